"""train: the diffusion transformer, from latents to weights. Run it again and it goes on where it stopped.

    torchrun --nproc-per-node 8 -m dit.stages.train

trains with several processes: the same batches in the same order, and the same result up to rounding.
"""

import csv
import platform
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dit import dataset, entry, finetune, registry, resume, runtime, storage, tracking
from dit.checkpoint import CONDITIONS, load_tensors, network_config, power_file, save_tensors
from dit.dataset import LatentDataset
from dit.initial import Initial, open_initial, require_latents
from dit.latents import read_index
from dit.model import DiT, ModelConfig
from dit.monitor import COLUMNS
from dit.objective import ObjectiveConfig, require_objective
from dit.parallel import World, world
from dit.paths import Paths, publish, write_json
from dit.places import Folder
from dit.preview import previews
from dit.runtime import RunConfig
from dit.saving import Saver
from dit.scoring import scores
from dit.speed import Speed, flops_per_image, peak_flops
from dit.states import SavedState
from dit.trainer import fit, share
from dit.training import TrainConfig, mathematics

MIRROR_SECONDS = 60.0  # for which a training that is told to stop waits for its last state to be copied
STATE_COPIES, SLOW_DISK = 4, 200e6  # of the weights in a state; bytes a second: until a save has been timed
WORTH_TIMING = 1e12  # operations of a training, from which on it pays to time what a CPU could do


def train(model: ModelConfig, objective: ObjectiveConfig, train: TrainConfig, run: RunConfig, *, paths: Paths) -> None:
    """Write artifacts/train: the last weights, the averages, loss.csv, config.json, run.json."""
    device, us = runtime.start(run), world()
    require_objective(model, objective)
    encoded = paths.artifacts / "encode"
    index = read_index(encoded)
    initial = initial_weights(train, index, paths, us)
    torch.manual_seed(train.seed)
    network = new_network(model, index).to(device)
    far = elsewhere(run, paths)
    data = training_latents(train, run, paths, us)
    asked_with = dataset.conditions(encoded, **far) if us.main and model.condition == "embeddings" else None
    config = describe(network, objective, train, index, initial)
    name = mathematics(network, objective, train, index["digest"], initial and initial.digest)
    with resume.begun(paths, name, train.max_steps, run=run, world=us) as work:
        if initial and work.state is None:
            for sentence in finetune.begin_with(network, initial, objective, index, trained=train.max_steps > 0):
                print(sentence)
        size = f"{sum(p.numel() for p in network.parameters()):,} parameters, {data.size} images"
        on = f"{device}" if us.size == 1 else f"{us.size} processes, each on its {device.type}"
        print(f"{size}, {train.max_steps} steps of {train.global_batch_size} on {on}")
        inputs = [tracking.Dataset(index["data"]["name"], index["digest"], encoded.as_posix(), "train")]
        named = {"experiment": run.experiment, "datasets": inputs, "run_id": work.notes.get("mlflow_run_id")}
        told = tracking.open_run(paths, f"{index['data']['name']}-{name[:8]}", **named) if us.main else nullcontext()
        with told as mirror:
            if us.main:
                work.note(mlflow_run_id=mirror.id or work.notes.get("mlflow_run_id"), tracking_uri=mirror.tracking_uri)
                if config["license"]:
                    mirror.tags({"license": config["license"]})
            log = mirror.log if us.main else lambda step, values: None
            begin = work.state
            saver = Saver(
                work.folder, run.keep_checkpoints, world=us, mirror=work.mirror, before=partial(snapshot, train=train)
            )
            saver.last = begin
            saver.seconds = STATE_COPIES * sum(p.nbytes for p in network.parameters()) / SLOW_DISK
            with entry.deferred_interrupts(run) as asked:
                try:
                    state = fit(
                        network,
                        data,
                        objective,
                        train,
                        run,
                        resume=begin,
                        log=log,
                        speed=speed(network, train, us, begin.step if begin else 0),
                        save=saver.save,
                        observe=previews(
                            paths, work.folder / "previews", config, mirror.image if us.main else None, asked_with
                        ),
                        score=scores(encoded, objective, train.precision, log, **far),
                        should_stop=lambda: asked(saver.seconds + (MIRROR_SECONDS if run.mirror else 0)),
                        last_good=lambda: saver.last and saver.last.path.name,
                    )
                    if saver.last is None and not train.max_steps:
                        saver.save(state)
                finally:
                    saver.close(MIRROR_SECONDS if asked() else None)
            if state.step < train.max_steps:
                raise entry.Interrupted(f"stopped at step {state.step} of {train.max_steps}, which is saved")
        data.close()
        if us.main:
            with publish(paths.artifacts / "train", paths.scratch) as folder:
                export(folder, work, saver.last, network, train, config)
                if asked_with is not None:
                    save_tensors(folder / "ema" / CONDITIONS, asked_with)
            work.note(export=resume.dvc_hash(paths.artifacts / "train"))


def initial_weights(train: TrainConfig, index: dict[str, Any], paths: Paths, us: World) -> Initial | None:
    """The weights that training begins with, if any are named. Raises ValueError where they do not fit the latents."""
    if train.init_from is None:
        return None
    if not us.main:
        us.barrier()  # the main process brings them here
    initial = open_initial(train.init_from, partial(registry.download, paths), paths.root)
    if us.main:
        us.barrier()
    require_latents(initial, index)
    return initial


def training_latents(train: TrainConfig, run: RunConfig, paths: Paths, us: World) -> LatentDataset:
    """The latents as `train` and `run` ask for them. Raises ValueError where they are not there, or do not fit."""
    return LatentDataset(
        paths.artifacts / "encode",
        train.seed,
        train.global_batch_size,
        window=train.shuffle_window,
        classes=train.classes,
        parts=train.data_parts,
        rows=share(train.global_batch_size, us),
        where=run.latents,
        **elsewhere(run, paths),
    )


def elsewhere(run: RunConfig, paths: Paths) -> dict[str, Any]:
    """Where latents are taken from that are not in the folder, and where they are kept."""
    told, source = run.latents_from, None
    if told is not None:
        bucket = told.startswith("s3://")
        source = storage.Bucket(told, "run.latents_from") if bucket else Folder(str(paths.given(told)))
    return {"source": source, "cache": paths.memory / "latents", "cache_gb": run.cache_gb}


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


def snapshot(saved: SavedState, train: TrainConfig) -> None:
    """Keep the averages of a state where a snapshot of them is due."""
    if train.snapshot_every_steps and saved.step % train.snapshot_every_steps == 0:
        folder = saved.path.parent / "snapshots"
        folder.mkdir(exist_ok=True)
        for name, tensors in averages(saved, train):
            save_tensors(folder / name, tensors)


def averages(saved: SavedState, train: TrainConfig) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """The file's name and the tensors of each average in a state: the exponential one, and those of each power."""
    yield f"step-{saved.step:08d}.safetensors", saved.read("ema.")
    for width in train.power_ema:
        yield power_file(width, saved.step), saved.read(f"power.{width}.")


def export(
    folder: Path,
    work: resume.Work,
    saved: SavedState,
    network: DiT,
    train: TrainConfig,
    config: dict[str, Any],
) -> None:
    """Fill artifacts/train from the final state and the snapshots on the way."""
    fixed = {"pos_embed": network.pos_embed}
    save_tensors(folder / "model.safetensors", saved.read("model.") | fixed)
    (folder / "ema").mkdir()
    for snapshot in sorted((work.folder / "snapshots").glob("*.safetensors")):
        save_tensors(folder / "ema" / snapshot.name, load_tensors(snapshot) | fixed)
    for name, tensors in averages(saved, train):
        save_tensors(folder / "ema" / name, tensors | fixed)
    with open(folder / "loss.csv", "w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *saved.values["rows"]])
    write_json(folder / "config.json", {**config, "step": saved.step})
    machine = {"device": network.pos_embed.device.type, "threads": torch.get_num_threads(), "torch": torch.__version__}
    notes = {k: work.notes.get(k) for k in ("mlflow_run_id", "tracking_uri", "earlier_code")}
    write_json(folder / "run.json", {**notes, "python": platform.python_version(), **machine})


def speed(network: DiT, train: TrainConfig, us: World, step: int) -> Callable[[int, float], dict[str, float]]:
    """What `fit` logs of its speed from this step on: images per second, and the share of what the devices could do."""
    device, each = network.pos_embed.device, flops_per_image(network)
    ahead = each * train.global_batch_size * (train.max_steps - step)
    peak = peak_flops(device) if us.main and (device.type != "cpu" or ahead > WORTH_TIMING) else None
    size = train.global_batch_size
    return Speed(device, size, step=step, flops_per_image=each, peak_flops=peak and peak * us.size).row


if __name__ == "__main__":
    entry.main(train, together=True)
