"""dvc.yaml tells the truth: its params, deps and outs are those of the stages' signatures and imports."""

from pathlib import Path

import pytest
from test_architecture import FLOOR, ROOT, dit_modules

from dit.check import OPTIONAL, STAGES, stage_functions
from dit.config import read_params, sections_of
from dit.presets import names, resolve

PLAN = read_params(ROOT / "dvc.yaml")["stages"]


def closure(stage: str) -> set[str]:
    """The stage's own file, and the floor 0 and 1 modules that it reaches; doors carry and do not change."""
    start = ROOT / "dit" / "stages" / f"{stage}.py"
    found, todo = {start}, [start]
    while todo:
        for name in dit_modules(todo.pop()):
            file = ROOT / "dit" / f"{name}.py"
            if FLOOR[name] < 2 and file not in found:
                found.add(file)
                todo.append(file)
    return {file.relative_to(ROOT).as_posix() for file in found}


def outs(stage: str) -> list[str]:
    return [out if isinstance(out, str) else next(iter(out)) for out in PLAN[stage]["outs"]]


def test_the_plan_has_exactly_the_stages():
    assert tuple(PLAN) == STAGES


@pytest.mark.parametrize("function", stage_functions(), ids=lambda function: function.__name__)
def test_params_equal_the_signature(function):
    listed = PLAN[function.__name__].get("params", [])
    assert set(listed) == set(sections_of(function)) - {"run"} and len(listed) == len(set(listed))


@pytest.mark.parametrize("stage", STAGES)
def test_code_deps_equal_the_import_closure(stage):
    listed = {dep for dep in PLAN[stage]["deps"] if dep.endswith(".py")}
    assert listed == closure(stage)


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_writes_its_own_folder_and_reads_only_what_is_made(stage):
    assert all(Path(out).parts[:2] == ("artifacts", stage) for out in outs(stage))
    data = [dep for dep in PLAN[stage]["deps"] if not dep.endswith(".py")]
    made = [out for other in STAGES[: STAGES.index(stage)] for out in outs(other)]
    for dep in data:
        assert any(Path(dep).is_relative_to(out) for out in made), f"{dep} is made by no earlier stage"
    text = (ROOT / "dit" / "stages" / f"{stage}.py").read_text()
    for dep in data:
        folder = Path(dep).parts[1]
        assert folder in text, f"{stage} lists {dep} and does not read it"


def test_what_must_not_make_training_stale():
    stale = set(PLAN["train"]["deps"])
    for free in ("sampling", "preview", "metrics", "features", "vae", "generation", "tracking", "entry", "config"):
        assert f"dit/{free}.py" not in stale
    for must in (
        "model",
        "trainer",
        "learner",
        "objective",
        "alignment",
        "ema",
        "latents",
        "diffusion",
        "transport",
        "randomness",
    ):
        assert f"dit/{must}.py" in stale
    assert not any("run" in stage.get("params", []) or "preset" in stage.get("params", []) for stage in PLAN.values())
    assert not any("run.json" in dep for stage in PLAN.values() for dep in stage["deps"])


def test_scan_and_register_always_run_and_scan_alone_keeps_its_history():
    assert {name for name, stage in PLAN.items() if stage.get("always_changed")} == {"scan", "register"}
    kept = {
        name
        for name, stage in PLAN.items()
        if any(isinstance(o, dict) and next(iter(o.values())).get("persist") for o in stage["outs"])
    }
    assert kept == {"scan"}


def test_every_preset_is_valid_and_params_hold_one_of_them():
    from dit.check import conflicts
    from dit.config import check_sections

    assert {"digits", "smoke", "xl2"} <= set(names(ROOT / "presets"))
    for name in [*names(ROOT / "presets"), str(ROOT / "tests" / "micro.yaml")]:
        sections = check_sections(stage_functions(), resolve(name, ROOT / "presets"), optional=OPTIONAL)
        assert list(conflicts(sections)) == [], name
    params = read_params(ROOT / "params.yaml")
    assert params == resolve(params["preset"], ROOT / "presets")


def test_the_full_size_preset_is_the_papers_model():
    sections = resolve("xl2", ROOT / "presets")
    assert sections["model"]["name"] == "DiT-XL/2" and sections["objective"]["name"] == "diffusion"
    assert sections["train"]["lr"] == 1e-4 and sections["train"]["global_batch_size"] == 256
    assert sections["data"]["num_classes"] == 1000 and sections["data"]["mirror"] is True
