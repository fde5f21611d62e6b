import pytest
import torch
from torch import nn

from dit.alignment import AlignmentConfig, alignment_loss, new_projector, require_alignment, to_grid


def test_the_loss_is_the_mean_cosine_distance():
    torch.manual_seed(0)
    tokens, features = torch.randn(3, 4, 5), torch.randn(3, 4, 5)
    by_hand = torch.stack(
        [
            torch.stack([1 - h @ f / (h.norm() * f.norm()) for h, f in zip(*pair, strict=True)]).mean()
            for pair in zip(tokens, features, strict=True)
        ]
    )
    torch.testing.assert_close(alignment_loss(nn.Identity(), tokens, features), by_hand)
    assert alignment_loss(nn.Identity(), tokens, 7 * tokens).abs().max() < 1e-6
    torch.testing.assert_close(alignment_loss(nn.Identity(), tokens, -tokens), torch.full((3,), 2.0))


def test_one_feature_is_compared_with_the_mean_token():
    tokens, feature = torch.randn(2, 9, 6), torch.randn(2, 1, 6)
    expected = 1 - torch.cosine_similarity(tokens.mean(1), feature[:, 0])
    torch.testing.assert_close(alignment_loss(nn.Identity(), tokens, feature), expected)


def test_a_grid_of_features_becomes_the_grid_of_the_tokens():
    def ramp(side):  # the position of each square's centre, which bilinear interpolation keeps
        place = (torch.arange(side) + 0.5) / side
        return torch.stack(torch.meshgrid(place, place, indexing="ij"), -1).view(1, side * side, 2)

    assert torch.equal(to_grid(ramp(4), 16), ramp(4))
    finer = to_grid(ramp(4), 64).view(8, 8, 2)[1:-1, 1:-1]  # at the border the nearest square counts
    torch.testing.assert_close(finer, ramp(8).view(8, 8, 2)[1:-1, 1:-1])
    coarser = to_grid(ramp(16), 16).view(4, 4, 2)
    torch.testing.assert_close(coarser, ramp(4).view(4, 4, 2), atol=0.03, rtol=0)
    assert (to_grid(ramp(4), 64)[0, 0] < to_grid(ramp(4), 64)[0, -1]).all()  # row by row, not turned over


def test_the_projector_learns_to_tell_the_features_and_so_do_the_tokens():
    torch.manual_seed(0)
    tokens, features = nn.Parameter(torch.randn(8, 4, 6)), torch.randn(8, 4, 10)
    projector = new_projector(6, AlignmentConfig(weight=1.0, projector_size=32), 10, seed=0)
    optimizer = torch.optim.Adam([tokens, *projector.parameters()], lr=1e-2)
    first = alignment_loss(projector, tokens, features).mean()
    for _ in range(100):
        optimizer.zero_grad()
        loss = alignment_loss(projector, tokens, features).mean()
        loss.backward()
        optimizer.step()
    assert first > 0.9 and loss < 0.2


def test_the_projectors_weights_are_a_function_of_the_seed_and_touch_no_other_randomness():
    config = AlignmentConfig(weight=1.0, projector_size=8)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    a, b, c = (new_projector(4, config, 3, seed)[0].weight for seed in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c) and torch.equal(torch.get_rng_state(), state)


def test_when_it_is_part_of_the_loss():
    assert not AlignmentConfig().active_at(0) and AlignmentConfig(weight=0.5).active_at(10**9)
    stopped = AlignmentConfig(weight=0.5, stop_step=3)
    assert [stopped.active_at(step) for step in range(5)] == [True, True, True, False, False]


@pytest.mark.parametrize(
    "change,shape,message",
    [
        ({}, None, "objective.alignment.weight: the latents carry no features to align with"),
        ({"block": 3}, (4, 8), "objective.alignment.block: 3 is more than the network's 2 blocks"),
        ({}, (5, 8), "objective.alignment.weight: 5 feature vectors an image are neither one nor a square grid"),
    ],
)
def test_what_cannot_be_aligned_is_refused(change, shape, message):
    with pytest.raises(ValueError) as caught:
        require_alignment(AlignmentConfig(weight=0.5, **change), 2, shape)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
    require_alignment(AlignmentConfig(weight=0.0, block=99), 2, None)  # off: nothing is asked for


def test_a_grid_of_the_image_itself_is_no_target_for_its_mirror_image():
    on, off = AlignmentConfig(weight=0.5), AlignmentConfig()
    with pytest.raises(ValueError, match="^encode.features: the file has no features_mirror for mirror images: add"):
        require_alignment(on, 2, (4, 8), mirrored=False)
    for config, shape, mirrored in [(on, (4, 8), True), (on, (1, 8), False), (off, (4, 8), False)]:
        require_alignment(config, 2, shape, mirrored=mirrored)


@pytest.mark.parametrize("change", [{"weight": -1.0}, {"block": 0}, {"stop_step": 0}, {"projector_size": 0}])
def test_bad_settings_are_refused(change):
    with pytest.raises(ValueError, match=f"^{next(iter(change))} must "):
        AlignmentConfig(**change)
