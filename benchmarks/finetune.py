"""Fine-tuning from one half of a data set's classes to the other, beside training the other half from scratch.

    .venv/bin/dit init FOLDER && make repro             # once: latents, autoencoder, shards (docs/emoji.md: of emoji)
    .venv/bin/python benchmarks/finetune.py

Classes number 0, 2, 4 ... are learned first; then 1, 3, 5 ..., once from these weights and once from nothing, with the
same batches, learning rate and network, scored at the same steps against the second half's own images.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from PIL import Image

from dit.checkpoint import Checkpoint, load_tensors, network_config, save_checkpoint
from dit.config import parse, read_params
from dit.dataset import LatentDataset
from dit.finetune import adopt
from dit.generation import SampleConfig, Setting, generate_blocks
from dit.grids import overview
from dit.latents import read_index
from dit.model import DiT, ModelConfig
from dit.objective import ObjectiveConfig
from dit.paths import Paths, publish
from dit.runtime import RunConfig
from dit.trainer import fit
from dit.training import TrainConfig

SETTING = Setting("heun12", 1.5, "heun", 12)


def half(data: LatentDataset, classes: list[int]) -> LatentDataset:
    """The latents of these classes only, numbered anew."""
    mask = torch.isin(data.tensors["label"], torch.tensor(classes))
    tensors = {key: tensor[mask] for key, tensor in data.tensors.items()}
    data.hold(tensors | {"label": torch.searchsorted(torch.tensor(classes), tensors["label"])})
    return data


def half_of_images(folder: Path, split: str, classes: list[int]) -> tuple[np.ndarray, np.ndarray]:
    from dit.shards import load_split

    images, labels = load_split(folder, split)
    mask = np.isin(labels, classes)
    return images[mask], np.searchsorted(classes, labels[mask])


class Half:
    """Trainings on one half of the classes."""

    def __init__(self, paths: Paths, classes: list[int]):
        self.paths, self.classes, self.index = paths, classes, read_index(paths.artifacts / "encode")
        params = read_params(paths.params)
        sections = {"model": ModelConfig, "objective": ObjectiveConfig, "train": TrainConfig}
        self.sections: dict[str, Any] = {name: parse(name, params[name], kind) for name, kind in sections.items()}

    def train(
        self, steps: list[int], lr: float, initial: tuple[dict[str, torch.Tensor], dict[str, Any]] | None = None
    ) -> dict[int, Checkpoint]:
        """The averages at these steps."""
        index, config = self.index, self.sections["train"]
        torch.manual_seed(config.seed)
        shape = {"input_size": index["size"], "in_channels": index["channels"], "num_classes": len(self.classes)}
        network = DiT(self.sections["model"], **shape)
        told = {"model": network_config(network), "objective": asdict(self.sections["objective"])}
        told |= {"latents": {key: index[key] for key in ("digest", "autoencoder")} | index["normalization"]}
        told |= {"classes": [index["classes"][i] for i in self.classes], "image_size": index["image_size"]}
        if initial:
            for sentence in adopt(network, *initial, told["classes"]):
                print(sentence)
        config = replace(config, max_steps=steps[-1], lr=lr, lr_schedule="constant", snapshot_every_steps=0)
        encoded, size = self.paths.artifacts / "encode", config.global_batch_size
        data = half(LatentDataset(encoded, config.seed, size, where="memory"), self.classes)
        kept: dict[int, Checkpoint] = {}

        def observe(step: int, average: Any) -> None:
            if step in steps:
                kept[step] = Checkpoint(average(), told | {"step": step})

        run = RunConfig(log_every_steps=100, checkpoint_every_steps=10**9, preview_every_steps=steps[0])
        fit(network, data, self.sections["objective"], config, run, observe=observe)
        return kept

    def reference(self, folder: Path) -> dict[str, Any]:
        """The evaluator of this half, and the floor: its real held-out images."""
        from dit.classifier import ReferenceConfig
        from dit.evaluation import EvaluateConfig, score
        from dit.imagesets import from_array
        from dit.stages.reference import write_reference

        folder.mkdir(parents=True, exist_ok=True)
        shards = self.paths.artifacts / "shard"
        images, labels = half_of_images(shards, "train", self.classes)
        heldout = half_of_images(shards, "heldout", self.classes)
        told = {"extractor": "half_classifier", "data": self.index["digest"], "num_classes": len(self.classes)}
        write_reference(folder, from_array(images, labels), from_array(*heldout), told, ReferenceConfig())
        return score(from_array(*heldout), folder, EvaluateConfig())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--first-steps", type=int, default=1500, help="of the first half")
    parser.add_argument(
        "--steps", type=int, nargs="+", default=[100, 200, 400, 800], help="of the second, scored at each"
    )
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--num-images", type=int, default=500)
    parser.add_argument("--output", type=Path, default=Path("scratch/finetune"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    from dit.evaluation import EvaluateConfig, score
    from dit.imagesets import from_array
    from dit.vae import Autoencoder

    paths = Paths()
    count = len(read_index(paths.artifacts / "encode")["classes"])
    first, second = Half(paths, list(range(0, count, 2))), Half(paths, list(range(1, count, 2)))
    options.output.mkdir(parents=True, exist_ok=True)
    began = options.output / f"first-{options.first_steps}-{options.lr:g}-{first.index['digest'][:8]}"
    if not began.exists():
        (learned,) = first.train([options.first_steps], options.lr).values()
        with publish(began, paths.scratch) as folder:
            save_checkpoint(folder, learned.model.state_dict(), learned.config)
    initial = load_tensors(began / "model.safetensors"), json.loads((began / "config.json").read_text())
    floor = second.reference(options.output / "reference")
    autoencoder = Autoencoder.load(paths.artifacts / "vae")
    config = SampleConfig(options.num_images, 0, "balanced", 100, (SETTING,))
    rows = [{"weights": "held-out images", "step": None, "metrics": floor}]
    for name, weights in (("scratch", None), ("fine-tuned", initial)):
        start = time.monotonic()
        for step, checkpoint in second.train(options.steps, options.lr, weights).items():
            images, labels = generate_blocks(checkpoint, autoencoder, SETTING, config)
            metrics = score(from_array(images, labels), options.output / "reference", EvaluateConfig())
            rows.append({"weights": name, "step": step, "metrics": metrics})
            Image.fromarray(overview(images, labels)).save(options.output / f"{name}-{step}.png")
        print(f"{name}: {time.monotonic() - start:.0f} s")
    (options.output / "rows.json").write_text(json.dumps(rows, indent=1))
    print("| weights | steps | FID | FID pooled | agreement | precision | recall |\n|---|---|---|---|---|---|---|")
    for row in rows:
        short = {key.replace("_half_classifier", "").rpartition("_")[0]: value for key, value in row["metrics"].items()}
        cells = [f"{short[key]:.3f}" for key in ("fid", "fid_pooled", "class_agreement", "precision", "recall")]
        print("| " + " | ".join([row["weights"], str(row["step"] or ""), *cells]) + " |")


if __name__ == "__main__":
    main()
