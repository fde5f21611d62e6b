import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dit.ema import decay_at, update


@given(decay=st.floats(0, 1), values=st.lists(st.floats(-10, 10), min_size=1, max_size=20))
def test_average_equals_its_closed_form(decay, values):
    average = [torch.zeros(1, dtype=torch.float64)]
    for value in values:
        update(average, [torch.tensor([value], dtype=torch.float64)], decay)
    closed = sum((1 - decay) * decay ** (len(values) - 1 - i) * value for i, value in enumerate(values))
    assert average[0].item() == pytest.approx(closed, abs=1e-9)


def test_warmup_follows_the_young_run_and_ends_at_the_decay():
    assert decay_at(0, 0.9999, warmup=False) == 0.9999
    assert decay_at(0, 0.9999, warmup=True) == 0.1
    assert decay_at(10**7, 0.9999, warmup=True) == 0.9999
