"""What a run will do and cost, in a line, and what it is refused for."""

import json
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import checkout
import pytest

from dit import expectations, preflight
from dit.check import STAGES, check
from dit.cli import main
from dit.estimate import Device
from dit.expectations import Machine
from dit.paths import Paths
from dit.preflight import Preflight, ask, checked, refuse
from dit.presets import override

ROOT = Path(__file__).parents[1]
CPU = Machine("cpu", "one of 2 CPU threads", int(25e9), 96e9)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A git repository with the settings of preset digits, on a machine that is always as fast."""
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    monkeypatch.setattr(expectations, "look", lambda wanted="auto": CPU)
    return tmp_path


def told(project, *settings, **options):
    if settings:
        override(project / "params.yaml", list(settings))
    sections = check(Paths(project), files=False)
    return preflight.preflight(sections, Paths(project), **{"stale": STAGES, "push": False, **options})


def test_one_line_says_what_a_run_will_do(project):
    everything = told(project)
    assert everything.faults == everything.warnings == [] and everything.stages == list(STAGES)
    assert everything.line.startswith("11 of 11 stages to run: 1,797 images, 2,400 steps of 64, about 2m")
    assert " on one of 2 CPU threads (train 1m" in everything.line and everything.line.endswith("25 GB of memory")
    assert "\n" not in everything.line and everything.price_usd is None
    assert everything.hours == pytest.approx(sum(everything.hours_of.values())) and everything.steps == 2400
    unknown = told(project, stale=None)
    assert "DVC can't say" in unknown.line and unknown.hours == pytest.approx(everything.hours)


def test_what_is_not_stale_counts_nothing(project):
    everything = told(project)
    few = told(project, stale=["scan", "sample", "evaluate", "register", "report"])
    assert few.line.startswith("5 of 11 stages to run (scan, sample, evaluate, register, report): 1,797 images, about ")
    assert few.steps == 0 and set(few.hours_of) == set(few.stages) and few.hours < everything.hours / 3
    nothing = told(project, stale=["scan", "register"])
    assert nothing.line == "nothing is stale: only what always runs will (scan, register); 1,797 images"
    assert nothing.memory_bytes == 0 and nothing.hours < 10 / 3600


def test_price_is_that_of_what_the_accelerator_does(project):
    own = Device("own", 1e12, 10e9, 3.6)
    one, eight = (told(project, device=own, devices=count) for count in (1, 8))
    working = sum(one.hours_of[name] for name in ("vae", "encode", "reference", "train", "sample", "evaluate"))
    assert one.price_usd == pytest.approx(3.6 * working) and "US$" in one.line and "on 1 x own" in one.line
    assert eight.hours < one.hours < one.price_usd < eight.price_usd and "on 8 x own" in eight.line  # vae takes one
    assert eight.hours_of["train"] < one.hours_of["train"] / 4 and eight.warnings == []
    assert "at 3.00 an hour" in told(project, device="NVIDIA H100 80GB HBM3").line
    with pytest.raises(ValueError, match="device 'K80' is not in the table"):
        told(project, device="K80")


def test_months_without_an_accelerator_are_refused(project):
    (fault,) = told(project, "train.max_steps=40000000").faults
    assert re.fullmatch(r"no accelerator, and the work takes about \d\dd\d\dh on one of .* smaller preset", fault)
    assert re.search(r"about \d\d years on", told(project, "train.max_steps=40000000000").faults[0])
    override(project / "params.yaml", ["train.max_steps=40000000"])
    assert told(project, device="H100").faults == []
    days = told(project, "train.max_steps=4000000")
    assert days.faults == [] and "no accelerator" in days.warnings[0]
    assert told(project, "train.max_steps=40000000", stale=["scan", "ema"]).faults == []  # it is trained already


def test_more_than_the_memory_is_refused_with_what_would_fit(project):
    small = Device("small", 1e14, 400e6, 1.0)
    assert told(project, device=small).faults == []
    (fault,) = told(project, "model.hidden_size=256", "train.global_batch_size=4096", device=small).faults
    most = int(fault.rpartition(" to ")[2].split()[0])
    assert fault.startswith("train: 4096 images at a time take ") and "small has 0.4 GB" in fault and most > 8
    fitting = told(project, f"run.device_batch_size={most}", device=small)
    assert fitting.faults == [] and fitting.memory_bytes < 400e6
    assert any("small has" in fault for fault in told(project, "run.device_batch_size=4000", device=small).faults)
    tiny = replace(small, memory_bytes=20e6)
    assert "take a smaller model or a larger device" in told(project, device=tiny).faults[0]
    (drawing,) = told(project, "sample.block_images=1000", device=tiny, stale=["sample"]).faults
    assert drawing.startswith("sample.block_images: 1000 at a time take ")


def test_each_device_takes_its_share_of_the_batch(project):
    small = Device("small", 1e14, 400e6, 1.0)
    alone = told(project, "model.hidden_size=256", "train.global_batch_size=4096", device=small)
    assert alone.faults and told(project, device=small, devices=512).faults == []


@pytest.mark.parametrize(("processes", "used"), [(0, 8), (4, 4)])
def test_all_accelerators_of_this_machine_are_counted(project, monkeypatch, processes, used):
    override(project / "params.yaml", [f"run.processes={processes}"])
    monkeypatch.setattr("dit.runtime.accelerators", lambda wanted: ("cuda", 8))
    assert preflight.checked(Paths(project), stale=list(STAGES), push=False).devices == used
    named = preflight.checked(Paths(project), stale=list(STAGES), push=False, device="H100")
    assert named.devices == (processes or 1) and named.faults == []


@pytest.mark.parametrize("way", ["ddp", "auto", "fsdp"])
def test_what_devices_share_needs_no_room_on_each(project, way):
    """5 million weights, gradients, moments and averages: 101 MB on each of them, or an eighth and what is gathered."""
    small = Device("small", 1e14, 60e6, 1.0)
    settings = ["model.hidden_size=256", "train.global_batch_size=8", "sample.block_images=8", f"run.parallel={way}"]
    assert told(project, *settings, device=small).faults[0].endswith("take a smaller model or a larger device")
    eight = told(project, device=small, devices=8)
    if way == "ddp":
        (fault,) = eight.faults
        assert fault.endswith("set run.parallel to fsdp, for the 8 devices to share what each holds now")
    else:
        assert eight.faults == eight.warnings == [] and eight.memory_bytes < 0.9 * 60e6
    large = replace(small, memory_bytes=10e9)  # of room enough, auto makes no use
    shared = told(project, device=large, devices=8).memory_bytes == eight.memory_bytes
    assert shared == (way != "auto")


def test_a_batch_that_the_devices_cannot_share_is_refused(project):
    (fault,) = told(project, device="H100", devices=3).faults
    assert fault == (
        "train.global_batch_size: 64 images are no whole number for each of 3 devices: "
        "set it to 63 or 66, or take 2 of them (run.processes)"
    )
    (fault,) = told(project, device="H100", devices=96).faults
    assert "set it to 96, or take 64 of them" in fault
    assert told(project, device="H100", devices=3, stale=["sample"]).faults == []  # it is trained already
    assert told(project, device=None, devices=3, elsewhere=True).faults[0].startswith("train.global_batch_size: 64")
    (fault,) = told(project, "run.processes=8", device="H100", devices=4).faults
    assert fault == "run.processes: 8 are more than the 4 devices: set 0, for all of them"


def test_this_machines_three_devices_are_found_out_too(project, monkeypatch):
    monkeypatch.setattr("dit.runtime.accelerators", lambda wanted: ("cuda", 3))
    found = checked(Paths(project), stale=list(STAGES), push=False)
    assert found.devices == 3 and "for each of 3 devices" in found.faults[0]


def test_what_nobody_knows_of_another_machine_is_not_judged(project):
    huge = ["train.max_steps=400000000", "model.hidden_size=4096"]
    assert len([fault for fault in told(project, *huge).faults if "CPU" in fault or "this machine" in fault]) == 2
    unknown = told(project, "run.device=cuda", elsewhere=True)
    assert unknown.faults == unknown.warnings == [] and "CPU" not in unknown.line and unknown.device == ""
    assert unknown.line.endswith("which device it will run on is not known, so time, price and memory are not judged")
    assert (unknown.hours, unknown.price_usd) == (None, None) and "GB of a device's memory, " in unknown.line
    assert checked(Paths(project), stale=list(STAGES), push=False, elsewhere=True).line == unknown.line


def test_a_chip_that_torch_has_no_name_for_is_called_as_its_pool_does(project, monkeypatch):
    monkeypatch.setattr(expectations, "look", lambda wanted="auto": Machine("tpu", "tpu", int(100e9), None))
    nameless = told(project)
    assert nameless.hours is None and "how long on 1 x tpu is not known" in nameless.line
    monkeypatch.setenv("DIT_DEVICE", "TPU v6e")
    assert "of its 32 GB" in told(project).line and told(project).price_usd > 0
    monkeypatch.setattr(expectations, "look", lambda wanted="auto": Machine("cuda", "NVIDIA L40S", int(48e9), None))
    assert "how long on 1 x NVIDIA L40S is not known" in told(project).line  # which is none of the table's
    monkeypatch.setattr(expectations, "look", lambda wanted="auto": CPU)
    assert "CPU" in told(project).line


def test_latents_take_memory_only_where_they_lie_there(project, monkeypatch):
    monkeypatch.setattr(preflight.reach, "source", lambda data, paths, faults: (200_000_000, "200,000,000 images"))
    options = {"stale": ["train"]}
    faults = {
        how: " ".join(told(project, f"run.latents={how}", **options).faults) for how in ("memory", "mapped", "auto")
    }
    assert "at a time take" in faults["memory"] and "at a time take" not in faults["mapped"] + faults["auto"]


def test_what_is_missing_is_refused_unless_anyway(project):
    missing = told(project, "data.source=nowhere", "train.init_from=weights/none", "reference.extractor=inception",
                   "reference.weights=none.pth", "register.metric=fid")  # fmt: skip
    assert ["reference.weights", "train.init_from", "data.source"] == [
        fault.partition(":")[0].partition(" ")[0] for fault in missing.faults
    ]
    with pytest.raises(ValueError) as caught:
        refuse(missing)
    assert str(caught.value).splitlines() == [*missing.faults, preflight.HOW_ANYWAY]
    refuse(missing, anyway=True)
    elsewhere = told(
        project, device="H100", elsewhere=True
    )  # another machine may have the weights, but no other source
    assert [*elsewhere.warnings, *elsewhere.faults] == missing.faults and len(elsewhere.faults) == 1
    refuse(told(project, "data.source=digits", "train.init_from=null", "reference.weights=null",
                "reference.extractor=classifier"))  # fmt: skip


def test_a_device_that_the_machine_lacks_is_a_fault(project, monkeypatch):
    def look(wanted="auto"):
        if wanted == "cuda":
            raise ValueError("run.device: this machine has no 'cuda': use auto or cpu")
        return CPU

    monkeypatch.setattr(expectations, "look", look)
    assert told(project, "run.device=cuda").faults == ["run.device: this machine has no 'cuda': use auto or cpu"]
    assert told(project, device="H100").faults == []  # the work is done elsewhere
    assert "2 CPU threads" in told(project, "run.num_threads=2", "run.device=auto").line


def test_of_a_record_by_other_code_what_is_known_is_read():
    mine = Preflight("line", ["fault"], [], ["train"], images=3, hours=1.5)
    assert Preflight.load(mine.dump()) == mine
    newer = json.loads(mine.dump()) | {"colour": "red"}
    older = {"line": "line", "faults": [], "warnings": []}
    assert Preflight.load(json.dumps(newer)) == mine and Preflight.load(json.dumps(older)).hours is None


def test_wrong_settings_are_no_preflight(project):
    with pytest.raises(ValueError, match="--stale: no stage trian: choose among scan"):
        checked(Paths(project), stale=["trian"])
    with pytest.raises(ValueError, match="--devices must be at least 1, got 0"):
        checked(Paths(project), devices=0)


def test_a_checkout_is_asked_by_its_own_code(tmp_path):
    folder = checkout.make(tmp_path)
    asked = ask(folder, device="L4", devices=2, stale=["train", "sample"])
    assert asked.stages == ["train", "sample"] and asked.line.startswith("2 of 11 stages to run (train, sample): 1,797")
    assert asked.device == "L4" and asked.price_usd > 0 and asked.faults == []
    assert json.loads((folder / "scratch/preflight.json").read_text()) == json.loads(asked.dump())
    override(folder / "params.yaml", ["data.held_out_fraction=0", "sample.num_images=2"])
    with pytest.raises(ValueError) as caught:
        ask(folder, stale=[])
    assert [line.partition(":")[0] for line in str(caught.value).splitlines()] == [
        "data.held_out_fraction",
        "sample.num_images",
    ]


def test_a_person_is_told_and_refused(project, monkeypatch, capsys):
    monkeypatch.chdir(project)
    monkeypatch.delenv("DVC_STAGE", raising=False)
    assert main(["check", "--stale", "ema,report"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("2 of 11 stages to run (ema, report): 1,797 images, about 8s on ") and err == ""
    override(project / "params.yaml", ["data.source=nowhere"])
    assert main(["check", "--stale", "train", "--device", "L4"]) == 2
    out, err = capsys.readouterr()
    assert out.count("\n") == 1 and "images out of reach" in out and "on 1 x L4" in out
    first, last = err.splitlines()
    assert first.startswith("dit: data.source: the folder 'nowhere'") and last.endswith(preflight.HOW_ANYWAY)
    assert main(["check", "--stale", "train", "--anyway"]) == 0
    assert capsys.readouterr().err == f"{first}\n"
    assert main(["check", "--json", "--stale", ""]) == 0
    assert len(Preflight.load(capsys.readouterr().out).faults) == 1  # whoever asked decides
    override(project / "params.yaml", ["data.held_out_fraction=0"])
    assert main(["check", "--stale", "", "--anyway"]) == 2  # no settings to work with


def test_inside_a_command_of_dvc_nothing_is_told(project, monkeypatch, capsys):
    monkeypatch.chdir(project)
    monkeypatch.setenv("DVC_STAGE", "scan")
    assert main(["check"]) == 0 and capsys.readouterr() == ("", "")
    override(project / "params.yaml", ["train.init_from=weights/none"])
    assert main(["check"]) == 2
    monkeypatch.setenv("DIT_ANYWAY", "1")
    assert main(["check"]) == 0
