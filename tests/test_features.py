import errno

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit.extractors import Extractor, open_extractor
from dit.features import Moments, collect, evenly, merged
from dit.imagesets import from_array


def colours(images):
    """A space in which one can count: the mean colour, and the first pixel."""
    return {"mean": images.float().mean(dim=(2, 3)), "first": images[:, :, 0, 0].float()}


SPACE = Extractor("colours", "0", "none", {"mean": 3, "first": 3}, {"": "mean"}, "mean", ("", "mean"), colours)


def images_of(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 4, 5, 3)).astype(np.uint8)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.floats(-1e4, 1e4), st.integers(0, 1000))
def test_moments_of_parts_are_those_of_the_whole(sizes, shift, seed):
    features = torch.from_numpy(np.random.default_rng(seed).normal(shift, 1, (sum(sizes), 4)))
    parts = features.split(sizes)
    whole = Moments.of(features)
    together = merged(Moments.of(part) for part in parts)
    later = Moments.of(parts[0])
    for part in parts[1:]:
        later = later.update(part)
    for told in (together, later, merged(Moments.of(part) for part in reversed(parts))):
        assert told.count == len(features)
        torch.testing.assert_close(told.mean, whole.mean, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(told.scatter, whole.scatter, rtol=1e-9, atol=1e-7)


def test_covariance_is_unbiased_and_float64():
    features = torch.randn(50, 4)
    told = Moments.of(features)
    assert told.mean.dtype == told.covariance.dtype == torch.float64
    np.testing.assert_allclose(told.mean, features.double().mean(0))
    np.testing.assert_allclose(told.covariance, np.cov(features.double().numpy(), rowvar=False))


@pytest.mark.parametrize("tile", [1, 3, 4, 10, 11])
def test_a_covariance_in_tiles_is_that_of_the_whole(tile, monkeypatch):
    monkeypatch.setattr("dit.features.TILE", tile)
    features = torch.randn(30, 10, generator=torch.Generator().manual_seed(0)) + 3
    told = Moments.of(features).covariance
    torch.testing.assert_close(told, features.double().T.cov(), rtol=1e-12, atol=1e-12)
    assert torch.equal(told, told.T)


def test_one_image_has_no_covariance_and_dimensions_must_agree():
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        Moments.of(torch.zeros(1, 3)).covariance  # noqa: B018
    with pytest.raises(ValueError, match="of 3 and of 4 dimensions"):
        Moments.of(torch.zeros(2, 3)).merge(Moments.of(torch.zeros(2, 4)))


def test_a_large_mean_costs_no_digits():
    features = torch.randn(1000, 3, dtype=torch.float64)
    told = merged(Moments.of(part) for part in (features + 1e7).split(64))
    torch.testing.assert_close(told.covariance, torch.cov(features.T), rtol=1e-6, atol=1e-8)


def test_evenly_takes_as_many_as_asked_from_all_parts():
    assert evenly(10, None).tolist() == evenly(10, 12).tolist() == list(range(10))
    taken = evenly(1_281_167, 10_000)
    assert len(taken) == len(set(taken.tolist())) == 10_000 and taken[0] == 0
    assert set(np.diff(taken)) == {128, 129}
    assert len(evenly(0, 5)) == 0


@pytest.mark.parametrize("block", [1, 7, 256])
def test_collected_is_what_the_extractor_gives_of_all(tmp_path, block):
    images, done = images_of(50), []
    told = collect(
        SPACE, from_array(images), keep={"mean": None, "first": 7}, folder=tmp_path, progress=done.append, block=block
    )
    whole = colours(torch.from_numpy(images).permute(0, 3, 1, 2))
    assert told.count == told.moments["mean"].count == sum(done) == 50 and set(told.moments) == {"mean"}
    torch.testing.assert_close(told.moments["mean"].covariance, torch.cov(whole["mean"].double().T))
    assert torch.equal(told.kept["mean"], whole["mean"])
    assert torch.equal(told.kept["first"], whole["first"][told.indices["first"]])
    assert told.indices["first"].tolist() == [0, 7, 14, 21, 28, 35, 42]


def test_the_layers_whose_moments_count_can_be_told(tmp_path):
    told = collect(SPACE, from_array(images_of(5)), moments_of=("first",), folder=tmp_path)
    assert set(told.moments) == {"first"} and told.kept == {}


def test_features_that_are_not_finite_name_their_image(tmp_path):
    def broken(images):
        x = images[:, :, 0, 0].float()
        return {"mean": torch.where(x == 77, torch.nan, x)}

    images = images_of(30)
    images[:, 0, 0] = 5
    images[23, 0, 0] = 77
    space = Extractor("broken", "0", "none", {"mean": 3}, {"": "mean"}, "mean", ("", "mean"), broken)
    for keep, moments_of in (({}, ("mean",)), ({"mean": None}, ())):
        with pytest.raises(ValueError, match=r"in memory: image 23 has features \(mean\) that are not finite") as told:
            collect(space, from_array(images), keep=keep, moments_of=moments_of, folder=tmp_path, block=8)
        assert "\n" not in str(told.value)


def test_memory_does_not_grow_with_the_number_of_images(tmp_path):
    alive = []

    class Lazy(type(from_array(images_of(2)))):
        def read(self, start, stop):
            alive.append(stop - start)
            return np.zeros((stop - start, *self.size, 3), np.uint8)

    few = from_array(images_of(2))
    many = Lazy("many", 100_000, few.size, None, few.reader, few.digester)
    told = collect(SPACE, many, keep={"mean": 10}, folder=tmp_path, block=1000)
    assert told.count == 100_000 and max(alive) == 1000 and told.kept["mean"].shape == (10, 3)


def test_a_full_disk_is_told_before_anything_is_written_to_it(tmp_path, monkeypatch):
    def full(file, start, num_bytes):
        raise OSError(errno.ENOSPC, "No space left on device")

    images, extractor = from_array(np.zeros((4, 8, 8, 3), np.uint8)), open_extractor("random")
    monkeypatch.setattr("os.posix_fallocate", full, raising=False)
    with pytest.raises(OSError, match=r"No space left on device: features take 8,192 bytes.*pooled.float32"):
        collect(extractor, images, keep={"pooled": None}, folder=tmp_path)
    monkeypatch.setattr("os.posix_fallocate", lambda *_: reserves_nothing(), raising=False)
    assert collect(extractor, images, keep={"pooled": None}, folder=tmp_path).kept["pooled"].shape == (4, 512)


def reserves_nothing():
    raise OSError(errno.EOPNOTSUPP, "this file system reserves nothing")
