import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit import torchvision_cpu
from dit.embedders import unpatchify
from dit.model import DiT, ModelConfig

# Parameters at 256 pixels (latent side 32, 4 channels, 1000 classes), the fixed position table included.
PUBLISHED_PARAMETERS = {
    "DiT-S/2": 32_963_360,
    "DiT-S/4": 32_945_024,
    "DiT-S/8": 33_148_160,
    "DiT-B/2": 130_512_416,
    "DiT-B/4": 130_475_648,
    "DiT-B/8": 130_881_536,
    "DiT-L/2": 458_102_816,
    "DiT-L/4": 458_053_760,
    "DiT-L/8": 458_594_816,
    "DiT-XL/2": 675_129_632,
    "DiT-XL/4": 675_074_432,
    "DiT-XL/8": 675_683_072,
}


BLOCKS = ("adaln_zero", "adaln", "cross_attention", "in_context")


def tiny(patch_size=2, input_size=8, in_channels=4, num_classes=3, condition_shape=None, **sizes):
    config = ModelConfig("custom", patch_size, **{"hidden_size": 32, "depth": 2, "num_heads": 4, **sizes})
    return DiT(
        config,
        input_size=input_size,
        in_channels=in_channels,
        num_classes=num_classes,
        condition_shape=condition_shape,
    )


def randomized(network):
    torch.manual_seed(0)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return network.eval()


@pytest.mark.parametrize("name", PUBLISHED_PARAMETERS)
def test_parameter_count_equals_the_published_one(name):
    with torch.device("meta"):
        network = DiT(ModelConfig(name), input_size=32, in_channels=4, num_classes=1000)
    assert sum(tensor.numel() for tensor in network.state_dict().values()) == PUBLISHED_PARAMETERS[name]


@pytest.mark.parametrize("patches", ["p2", "p4"])
def test_forward_equals_the_reference(golden_network, patches):
    network, tensors = golden_network(f"dit_forward_{patches}")
    with torch.no_grad():
        torch.testing.assert_close(
            network(tensors["in.x"], tensors["in.t"], tensors["in.y"]), tensors["out.forward"], atol=2e-5, rtol=1e-5
        )
        torch.testing.assert_close(
            network(tensors["in.x"], tensors["in.t_frac"], tensors["in.y"]),
            tensors["out.forward_t_frac"],
            atol=2e-5,
            rtol=1e-5,
        )


def test_gradients_equal_the_reference(golden_network):
    network, tensors = golden_network("dit_forward_p2")
    x = tensors["in.x"].clone().requires_grad_()
    (network(x, tensors["in.t"], tensors["in.y"]) * tensors["grad.w"]).sum().backward()
    expected = {"x": tensors["grad.x"]} | {
        key.removeprefix("grad.param."): value for key, value in tensors.items() if key.startswith("grad.param.")
    }
    actual = {"x": x.grad} | {name: parameter.grad for name, parameter in network.named_parameters()}
    assert len(expected) >= 7
    for name, gradient in expected.items():
        rows = actual[name][:: len(actual[name]) // len(gradient)]  # of the largest, every sixth is carried
        torch.testing.assert_close(rows, gradient, atol=1e-4 * gradient.abs().max().item(), rtol=0, msg=name)


@pytest.mark.parametrize("convention", ["published", "diffusers"])
def test_network_equals_diffusers_transformer(convention):
    """Another implementation on the same random weights, as it is; or with its timestep frequencies set to the
    published ones, by the network that has those."""
    torchvision_cpu.prepare()
    from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

    ours = randomized(tiny(num_classes=7, timestep_embedding=convention))
    theirs = DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=7,
        norm_eps=1e-6,
    ).eval()
    state, target = ours.state_dict(), {}
    for part in ("weight", "bias"):
        target[f"pos_embed.proj.{part}"] = state[f"x_embedder.proj.{part}"]
        target[f"proj_out_1.{part}"] = state[f"final_layer.adaLN_modulation.1.{part}"]
        target[f"proj_out_2.{part}"] = state[f"final_layer.linear.{part}"]
        for i in range(2):
            ours_i, theirs_i = f"blocks.{i}.", f"transformer_blocks.{i}."
            for name, chunk in zip("qkv", state[f"{ours_i}attn.qkv.{part}"].chunk(3), strict=True):
                target[f"{theirs_i}attn1.to_{name}.{part}"] = chunk
            for a, b in {
                "attn.proj": "attn1.to_out.0",
                "mlp.fc1": "ff.net.0.proj",
                "mlp.fc2": "ff.net.2",
                "adaLN_modulation.1": "norm1.linear",
            }.items():
                target[f"{theirs_i}{b}.{part}"] = state[f"{ours_i}{a}.{part}"]
            for a, b in {"mlp.0": "linear_1", "mlp.2": "linear_2"}.items():
                target[f"{theirs_i}norm1.emb.timestep_embedder.{b}.{part}"] = state[f"t_embedder.{a}.{part}"]
    for i in range(2):
        target[f"transformer_blocks.{i}.norm1.emb.class_embedder.embedding_table.weight"] = state[
            "y_embedder.embedding_table.weight"
        ]
    theirs.load_state_dict(target)
    if convention == "published":
        for block in theirs.transformer_blocks:
            block.norm1.emb.time_proj.downscale_freq_shift = 0
    x, t, y = torch.randn(3, 4, 8, 8), torch.tensor([0, 17, 999]), torch.tensor([0, 6, 7])
    with torch.no_grad():
        a, b = ours(x, t, y), theirs(x, timestep=t, class_labels=y).sample
    assert (a - b).abs().max() <= 2e-5 * b.abs().max()


def test_begins_by_predicting_nothing_and_with_the_documented_spread():
    torch.manual_seed(0)
    network = tiny(hidden_size=64)
    x = torch.randn(2, 4, 8, 8)
    assert torch.equal(network(x, torch.rand(2), torch.tensor([0, 3])), torch.zeros(2, 8, 8, 8))
    qkv = network.blocks[0].attn.qkv.weight
    assert qkv.abs().max().item() <= (6 / (4 * 64)) ** 0.5 and qkv.abs().max().item() > 0.95 * (6 / (4 * 64)) ** 0.5
    assert network.y_embedder.embedding_table.weight.std().item() == pytest.approx(0.02, rel=0.2)
    assert "pos_embed" in network.state_dict() and "pos_embed" not in dict(network.named_parameters())


@settings(max_examples=15, deadline=None)
@given(
    patch=st.sampled_from([1, 2, 4]),
    grid=st.integers(1, 4),
    channels=st.integers(1, 5),
    classes=st.integers(0, 4),
    sigma=st.booleans(),
)
def test_any_size_gives_the_shape_of_its_input(patch, grid, channels, classes, sigma):
    network = tiny(patch, patch * grid, channels, classes, learn_sigma=sigma)
    x = torch.randn(2, channels, patch * grid, patch * grid)
    out = network(x, torch.rand(2), torch.full((2,), network.null_label))
    assert out.shape == (2, channels * (1 + sigma), patch * grid, patch * grid)


@settings(max_examples=25, deadline=None)
@given(
    block=st.sampled_from(BLOCKS),
    condition=st.sampled_from(["classes", "none", "embeddings"]),
    norm=st.sampled_from(["layer", "rms"]),
    mlp=st.sampled_from(["gelu", "swiglu"]),
    rotary=st.booleans(),
    qk_norm=st.booleans(),
    tokens=st.integers(1, 3),
)
def test_every_design_takes_every_condition(block, condition, norm, mlp, rotary, qk_norm, tokens):
    design = {"block": block, "condition": condition, "norm": norm, "mlp": mlp, "rotary": rotary, "qk_norm": qk_norm}
    network = tiny(condition_shape=(tokens, 5), **design)
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([0.2, 0.7])
    y = torch.randn(2, tokens, 5) if condition == "embeddings" else torch.tensor([0, 2]) * (condition == "classes")
    assert network.null(2).shape == y.shape and network.null(2).dtype == y.dtype
    assert torch.equal(network(x, t, y), torch.zeros(2, 8, 8, 8))  # begins by predicting nothing
    out, seen = randomized(network)(x, t, y, tap=1)
    assert out.shape == (2, 8, 8, 8) and seen.shape == (2, 16, 32)
    assert not torch.allclose(network(x, t + 5, y), out, atol=1e-4)
    assert torch.allclose(network(x, t, network.null(2)), out, atol=1e-4) == (condition == "none")
    out.square().sum().backward()
    silent = {name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()}
    assert not silent, silent


@pytest.mark.parametrize("block", BLOCKS)
def test_a_condition_is_a_set_of_tokens(block):
    """No design gives the tokens an order: CLIP's features, say, have their positions in them already."""
    network = randomized(tiny(block=block, condition="embeddings", condition_shape=(3, 5), rotary=True))
    x, t, y = torch.randn(2, 4, 8, 8), torch.rand(2), torch.randn(2, 3, 5)
    with torch.no_grad():
        torch.testing.assert_close(network(x, t, y[:, [2, 0, 1]]), network(x, t, y), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(network(x, t, y.half().float()), network(x, t, y.half()))


def test_in_context_and_cross_attention_by_hand():
    """The forward pass written out once more, without the class that assembles it."""
    for block in ("in_context", "cross_attention"):
        network = randomized(tiny(block=block, depth=1))
        x, t, y = torch.randn(2, 4, 8, 8), torch.rand(2), torch.tensor([1, 3])
        tokens = network.x_embedder(x) + network.pos_embed
        c = torch.stack([network.t_embedder(t), network.y_embedder.embedding_table(y)], dim=1)
        h = torch.cat([tokens, c], dim=1) if block == "in_context" else tokens
        only = network.blocks[0]
        h = h + only.attn(only.norm1(h))
        if block == "cross_attention":
            h = h + only.cross_attn(only.norm_cross(h), c)
        h = h + only.mlp(only.norm2(h))
        final = network.final_layer
        expected = unpatchify(final.linear(final.norm_final(h[:, :16])), 2)
        torch.testing.assert_close(network(x, t, y), expected)


def test_rotary_positions_tell_tokens_apart_without_the_table():
    plain, rotary = (randomized(tiny(block="in_context", rotary=rotary)) for rotary in (False, True))
    x, t, y = torch.randn(1, 4, 8, 8), torch.rand(1), torch.tensor([1])
    for network in (plain, rotary):
        network.pos_embed.zero_()
    with torch.no_grad():  # patches in another order come out in that order, where nothing says positions
        moved = x.flip(2).unflatten(2, (4, 2)).flip(3).flatten(2, 3)
        for network, same in ((plain, True), (rotary, False)):
            a, b = network(x, t, y), network(moved, t, y)
            assert torch.allclose(b, a.flip(2).unflatten(2, (4, 2)).flip(3).flatten(2, 3), atol=1e-5) == same


def test_the_published_networks_names():
    names = set(tiny(depth=1).state_dict())
    layers = {f"blocks.0.{n}" for n in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1")}
    layers |= {"x_embedder.proj", "t_embedder.mlp.0", "t_embedder.mlp.2", "final_layer.linear"}
    layers |= {"final_layer.adaLN_modulation.1"}
    expected = {f"{layer}.{part}" for layer in layers for part in ("weight", "bias")}
    assert names == expected | {"pos_embed", "y_embedder.embedding_table.weight"}
    # Rotary tables are made anew from the sizes, not stored.
    assert set(tiny(depth=1, rotary=True).state_dict()) == names


def test_tap_gives_the_tokens_after_a_block():
    network = randomized(tiny(depth=3))
    x, t, y = torch.randn(2, 4, 8, 8), torch.rand(2), torch.tensor([1, 2])
    left = []
    for block in network.blocks:
        block.register_forward_hook(lambda module, inputs, output: left.append(output))
    for k in (1, 2, 3):
        left.clear()
        out, tokens = network(x, t, y, tap=k)
        assert torch.equal(tokens, left[k - 1]) and torch.equal(out, network(x, t, y))
    with pytest.raises(ValueError, match="tap must be a block from 1 to 3, got 4"):
        network(x, t, y, tap=4)


def test_half_precision_and_autocast_run_every_option():
    network = randomized(tiny(block="cross_attention", norm="rms", mlp="swiglu", rotary=True, qk_norm=True))
    x, t, y = torch.randn(2, 4, 8, 8), torch.rand(2), torch.tensor([1, 2])
    with torch.no_grad():
        exact = network(x, t, y)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(network(x, t, y).float(), exact, atol=0.05 * exact.abs().max().item(), rtol=0)
        half = network.bfloat16()(x.bfloat16(), t, y)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), exact, atol=0.1 * exact.abs().max().item(), rtol=0)


def test_refuses_what_cannot_be_built():
    with pytest.raises(ValueError, match="patch_size 3 does not divide the latent side 8"):
        tiny(patch_size=3)
    with pytest.raises(ValueError, match="hidden_size must be a multiple of num_heads"):
        tiny(num_heads=5)
    with pytest.raises(ValueError, match="name must be custom or one of"):
        ModelConfig("DiT-XXL/2")
    with pytest.raises(ValueError, match="patch_size is already said"):
        ModelConfig("DiT-S/2", patch_size=4)
    with pytest.raises(ValueError, match="depth must be a whole number"):
        ModelConfig("custom", 2, 32, None, 4)
    with pytest.raises(ValueError, match="rotary needs heads of a multiple of 4 channels, got hidden_size 24 / num"):
        tiny(hidden_size=24, rotary=True)
    with pytest.raises(ValueError, match="block must be one of adaln_zero, adaln, .*, got 'adaln-zero'"):
        tiny(block="adaln-zero")
    for shape in (None, (0, 5)):
        with pytest.raises(ValueError, match="model.condition embeddings needs the shape"):
            tiny(condition="embeddings", condition_shape=shape)
