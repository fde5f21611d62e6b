from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit.blocks import (
    MLP,
    AdaLNBlock,
    AdaLNZeroBlock,
    Attention,
    CrossAttention,
    CrossAttentionBlock,
    FinalLayer,
    InContextBlock,
    SwiGLU,
    feed_forward,
    mlp_size,
    normalization,
)


def sizes(hidden_size=16, num_heads=2, mlp_ratio=4.0, norm="layer", mlp="gelu", qk_norm=False):
    return SimpleNamespace(
        hidden_size=hidden_size, num_heads=num_heads, mlp_ratio=mlp_ratio, norm=norm, mlp=mlp, qk_norm=qk_norm
    )


def randomized(module):
    torch.manual_seed(0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module.eval()


def test_final_layer_of_patch_4_equals_the_reference(golden):
    tensors, shape = golden("dit_forward_p4")
    layer = FinalLayer(sizes(shape["hidden_size"]), 4, 8, modulated=True)
    state = {k.removeprefix("state.final_layer."): v for k, v in tensors.items() if k.startswith("state.final_layer.")}
    layer.load_state_dict(state)
    out = layer(tensors["act.block1"], tensors["act.t_emb"] + tensors["act.y_emb"])
    torch.testing.assert_close(out, tensors["act.final_tokens"], atol=2e-5, rtol=1e-5)


def test_attention_equals_torchs_own():
    attention, cross = randomized(Attention(sizes())), randomized(CrossAttention(sizes()))
    theirs = torch.nn.MultiheadAttention(16, 2, batch_first=True).eval()
    x, c = torch.randn(3, 5, 16), torch.randn(3, 4, 16)
    with torch.no_grad():
        for fused, other in (((attention.qkv,), x), ((cross.q, cross.kv), c)):
            theirs.in_proj_weight.copy_(torch.cat([layer.weight for layer in fused]))
            theirs.in_proj_bias.copy_(torch.cat([layer.bias for layer in fused]))
            proj = (attention if other is x else cross).proj
            theirs.out_proj.load_state_dict(proj.state_dict())
            ours = attention(x) if other is x else cross(x, c)
            torch.testing.assert_close(ours, theirs(x, other, other)[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_norms_and_normalised_queries(kind):
    x = 3 + 2 * torch.randn(4, 8)
    centred = x - x.mean(-1, keepdim=True) if kind == "layer" else x
    expected = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(normalization(kind, 8, affine=False)(x), expected)
    # With normalised queries and keys the scores do not know how large the queries' weights are.
    attention = randomized(Attention(sizes(norm=kind, qk_norm=True)))
    x = torch.randn(2, 5, 16)
    before = attention(x)
    with torch.no_grad():
        attention.qkv.weight[:16] *= 1000
        attention.qkv.bias[:16] *= 1000
    torch.testing.assert_close(attention(x), before, atol=1e-4, rtol=1e-4)
    assert attention.q_norm.weight.shape == (8,)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.sampled_from([1.0, 2.0, 2.5, 4.0]))
def test_swiglu_has_as_many_parameters_as_gelu(multiple, ratio):
    D = 32 * multiple
    count = {
        mlp: sum(p.numel() for p in feed_forward(sizes(D, 4, ratio, mlp=mlp)).parameters())
        for mlp in ("gelu", "swiglu")
    }
    width = mlp_size(sizes(D, 4, ratio, mlp="swiglu"))
    assert abs(count["swiglu"] / count["gelu"] - 1) <= max(0.01, 0.5 / width + 1e-3)


def test_wide_swiglu_is_a_multiple_that_hardware_likes():
    assert [mlp_size(sizes(D, 16, mlp="swiglu")) for D in (384, 768, 1024, 1152)] == [1024, 2048, 2752, 3072]


def test_swiglu_is_its_equation():
    layer = randomized(SwiGLU(4, 3))
    x = torch.randn(2, 4)
    a, b = (x @ layer.fc1.weight.T + layer.fc1.bias).chunk(2, dim=1)
    expected = (a * a.sigmoid() * b) @ layer.fc2.weight.T + layer.fc2.bias
    torch.testing.assert_close(layer(x), expected)
    assert isinstance(feed_forward(sizes()), MLP)


def test_designs_are_one_block_with_and_without_gates_and_modulation():
    plain, adaln, zero = (kind(sizes()) for kind in (InContextBlock, AdaLNBlock, AdaLNZeroBlock))
    torch.manual_seed(0)
    shared = {k: v for k, v in randomized(plain).state_dict().items() if not k.startswith("norm")}
    x, c = torch.randn(2, 5, 16), torch.randn(2, 16)
    with torch.no_grad():
        for norm in (plain.norm1, plain.norm2):
            norm.reset_parameters()
        for block in (adaln, zero):
            block.load_state_dict(shared, strict=False)
            torch.nn.init.zeros_(block.adaLN_modulation[1].weight)
            torch.nn.init.zeros_(block.adaLN_modulation[1].bias)
        torch.testing.assert_close(adaln(x, c, None), plain(x, c, None))  # nothing shifted or scaled
        assert torch.equal(zero(x, c, None), x)  # gates closed
        zero.adaLN_modulation[1].bias.view(6, 16)[[2, 5]] = 1  # gates open
        torch.testing.assert_close(zero(x, c, None), plain(x, c, None))
        torch.nn.init.normal_(adaln.adaLN_modulation[1].weight)
        zero.adaLN_modulation[1].weight.view(6, 16, 16)[[0, 1, 3, 4]] = adaln.adaLN_modulation[1].weight.view(4, 16, 16)
        torch.testing.assert_close(zero(x, c, None), adaln(x, c, None))
        assert not torch.allclose(adaln(x, c, None), plain(x, c, None), atol=0.1)


def test_cross_attention_block_is_a_plain_block_where_the_condition_is_silent():
    plain, cross = randomized(InContextBlock(sizes())), CrossAttentionBlock(sizes())
    cross.load_state_dict(plain.state_dict(), strict=False)
    x, c = torch.randn(2, 5, 16), torch.randn(2, 3, 16)
    assert not torch.allclose(cross(x, c, None), plain(x, c, None), atol=1e-3)
    torch.nn.init.zeros_(cross.cross_attn.proj.weight)
    torch.nn.init.zeros_(cross.cross_attn.proj.bias)
    torch.testing.assert_close(cross(x, c, None), plain(x, c, None))
