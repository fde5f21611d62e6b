import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit import torchvision_cpu
from dit.embedders import (
    LabelEmbedder,
    PatchEmbed,
    SequenceEmbedder,
    TimestepEmbedder,
    position_embedding,
    rotary_embedding,
    rotate,
    timestep_embedding,
    unpatchify,
)
from dit.runtime import autocast


def test_embeddings_and_layout_equal_the_reference(golden):
    tensors, _ = golden("posemb")
    for grid in (4, 6):
        torch.testing.assert_close(position_embedding(64, grid), tensors[f"pos2d_dim64_grid{grid}"], atol=1e-6, rtol=0)
    some = position_embedding(1152, 16)[[1, 100, 255]]  # of the published XL networks' table
    torch.testing.assert_close(some, tensors["pos2d_dim1152_grid16"], atol=1e-6, rtol=0)
    for dim in (15, 16, 256):
        torch.testing.assert_close(timestep_embedding(tensors["t"], dim), tensors[f"temb_dim{dim}"], atol=1e-6, rtol=0)
    torch.testing.assert_close(
        timestep_embedding(tensors["t_frac"], 256), tensors["temb_frac_dim256"], atol=1e-6, rtol=0
    )
    assert torch.equal(unpatchify(tensors["unpatchify.tokens"], 2), tensors["unpatchify.image"])


def test_the_timestep_embedder_equals_the_reference_under_autocast_too(golden):
    tensors, _ = golden("posemb")
    embedder = TimestepEmbedder(16)
    embedder.load_state_dict({part: tensors[f"tembedder.state.{part}"] for part in embedder.state_dict()})
    for precision in ("fp32", "bf16"):
        with autocast(torch.device("cpu"), precision):
            torch.testing.assert_close(embedder(tensors["t"]), tensors["tembedder.out"], atol=1e-6, rtol=0)


def test_patches_of_four_equal_the_reference(golden):
    tensors, shape = golden("dit_forward_p4")
    embedder = PatchEmbed(4, shape["hidden_size"], 4)
    embedder.proj.weight.data, embedder.proj.bias.data = (
        tensors[f"state.x_embedder.proj.{part}"] for part in ("weight", "bias")
    )
    torch.testing.assert_close(embedder(tensors["in.x"]), tensors["act.patch_embed"], atol=2e-5, rtol=1e-5)
    assert torch.equal(unpatchify(tensors["act.final_tokens"], 4), tensors["out.forward"])


def test_both_conventions_of_the_timestep_embedding_equal_diffusers():
    torchvision_cpu.prepare()
    from diffusers.models.embeddings import get_timestep_embedding

    t = torch.tensor([0.0, 0.3, 17, 999])
    for convention, shift in (("published", 0), ("diffusers", 1)):
        theirs = get_timestep_embedding(t, 256, flip_sin_to_cos=True, downscale_freq_shift=shift)
        torch.testing.assert_close(timestep_embedding(t, 256, convention=convention), theirs, atol=1e-6, rtol=0)
    embedders = [TimestepEmbedder(8, convention) for convention in ("published", "diffusers")]
    embedders[1].load_state_dict(embedders[0].state_dict())
    assert not torch.allclose(embedders[0](t)[2:], embedders[1](t)[2:], atol=1e-3)


@settings(max_examples=15, deadline=None)
@given(st.tuples(*[st.integers(0, 5)] * 4), st.tuples(st.integers(0, 5), st.integers(0, 5)))
def test_rotated_products_depend_on_the_offset_alone(positions, shift):
    grid, size = 12, 16
    torch.manual_seed(0)
    q, k = torch.randn(2, size)
    rotary = rotary_embedding(size, grid)

    def product(row_q, column_q, row_k, column_k):
        tokens = torch.zeros(2, grid * grid, size)
        i, j = row_q * grid + column_q, row_k * grid + column_k
        tokens[0, i], tokens[1, j] = q, k
        turned = rotate(tokens, rotary)
        return turned[0, i] @ turned[1, j]

    row_q, column_q, row_k, column_k = positions
    down, right = shift
    moved = product(row_q + down, column_q + right, row_k + down, column_k + right)
    torch.testing.assert_close(product(*positions), moved, atol=1e-4, rtol=1e-4)


def test_rotation_keeps_lengths_turns_by_the_grid_and_leaves_appended_tokens():
    rotary = rotary_embedding(8, 3, num_appended=2)
    assert rotary.shape == (2, 9 + 2, 4)
    x = torch.randn(2, 3, 11, 8)
    turned = rotate(x, rotary)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(turned[..., 9:, :], x[..., 9:, :]) and torch.equal(turned[..., 0, :], x[..., 0, :])
    # Token 5 is row 1, column 2; frequencies 1 and 1/100, the column's pairs before the row's.
    angles = torch.tensor([2.0, 0.02, 1.0, 0.01])
    torch.testing.assert_close(rotary[:, 5], torch.stack([angles.cos(), angles.sin()]))
    assert rotate(x.bfloat16(), rotary).dtype == torch.bfloat16


def test_conditions_are_sequences():
    labels = LabelEmbedder(3, 8)
    assert labels(torch.tensor([0, 3])).shape == (2, 1, 8) and labels.embedding_table.weight.shape == (4, 8)
    sequences = SequenceEmbedder(5, 8)
    out = sequences(torch.zeros(2, 4, 5, dtype=torch.float16))  # as they are stored
    expected = sequences.mlp[2](torch.nn.functional.silu(sequences.mlp[0].bias))
    torch.testing.assert_close(out, expected.expand(2, 4, 8))


def test_position_table_of_one_axis_is_the_sinusoid():
    table = position_embedding(8, 2)  # channels: sin, sin, cos, cos of the column, then of the row
    omega = [1.0, 10000**-0.5]
    expected = [0.0, 0.0, 1.0, 1.0] + [f(w) for f in (math.sin, math.cos) for w in omega]
    assert table[2].tolist() == pytest.approx(expected)  # row 1, column 0
