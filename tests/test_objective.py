import json
from dataclasses import asdict

import pytest
import torch

from dit.alignment import AlignmentConfig, alignment_loss, new_projector
from dit.config import parse
from dit.diffusion import DiffusionConfig
from dit.model import DiT, ModelConfig
from dit.objective import ObjectiveConfig, loss_of, objective_from, require_objective, times
from dit.transport import TransportConfig


@pytest.fixture(scope="module")
def batch():
    torch.manual_seed(0)
    network = DiT(ModelConfig("custom", 2, 16, 2, 2), input_size=4, in_channels=2, num_classes=3)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x, noise = torch.randn(2, 5, 2, 4, 4)
    return network, {"x": x, "noise": noise, "y": torch.tensor([0, 1, 2, 3, 3]), "t": torch.rand(5)}


def test_a_checkpoint_tells_its_objective_and_an_old_one_has_the_defaults():
    ours = ObjectiveConfig("transport", transport=TransportConfig(path="gvp"), alignment=AlignmentConfig(0.5, 2))
    assert objective_from(json.loads(json.dumps(asdict(ours)))) == ours
    assert objective_from({"name": "diffusion"}) == ObjectiveConfig("diffusion")


def test_only_what_has_a_part_in_the_loss_is_active():
    plain = ObjectiveConfig("transport")
    assert plain.active() == ObjectiveConfig("transport", diffusion=DiffusionConfig(schedule="cosine")).active()
    assert plain.active() == ObjectiveConfig("transport", alignment=AlignmentConfig(0.0, 7)).active()
    assert plain.active() != ObjectiveConfig("transport", transport=TransportConfig(path="gvp")).active()
    assert plain.active() != ObjectiveConfig("transport", alignment=AlignmentConfig(0.1)).active()
    assert "transport" not in ObjectiveConfig("diffusion").active()


def test_the_settings_reach_the_loss(batch):
    network, inputs = batch
    losses = [
        loss_of(network, ObjectiveConfig("transport", transport=TransportConfig(**told)), **inputs)
        for told in ({}, {"path": "gvp"}, {"prediction": "noise"}, {"direction_weight": 1.0})
    ]
    inputs = inputs | {"t": torch.tensor([0, 3, 400, 700, 999])}
    losses += [
        loss_of(network, ObjectiveConfig("diffusion", diffusion=DiffusionConfig(**told)), **inputs)
        for told in ({}, {"schedule": "cosine"}, {"prediction": "v"}, {"variance": "fixed_small"})
    ]
    assert all(loss.shape == (5,) and torch.isfinite(loss).all() for loss in losses)
    assert len({round(loss.sum().item(), 4) for loss in losses}) == len(losses)


@pytest.mark.parametrize("name", ["transport", "diffusion"])
def test_alignment_is_added_to_the_loss_of_the_very_same_forward_pass(batch, name):
    network, inputs = batch
    inputs = inputs | ({"t": torch.tensor([0, 3, 400, 700, 999])} if name == "diffusion" else {})
    aligned = AlignmentConfig(weight=0.7, block=1, projector_size=8)
    projector, features = new_projector(16, aligned, 6, 0), torch.randn(5, 4, 6)
    seen = []

    def watched(*arguments, **options):
        output, tokens = network(*arguments, **options)
        seen.append((options, tokens))
        return output, tokens

    loss = loss_of(watched, ObjectiveConfig(name, alignment=aligned), **inputs, features=features, projector=projector)
    [(options, tokens)] = seen
    assert options == {"tap": 1}
    plain = loss_of(network, ObjectiveConfig(name), **inputs)
    torch.testing.assert_close(loss, plain + 0.7 * alignment_loss(projector, tokens, features))


def test_times_are_one_number_each_whatever_their_law():
    uniform = torch.rand(2000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(times(uniform, ObjectiveConfig("transport")), uniform)
    logit_normal = times(uniform, ObjectiveConfig("transport", transport=TransportConfig(times="logit_normal")))
    assert torch.equal(logit_normal.argsort(), uniform.argsort()) and logit_normal.std() < 0.9 * uniform.std()
    steps = times(uniform, ObjectiveConfig("diffusion"))
    assert steps.dtype == torch.long and steps.min() == 0 and steps.max() == 999


def test_a_variance_that_is_learned_needs_outputs():
    narrow = ModelConfig("custom", 2, 16, 1, 2, learn_sigma=False)
    with pytest.raises(ValueError, match="model.learn_sigma must be true for objective.name diffusion"):
        require_objective(narrow, ObjectiveConfig("diffusion"))
    require_objective(narrow, ObjectiveConfig("diffusion", diffusion=DiffusionConfig(variance="fixed_large")))
    require_objective(narrow, ObjectiveConfig("transport"))


@pytest.mark.parametrize(
    "told,message",
    [
        (
            {"transport": {"pth": "gvp"}},
            "objective.transport.pth: no such setting (did you mean objective.transport.path?)",
        ),
        ({"alignment": {"weight": -1}}, "objective.alignment.weight must not be negative (0 = off), got -1.0"),
        (
            {"diffusion": {"schedule": "quadratic"}},
            "objective.diffusion.schedule: input should be 'linear' or 'cosine'",
        ),
        ({"alignement": {}}, "objective.alignement: no such setting (did you mean objective.alignment?)"),
    ],
)
def test_a_fault_deep_in_the_settings_is_named_with_its_path(told, message):
    with pytest.raises(ValueError) as caught:
        parse("objective", {"name": "transport", **told}, ObjectiveConfig)
    assert str(caught.value).startswith(message)
