"""What the network learns: the noise of a discrete chain (DiT) or the velocity of a path (SiT), and, where asked for,
to align its tokens with an image's features. One function gives the loss of a batch, whichever it is.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import cache
from typing import Any, Literal

from torch import Tensor, nn

from dit import diffusion, transport
from dit.alignment import AlignmentConfig, alignment_loss
from dit.diffusion import DiffusionConfig
from dit.transport import TransportConfig


@dataclass(frozen=True)
class ObjectiveConfig:
    """Which of the two, and the settings of each; those of the other one are not looked at."""

    name: Literal["diffusion", "transport"]
    diffusion: DiffusionConfig = DiffusionConfig()
    transport: TransportConfig = TransportConfig()
    alignment: AlignmentConfig = AlignmentConfig()

    def active(self) -> dict[str, Any]:
        """The settings that have a part in the loss: what they are not, can be changed without changing the training."""
        told = {"name": self.name, self.name: asdict(getattr(self, self.name))}
        return told | ({"alignment": asdict(self.alignment)} if self.alignment.weight else {})


def objective_from(told: dict[str, Any]) -> ObjectiveConfig:
    """The objective that a checkpoint's config.json tells; what it does not say has its default."""
    parts = {field.name: field.type for field in fields(ObjectiveConfig) if field.name != "name"}
    return ObjectiveConfig(told["name"], **{key: kind(**told.get(key, {})) for key, kind in parts.items()})


def times(uniform: Tensor, objective: ObjectiveConfig) -> Tensor:
    """Training times of a batch from numbers (N,) in [0, 1): one each, whatever the law of the times is."""
    if objective.name == "transport":
        return transport.sample_times(uniform, objective.transport)
    return (uniform * diffusion.NUM_TIMESTEPS).long()


def loss_of(
    network: Callable[..., Any],
    objective: ObjectiveConfig,
    x: Tensor,
    y: Tensor,
    t: Tensor,
    noise: Tensor,
    *,
    features: Tensor | None = None,
    projector: nn.Module | None = None,
) -> Tensor:
    """The loss (N,) for clean latents x (N, C, H, W), labels (N,) or embeddings (N, L, E) y, and times t (N,).

    With a projector and features (N, L, E) the alignment's term is part of it.
    """
    aligned, tokens = objective.alignment, []

    def tapped(x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        output, inner = network(x_t, t, y, tap=aligned.block)
        tokens.append(inner)
        return output

    model = network if projector is None else tapped
    if objective.name == "transport":
        loss = transport.training_loss(model, x, y, t, noise, objective.transport)
    else:
        loss = diffusion.training_loss(_chain(objective.diffusion), model, x, y, t, noise)
    return loss if projector is None else loss + aligned.weight * alignment_loss(projector, tokens[0], features)


def require_objective(model: Any, objective: ObjectiveConfig) -> None:
    """Raise ValueError where the network's outputs do not fit the objective. `model` is its config."""
    if objective.name == "diffusion" and objective.diffusion.learns_variance and not model.learn_sigma:
        raise ValueError(
            "model.learn_sigma must be true for objective.name diffusion: it learns the range of variances "
            "(objective.diffusion.variance fixed_large or fixed_small does not)"
        )


_chain = cache(diffusion.chain)
