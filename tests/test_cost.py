import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dit.cost import macs, parameters, tokens
from dit.model import DiT, ModelConfig

# Parameters at 256 and 512 pixels (latent side 32 and 64, 4 channels, 1000 classes), the position table included; the
# paper's Gflops at 256 pixels (tables 4 and 6 of arXiv 2212.09748).
PUBLISHED = {
    "DiT-S/2": (32_963_360, 33_258_272, 6.06),
    "DiT-S/4": (32_945_024, 33_018_752, 1.41),
    "DiT-S/8": (33_148_160, 33_166_592, 0.36),
    "DiT-B/2": (130_512_416, 131_102_240, 23.01),
    "DiT-B/4": (130_475_648, 130_623_104, 5.56),
    "DiT-B/8": (130_881_536, 130_918_400, 1.42),
    "DiT-L/2": (458_102_816, 458_889_248, 80.71),
    "DiT-L/4": (458_053_760, 458_250_368, 19.70),
    "DiT-L/8": (458_594_816, 458_643_968, 5.01),
    "DiT-XL/2": (675_129_632, 676_014_368, 118.64),
    "DiT-XL/4": (675_074_432, 675_295_616, 29.05),
    "DiT-XL/8": (675_683_072, 675_738_368, 7.39),
}
# Multiply-accumulates at 256 and 512 pixels, in thousands of millions, as counted in another implementation.
COUNTED = {
    "DiT-S/2": (6.0557, 31.4370),
    "DiT-S/4": (1.4126, 6.0698),
    "DiT-S/8": (0.3580, 1.4267),
    "DiT-B/2": (23.0051, 106.3826),
    "DiT-B/4": (5.5652, 23.0334),
    "DiT-B/8": (1.4175, 5.5935),
    "DiT-L/2": (80.6976, 360.9820),
    "DiT-L/4": (19.6957, 80.7354),
    "DiT-L/8": (5.0114, 19.7334),
    "DiT-XL/2": (118.6214, 524.5383),
    "DiT-XL/4": (29.0437, 118.6639),
    "DiT-XL/8": (7.3924, 29.0861),
}
# The four designs at XL/2: the paper's Gflops (figure 5) and parameters (table 4).
DESIGNS = {
    "in_context": (119.37e9, 449e6),
    "cross_attention": (137.62e9, 598e6),
    "adaln": (118.56e9, 600e6),
    "adaln_zero": (118.64e9, 675e6),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_equal_the_published_table(name):
    config = ModelConfig(name)
    at_256, at_512, gflops = PUBLISHED[name]
    for side, expected in ((32, at_256), (64, at_512)):
        assert parameters(config, input_size=side, in_channels=4, num_classes=1000) == expected
    # The paper prints two decimals: half of the last one, where that is more than a thousandth.
    assert macs(config, input_size=32, in_channels=4) / 1e9 == pytest.approx(gflops, rel=1e-3, abs=0.0055)
    for side, counted in zip((32, 64), COUNTED[name], strict=True):
        assert macs(config, input_size=side, in_channels=4) / 1e9 == pytest.approx(counted, rel=1e-4, abs=5.1e-5)


@pytest.mark.parametrize("block", DESIGNS)
def test_the_four_designs_equal_the_paper(block):
    gflops, count = DESIGNS[block]
    config = ModelConfig("DiT-XL/2", block=block)
    assert macs(config, input_size=32, in_channels=4) == pytest.approx(gflops, rel=1e-3)
    # The paper prints whole millions, and 600.7 as 600.
    assert abs(parameters(config, input_size=32, in_channels=4, num_classes=1000) - count) < 1e6


DESIGN = st.fixed_dictionaries(
    {
        "block": st.sampled_from(sorted(DESIGNS)),
        "condition": st.sampled_from(["classes", "none", "embeddings"]),
        "norm": st.sampled_from(["layer", "rms"]),
        "mlp": st.sampled_from(["gelu", "swiglu"]),
        "mlp_ratio": st.sampled_from([2.0, 2.5, 4.0]),
        "rotary": st.booleans(),
        "qk_norm": st.booleans(),
        "learn_sigma": st.booleans(),
        "depth": st.integers(1, 3),
    }
)


@settings(max_examples=40, deadline=None)
@given(DESIGN, st.integers(1, 3), st.integers(1, 5), st.sampled_from([(1, 4), (2, 8), (4, 8)]))
def test_equal_the_network_itself(design, length, channels, patch_and_side):
    patch_size, side = patch_and_side
    config = ModelConfig("custom", patch_size=patch_size, hidden_size=48, num_heads=3, **design)
    shape = {"input_size": side, "in_channels": channels, "condition_shape": (length, 7)}
    network = DiT(config, num_classes=5, **shape)
    assert parameters(config, num_classes=5, **shape) == sum(tensor.numel() for tensor in network.state_dict().values())
    x = torch.randn(2, channels, side, side)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        network(x, torch.rand(2), network.null(2))
    assert 2 * 2 * macs(config, **shape) == counter.get_total_flops()


@pytest.mark.parametrize("block,mlp", itertools.product(sorted(DESIGNS), ["gelu", "swiglu"]))
def test_equal_the_large_networks_too(block, mlp):
    config = ModelConfig("DiT-XL/2", block=block, mlp=mlp, qk_norm=True, norm="rms", rotary=True)
    with torch.device("meta"):
        network = DiT(config, input_size=32, in_channels=4, num_classes=1000)
    expected = sum(tensor.numel() for tensor in network.state_dict().values())
    assert parameters(config, input_size=32, in_channels=4, num_classes=1000) == expected


def test_swiglu_costs_what_gelu_costs():
    for name in PUBLISHED:
        gelu, swiglu = (macs(ModelConfig(name, mlp=mlp), input_size=32, in_channels=4) for mlp in ("gelu", "swiglu"))
        assert swiglu == pytest.approx(gelu, rel=0.01)


def test_a_patch_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="model.patch_size 8 does not divide the latent side 36"):
        tokens(ModelConfig("DiT-B/8"), 36)
