import json

import numpy as np
import pytest
import torch
from conftest import GOLDEN
from hypothesis import given, settings
from hypothesis import strategies as st

from dit.timesteps import cosine_betas, linear_betas, space_timesteps


def test_respacing_equals_the_reference_to_the_letter():
    cases = json.loads((GOLDEN / "space_timesteps.json").read_text())
    assert len(cases) > 10
    for case, expected in cases.items():
        num_timesteps, spec = case.split("|")
        if expected == "ValueError":
            with pytest.raises(ValueError):
                space_timesteps(int(num_timesteps), spec)
        else:
            assert space_timesteps(int(num_timesteps), spec) == expected, case


def test_schedules_equal_the_reference():
    reference = np.load(GOLDEN / "gaussian_tables.npz")
    for label, betas in {"full": linear_betas(), "cosine_full": cosine_betas()}.items():
        assert betas.dtype == torch.float64
        np.testing.assert_allclose(betas.numpy(), reference[f"{label}.betas"], rtol=1e-12, err_msg=label)


def test_the_linear_schedule_of_any_length_ends_at_about_the_same_noise():
    ends = [(1 - linear_betas(length)).log().sum().item() for length in (250, 1000, 4000)]
    assert ends == pytest.approx([ends[1]] * 3, rel=0.05)


def test_the_cosine_schedule_is_a_cosine_where_it_is_not_capped():
    alphas_bar, half = (1 - cosine_betas()).cumprod(0), 499
    angle = torch.tensor(((half + 1) / 1000 + 0.008) / 1.008 * torch.pi / 2, dtype=torch.float64)
    start = torch.tensor(0.008 / 1.008 * torch.pi / 2, dtype=torch.float64)
    assert alphas_bar[half].item() == pytest.approx((angle.cos() / start.cos()).square().item(), rel=1e-9)
    assert cosine_betas().max() == 0.999


@settings(max_examples=25, deadline=None)
@given(length=st.integers(1, 400), counts=st.lists(st.integers(1, 40), min_size=1, max_size=4))
def test_each_section_gives_as_many_steps_as_asked_within_it(length, counts):
    size, extra = divmod(length, len(counts))
    sizes = [size + (i < extra) for i in range(len(counts))]
    spec = ",".join(map(str, counts))
    if any(count > size for count, size in zip(counts, sizes, strict=True)):
        with pytest.raises(ValueError, match="cannot give"):
            space_timesteps(length, spec)
        return
    steps, start = space_timesteps(length, spec), 0
    for count, size in zip(counts, sizes, strict=True):
        inside = [step for step in steps if start <= step < start + size]
        assert len(inside) == count and inside[0] == start
        assert count == 1 or inside[-1] == start + size - 1
        start += size
