"""The training loop. It knows tensors and steps; where things are logged and saved is the caller's business.

All randomness of a step is drawn from (seed, step) for the whole global batch, and the batch itself is a function of
the step. So what a run computes does not depend on where it was stopped, and the split into processes and device
batches changes only the rounding. Nothing in a step waits for the device: what has to be known is asked at the log
interval.
"""

import contextlib
from collections.abc import Callable
from copy import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from dit import ema
from dit.alignment import new_projector, require_alignment
from dit.dataset import LatentDataset
from dit.feeding import Feed
from dit.latents import draw, pick_features
from dit.learner import Learner
from dit.model import DiT
from dit.monitor import COLUMNS, Monitor, scaled_time
from dit.objective import ObjectiveConfig, times
from dit.parallel import Agreement, World, world
from dit.progress import Progress
from dit.randomness import generator
from dit.runtime import RunConfig, autocast
from dit.states import SavedState, TrainingState
from dit.training import TrainConfig
from dit.wrapping import Wrapped

Observer = Callable[[int, Callable[[], DiT]], None]


def fit(
    network: DiT,
    data: LatentDataset,
    objective: ObjectiveConfig,
    train: TrainConfig,
    run: RunConfig,
    *,
    resume: SavedState | None = None,
    log: Callable[[int, dict[str, float]], None] = lambda step, values: None,
    speed: Callable[[int, float], dict[str, float]] = lambda step, waited: {},
    save: Callable[[TrainingState], None] = lambda state: None,
    observe: Observer = lambda step, average: None,
    score: Observer = lambda step, average: None,
    should_stop: Callable[[], bool] = lambda: False,
    last_good: Callable[[], str | None] = lambda: None,
) -> TrainingState:
    """Train `network` (on its device already) in place and return the state at the end, or where it was stopped.

    Every process of the world calls it, with the same arguments. States are live: the next step changes their tensors.

    `log(step, values)` every `run.log_every_steps` (with what `speed(step, seconds waited for data)` adds), and
    `save(state)` every `run.checkpoint_every_steps`, at the snapshots, at the end, and when any process says
    `should_stop()`. `observe(step, average)` every `run.preview_every_steps` and `score(step, average)` every
    `run.score_every_steps`, on the main process, where `average()` builds the EMA network.

    A step whose gradient is not finite is skipped. Raises ValueError where `run.max_bad_steps` in a row were; it names
    the state that `last_good()` names.
    """
    us, device, size = world(), network.pos_embed.device, train.global_batch_size
    part = share(size, us)
    projector = new_alignment(network, data, objective, train)
    begin = resume.step if resume else 0
    wrapped = Wrapped(network, projector, objective, train, run, us, steps_done=begin)
    learner = Learner(
        network, betas=train.betas, weight_decay=train.weight_decay, power_ema=train.power_ema, projector=projector
    )
    monitor = Monitor(device, size, us, max_bad_steps=run.max_bad_steps, last_good=last_good)
    agreement, step, rows, whole = Agreement(), begin, [], None
    if resume:
        resume.load_into(learner.tensors())
        values = resume.values
        whole = values.get("whole")
        if whole and step < train.max_steps:  # longer than it was to be: the end had cut a row short
            values, whole = values | whole, None
        monitor.load(values["monitor"])
        rows = [list(row) for row in values["rows"]]
    data = copy(data)
    for name in ("shift", "scale"):  # once: the host waits for each such copy
        setattr(data, name, getattr(data, name).to(device))

    def state() -> TrainingState:
        values = {"rows": rows.copy(), "monitor": monitor.values(), "whole": whole}
        return TrainingState(step, learner.tensors(), values)

    progress = Progress("train", train.max_steps * size, before=step * size)
    saved = None
    network.train()
    needed = partial(used, data, network, objective)
    with Feed(data, range(step, train.max_steps), part, device, wanted=needed) as feed:
        while step < train.max_steps:
            with phase("data"):
                batch = next(feed)
            train_step(learner, wrapped, monitor, batch, data, objective, train, run, part, step)
            with phase("average"):
                learner.average(step, ema.decay_at(step, train.ema_decay, train.ema_warmup))
            step += 1
            last = step == train.max_steps
            if step % run.log_every_steps == 0 or last:
                if step % run.log_every_steps:
                    whole = {"rows": rows.copy(), "monitor": monitor.values()}
                row = monitor.row(step, train.lr_at(step - 1))
                rows.append([row[name] for name in COLUMNS])
                told = {name: value for name, value in row.items() if name != "step" and value is not None}
                log(step, told | speed(step, feed.waited))
            progress(size, note(step, train.max_steps, rows))
            for every, look in ((run.preview_every_steps, observe), (run.score_every_steps, score)):
                if every and (step % every == 0 or last):
                    look_at(learner, us, step, look)
            stop = agreement.ask(should_stop()) and not last
            snapshot = train.snapshot_every_steps and step % train.snapshot_every_steps == 0
            saved = None
            if step % run.checkpoint_every_steps == 0 or last or stop or snapshot:
                saved = state()
                save(saved)
            if stop:
                break
    agreement.settle()
    return saved or state()


def used(data: LatentDataset, network: DiT, objective: ObjectiveConfig, step: int) -> list[str]:
    """What a step needs of each image: features only while they are its condition, or tokens are aligned with them."""
    featured = network.config.condition == "embeddings" or objective.alignment.active_at(step)
    return [key for key in data.keys if featured or not key.startswith("features")]


def share(size: int, us: World) -> slice:
    """This process's images of a global batch of `size`. Raises ValueError where they cannot be shared out evenly."""
    if size % us.size:
        raise ValueError(
            f"train.global_batch_size: {size} images are no whole number for each of {us.size} processes: "
            "change it, or set run.processes"
        )
    each = size // us.size
    return slice(us.rank * each, (us.rank + 1) * each)


def new_alignment(
    network: DiT, data: LatentDataset, objective: ObjectiveConfig, train: TrainConfig
) -> nn.Module | None:
    """The projector that tokens are aligned through, if they are. Raises ValueError where the latents' features do not
    allow it."""
    aligned, shape = objective.alignment, data.feature_shape
    require_alignment(aligned, network.config.depth, shape, mirrored=data.has("features_mirror") or not data.mirror)
    if not aligned.weight:
        return None
    return new_projector(network.config.hidden_size, aligned, shape[-1], train.seed).to(network.pos_embed.device)


def train_step(
    learner: Learner,
    wrapped: Wrapped,
    monitor: Monitor,
    batch: dict[str, Tensor],
    data: LatentDataset,
    objective: ObjectiveConfig,
    train: TrainConfig,
    run: RunConfig,
    part: slice,
    step: int,
) -> None:
    """One optimizer step, of which `batch` are this process's images, `part` of the global batch."""
    device, aligned = learner.network.pos_embed.device, objective.alignment.active_at(step)
    with phase("data"):
        inputs = step_inputs(batch, data, learner.network, objective, train, step, part)
    here = part.stop - part.start
    size = min(run.device_batch_size or here, here)
    learner.forget_gradients()
    for start in range(0, here, size):
        piece = {key: tensor[start : start + size] for key, tensor in inputs.items()}
        with wrapped.exchanging(last=start + size >= here, aligned=aligned):
            with phase("forward"), autocast(device, train.precision):
                losses = wrapped.losses(piece)
                loss = losses.sum() / (train.global_batch_size / wrapped.size)
            loss.backward()
        monitor.record(losses, scaled_time(piece["t"], objective))
    with phase("optimizer"):
        monitor.end_step(*learner.update(train.lr_at(step), train.grad_clip))


def step_inputs(
    batch: dict[str, Tensor],
    data: LatentDataset,
    network: DiT,
    objective: ObjectiveConfig,
    train: TrainConfig,
    step: int,
    part: slice = slice(None),
) -> dict[str, Tensor]:
    """x, y, t and noise of a part of a step's global batch: all randomness of the step, drawn for the whole of it in one
    fixed order.

    `batch` is that part's; it, and the data's shift and scale, are on the network's device.

    And `features` (N, L, E), the mirror image's where that was picked, while tokens are aligned with them. y is the
    labels or, for a network that is conditioned on embeddings, the features; the null condition where it is dropped.
    """
    mean, device = batch["mean"], batch["mean"].device
    draws, N = generator(train.seed, "step", step, device=device), train.global_batch_size
    posterior, noise = (torch.randn(N, *mean.shape[1:], generator=draws, device=device)[part] for _ in range(2))
    uniform, dropped, mirrored = torch.rand((3, N), generator=draws, device=device)[:, part]
    mirror = mirrored < 0.5 if data.mirror else None
    inputs = {"x": draw(batch, data.shift, data.scale, posterior, mirror)}
    features = pick_features(batch, mirror) if "features" in batch else None
    if network.config.condition == "embeddings":
        null = network.null(len(mean))
        inputs["y"] = torch.where((dropped < train.class_dropout_prob).view(-1, 1, 1), null, features)
    elif network.num_classes == 0:
        inputs["y"] = torch.zeros_like(batch["label"])
    else:
        inputs["y"] = torch.where(dropped < train.class_dropout_prob, network.null_label, batch["label"])
    if objective.alignment.active_at(step):
        inputs["features"] = features
    return inputs | {"t": times(uniform, objective), "noise": noise}


def phase(name: str) -> contextlib.AbstractContextManager[Any]:
    """A mark in a trace (`dit.profiling`), and nothing where none is made: a mark costs as much as a small operation."""
    return record_function(f"train/{name}") if torch.autograd._profiler_enabled() else contextlib.nullcontext()


def look_at(learner: Learner, us: World, step: int, look: Observer) -> None:
    """Let the main process look at the average; the others help to put it together where it is sharded."""
    if learner.sharded:
        network = learner.averaged_network(wanted=us.main)
        average = lambda: network  # noqa: E731
    else:
        average = learner.averaged_network
    if us.main:
        look(step, average)


def note(step: int, max_steps: int, rows: list[list[Any]]) -> str:
    """What stands beside the progress: the step, and the last loss if there is one."""
    loss = rows[-1][1] if rows else None
    return f" (step {step}/{max_steps})" if loss is None else f" (step {step}/{max_steps}, loss {loss:.4f})"
