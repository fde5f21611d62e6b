"""Other people's files are read without running them, and what they say wrongly is one line."""

import argparse
import os
import pickle

import numpy as np
import pytest
import torch
from tiny_foreign import network

from dit.foreign import Settings, read_json
from dit.importing import read


class Malice:
    """What a pickle can do: run anything when it is opened."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


@pytest.mark.parametrize("how", ["torch", "plain pickle", "in the arguments"])
def test_a_pickle_that_would_run_something_is_refused_unrun(tmp_path, how):
    file, proof = tmp_path / "DiT.pt", tmp_path / "it-ran"
    state = network().state_dict()
    if how == "torch":
        torch.save({"ema": state, "opt": Malice(proof)}, file)
    elif how == "in the arguments":
        torch.save({"ema": state, "args": argparse.Namespace(model="DiT-S/2", image_size=Malice(proof))}, file)
    else:
        file.write_bytes(pickle.dumps(Malice(proof), protocol=2))
    with pytest.raises(ValueError, match=r"holds more than tensors and plain values \((posix|nt)\.system\)") as caught:
        read(file)
    assert not proof.exists() and "\n" not in str(caught.value)
    if how == "torch":  # the test's own trap works
        torch.load(file, weights_only=False)
        assert proof.exists()


def test_numpys_numbers_are_refused_with_the_way_out(tmp_path):
    torch.save({"ema": network().state_dict(), "best": np.float64(3)}, tmp_path / "DiT.pt")
    with pytest.raises(ValueError, match=r"numpy\S+ refused.* if it is yours, save it again with Python's numbers"):
        read(tmp_path / "DiT.pt")


def test_torn_and_other_files_are_one_line(tmp_path):
    whole = tmp_path / "whole.pt"
    torch.save(network().state_dict(), whole)
    content = whole.read_bytes()
    cases = {"half.pt": content[: len(content) // 2], "empty.pt": b"", "text.pt": b"hello", "half.safetensors": b"\1\2"}
    for name, some in cases.items():
        (tmp_path / name).write_bytes(some)
        with pytest.raises(ValueError, match="torn") as caught:
            read(tmp_path / name)
        assert "\n" not in str(caught.value), name
    torch.save({"x": torch.ones(1)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="is no DiT or SiT: x_embedder.proj.weight"):
        read(tmp_path / "other.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="holds no state dict"):
        read(tmp_path / "list.pt")
    with pytest.raises(ValueError, match="is not there"):
        read(tmp_path / "nosuch.pt")


BIAS = "t_embedder.mlp.0.bias"


@pytest.mark.parametrize(
    "content,message",
    [
        (lambda s: {**s, 3: torch.ones(1)}, "holds no state dict: 3 is no tensor with a name"),
        (lambda s: {"state_dict": s}, "holds no state dict: 'state_dict' is no tensor with a name"),
        (lambda s: {}, "holds no state dict"),
        (lambda s: {"ema": {**s, "decay": 0.9}}, "holds no state dict: 'decay' is no tensor with a name .float"),
        (lambda s: {**s, BIAS: s[BIAS].to_sparse()}, BIAS + " is no plain tensor of floats .torch.float32, torch.sparse"),
        (lambda s: {**s, BIAS: s[BIAS].to(torch.complex64)}, BIAS + " is no plain tensor of floats"),
        (lambda s: {**s, BIAS: s[BIAS].to("meta")}, BIAS + " is no plain tensor of floats .*on meta"),
        (lambda s: {**s, BIAS: s[BIAS].to(torch.int8)}, BIAS + " is no plain tensor of floats"),
        (lambda s: {**s, "module." + BIAS: s[BIAS]}, BIAS + " is there twice"),
        (lambda s: {**s, "x_embedder.proj.weight": torch.tensor(1.0)}, r"x_embedder.proj.weight is \(\), and must have 4 sides"),
        (lambda s: {"ema": s, "args": {"num_classes": "3"}}, r"args\.num_classes must be a whole number, got '3'"),
    ],
)  # fmt: skip
def test_what_is_no_plain_tensor_is_one_line_with_file_and_name(tmp_path, content, message):
    torch.save(content(network().state_dict()), tmp_path / "DiT.pt")
    with pytest.raises(ValueError, match=message) as caught:
        read(tmp_path / "DiT.pt")
    assert str(tmp_path / "DiT.pt") in str(caught.value) and "\n" not in str(caught.value)


def test_the_average_is_found_among_whatever_else_a_training_wrote(tmp_path):
    state = network().state_dict()
    beside = {"step": torch.tensor(3), "args": None, "opt": {}}
    torch.save({**beside, "model": state, "ema": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "whole.pt")
    torch.save({**beside, "model": state, "ema": None}, tmp_path / "raw.pt")
    for name, weights in {"whole": "ema", "raw": "raw"}.items():
        found = read(tmp_path / f"{name}.pt")
        assert found.weights == weights and found.tensors.keys() == state.keys()
        assert any("no averaged weights" in line for line in found.said) == (weights == "raw")


def test_settings_have_the_type_that_is_expected(tmp_path):
    told = Settings("f.json: ", {"count": 3, "yes": True, "none": None, "part": {"list": [1, 2.5], "bad": [1, "x"]}})
    assert told.get("count", int, above=0) == told.get("count", float) == 3 and told.get("none", int, None) is None
    assert told.get("missing", str, "default") == "default" and told.within("part").each("list", float) == [1, 2.5]
    for wrong, message in {
        lambda: told.get("missing", str): "missing is missing",
        lambda: told.get("yes", int): "yes must be a whole number, got True",
        lambda: told.get("none", int, 3): "none must be a whole number, got None",
        lambda: told.get("count", int, above=3): "count must be a whole number above 3, got 3",
        lambda: told.within("part").each("bad", float): "part.bad.1 must be a number, got 'x'",
        lambda: told.one_of("count", ("a", "b")): "count must be a line of text, got 3",
        lambda: Settings("f.json: ", {"a": "c"}).one_of("a", ("a", "b")): "a must be one of a, b, got 'c'",
        lambda: Settings("f.json: ", {"a": "c\nd"}).get("a", str): "a must be a line of text, got 'c\\nd'",
        lambda: Settings("f.json: ", {"a": float("nan")}).get("a", float): "a must be a number, got nan",
    }.items():
        with pytest.raises(ValueError) as caught:
            wrong()
        assert str(caught.value) == f"f.json: {message}"
    for content, message in {
        "{": "is missing or torn",
        "[" * 100_000: "is missing or torn",
        "[1]": "holds no settings",
    }.items():
        (tmp_path / "f.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            read_json(tmp_path / "f.json")
