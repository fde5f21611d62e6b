"""What it costs to come by FID, Inception Score, precision and recall, beside torch-fidelity 0.4.0's own functions.

    python benchmarks/evaluate.py                          # 10,000 x 2048 features, 10,000 x 1008 logits, all cores
    python benchmarks/evaluate.py --size 2000 --rounds 1
    python benchmarks/evaluate.py --device cuda --json > result.json
    python benchmarks/evaluate.py --extract 128 --side 256   # images a second through Inception, random weights

Every measurement is a process of its own that reads the same features from a file, so that its peak of memory is its
own; they take turns. "floor" is what nobody can leave out: one product of the generated with the real features, half a
product of each with itself (float32, by oneDNN where we ask it), both covariances (half a product each, in float64), and
the eigenvalues of one symmetric matrix that three products make. torch-fidelity's precision and recall run twice, in one
piece (its default) and with `save_cpu_ram`; its functions work on the CPU, whatever the device. Without torch-fidelity,
ours alone is measured.
"""

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import Tensor

WIDTH, CLASSES, NEAREST, SPLITS, SEED = 2048, 1008, 3, 10, 2020
ROWS = 2048  # of features that are looked at together
THEIRS = ("torch-fidelity", "torch-fidelity, save_cpu_ram")
MIB = 2**20


def write_features(folder: Path, size: int) -> None:
    """Two sets like Inception's pooled features (none below 0, of fewer directions than dimensions), and logits."""
    generator = torch.Generator().manual_seed(SEED)
    mix = torch.randn(256, WIDTH, generator=generator) / 16
    for name, scale in (("real", 1.0), ("generated", 0.97)):
        directions = torch.randn(size, 256, generator=generator) * scale
        features = (directions @ mix + 0.3 * torch.randn(size, WIDTH, generator=generator) - 0.3).relu_()
        features.numpy().tofile(folder / name)
    (2 * torch.randn(size, CLASSES, generator=generator)).numpy().tofile(folder / "logits")


def read(folder: Path, name: str) -> Tensor:
    import numpy as np

    return torch.from_numpy(np.fromfile(folder / name, np.float32)).view(-1, CLASSES if name == "logits" else WIDTH)


def ours(real: Tensor, generated: Tensor, logits: Tensor, device: str) -> dict[str, float]:
    """As the evaluator calls them: moments block by block, then the metrics."""
    from dit.metrics import frechet_distance, inception_score, neighbourhoods

    gaussians = []
    for features in (generated, real):
        told = moments(features, device)
        gaussians += [told.mean, told.covariance]
    score, _ = inception_score(logits.to(device), SPLITS, seed=SEED)
    near = neighbourhoods(real, generated, NEAREST, device=device)
    return {"FID": frechet_distance(*gaussians), "IS": score, "precision": near.precision, "recall": near.recall}


def moments(features: Tensor, device: str) -> Any:
    from dit.features import Moments, merged

    return merged(Moments.of(part.to(device)) for part in features.split(ROWS))


def theirs(real: Tensor, generated: Tensor, logits: Tensor, save_cpu_ram: bool) -> dict[str, float]:
    """torch-fidelity's functions, called as its `calculate_metrics` calls them."""
    from dit import torchvision_cpu

    torchvision_cpu.prepare()
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    distance = fid_statistics_to_metric(*(fid_features_to_statistics(x) for x in (generated, real)), False)
    score = isc_features_to_metric(logits, splits=SPLITS, shuffle=True, rng_seed=SEED)
    near = prc_features_to_metric(
        generated, real, prc_neighborhood=NEAREST, prc_batch_size=10_000, save_cpu_ram=save_cpu_ram, verbose=False
    )
    told = {"FID": distance["frechet_inception_distance"], "IS": score["inception_score_mean"]}
    return told | {name: near[name] for name in ("precision", "recall")}


def floor(real: Tensor, generated: Tensor, device: str) -> dict[str, float]:
    """The products and eigenvalues alone: nothing is compared, nothing kept."""
    from dit import onednn

    real, generated = real.to(device), generated.to(device)
    faster, none = real.device.type == "cpu" and onednn.available(), torch.zeros(ROWS)
    for a, b in ((real, generated), (real, real), (generated, generated)):
        for start in range(0, len(a), ROWS):
            first = start if a is b else 0
            for column in range(first, len(b), ROWS):
                x, y = a[start : start + ROWS], b[column : column + ROWS]
                onednn.linear(x, y, none[: len(y)]) if faster else x @ y.T
    matrices = []
    for features in (real, generated):
        matrix = torch.zeros(WIDTH, WIDTH, dtype=torch.float64, device=device)
        for part in features.split(ROWS):
            part = part.double()
            for row in range(0, WIDTH, 512):
                matrix[row : row + 512, row:].addmm_(part[:, row : row + 512].T, part[:, row:])
        matrices.append(matrix)
    factor = torch.linalg.cholesky_ex(matrices[0]).L
    torch.linalg.eigvalsh(factor.T @ matrices[1] @ factor).sum().item()
    return {}


def measure(what: str, folder: Path, device: str) -> dict[str, Any]:
    """One measurement, in this process: seconds, the memory at its height, and what was found."""
    real, generated, logits = (read(folder, name) for name in ("real", "generated", "logits"))
    work: dict[str, Callable[[], dict[str, float]]] = {
        "ours": lambda: ours(real, generated, logits, device),
        "floor": lambda: floor(real, generated, device),
        THEIRS[0]: lambda: theirs(real, generated, logits, False),
        THEIRS[1]: lambda: theirs(real, generated, logits, True),
    }
    small = [x[:64] for x in (real, generated, logits)]
    if what in THEIRS:  # imports and first calls are no part of it
        theirs(small[0][:, :8], small[1][:, :8], small[2], True)
    elif what == "ours":
        ours(*small, device)
    else:
        floor(*small[:2], device)
    if cuda := device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    before, start, cpu = resident_bytes(), time.perf_counter(), time.process_time()
    found = work[what]()
    if cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "what": what,
        "seconds": seconds,
        "cpu_seconds": time.process_time() - cpu,
        "peak_mib": peak / MIB,
        "above_mib": max(peak - before, 0) / MIB,
        "device_mib": torch.cuda.max_memory_allocated() / MIB if cuda else None,
        "found": found,
    }


def resident_bytes() -> int:
    """What this process holds in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def extraction(what: str, folder: Path, device: str, count: int, side: int) -> dict[str, Any]:
    """Images a second through Inception, `count` of them, in batches of 16 (of 128 on a GPU), and a sum of features."""
    batch = 128 if device.startswith("cuda") else 16
    images = torch.randint(
        0, 256, (count, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    weights = folder / "weights.pth"
    if what == "ours":
        from dit.inception import load_inception

        extract = load_inception(weights, device)
    else:
        from dit import torchvision_cpu

        torchvision_cpu.prepare()
        from torch_fidelity.utils import create_feature_extractor

        network = create_feature_extractor(
            "inception-v3-compat",
            ["2048", "logits_unbiased"],
            cuda=device.startswith("cuda"),
            verbose=False,
            feature_extractor_weights_path=str(weights),
        )

        def extract(x: Tensor) -> dict[str, Tensor]:
            return network.convert_features_tuple_to_dict(network(x.to(device)))

    with torch.no_grad():
        extract(images[:batch])
        start = time.perf_counter()
        features = [extract(part) for part in images.split(batch)]
        layer = "pooled" if what == "ours" else "2048"
        mean = torch.cat([part[layer] for part in features]).double().mean().item()
    seconds = time.perf_counter() - start
    return {"what": what, "images_per_second": count / seconds, "mean_feature": mean}


def write_weights(file: Path) -> None:
    """Random weights of Inception's shapes, under which features neither vanish nor grow without end."""
    from dit import torchvision_cpu

    torchvision_cpu.prepare()
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Untrained(FeatureExtractorInceptionV3):
        def load_state_dict(self, *_: Any, **__: Any) -> None:
            """There is nothing to load yet."""

    torch.manual_seed(SEED)
    torch.save({}, file)
    network = Untrained("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(file))
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_uniform_(module.weight, nonlinearity="relu")
    torch.save(network.state_dict(), file)


def in_a_process(arguments: list[str]) -> dict[str, Any]:
    run = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True)
    if run.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{run.stderr[-2000:]}")
    return json.loads(run.stdout.splitlines()[-1])


def table(runs: list[dict[str, Any]]) -> str:
    """One line for each kind of run: the median time and the largest memory, beside ours."""
    kinds = list(dict.fromkeys(run["what"] for run in runs))
    lines = [
        f"{'':30}{'seconds':>10}{'times ours':>12}{'CPU s':>8}{'peak MiB':>10}{'above features':>16}{'times ours':>12}"
    ]
    own: dict[str, float] = {}
    for kind in kinds:
        mine = [run for run in runs if run["what"] == kind]
        seconds = statistics.median(run["seconds"] for run in mine)
        peak, above = (max(run[key] for run in mine) for key in ("peak_mib", "above_mib"))
        own = own or {"seconds": seconds, "above": above}
        cpu = statistics.median(run["cpu_seconds"] for run in mine)
        ratios = seconds / own["seconds"], above / max(own["above"], 1)
        lines.append(f"{kind:30}{seconds:10.2f}{ratios[0]:12.2f}{cpu:8.1f}{peak:10.0f}{above:16.0f}{ratios[1]:12.2f}")
        if mine[0]["device_mib"] is not None:
            lines[-1] += f"   GPU {max(run['device_mib'] for run in mine):.0f} MiB"
    for kind in kinds:
        found = next(run["found"] for run in runs if run["what"] == kind)
        if found:
            lines.append(f"{kind:30}" + "  ".join(f"{name} {value:.9g}" for name, value in found.items()))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=10_000, help="images of either set")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0, help="of a CPU; 0 = as many as torch takes")
    parser.add_argument("--extract", type=int, default=0, help="measure extraction instead, of so many images")
    parser.add_argument("--side", type=int, default=256, help="of the images that are extracted")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    told = parser.parse_args()
    if told.threads:
        torch.set_num_threads(told.threads)
    if told.measure:
        if told.extract:
            result = extraction(told.measure, told.folder, told.device, told.extract, told.side)
        else:
            result = measure(told.measure, told.folder, told.device)
        print(json.dumps(result))
        return
    has_theirs = find_spec("torch_fidelity") is not None
    if not has_theirs:
        print("torch-fidelity is not installed: ours alone is measured", file=sys.stderr)
        if told.extract:
            raise SystemExit(
                "--extract takes Inception's random weights from torch-fidelity: pip install torch-fidelity"
            )
    kinds = ("ours", THEIRS[0]) if told.extract else ("ours", "floor", *THEIRS)
    kinds = [kind for kind in kinds if has_theirs or kind not in THEIRS]
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        if told.extract:
            write_weights(Path(folder) / "weights.pth")
        else:
            write_features(Path(folder), told.size)
        passed = ["--folder", folder, "--device", told.device, "--threads", str(told.threads)]
        passed += ["--extract", str(told.extract), "--side", str(told.side)]
        for _ in range(told.rounds):
            for kind in kinds:
                runs.append(in_a_process(["--measure", kind, *passed]))
                print(f"{kind}: {runs[-1].get('seconds') or runs[-1].get('images_per_second'):.2f}", file=sys.stderr)
    machine = {"torch": torch.__version__, "device": told.device, "threads": torch.get_num_threads()}
    machine |= {"machine": platform.processor() or platform.machine(), "size": told.extract or told.size}
    if told.device.startswith("cuda"):
        machine["gpu"] = torch.cuda.get_device_name()
    if told.json:
        print(json.dumps({**machine, "runs": runs}, indent=2))
    elif told.extract:
        for kind in kinds:
            speeds = [run["images_per_second"] for run in runs if run["what"] == kind]
            mean = next(run["mean_feature"] for run in runs if run["what"] == kind)
            print(f"{kind:30}{statistics.median(speeds):10.2f} images/s   mean feature {mean:.7g}")
    else:
        print("  ".join(f"{key} {value}" for key, value in machine.items()))
        print(table(runs))


if __name__ == "__main__":
    main()
