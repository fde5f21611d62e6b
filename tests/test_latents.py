import pytest
import test_dataset
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit.latents import Statistics, draw, index_digest, read_index, require_autoencoder

folder = test_dataset.folder


def test_drawn_latents_have_the_posteriors_moments_and_the_scale():
    mean, std = torch.full((4000, 2, 1, 1), 3.0), torch.full((4000, 2, 1, 1), 0.5)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))
    shift, scale = torch.tensor([1.0, 2.0]).view(1, 2, 1, 1), torch.tensor([2.0, 4.0]).view(1, 2, 1, 1)
    x = draw({"mean": mean, "std": std}, shift, scale, noise, None)
    assert x.mean(dim=(0, 2, 3)).tolist() == pytest.approx([1.0, 0.25], abs=0.02)
    assert x.std(dim=(0, 2, 3)).tolist() == pytest.approx([0.25, 0.125], rel=0.05)


def test_mirroring_picks_the_mirror_images_moments():
    zero = torch.zeros(2, 1, 1, 1)
    batch = {"mean": zero, "std": zero, "mean_mirror": zero + 1, "std_mirror": zero}
    x = draw(batch, zero[:1], zero[:1] + 1, zero, torch.tensor([True, False]))
    assert x.flatten().tolist() == [1.0, 0.0]


@settings(max_examples=20, deadline=None)
@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_running_statistics_equal_those_of_all_at_once(sizes):
    generator = torch.Generator().manual_seed(len(sizes))
    parts = [torch.randn(n, 3, 2, 2, generator=generator) for n in sizes]
    running = Statistics(3)
    for part in parts:
        running.add(part, torch.full_like(part, 0.5))
    mean, std = running
    whole = torch.cat(parts).double()
    torch.testing.assert_close(torch.tensor(mean).double(), whole.mean(dim=(0, 2, 3)))
    expected = (whole.var(dim=(0, 2, 3), correction=0) + 0.25).sqrt()
    torch.testing.assert_close(torch.tensor(std).double(), expected)


def test_the_digest_follows_content_scale_and_classes(folder):
    index = read_index(folder)
    base = index_digest(index)
    for change in (
        {"classes": ["b"]},
        {"normalization": {"mean": [0.0], "std": [1.0]}},
        {"shards": index["shards"][:1]},
    ):
        assert index_digest({**index, **change}) != base
    assert index_digest({**index, "something": "else"}) == base


def test_another_autoencoder_and_missing_latents_are_refused(tmp_path):
    require_autoencoder({"autoencoder": "a" * 64}, "a" * 64, "these latents")
    with pytest.raises(ValueError, match=r"these latents belong to another autoencoder \(aaaaaaaaaaaa\)"):
        require_autoencoder({"autoencoder": "a" * 64}, "b" * 64, "these latents")
    with pytest.raises(ValueError, match="holds no latents"):
        read_index(tmp_path)
