import json
import pickle
import shutil

import pytest
import torch

from dit.parallel import World
from dit.saving import Saver
from dit.states import TrainingState, latest_state, stem

VALUES = {"rows": [[5, 0.1 + 0.2, 1e-4]], "inf": float("inf"), "name": "ü"}


def tensors(step):
    torch.manual_seed(step)
    return {
        "model.a": torch.randn(5, 3),
        "model.b": torch.randn(4).to(torch.bfloat16),
        "ema.a": torch.randn(5, 3),
        "count": torch.tensor(step),
        "pending": torch.zeros(0, 6),
    }


def saved(folder, *steps, keep=9):
    saver = Saver(folder, keep)
    for step in steps:
        saver.save(TrainingState(step, tensors(step), VALUES))
    saver.wait()
    return saver.last


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "abc"


def test_the_newest_is_found_with_every_bit(folder):
    saved(folder, 5, 10)
    found = latest_state(folder)
    assert found.step == 10 and found.values == VALUES and found.path == folder / "step-00000010.safetensors"
    assert same(found.read(), tensors(10))
    assert same(found.read("model."), {name: tensors(10)[f"model.{name}"] for name in "ab"})
    again = {name: torch.full_like(tensor, 7) for name, tensor in tensors(10).items()}
    weight = again["model.a"].requires_grad_()
    pickle.loads(pickle.dumps(found)).load_into(again)
    assert same(again, tensors(10)) and again["model.a"] is weight
    assert latest_state(folder / "nowhere") is None
    assert latest_state(folder, World(0, 1)) == found


@pytest.mark.parametrize(
    "harm, told",
    [
        ("truncate", "step-00000010.safetensors is torn (its content is not what was written)"),
        ("flip", "step-00000010.safetensors is torn (its content is not what was written)"),
        ("remove", "step-00000010.safetensors is torn (No such file or directory)"),
        ("empty", "step-00000010.json is torn, or no state's"),
        ("list", "step-00000010.json is torn, or no state's"),
        ("half", "step-00000010.json is torn, or no state's"),
        ("format", "step-00000010.json is of another format than dit-state/1"),
        ("renamed", "step-00000010.json is of another format than dit-state/1, or of another step"),
        ("outside", "step-00000010.json is of another format than dit-state/1"),
        ("foreign", "step-00000010.json is of another training (xyz)"),
    ],
)
def test_what_is_torn_or_foreign_is_named_and_passed_over(folder, capsys, harm, told):
    saved(folder, 5, 10)
    file, sidecar = folder / "step-00000010.safetensors", folder / "step-00000010.json"
    content, text = file.read_bytes(), sidecar.read_text()
    if harm == "truncate":
        file.write_bytes(content[:-3])
    elif harm == "flip":
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif harm == "remove":
        file.unlink()
    elif harm == "renamed":
        for ending in ("json", "safetensors"):
            shutil.copy(folder / f"step-00000005.{ending}", folder / f"step-00000010.{ending}")
    elif harm == "foreign":
        saved(folder.parent / "xyz", 10)
        for ending in ("json", "safetensors"):
            shutil.copy(folder.parent / "xyz" / f"step-00000010.{ending}", folder)
    else:
        outside = json.dumps(json.loads(text) | {"files": {"../step-00000005.safetensors": "0"}})
        harmed = {"empty": "", "list": "[]", "half": text[: len(text) // 2], "outside": outside}
        sidecar.write_text(harmed.get(harm, text.replace("dit-state/1", "dit-state/9")))
    assert latest_state(folder).step == 5
    said = capsys.readouterr().out
    assert told in said and said.count("\n") == 1 and "passed over for the state before it" in said


def test_a_state_counts_once_its_sidecar_is_there(folder):
    saved(folder, 5)
    shutil.copy(folder / "step-00000005.safetensors", folder / "step-00000009.safetensors")
    (folder / "step-last.json").write_text("{}")
    assert latest_state(folder).step == 5


def test_a_training_that_was_set_aside_keeps_its_states(folder):
    saved(folder, 5)
    assert latest_state(folder.rename(folder.with_name("abc.1"))).step == 5


@pytest.mark.parametrize(
    "name, tensor, told",
    [
        ("model.c", torch.zeros(5, 3), "model.c should be (5, 3) float32 and is not there"),
        ("model.a", torch.zeros(3, 5), "model.a should be (3, 5) float32 and is (5, 3) float32"),
        ("model.a", torch.zeros(5, 3).half(), "model.a should be (5, 3) float16 and is (5, 3) float32"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_changed(folder, name, tensor, told):
    wanted = {"ema.a": torch.zeros(5, 3), name: tensor}
    with pytest.raises(ValueError, match="does not fit this training: ") as error:
        saved(folder, 5).load_into(wanted)
    assert str(error.value).endswith(told) and not wanted["ema.a"].any()


def test_names_sort_as_steps_do():
    assert [stem(step) for step in (400, 12345678, 123456789)] == ["step-00000400", "step-12345678", "step-123456789"]
