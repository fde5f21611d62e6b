"""What decides a training's weights: its settings and its name."""

import pytest
import torch

from dit.alignment import AlignmentConfig
from dit.diffusion import DiffusionConfig
from dit.model import DiT, ModelConfig
from dit.objective import ObjectiveConfig
from dit.training import TrainConfig, mathematics

TRANSPORT, DIFFUSION = ObjectiveConfig("transport"), ObjectiveConfig("diffusion")
ALIGNED = ObjectiveConfig("transport", alignment=AlignmentConfig(weight=0.5, stop_step=5, projector_size=8))


def settings(**changes):
    return TrainConfig(**{"max_steps": 10, "global_batch_size": 8, "lr": 1e-2, "warmup_steps": 2, **changes})


def new_network():
    with torch.device("meta"):
        return DiT(ModelConfig("custom", 2, 16, 1, 2), input_size=4, in_channels=2, num_classes=3)


def test_more_steps_at_a_constant_rate_are_the_same_training():
    name = lambda **changes: mathematics(new_network(), TRANSPORT, settings(**changes), "x")  # noqa: E731
    assert name(max_steps=6) == name()
    assert name(max_steps=6, lr_schedule="cosine") != name(lr_schedule="cosine")


def test_what_changes_the_weights_changes_the_name():
    names = {
        mathematics(new_network(), TRANSPORT, settings(**c), "x")
        for c in ({}, {"lr": 1e-3}, {"seed": 1}, {"ema_decay": 0.5}, {"shuffle_window": 8}, {"classes": "balanced"})
    }
    names |= {
        mathematics(new_network(), DIFFUSION, settings(), "x"),
        mathematics(new_network(), TRANSPORT, settings(), "y"),
    }
    names |= {
        mathematics(new_network(), ALIGNED, settings(), "x"),
        mathematics(new_network(), TRANSPORT, settings(power_ema=(0.1,)), "x"),
        mathematics(new_network(), TRANSPORT, settings(init_from="a"), "x", "digest of a"),
    }
    assert len(names) == 11
    moved = mathematics(new_network(), TRANSPORT, settings(init_from="b"), "x", "digest of a")
    unused = ObjectiveConfig("transport", diffusion=DiffusionConfig(schedule="cosine"))
    assert moved in names and mathematics(new_network(), unused, settings(), "x") in names


@pytest.mark.parametrize(
    "change,message",
    [
        ({"lr": 0}, "lr must be above 0"),
        ({"max_steps": 0}, "max_steps must be at least 1"),
        ({"max_steps": -1, "init_from": "a"}, "max_steps must be 0 or more, got -1"),
        ({"init_from": " "}, "init_from must be null, a checkpoint folder"),
        ({"ema_decay": 1.5}, "ema_decay must be between"),
        ({"power_ema": (0.3,)}, "power_ema must be above 0 and below 0.2887"),
        ({"power_ema": (0.1, 0.1)}, "power_ema must not name a width twice"),
        ({"power_ema": (0.1,), "max_steps": 0, "init_from": "a"}, "power_ema needs at least one step"),
    ],
)
def test_bad_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        settings(**change)
