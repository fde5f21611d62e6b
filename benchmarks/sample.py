"""How fast latents are drawn, with guidance, beside diffusers' `DiTTransformer2DModel` and `DDIMScheduler`.

    python benchmarks/sample.py                          # DiT-S/4 and the digits model, on two threads of a CPU
    python benchmarks/sample.py --case digits --threads 1
    python benchmarks/sample.py --device cuda --precision bf16 --case xl2 --images 16 64 --steps 50
    python benchmarks/sample.py --json > result.json

Both have the same random weights, start from the same noise and take the same DDIM steps; that they draw the same
latents is checked first. Ours is `generation.generate_latents` as the pipeline calls it, noise included. Theirs is the
loop of `DiTPipeline`, without the autoencoder, from noise already drawn. They take turns, with a matrix product between
them that tells what the machine had to give at that time. Without diffusers, ours alone is timed.
"""

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from telling import tell
from torch import Tensor

from dit import onednn, runtime
from dit.checkpoint import Checkpoint
from dit.cost import macs
from dit.generation import generate_latents, latent_noise
from dit.interop import to_diffusers
from dit.model import DiT, ModelConfig
from dit.objective import ObjectiveConfig
from dit.setting import Setting
from dit.torchvision_cpu import prepare


@dataclass(frozen=True)
class Case:
    """A model, how many classes it knows, and how many images are drawn at once."""

    model: dict[str, Any]
    input_size: int
    num_classes: int
    num_images: tuple[int, ...]


CASES = {
    "s4": Case({"name": "DiT-S/4"}, 32, 1000, (16,)),
    "digits": Case(
        {"name": "custom", "patch_size": 4, "hidden_size": 128, "depth": 4, "num_heads": 4}, 8, 10, (16, 100)
    ),
    "xl2": Case({"name": "DiT-XL/2"}, 32, 1000, (16,)),
    "tiny": Case({"name": "custom", "patch_size": 2, "hidden_size": 32, "depth": 2, "num_heads": 2}, 8, 3, (5,)),
}
TOLERANCE = {"fp32": 2e-5, "bf16": 5e-2}  # of the latents' magnitude
SEED, CFG_SCALE, MATRIX_SIDE = 0, 1.5, 1024


@dataclass(frozen=True)
class Row:
    """What was measured: seconds of each drawing, and multiply-accumulates per second of each matrix product."""

    case: str
    num_images: int
    steps: int
    macs: int  # of the drawing, as cost.macs counts, for both halves of guidance
    ours: list[float]
    theirs: list[float]
    matrix: list[float]
    difference: float | None  # the largest, of the latents' magnitude


def network_of(case: Case, device: torch.device) -> DiT:
    """The case's network with every weight random, the modulation's too, in diffusers' timestep convention."""
    torch.manual_seed(SEED)
    config = ModelConfig(**case.model, timestep_embedding="diffusers")
    network = DiT(config, input_size=case.input_size, in_channels=4, num_classes=case.num_classes)
    for parameter in network.parameters():
        fan_in = parameter[0].numel() if parameter.dim() > 1 else 100
        torch.nn.init.normal_(parameter, std=1 / math.sqrt(fan_in))
    return network.eval().requires_grad_(False).to(device)


def ours(network: DiT, labels: Tensor, steps: int) -> Callable[[], Tensor]:
    """A drawing by the pipeline's own path."""
    checkpoint = Checkpoint(network, {"objective": asdict(ObjectiveConfig("diffusion"))})
    setting = Setting("ddim", CFG_SCALE, "ddim", steps, spacing="stride")
    return lambda: generate_latents(checkpoint, setting, labels, range(len(labels)), seed=SEED)


def theirs(network: DiT, labels: Tensor, steps: int) -> Callable[[], Tensor]:
    """A drawing by diffusers with the same weights. Raises ImportError where diffusers is not installed."""
    prepare()
    from diffusers import DDIMScheduler, DiTTransformer2DModel

    config, device, C = network.config, network.pos_embed.device, network.in_channels
    transformer = DiTTransformer2DModel(
        num_attention_heads=config.num_heads,
        attention_head_dim=config.hidden_size // config.num_heads,
        in_channels=C,
        out_channels=network.out_channels,
        num_layers=config.depth,
        sample_size=network.input_size,
        patch_size=config.patch_size,
        num_embeds_ada_norm=network.num_classes,
        norm_eps=1e-6,
    )
    weights = to_diffusers({name: tensor.cpu() for name, tensor in network.state_dict().items()}, config.depth)
    transformer.load_state_dict(weights)
    transformer = transformer.eval().requires_grad_(False).to(device)
    scheduler = DDIMScheduler(
        beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False, set_alpha_to_one=True
    )
    noise = latent_noise((C, network.input_size, network.input_size), SEED, range(len(labels)), device)()
    y = torch.cat([labels, torch.full_like(labels, network.null_label)]).to(device)

    @torch.no_grad()
    def draw() -> Tensor:
        x = torch.cat([noise, noise])
        scheduler.set_timesteps(steps)
        for t in scheduler.timesteps:
            half = x[: len(x) // 2]
            x = scheduler.scale_model_input(torch.cat([half, half]), t)
            output = transformer(x, timestep=t[None].to(device).expand(len(x)), class_labels=y).sample
            eps, rest = output[:, :C], output[:, C:]
            cond, uncond = eps.split(len(eps) // 2)
            guided = uncond + CFG_SCALE * (cond - uncond)
            output = torch.cat([torch.cat([guided, guided]), rest], dim=1)
            x = scheduler.step(output.split(C, dim=1)[0], t, x).prev_sample
        return x.chunk(2)[0]

    return draw


def matrix_products(device: torch.device) -> dict[str, Callable[[], Tensor]]:
    """Square matrix products: torch's, and on a CPU oneDNN's too, where drawing uses it."""
    a, b, bias = (torch.randn(shape, device=device) for shape in (2 * (MATRIX_SIDE,), 2 * (MATRIX_SIDE,), MATRIX_SIDE))
    products = {"torch": lambda: a @ b}
    if device.type == "cpu" and onednn.available():
        products["oneDNN"] = lambda: onednn.linear(a, b, bias)
    return products


def seconds(work: Callable[[], Any], device: torch.device, clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of one call, until its result is there; the clock's, if no other is given."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = clock()
    work()
    wait()
    return clock() - start


@torch.no_grad()
def measure(name: str, num_images: int, steps: int, repeats: int, device: torch.device, precision: str = "fp32") -> Row:
    """Draw `repeats` times with each. Raises RuntimeError where the two do not draw the same latents."""
    case = CASES[name]
    network, labels = network_of(case, device), torch.arange(num_images) % case.num_classes
    drawings = {"ours": ours(network, labels, steps)}
    try:
        drawings["theirs"] = theirs(network, labels, steps)
    except ImportError:
        pass
    with runtime.autocast(device, precision):
        first = {who: draw().float() for who, draw in drawings.items()}  # a warm-up, too
        difference = None
        if "theirs" in first:
            difference = float((first["ours"] - first["theirs"]).abs().max() / first["theirs"].abs().max())
            if not difference <= TOLERANCE[precision]:
                raise RuntimeError(f"{name}: the latents differ by {difference:.1e} of their magnitude")
        products = matrix_products(device)
        times = {who: [] for who in (*drawings, *products)}
        for _ in range(repeats):
            for who, work in (drawings | products).items():
                times[who].append(seconds(work, device))
    best = min((times[kind] for kind in products), key=statistics.median)
    work = 2 * num_images * steps * macs(network.config, input_size=case.input_size, in_channels=4)
    rates = [MATRIX_SIDE**3 / t for t in best]
    return Row(name, num_images, steps, work, times["ours"], times.get("theirs", []), rates, difference)


def table(rows: list[Row]) -> str:
    """Medians (least to most); how many times faster; the share of the machine's matrix products that each reaches."""
    lines = [
        "| case | images | steps | ours, s | diffusers, s | faster | matrix product, GMAC/s | ours reaches | diffusers |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        median, rate = statistics.median(row.ours), statistics.median(row.matrix)
        other = statistics.median(row.theirs) if row.theirs else math.nan
        told = [row.case, str(row.num_images), str(row.steps), _spread(row.ours), _spread(row.theirs)]
        told += [f"{other / median:.2f}x", _spread([r / 1e9 for r in row.matrix], ".0f")]
        told += [f"{row.macs / time / rate:.0%}" for time in (median, other)]
        lines.append("| " + " | ".join("-" if "nan" in text else text for text in told) + " |")
    return "\n".join(lines)


def _spread(values: list[float], form: str = ".3f") -> str:
    if not values:
        return "-"
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", choices=CASES, default=["s4", "digits"])
    parser.add_argument("--images", nargs="+", type=int, help="drawn at once (default: the case's)")
    parser.add_argument("--steps", type=int, default=10, help="DDIM steps, a divisor of 1000 (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2, help="of a CPU (default: %(default)s)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--json", action="store_true", help="print every measurement instead of the table")
    given = parser.parse_args()
    device = runtime.pick_device(given.device)
    torch.set_num_threads(given.threads)
    rows = [
        measure(name, num_images, given.steps, given.repeats, device, given.precision)
        for name in given.case
        for num_images in given.images or CASES[name].num_images
    ]
    tell(rows, table(rows), as_json=given.json, device=device.type, precision=given.precision, threads=given.threads)


if __name__ == "__main__":
    main()
