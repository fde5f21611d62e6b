"""train: the diffusion transformer, from latents to weights. Run it again and it goes on where it stopped."""

import csv
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dit import entry, finetune, latents, registry, resume, runtime, tracking
from dit.checkpoint import (
    CONDITIONS,
    TrainingState,
    load_tensors,
    network_config,
    power_file,
    save_state,
    save_tensors,
)
from dit.initial import Initial, open_initial, require_latents
from dit.latents import LatentDataset, read_index
from dit.model import DiT, ModelConfig
from dit.objective import ObjectiveConfig, require_objective
from dit.paths import Paths, publish, write_json
from dit.preview import previews
from dit.runtime import RunConfig
from dit.trainer import TrainConfig, fit, mathematics


def train(model: ModelConfig, objective: ObjectiveConfig, train: TrainConfig, run: RunConfig, *, paths: Paths) -> None:
    """Write artifacts/train: the last weights, the averages, loss.csv, config.json, run.json."""
    device = runtime.start(run)
    require_objective(model, objective)
    encoded = paths.artifacts / "encode"
    index = read_index(encoded)
    initial = initial_weights(train, index, paths)
    torch.manual_seed(train.seed)
    network = new_network(model, index).to(device)
    data = LatentDataset(encoded, train.seed, train.global_batch_size)
    config = describe(network, objective, train, index, initial)
    name = mathematics(network, objective, train, index["digest"], initial and initial.digest)
    with resume.begun(paths, name, train.max_steps) as work:
        if initial and work.state is None:
            for sentence in finetune.begin_with(network, initial, objective, index, trained=train.max_steps > 0):
                print(sentence)
        size = f"{sum(p.numel() for p in network.parameters()):,} parameters, {data.size} images"
        print(f"{size}, {train.max_steps} steps of {train.global_batch_size} on {device}")
        inputs = [tracking.Dataset(index["data"]["name"], index["digest"], encoded.as_posix(), "train")]
        with tracking.open_run(
            paths,
            f"{index['data']['name']}-{name[:8]}",
            experiment=run.experiment,
            datasets=inputs,
            run_id=work.notes.get("mlflow_run_id"),
        ) as mirror:
            work.note(mlflow_run_id=mirror.id or work.notes.get("mlflow_run_id"), tracking_uri=mirror.tracking_uri)
            if config["license"]:
                mirror.tags({"license": config["license"]})
            state = work.take()
            done = state.step if state else 0
            with entry.deferred_interrupts() as should_stop:
                state = fit(
                    network,
                    data,
                    objective,
                    train,
                    run,
                    resume=state,
                    log=with_speed(mirror.log, train.global_batch_size, done),
                    save=lambda state: keep(work.folder, state, train, run),
                    observe=previews(paths, work.folder / "previews", config, mirror.image),
                    should_stop=should_stop,
                )
            if state.step < train.max_steps:
                raise entry.Interrupted(f"stopped at step {state.step} of {train.max_steps}, which is saved")
        with publish(paths.artifacts / "train", paths.scratch) as folder:
            export(folder, work, state, network, train, config)
            if model.condition == "embeddings":
                save_tensors(folder / "ema" / CONDITIONS, latents.conditions(encoded))
        work.note(export=resume.dvc_hash(paths.artifacts / "train"))


def initial_weights(train: TrainConfig, index: dict[str, Any], paths: Paths) -> Initial | None:
    """The weights that training begins with, if any are named. Raises ValueError where they do not fit the latents."""
    if train.init_from is None:
        return None
    initial = open_initial(train.init_from, partial(registry.download, paths), paths.root)
    require_latents(initial, index)
    return initial


def new_network(model: ModelConfig, index: dict[str, Any]) -> DiT:
    """A network for the latents that `index` tells of. Raises ValueError where they lack what it is conditioned on."""
    shape = (index.get("features") or {}).get("shape")
    if model.condition == "embeddings" and shape is None:
        raise ValueError("model.condition: the latents carry no embeddings: set encode.features, or classes or none")
    sizes = {"input_size": index["size"], "in_channels": index["channels"], "num_classes": len(index["classes"])}
    return DiT(model, **sizes, condition_shape=tuple(shape) if shape else None)


def describe(
    network: DiT,
    objective: ObjectiveConfig,
    train: TrainConfig,
    index: dict[str, Any],
    initial: Initial | None = None,
) -> dict[str, Any]:
    """config.json: all that a checkpoint's user needs to know. The licence is that of the weights it began with."""
    normalization = index["normalization"]
    return {
        "model": network_config(network),
        "objective": asdict(objective),
        "latents": {
            "digest": index["digest"],
            "autoencoder": index["autoencoder"],
            "mean": normalization["mean"],
            "std": normalization["std"],
        },
        "classes": index["classes"],
        "image_size": index["image_size"],
        "data": index["data"],
        "training": asdict(train),
        "step": train.max_steps,
        "weights": "raw",
        "init": initial.told() if initial else None,
        "license": initial.config.get("license") if initial else None,
    }


def keep(folder: Path, state: TrainingState, train: TrainConfig, run: RunConfig) -> None:
    """Save a state, and the averages of it where a snapshot is due."""
    if train.snapshot_every_steps and state.step % train.snapshot_every_steps == 0:
        (folder / "snapshots").mkdir(exist_ok=True)
        for name, tensors in averages(state, train):
            save_tensors(folder / "snapshots" / name, tensors)
    save_state(folder, state, run.keep_checkpoints)


def averages(state: TrainingState, train: TrainConfig) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """The file's name and the tensors of each average in a state: the exponential one, and those of each power."""
    yield f"step-{state.step:08d}.safetensors", _part(state, "ema.")
    for width in train.power_ema:
        yield power_file(width, state.step), _part(state, f"power.{width}.")


def export(
    folder: Path,
    work: resume.Work,
    state: TrainingState,
    network: DiT,
    train: TrainConfig,
    config: dict[str, Any],
) -> None:
    """Fill artifacts/train from the final state and the snapshots on the way."""
    fixed = {"pos_embed": network.pos_embed}
    save_tensors(folder / "model.safetensors", _part(state, "model.") | fixed)
    (folder / "ema").mkdir()
    for snapshot in sorted((work.folder / "snapshots").glob("*.safetensors")):
        save_tensors(folder / "ema" / snapshot.name, load_tensors(snapshot) | fixed)
    for name, tensors in averages(state, train):
        save_tensors(folder / "ema" / name, tensors | fixed)
    with open(folder / "loss.csv", "w", newline="") as file:
        csv.writer(file).writerows([["step", "loss", "lr"], *state.values["rows"]])
    write_json(folder / "config.json", {**config, "step": state.step})
    machine = {"device": network.pos_embed.device.type, "threads": torch.get_num_threads(), "torch": torch.__version__}
    notes = {k: work.notes.get(k) for k in ("mlflow_run_id", "tracking_uri", "earlier_code")}
    write_json(folder / "run.json", {**notes, "python": platform.python_version(), **machine})


def with_speed(
    log: Callable[[int, dict[str, float]], None], global_batch_size: int, last_step: int
) -> Callable[[int, dict[str, float]], None]:
    """`log` with images per second since the last call added."""
    last_time = time.monotonic()

    def logged(step: int, values: dict[str, float]) -> None:
        nonlocal last_step, last_time
        now = time.monotonic()
        speed = (step - last_step) * global_batch_size / max(now - last_time, 1e-9)
        log(step, {**values, "images_per_second": speed})
        last_step, last_time = step, now

    return logged


def _part(state: TrainingState, prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.tensors.items() if name.startswith(prefix)}


if __name__ == "__main__":
    entry.main(train)
