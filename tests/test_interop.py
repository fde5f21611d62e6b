"""Other people's files are read without running them, and the names translate without loss."""

import argparse
import json
import os
import pickle

import pytest
import torch
from tiny_foreign import inputs, network

from dit import interop
from dit.checkpoint import save_tensors
from dit.vae import import_diffusers


@pytest.fixture(scope="module")
def diffusers_model():
    """make(ours) gives diffusers' own network with our weights."""
    import_diffusers()
    from diffusers import DiTTransformer2DModel

    def make(ours):
        config = ours.config
        theirs = DiTTransformer2DModel(
            num_attention_heads=config.num_heads,
            attention_head_dim=config.hidden_size // config.num_heads,
            in_channels=ours.in_channels,
            out_channels=ours.out_channels,
            num_layers=config.depth,
            sample_size=ours.input_size,
            patch_size=config.patch_size,
            num_embeds_ada_norm=ours.num_classes,
            norm_eps=1e-6,
        )
        theirs.load_state_dict(interop.to_diffusers(ours.state_dict(), config.depth), strict=True)
        return theirs.eval()

    return make


@pytest.mark.parametrize(
    "change",
    [{}, {"patch_size": 4, "num_heads": 4}, {"learn_sigma": False, "depth": 3}],
    ids=["patch 2", "patch 4", "no sigma"],
)
def test_our_network_equals_diffusers_own(diffusers_model, change):
    ours = network(num_classes=10, timestep_embedding="diffusers", **change)
    theirs = diffusers_model(ours)
    x, t, y = inputs(ours, num_images=6)
    with torch.no_grad():
        expected, found = theirs(x, timestep=t, class_labels=y).sample, ours(x, t, y)
        published = network(num_classes=10, **change)(x, t, y)
    scale = expected.abs().max()
    assert (found - expected).abs().max() < 2e-5 * scale
    assert (published - expected)[1:].abs().max() > 1e-2 * scale  # what the convention is worth on random weights


def test_the_shipped_module_equals_the_published_network(diffusers_model):
    ours = network(num_classes=10)
    stock = diffusers_model(ours)
    from dit.published_dit import PublishedDiT

    theirs = PublishedDiT.from_config(stock.config).eval()
    theirs.load_state_dict(stock.state_dict())
    x, t, y = inputs(ours)
    with torch.no_grad():
        expected = ours(x, t, y)
        assert (theirs(x, timestep=t, class_labels=y).sample - expected).abs().max() < 2e-5 * expected.abs().max()


def test_names_translate_there_and_back():
    tensors = {k: v for k, v in network().state_dict().items() if k != "pos_embed"}
    theirs = interop.to_diffusers(tensors, 2)
    back = interop.from_diffusers(theirs, 2)
    assert back.keys() == tensors.keys() and all(torch.equal(back[k], tensors[k]) for k in tensors)
    theirs["transformer_blocks.1.norm1.emb.timestep_embedder.linear_1.bias"] += 1
    with pytest.raises(ValueError, match="the blocks' timestep_embedder.linear_1.bias differ"):
        interop.from_diffusers(theirs, 2)


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
        interop.read(file)
    assert not proof.exists() and "\n" not in str(caught.value)
    if how == "torch":  # the test's own trap works
        torch.load(file, weights_only=False)
        assert proof.exists()


def test_torn_and_other_files_are_one_line(tmp_path):
    whole = tmp_path / "whole.pt"
    torch.save(network().state_dict(), whole)
    content = whole.read_bytes()
    cases = {"half.pt": content[: len(content) // 2], "empty.pt": b"", "text.pt": b"hello", "half.safetensors": b"\1\2"}
    for name, some in cases.items():
        (tmp_path / name).write_bytes(some)
        with pytest.raises(ValueError, match="torn") as caught:
            interop.read(tmp_path / name)
        assert "\n" not in str(caught.value), name
    torch.save({"x": torch.ones(1)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="is no DiT or SiT: x_embedder.proj.weight"):
        interop.read(tmp_path / "other.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="holds no state dict"):
        interop.read(tmp_path / "list.pt")
    with pytest.raises(ValueError, match="is not there"):
        interop.read(tmp_path / "nosuch.pt")


def write_transformer(folder, ours, **config):
    """A DiTTransformer2DModel's folder, as `save_pretrained` leaves it."""
    save_tensors(folder / f"{interop.WEIGHTS}.safetensors", interop.to_diffusers(ours.state_dict(), ours.config.depth))
    told = {"num_attention_heads": 2, "num_layers": ours.config.depth, "sample_size": 8, "norm_type": "ada_norm_zero"}
    (folder / "config.json").write_text(json.dumps({**told, **config}))


def test_a_folder_of_diffusers_follows_its_convention_unless_it_is_the_published_weights(tmp_path):
    for name, expected in {"mine": "diffusers", "DiT-XL-2-256": "published"}.items():
        (tmp_path / name).mkdir()
        write_transformer(tmp_path / name, network())
        found = interop.read(tmp_path / name)
        assert found.timestep_embedding == expected and found.num_classes == 3 and found.input_size == 8
        assert any(line.startswith(f"timestep embedding: {expected}, since") for line in found.said)
        assert any("norm_eps is 1e-05" in line for line in found.said)


def test_a_pickled_folder_and_a_sharded_one_hold_the_same(tmp_path):
    ours = network()
    write_transformer(tmp_path, ours)
    file = tmp_path / f"{interop.WEIGHTS}.safetensors"
    first = interop.read(tmp_path).tensors
    theirs = interop.to_diffusers(ours.state_dict(), 2)
    file.unlink()
    torch.save(theirs, tmp_path / f"{interop.WEIGHTS}.bin")
    pickled = interop.read(tmp_path).tensors
    names, where = sorted(theirs), {}
    for i, part in enumerate((names[::2], names[1::2])):
        save_tensors(tmp_path / f"part-{i}.safetensors", {name: theirs[name] for name in part})
        where |= dict.fromkeys(part, f"part-{i}.safetensors")
    (tmp_path / f"{interop.WEIGHTS}.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    sharded = interop.read(tmp_path).tensors
    assert first.keys() == pickled.keys() == sharded.keys()
    assert all(torch.equal(first[k], pickled[k]) and torch.equal(first[k], sharded[k]) for k in first)


def test_a_folder_that_lacks_something_is_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json is missing or torn"):
        interop.read(tmp_path)
    write_transformer(tmp_path, network(), norm_type="layer_norm")
    with pytest.raises(ValueError, match="is not of a DiTTransformer2DModel"):
        interop.read(tmp_path)
    write_transformer(tmp_path, network(), num_layers=3)
    with pytest.raises(ValueError, match=r"no whole DiTTransformer2DModel: transformer_blocks\.2\S+ is missing"):
        interop.read(tmp_path)
    (tmp_path / f"{interop.WEIGHTS}.safetensors").unlink()
    with pytest.raises(ValueError, match="holds no weights"):
        interop.read(tmp_path)
