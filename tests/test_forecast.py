"""flows/forecast.py: what the preflight is asked, from what a pool gives; and xl2 on a cluster, from a laptop."""

import json
import re
from pathlib import Path

import pytest

from dit import expectations, preflight
from dit.check import STAGES, stage_functions
from dit.config import check_sections
from dit.expectations import Machine
from dit.paths import Paths
from dit.presets import resolve
from dit.retraining import RetrainConfig
from flows.forecast import of_devices
from flows.placement import Devices, given_by

ROOT = Path(__file__).parents[1]
LAPTOP = Machine("cpu", "one of 2 CPU threads", int(25e9), 96e9)


@pytest.mark.parametrize(
    ("device", "processes", "asked"),
    [
        (None, 4, {}),  # this machine, which the preflight looks at itself
        (Devices("H100", 8), 0, {"device": "H100", "devices": 8}),
        (Devices("H100", 8), 4, {"device": "H100", "devices": 4}),
        (Devices("H100", 8), 16, {"device": "H100", "devices": 8}),  # too many, which the preflight says
        (Devices("H100", None), 4, {"device": "H100", "devices": None}),
        (Devices("H100", 16, hosts=2), 4, {"device": "H100", "devices": 16}),
        (Devices(None, 16, hosts=2), 0, {"device": None, "devices": 16, "elsewhere": True}),
    ],
)
def test_what_a_pool_gives_is_what_the_preflight_is_asked(device, processes, asked):
    assert of_devices(device, {"processes": processes}) == asked


def xl2(tmp_path, monkeypatch, **asked):
    """The preflight of preset xl2 with images that are there, on a machine without an accelerator."""
    monkeypatch.setattr(expectations, "look", lambda wanted="auto": LAPTOP)
    (tmp_path / "artifacts" / "reference").mkdir(parents=True, exist_ok=True)  # else Inception's address is tried
    params = resolve("xl2", ROOT / "presets")
    params["data"]["source"] = "digits"
    sections = check_sections(stage_functions(), params, optional={"retrain": RetrainConfig})
    todo = [name for name in STAGES if name != "vae"]  # which would ask the hub
    return preflight.preflight(sections, Paths(tmp_path), **{"stale": todo, "push": False, "elsewhere": True} | asked)


@pytest.mark.parametrize(
    ("pool", "told"),
    [("kubernetes-gpu", "on 1 x H100"), ("kubernetes-tpu", "on 4 x TPU v6e"), ("kubernetes-cpu", "is not known")],
)
def test_xl2_passes_for_a_cluster_from_a_machine_without_an_accelerator(tmp_path, monkeypatch, pool, told):
    here = xl2(tmp_path, monkeypatch, elsewhere=False)
    assert any(re.match(r"no accelerator, and the work takes about \d+ years on", fault) for fault in here.faults)
    template = json.loads((ROOT / "infra" / "work_pools" / f"{pool}.json").read_text())
    asked = of_devices(given_by(template, ROOT), {"processes": 0})
    found = xl2(tmp_path, monkeypatch, **asked)
    assert found.faults == [] and told in found.line and "CPU" not in found.line
    assert (found.price_usd is None) == (pool == "kubernetes-cpu")


def test_a_pool_of_eight_is_timed_and_priced_as_eight(tmp_path, monkeypatch):
    one, eight = (
        xl2(tmp_path, monkeypatch, **of_devices(Devices("H100", count), {"processes": 0})) for count in (1, 8)
    )
    assert eight.hours == pytest.approx(one.hours / 8, rel=0.01) and "on 8 x H100" in eight.line
    assert eight.price_usd == pytest.approx(one.price_usd, rel=0.01)
