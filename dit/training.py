"""What decides a training's weights: its settings, and the name that tells it from every other training."""

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from typing import Literal

from dit import ema
from dit.checkpoint import network_config
from dit.model import DiT
from dit.objective import ObjectiveConfig
from dit.schedule import warmup_cosine


@dataclass(frozen=True)
class TrainConfig:
    """Everything about training that changes the weights."""

    max_steps: int  # 0, where init_from is set: its weights pass straight on
    global_batch_size: int
    lr: float
    lr_schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    grad_clip: float = 0.0  # 0 = off
    class_dropout_prob: float = 0.1
    ema_decay: float = 0.9999
    ema_warmup: bool = False
    power_ema: tuple[float, ...] = ()  # relative widths of power-function averages, kept at every snapshot
    snapshot_every_steps: int = 0  # averages kept along the way; 0 = only the last
    init_from: str | None = None  # a checkpoint folder, models:/NAME@ALIAS or models:/NAME/VERSION; null = drawn
    precision: Literal["fp32", "bf16"] = "fp32"
    classes: Literal["natural", "balanced"] | dict[str, float] = "natural"  # how often each is seen
    shuffle_window: int = 0  # images shuffled together, in whole shards; 0 = all
    data_parts: int = 1  # parts that the data is dealt into, for hosts that read their own only
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_steps < (self.init_from is None):
            least = "at least 1 (0 is for train.init_from)" if self.init_from is None else "0 or more"
            raise ValueError(f"max_steps must be {least}, got {self.max_steps}")
        if self.global_batch_size < 1:
            raise ValueError(f"global_batch_size must be at least 1, got {self.global_batch_size}")
        if self.init_from is not None and not self.init_from.strip():
            raise ValueError("init_from must be null, a checkpoint folder or models:/NAME@ALIAS, got an empty text")
        self._check_power_ema()
        if not 1 <= self.data_parts <= self.global_batch_size:
            raise ValueError(f"data_parts must be 1 to global_batch_size, got {self.data_parts}")
        if isinstance(self.classes, dict) and not (
            min(self.classes.values(), default=0) >= 0 and max(self.classes.values(), default=1) < math.inf
        ):
            raise ValueError(f"classes must have weights of 0 or more, got {self.classes}")
        for name in ("warmup_steps", "snapshot_every_steps", "grad_clip", "weight_decay", "shuffle_window"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be 0 to {2**63 - 1}, got {self.seed}")
        if not 0 < self.lr < 10:
            raise ValueError(f"lr must be above 0 and below 10, got {self.lr}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be at least 0 and below 1, got {list(self.betas)}")
        for name in ("class_dropout_prob", "ema_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)}")

    def _check_power_ema(self) -> None:
        for width in self.power_ema:
            if not 0 < width < ema.SIGMA_REL_LIMIT:
                raise ValueError(
                    f"power_ema must be above 0 and below {ema.SIGMA_REL_LIMIT:.4f}, got {list(self.power_ema)}"
                )
        if len(set(self.power_ema)) < len(self.power_ema):
            raise ValueError(f"power_ema must not name a width twice, got {list(self.power_ema)}")
        if self.power_ema and not self.max_steps:
            raise ValueError("power_ema needs at least one step: set it to [] where max_steps is 0")

    def lr_at(self, step: int) -> float:
        """The learning rate of a step (0-based)."""
        if self.lr_schedule == "cosine":
            return self.lr * warmup_cosine(step, self.max_steps, self.warmup_steps)
        return self.lr * min(1.0, (step + 1) / max(1, self.warmup_steps))


def mathematics(
    network: DiT, objective: ObjectiveConfig, train: TrainConfig, latents: str, initial: str | None = None
) -> str:
    """The name of a training: a digest of all that decides its weights and averages at a given step.

    `max_steps` is no part of it where the learning rate does not depend on it: raising it continues the same training.
    `initial` is the digest of the weights that it begins with: what they are counts, and not where they lie.
    """
    settings = asdict(train)
    del settings["init_from"]
    if train.lr_schedule == "constant":
        del settings["max_steps"]
    told = [network_config(network), objective.active(), settings, latents, initial]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]
