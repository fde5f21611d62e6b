"""The training loop. It knows tensors and steps; where things are logged and saved is the caller's business.

All randomness of a step is drawn from (seed, step) for the whole global batch, and the batch itself is a function of
the step. So what a run computes does not depend on where it was stopped, and the split into device batches changes
only the rounding.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from dit import ema
from dit.alignment import new_projector, require_alignment
from dit.checkpoint import TrainingState, network_config
from dit.latents import LatentDataset, draw, pick_features
from dit.learner import Learner
from dit.model import DiT
from dit.objective import ObjectiveConfig, loss_of, times
from dit.progress import Progress
from dit.randomness import generator
from dit.runtime import RunConfig, autocast
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
        for name in ("warmup_steps", "snapshot_every_steps", "grad_clip", "weight_decay"):
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


def fit(
    network: DiT,
    data: LatentDataset,
    objective: ObjectiveConfig,
    train: TrainConfig,
    run: RunConfig,
    *,
    resume: TrainingState | None = None,
    log: Callable[[int, dict[str, float]], None] = lambda step, values: None,
    save: Callable[[TrainingState], None] = lambda state: None,
    observe: Callable[[int, Callable[[], DiT]], None] = lambda step, average: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> TrainingState:
    """Train `network` (on its device already) in place and return the state at the end, or where it was stopped.

    `log(step, values)` every `run.log_every_steps`, `save(state)` every `run.checkpoint_every_steps` and at the end,
    `observe(step, average)` every `run.preview_every_steps`, where `average()` builds the EMA network.
    Raises ValueError with the step where the loss is not finite; nothing of it is saved.
    """
    learner = new_learner(network, data, objective, train)
    data = copy(data)
    for name in ("shift", "scale"):  # once: the host waits for each such copy
        setattr(data, name, getattr(data, name).to(network.pos_embed.device))
    step, rows, losses = 0, [], []
    if resume is not None:
        step, rows = resume.step, list(resume.values["rows"])
        losses = list(resume.tensors["pending_losses"].to(network.pos_embed.device).unbind())
        learner.unpack(resume)
        resume = None  # some GB for a large model, and all of it is in the learner now

    def state() -> TrainingState:
        _require_finite(losses, step, learner.weights)
        return learner.pack(step, losses, rows)

    size = train.global_batch_size
    progress = Progress("train", train.max_steps * size, before=step * size)
    saved = None
    network.train()
    while step < train.max_steps:
        learner.optimizer.param_groups[0]["lr"] = train.lr_at(step)
        losses.append(train_step(learner, data, objective, train, run, step))
        learner.average(step, ema.decay_at(step, train.ema_decay, train.ema_warmup))
        step += 1
        last = step == train.max_steps
        if step % run.log_every_steps == 0 or last:
            _require_finite(losses, step)
            loss = torch.stack(losses).mean().item()
            rows.append([step, loss, train.lr_at(step - 1)])
            losses.clear()
            log(step, {"loss": loss, "lr": train.lr_at(step - 1)})
        note = (
            f" (step {step}/{train.max_steps}, loss {rows[-1][1]:.4f})" if rows else f" (step {step}/{train.max_steps})"
        )
        progress(train.global_batch_size, note)
        if run.preview_every_steps and (step % run.preview_every_steps == 0 or last):
            observe(step, learner.averaged_network)
        stop = should_stop() and not last
        snapshot = train.snapshot_every_steps and step % train.snapshot_every_steps == 0
        saved = None
        if step % run.checkpoint_every_steps == 0 or last or stop or snapshot:
            saved = state()
            save(saved)
        if stop:
            break
    return saved or state()


def new_learner(network: DiT, data: LatentDataset, objective: ObjectiveConfig, train: TrainConfig) -> Learner:
    """The learner before its first step. Raises ValueError where the latents carry no features to align with."""
    aligned, features = objective.alignment, data.tensors.get("features")
    shape, mirrored = None if features is None else tuple(features.shape[1:]), "features_mirror" in data.tensors
    require_alignment(aligned, network.config.depth, shape, mirrored=mirrored or not data.mirror)
    projector, steps = None, aligned.stop_step or train.max_steps
    if aligned.weight:
        projector = new_projector(network.config.hidden_size, aligned, features.shape[-1], train.seed)
        projector = projector.to(network.pos_embed.device)
    return Learner(
        network,
        lr=train.lr,
        betas=train.betas,
        weight_decay=train.weight_decay,
        power_ema=train.power_ema,
        projector=projector,
        projector_steps=steps,
    )


def train_step(
    learner: Learner, data: LatentDataset, objective: ObjectiveConfig, train: TrainConfig, run: RunConfig, step: int
) -> Tensor:
    """One optimizer step on the global batch of `step`; returns its mean loss, still on the device."""
    network, device = learner.network, learner.network.pos_embed.device
    inputs = step_inputs(on_device(data.batch(step), network, objective, step), data, network, objective, train, step)
    projector: nn.Module | None = learner.projector if objective.alignment.active_at(step) else None
    N = train.global_batch_size
    size = run.device_batch_size or N
    learner.optimizer.zero_grad(set_to_none=True)
    total = torch.zeros((), device=device)
    for start in range(0, N, size):
        part = {key: tensor[start : start + size] for key, tensor in inputs.items()}
        with autocast(device, train.precision):
            loss = loss_of(network, objective, **part, projector=projector).sum() / N
        loss.backward()
        total += loss.detach()
    if train.grad_clip:
        torch.nn.utils.clip_grad_norm_(list(learner.trained.values()), train.grad_clip)
    learner.optimizer.step()
    return total


def on_device(batch: dict[str, Tensor], network: DiT, objective: ObjectiveConfig, step: int) -> dict[str, Tensor]:
    """A batch on the network's device; features only while they are its condition, or tokens are aligned with them."""
    device = network.pos_embed.device
    if network.config.condition != "embeddings" and not objective.alignment.active_at(step):
        batch = {key: tensor for key, tensor in batch.items() if not key.startswith("features")}
    if device.type == "cuda":  # from pinned memory it travels while the host goes on
        batch = {key: tensor.pin_memory() for key, tensor in batch.items()}
    return {key: tensor.to(device, non_blocking=True) for key, tensor in batch.items()}


def step_inputs(
    batch: dict[str, Tensor],
    data: LatentDataset,
    network: DiT,
    objective: ObjectiveConfig,
    train: TrainConfig,
    step: int,
) -> dict[str, Tensor]:
    """x, y, t and noise of a step's global batch: all randomness of the step, drawn in one fixed order.

    `batch`, and the data's shift and scale, are on the network's device.

    And `features` (N, L, E), the mirror image's where that was picked, while tokens are aligned with them. y is the
    labels or, for a network that is conditioned on embeddings, the features; the null condition where it is dropped.
    """
    mean, device = batch["mean"], batch["mean"].device
    draws = generator(train.seed, "step", step, device=device)
    N = len(mean)
    posterior = torch.randn(mean.shape, generator=draws, device=device)
    noise = torch.randn(mean.shape, generator=draws, device=device)
    uniform, dropped, mirrored = torch.rand((3, N), generator=draws, device=device)
    mirror = mirrored < 0.5 if data.mirror else None
    inputs = {"x": draw(batch, data.shift, data.scale, posterior, mirror)}
    features = pick_features(batch, mirror) if "features" in batch else None
    if network.config.condition == "embeddings":
        inputs["y"] = torch.where((dropped < train.class_dropout_prob).view(-1, 1, 1), network.null(N), features)
    elif network.num_classes == 0:
        inputs["y"] = torch.zeros_like(batch["label"])
    else:
        inputs["y"] = torch.where(dropped < train.class_dropout_prob, network.null_label, batch["label"])
    if objective.alignment.active_at(step):
        inputs["features"] = features
    return inputs | {"t": times(uniform, objective), "noise": noise}


def _require_finite(losses: list[Tensor], step: int, weights: Sequence[Tensor] = ()) -> None:
    bad = (~torch.isfinite(torch.stack(losses))).nonzero().flatten().tolist() if losses else []
    if not bad and all(torch.isfinite(weight).all() for weight in weights):
        return
    first = step - len(losses) + bad[0] + 1 if bad else step + 1  # infinite weights show in the next loss
    raise ValueError(
        f"train.lr: the loss is not finite at step {first}, nothing of it was saved: "
        "lower train.lr, set train.grad_clip, or train.precision to fp32"
    )
