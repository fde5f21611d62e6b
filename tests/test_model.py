import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit import torchvision_cpu
from dit.model import DiT, ModelConfig, position_embedding, timestep_embedding, unpatchify

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


def tiny(patch_size=2, input_size=8, in_channels=4, num_classes=3, **sizes):
    config = ModelConfig("custom", patch_size, **{"hidden_size": 32, "depth": 2, "num_heads": 4, **sizes})
    return DiT(config, input_size=input_size, in_channels=in_channels, num_classes=num_classes)


@pytest.mark.parametrize("name", PUBLISHED_PARAMETERS)
def test_parameter_count_equals_the_published_one(name):
    with torch.device("meta"):
        network = DiT(ModelConfig(name), input_size=32, in_channels=4, num_classes=1000)
    assert sum(tensor.numel() for tensor in network.state_dict().values()) == PUBLISHED_PARAMETERS[name]


def test_forward_equals_the_reference(golden_network):
    network, tensors = golden_network("dit_forward_p2")
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
        torch.testing.assert_close(actual[name], gradient, atol=1e-4 * gradient.abs().max().item(), rtol=0, msg=name)


def test_embeddings_and_layout_equal_the_reference(golden):
    tensors, _ = golden("posemb")
    for grid in (4, 6):
        torch.testing.assert_close(position_embedding(64, grid), tensors[f"pos2d_dim64_grid{grid}"], atol=1e-6, rtol=0)
    for dim in (15, 16, 256):
        torch.testing.assert_close(timestep_embedding(tensors["t"], dim), tensors[f"temb_dim{dim}"], atol=1e-6, rtol=0)
    torch.testing.assert_close(
        timestep_embedding(tensors["t_frac"], 256), tensors["temb_frac_dim256"], atol=1e-6, rtol=0
    )
    assert torch.equal(unpatchify(tensors["unpatchify.tokens"], 2), tensors["unpatchify.image"])


def test_network_equals_diffusers_transformer():
    """Another implementation on the same random weights; its timestep frequencies are set to the published ones."""
    torchvision_cpu.prepare()
    from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

    torch.manual_seed(0)
    ours = tiny(num_classes=7).eval()
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
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
