"""What the two papers report, tried on digits: block designs, sizes, objectives, solvers, sampling compute, options.

    make repro                                                    # once: latents, autoencoder, reference of the digits
    .venv/bin/python benchmarks/science.py                        # over an hour of one core; stopped, it goes on
    .venv/bin/python benchmarks/science.py --study designs sizes  # some studies; other processes may take others
    .venv/bin/python benchmarks/science_report.py                 # docs/science.md and its plots, from the rows so far

Each training is a `Trial`, each line of a table a trial drawn with a setting. Rows are kept in docs/science/rows.jsonl,
trained models in scratch/science, so nothing is done twice.
"""

import argparse
import hashlib
import json
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from dit.checkpoint import Checkpoint, load_checkpoint, network_config, save_checkpoint
from dit.config import parse
from dit.cost import macs
from dit.dataset import LatentDataset
from dit.generation import SampleConfig, Setting, evaluations, generate_blocks
from dit.latents import read_index
from dit.model import DiT, ModelConfig
from dit.objective import ObjectiveConfig
from dit.paths import Paths, publish
from dit.runtime import RunConfig, pick_device
from dit.trainer import fit
from dit.training import TrainConfig

ROWS = Path("docs/science/rows.jsonl")
SIZES = {"S": (64, 2, 2), "M": (128, 4, 4), "L": (192, 6, 6)}  # hidden size, depth, heads
NUM_IMAGES = 1000
CFG = 1.5


@dataclass(frozen=True)
class Trial:
    """One training: what differs from the plain one (size M, patch 4, velocity of the linear path)."""

    name: str
    size: str = "M"
    patch_size: int = 4
    model: dict[str, Any] = field(default_factory=dict)
    objective: dict[str, Any] = field(default_factory=lambda: {"name": "transport"})
    steps: int = 1600
    lr: float = 4e-3
    seed: int = 0

    def digest(self) -> str:
        told = {key: value for key, value in asdict(self).items() if key != "name"}
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]

    def model_config(self) -> ModelConfig:
        hidden_size, depth, num_heads = SIZES[self.size]
        sizes = {"patch_size": self.patch_size, "hidden_size": hidden_size, "depth": depth, "num_heads": num_heads}
        return ModelConfig("custom", **sizes, **{"learn_sigma": self.objective["name"] == "diffusion", **self.model})


def transport(**settings: Any) -> dict[str, Any]:
    return {"name": "transport", "transport": settings}


def ode(num_steps: int, sampler: str = "heun", cfg_scale: float = CFG, **settings: Any) -> Setting:
    return Setting(f"{sampler}{num_steps or ''}", cfg_scale, sampler, num_steps, **settings)


HEUN, DDPM = ode(12), ode(50, "ddpm")
PLAIN = Trial("linear, velocity")
GAUSSIAN = Trial("DDPM, learned range", objective={"name": "diffusion"})
MODERN = {"norm": "rms", "mlp": "swiglu", "rotary": True, "qk_norm": True}
PATCH2 = {"patch_size": 2, "lr": 2e-3, "steps": 1200}


def studies() -> dict[str, list[tuple[Trial, list[Setting]]]]:
    """Every study's trainings, each with the settings that it is drawn with."""
    seeds = (0, 1)
    designs = ("in_context", "cross_attention", "adaln", "adaln_zero")
    objectives = [
        PLAIN,
        Trial("GVP, velocity", objective=transport(path="gvp")),
        Trial("VP, velocity", objective=transport(path="vp")),
        Trial("linear, noise", objective=transport(prediction="noise")),
        Trial("linear, score, velocity weight", objective=transport(prediction="score", weighting="velocity")),
    ]
    gaussians = [
        GAUSSIAN,
        Trial("DDPM, cosine", objective={"name": "diffusion", "diffusion": {"schedule": "cosine"}}),
        Trial("DDPM, v", objective={"name": "diffusion", "diffusion": {"prediction": "v"}}),
    ]
    options = {
        "baseline": {},
        "RMSNorm": {"model": {"norm": "rms"}},
        "SwiGLU": {"model": {"mlp": "swiglu"}},
        "rotary positions": {"model": {"rotary": True}},
        "QK-norm": {"model": {"qk_norm": True}},
        "logit-normal times": {"objective": transport(times="logit_normal")},
        "velocity direction": {"objective": transport(direction_weight=1.0)},
        "all but direction and alignment": {"model": MODERN, "objective": transport(times="logit_normal")},
        "alignment": {
            "objective": {"name": "transport", "alignment": {"weight": 0.5, "block": 2, "projector_size": 256}}
        },
        "alignment, first half": {
            "objective": {
                "name": "transport",
                "alignment": {"weight": 0.5, "block": 2, "projector_size": 256, "stop_step": 600},
            }
        },
        "all but alignment": {
            "model": MODERN,
            "objective": transport(times="logit_normal", direction_weight=1.0),
        },
    }
    solvers = [ode(n, "euler") for n in (4, 8, 12, 16, 24, 50, 100)]
    solvers += [ode(n, "heun") for n in (2, 4, 6, 8, 12, 25, 50)]
    solvers += [Setting(f"dopri5-{rtol:g}", CFG, "dopri5", None, rtol=rtol, atol=rtol) for rtol in (1e-1, 1e-2, 1e-3)]
    solvers += [ode(n, "sde_euler", diffusion_form="sigma") for n in (8, 16, 25, 50, 100, 250)]
    stochastic = [
        ("sigma", "sde_heun"),
        ("sbdm", "sde_euler"),
        ("increasing_decreasing", "sde_euler"),
        ("kl_eta", "sde_euler"),
    ]
    forms = [Setting(f"{s}-{f}", CFG, s, 50, diffusion_form=f) for f, s in stochastic]
    chains = [ode(n, s) for s in ("ddpm", "ddim") for n in (8, 16, 25, 50, 100, 250)]
    chains += [ode(n, s) for s in ("dpmpp", "unipc") for n in (4, 8, 12, 16, 25, 50)]
    guidances = [ode(12, cfg_scale=scale) for scale in (1.0, 1.25, 1.5, 2.0, 3.0)]
    guidances = [Setting(f"cfg{s.cfg_scale:g}", s.cfg_scale, s.sampler, s.num_steps) for s in guidances]
    guidances += [Setting("cfg2-first-half", 2.0, "heun", 12, cfg_interval=(0.0, 0.5))]
    guidances += [Setting("cfg2-middle-half", 2.0, "heun", 12, cfg_interval=(0.25, 0.75))]
    guidances += [Setting("cfg1.5-first3", 1.5, "heun", 12, cfg_channels="first3")]
    return {
        "designs": [(Trial(name, model={"block": name}, seed=s, **PATCH2), [HEUN]) for name in designs for s in seeds],
        "objectives": [
            (_with(t, seed=s), [HEUN, ode(25, "sde_euler", diffusion_form="sigma")]) for t in objectives for s in seeds
        ]
        + [(_with(t, seed=s), [ode(25, "ddim"), DDPM]) for t in gaussians for s in seeds],
        "solvers": [(PLAIN, solvers + forms), (GAUSSIAN, chains)],
        "guidance": [(PLAIN, guidances)],
        "compute": [
            (Trial(f"size {s}", s, lr=2e-3), [ode(n, "euler") for n in (8, 16, 32, 64, 128, 256)]) for s in SIZES
        ],
        "sizes": [(Trial(f"{size}/{patch}", size, patch, lr=2e-3), [HEUN]) for patch in (8, 4, 2) for size in SIZES],
        "options": [(Trial(name, **{**PATCH2, **changed}), [HEUN]) for name, changed in options.items()],
    }


def _with(trial: Trial, **changes: Any) -> Trial:
    return replace(trial, **changes)


def train(trial: Trial, paths: Paths, device: torch.device) -> Checkpoint:
    """The trial's EMA network: trained, or taken from scratch/science where it was trained before."""
    folder = paths.scratch / "science" / trial.digest()
    if folder.exists():
        return load_checkpoint(folder, device)
    index = read_index(paths.artifacts / "encode")
    torch.manual_seed(trial.seed)
    shape = {"input_size": index["size"], "in_channels": index["channels"], "num_classes": len(index["classes"])}
    network = DiT(trial.model_config(), **shape).to(device)
    objective = parse("objective", trial.objective, ObjectiveConfig)
    settings = {"lr_schedule": "cosine", "warmup_steps": 50, "ema_decay": 0.998, "ema_warmup": True}
    config = TrainConfig(trial.steps, 64, trial.lr, **settings, seed=trial.seed)
    data = LatentDataset(paths.artifacts / "encode", config.seed, config.global_batch_size, where="memory")
    if objective.alignment.weight:
        data.hold(data.tensors | {"features": image_features(paths)})
    run = RunConfig(log_every_steps=200, checkpoint_every_steps=10**9)
    began = time.monotonic()
    losses: list[float] = []
    state = fit(network, data, objective, config, run, log=lambda step, values: losses.append(values["loss"]))
    told = {
        "model": network_config(network),
        "objective": asdict(objective),
        "latents": {key: index[key] for key in ("digest", "autoencoder")} | index["normalization"],
        "classes": index["classes"],
        "image_size": index["image_size"],
        "step": trial.steps,
        "trial": asdict(trial),
        "seconds": time.monotonic() - began,
        "loss": losses[-1],
    }
    average = {name[4:]: tensor for name, tensor in state.tensors.items() if name.startswith("ema.")}
    with publish(folder, paths.scratch) as unfinished:
        save_checkpoint(unfinished, average | {"pos_embed": network.pos_embed}, told)
    return load_checkpoint(folder, device)


def image_features(paths: Paths) -> torch.Tensor:
    """What alignment aims at: a 4x4 grid of features (n, 16, 64) of a classifier that learned rotations, no labels."""
    from dit.classifier import ReferenceConfig, fit_classifier, to_channels_first
    from dit.shards import load_split

    images, labels = load_split(paths.artifacts / "shard", "train")
    classifier = fit_classifier(images, labels, 0, ReferenceConfig(seed=7), "alignment")
    with torch.no_grad():
        grid = classifier.convolutions(to_channels_first(images).float() / 127.5 - 1)
    return grid.flatten(2).transpose(1, 2).half()


def row_of(study: str, trial: Trial, setting: Setting, paths: Paths, device: torch.device) -> dict[str, Any]:
    """Train (or load), draw, score: one line of a table."""
    from dit.evaluation import EvaluateConfig, score
    from dit.imagesets import from_array
    from dit.vae import Autoencoder

    checkpoint = train(trial, paths, device)
    network, calls = checkpoint.model, [0]
    network.register_forward_pre_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    config = SampleConfig(NUM_IMAGES, 0, "balanced", 100, (setting,))
    began = time.monotonic()
    images, labels = generate_blocks(checkpoint, Autoencoder.load(paths.artifacts / "vae", device), setting, config)
    metrics = score(from_array(images, labels), paths.artifacts / "reference", EvaluateConfig())
    forward = macs(network.config, input_size=network.input_size, in_channels=network.in_channels)
    calls = calls[0] / (NUM_IMAGES / config.block_images)  # counted: dopri5 chooses its own steps
    assert setting.num_steps is None or calls == evaluations(setting), (calls, setting)
    return {
        "study": study,
        "trial": asdict(trial),
        "setting": asdict(setting),
        "evaluations": calls,
        "parameters": sum(p.numel() for p in network.parameters()),
        "gmacs": forward / 1e9,
        "loss": checkpoint.config["loss"],
        "train_seconds": checkpoint.config["seconds"],
        "draw_seconds": time.monotonic() - began,
        "metrics": {name.replace("_digits_classifier", "").rpartition("_")[0]: v for name, v in metrics.items()},
    }


def key_of(study: str, trial: dict[str, Any], setting: dict[str, Any]) -> str:
    return json.dumps([study, trial, setting], sort_keys=True)


def read_rows() -> list[dict[str, Any]]:
    """The rows so far; a later row for the same trial and setting replaces an earlier one."""
    if not ROWS.exists():
        return []
    rows = [json.loads(line) for line in ROWS.read_text().splitlines()]
    return list({key_of(row["study"], row["trial"], row["setting"]): row for row in rows}.values())


def run(options: argparse.Namespace) -> None:
    device = pick_device(options.device)
    torch.set_num_threads(1)
    paths = Paths()
    for study, trials in studies().items():
        if options.study and study not in options.study:
            continue
        for trial, settings in trials:
            for setting in settings:
                told = json.loads(json.dumps([asdict(trial), asdict(setting)]))
                if key_of(study, *told) in {key_of(row["study"], row["trial"], row["setting"]) for row in read_rows()}:
                    continue
                row = row_of(study, trial, setting, paths, device)
                ROWS.parent.mkdir(parents=True, exist_ok=True)
                with open(ROWS, "a") as file:
                    file.write(json.dumps(row) + "\n")
                told = ", ".join(f"{name} {value:.3f}" for name, value in row["metrics"].items())
                print(f"{study}: {trial.name} (seed {trial.seed}), {setting.name}: {told}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--study", nargs="*", choices=list(studies()), help="none: all of them")
    parser.add_argument("--device", default="cpu")
    run(parser.parse_args())


if __name__ == "__main__":
    main()
