"""The training loop. It knows tensors and steps; where things are logged and saved is the caller's business.

All randomness of a step is drawn from (seed, step) for the whole global batch, and the batch itself is a function of
the step. So what a run computes does not depend on where it was stopped, and the split into device batches changes
only the rounding.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from dit import diffusion, ema, transport
from dit.checkpoint import TrainingState, build, network_config
from dit.latents import LatentDataset, draw
from dit.model import DiT
from dit.progress import Progress
from dit.randomness import generator
from dit.runtime import RunConfig, autocast
from dit.schedule import warmup_cosine


@dataclass(frozen=True)
class ObjectiveConfig:
    """What the network learns: noise of a discrete chain (DiT), or the velocity of the linear path (SiT)."""

    name: Literal["diffusion", "transport"]


@dataclass(frozen=True)
class TrainConfig:
    """Everything about training that changes the weights."""

    max_steps: int
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
    snapshot_every_steps: int = 0  # EMA weights kept along the way; 0 = only the last
    precision: Literal["fp32", "bf16"] = "fp32"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("max_steps", "global_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
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

    def lr_at(self, step: int) -> float:
        """The learning rate of a step (0-based)."""
        if self.lr_schedule == "cosine":
            return self.lr * warmup_cosine(step, self.max_steps, self.warmup_steps)
        return self.lr * min(1.0, (step + 1) / max(1, self.warmup_steps))


def mathematics(network: DiT, objective: ObjectiveConfig, train: TrainConfig, latents: str) -> str:
    """The name of a training: a digest of all that decides its weights at a given step.

    `max_steps` is no part of it where the learning rate does not depend on it: raising it continues the same training.
    """
    settings = asdict(train)
    if train.lr_schedule == "constant":
        del settings["max_steps"]
    told = [network_config(network), asdict(objective), settings, latents]
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
    device = network.pos_embed.device
    names, weights = zip(*network.named_parameters(), strict=True)
    averages = [weight.detach().clone() for weight in weights]
    optimizer = torch.optim.AdamW(
        weights, lr=train.lr, betas=train.betas, weight_decay=train.weight_decay, fused=device.type in ("cpu", "cuda")
    )
    step, rows, losses = 0, [], []
    if resume is not None:
        step, rows = resume.step, list(resume.values["rows"])
        losses = list(resume.tensors["pending_losses"].to(device).unbind())
        _restore(resume, names, weights, averages, optimizer)
        resume = None  # some GB for a large model, and all of it is in the optimizer now

    def state() -> TrainingState:
        _require_finite(losses, step, weights)
        tensors = {"pending_losses": torch.stack(losses) if losses else torch.zeros(0)}
        for name, weight, average in zip(names, weights, averages, strict=True):
            moments = optimizer.state[weight]
            tensors |= {f"model.{name}": weight, f"ema.{name}": average}
            tensors |= {f"exp_avg.{name}": moments["exp_avg"], f"exp_avg_sq.{name}": moments["exp_avg_sq"]}
        return TrainingState(
            step, {k: v.detach().to("cpu", copy=True) for k, v in tensors.items()}, {"rows": list(rows)}
        )

    def average() -> DiT:
        copy = build(network_config(network)).to(device)
        copy.load_state_dict(dict(zip(names, averages, strict=True)) | {"pos_embed": network.pos_embed})
        return copy.eval().requires_grad_(False)

    progress = Progress("train", (train.max_steps - step) * train.global_batch_size)
    saved = None
    network.train()
    while step < train.max_steps:
        optimizer.param_groups[0]["lr"] = train.lr_at(step)
        losses.append(train_step(network, optimizer, data, objective, train, run, step))
        ema.update(averages, weights, ema.decay_at(step, train.ema_decay, train.ema_warmup))
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
            observe(step, average)
        stop = should_stop() and not last
        snapshot = train.snapshot_every_steps and step % train.snapshot_every_steps == 0
        saved = None
        if step % run.checkpoint_every_steps == 0 or last or stop or snapshot:
            saved = state()
            save(saved)
        if stop:
            break
    return saved or state()


def train_step(
    network: DiT,
    optimizer: torch.optim.Optimizer,
    data: LatentDataset,
    objective: ObjectiveConfig,
    train: TrainConfig,
    run: RunConfig,
    step: int,
) -> Tensor:
    """One optimizer step on the global batch of `step`; returns its mean loss, still on the device."""
    device = network.pos_embed.device
    batch = {key: tensor.to(device, non_blocking=True) for key, tensor in data.batch(step).items()}
    inputs = step_inputs(batch, data, network, objective, train, step)
    N = train.global_batch_size
    size = run.device_batch_size or N
    optimizer.zero_grad(set_to_none=True)
    total = torch.zeros((), device=device)
    for start in range(0, N, size):
        part = {key: tensor[start : start + size] for key, tensor in inputs.items()}
        with autocast(device, train.precision):
            loss = loss_of(network, objective, **part).sum() / N
        loss.backward()
        total += loss.detach()
    if train.grad_clip:
        torch.nn.utils.clip_grad_norm_(network.parameters(), train.grad_clip)
    optimizer.step()
    return total


def step_inputs(
    batch: dict[str, Tensor],
    data: LatentDataset,
    network: DiT,
    objective: ObjectiveConfig,
    train: TrainConfig,
    step: int,
) -> dict[str, Tensor]:
    """x, y, t and noise of a step's global batch: all randomness of the step, drawn in one fixed order."""
    mean, device = batch["mean"], batch["mean"].device
    draws = generator(train.seed, "step", step, device=device)
    N = len(mean)
    posterior = torch.randn(mean.shape, generator=draws, device=device)
    noise = torch.randn(mean.shape, generator=draws, device=device)
    uniform, dropped, mirrored = torch.rand((3, N), generator=draws, device=device)
    x = draw(batch, data.shift.to(device), data.scale.to(device), posterior, mirrored < 0.5 if data.mirror else None)
    y = torch.where(dropped < train.class_dropout_prob, network.null_label, batch["label"])
    if network.num_classes == 0:
        y = torch.zeros_like(y)
    t = uniform if objective.name == "transport" else (uniform * diffusion.NUM_TIMESTEPS).long()
    return {"x": x, "y": y, "t": t, "noise": noise}


def loss_of(network: DiT, objective: ObjectiveConfig, x: Tensor, y: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """The objective's loss (N,)."""
    if objective.name == "transport":
        return transport.training_loss(network, x, y, t, noise)
    return diffusion.training_loss(_CHAIN, network, x, y, t, noise)


def require_objective(network: Any, objective: ObjectiveConfig) -> None:
    """Raise ValueError where the network's outputs do not fit the objective."""
    if objective.name == "diffusion" and not network.learn_sigma:
        raise ValueError(
            "model.learn_sigma must be true for objective.name diffusion: it learns the range of variances"
        )


_CHAIN = diffusion.Diffusion(diffusion.linear_betas())


def _restore(state: TrainingState, names: Any, weights: Any, averages: Any, optimizer: torch.optim.Optimizer) -> None:
    fused = optimizer.defaults["fused"]
    with torch.no_grad():
        for name, weight, average in zip(names, weights, averages, strict=True):
            weight.copy_(state.tensors[f"model.{name}"])
            average.copy_(state.tensors[f"ema.{name}"])
            optimizer.state[weight] = {
                # a fused optimizer counts on the device; else a count there would be fetched for every parameter
                "step": torch.tensor(float(state.step), device=weight.device if fused else "cpu"),
                "exp_avg": state.tensors[f"exp_avg.{name}"].to(weight.device, copy=True),
                "exp_avg_sq": state.tensors[f"exp_avg_sq.{name}"].to(weight.device, copy=True),
            }


def _require_finite(losses: list[Tensor], step: int, weights: Sequence[Tensor] = ()) -> None:
    bad = (~torch.isfinite(torch.stack(losses))).nonzero().flatten().tolist() if losses else []
    if not bad and all(torch.isfinite(weight).all() for weight in weights):
        return
    first = step - len(losses) + bad[0] + 1 if bad else step + 1  # infinite weights show in the next loss
    raise ValueError(
        f"train.lr: the loss is not finite at step {first}, nothing of it was saved: "
        "lower train.lr, set train.grad_clip, or train.precision to fp32"
    )
