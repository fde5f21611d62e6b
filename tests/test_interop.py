"""diffusers' names: they translate without loss, and its network and ours are the same one. Results find a place."""

import json

import pytest
import torch
from tiny_foreign import inputs, network

from dit import interop
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


def test_only_an_earlier_result_of_the_same_command_makes_place(tmp_path, monkeypatch):
    def require(output):
        interop.require_place(output, "sub/told.json", {"a", "b"}, {"sub", "more"})

    monkeypatch.chdir(tmp_path)
    ours, told = tmp_path / "ours", tmp_path / "ours" / "sub" / "told.json"
    require(ours)
    told.parent.mkdir(parents=True)
    for content in ("{", "[]", json.dumps({"a": 1})):
        told.write_text(content)
        with pytest.raises(ValueError, match="ours is there and holds something else: choose another --output"):
            require(ours)
    told.write_text(json.dumps({"a": 1, "b": 2}))
    require(ours)
    with interop.beside(ours) as folder:
        (folder / "new").touch()
    assert [file.name for file in tmp_path.rglob("*")] == ["ours", "new"]
    told.parent.mkdir()
    told.write_text(json.dumps({"a": 1, "b": 2}))
    with pytest.raises(ValueError, match="holds something else"):  # the file `new`, which would be lost
        require(ours)
    with pytest.raises(ValueError, match="cannot be made: .*told.json is no folder"):
        require(told / "x")
    with pytest.raises(ValueError, match="artifacts/new belongs to the pipeline"):
        require(tmp_path / "artifacts" / "new")
