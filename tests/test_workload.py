"""What stages ask for: against torch's own counts, what was measured, and what the stages say of themselves."""

import re
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dit import workload
from dit.check import latent_factor, stage_functions
from dit.config import check_sections
from dit.estimate import ROOM, device_named
from dit.expectations import Machine
from dit.pipeline import SHARED, STAGES
from dit.presets import resolve
from dit.retraining import RetrainConfig
from dit.vae import import_diffusers

ROOT = Path(__file__).parents[1]
CPU = Machine("cpu", "one of 2 CPU threads", int(25e9), 96e9)  # the machine of README's table, as `look` measures it
H100 = Machine("accelerator", "H100", int(80e9), None)


def foreseen(preset, machine, images, tmp_path, **changes):
    params = resolve(preset, ROOT / "presets")
    for path, value in changes.items():
        section, _, name = path.partition("__")
        params[section][name] = value
    sections = check_sections(stage_functions(), params, optional={"retrain": RetrainConfig})
    network = workload.network_of(sections, latent_factor(sections["vae"]), tmp_path)
    speeds = workload.speeds(machine, sections["train"].precision)
    return sections, network, workload.seconds(sections, network, images, speeds, cores=2)


@pytest.mark.parametrize(
    ("widths", "layers", "channels", "attention", "side"),
    [((8, 16, 16), 1, 4, False, 32), ((8, 16, 32), 3, 8, False, 64), ((32, 64), 2, 4, True, 32)],
)
def test_the_autoencoders_operations_are_torchs_count(widths, layers, channels, attention, side):
    with torch.device("meta"):
        network = import_diffusers()(
            down_block_types=("DownEncoderBlock2D",) * len(widths),
            up_block_types=("UpDecoderBlock2D",) * len(widths),
            block_out_channels=widths,
            layers_per_block=layers,
            latent_channels=channels,
            norm_num_groups=8,
            mid_block_add_attention=attention,
        )
    shape = {"block_out_channels": widths, "layers_per_block": layers, "latent_channels": channels}
    told = workload.autoencoder_macs(side, **shape, attention=attention)
    with FlopCounterMode(display=False) as encoding:
        latents = network.encode(torch.empty(1, 3, side, side, device="meta")).latent_dist.mean
    with FlopCounterMode(display=False) as decoding:
        network.decode(latents)
    assert 2 * told[0] == encoding.get_total_flops() and 2 * told[1] == decoding.get_total_flops()


def test_a_cpu_takes_about_what_was_measured(tmp_path):
    """README's table, and docs/emoji.md."""
    _, _, digits = foreseen("digits", CPU, 1797, tmp_path)
    for stage, low, high in (("train", 76, 91), ("vae", 27, 40), ("reference", 14, 14), ("evaluate", 11, 11)):
        assert low / 1.5 < digits[stage] < high * 1.5, (stage, digits[stage])
    assert 160 / 1.2 < sum(digits.values()) < 204 * 1.2
    _, _, emoji = foreseen("own-64", CPU, 2871, tmp_path, data__num_classes=12, data__source="emoji")
    for stage, minutes in (("train", 19), ("vae", 3.6), ("sample", 1.4), ("reference", 0.9)):
        assert minutes / 1.5 < emoji[stage] / 60 < minutes * 1.5, (stage, emoji[stage])


def test_an_accelerator_takes_what_the_presets_say(tmp_path):
    _, _, published = foreseen("xl2-published", H100, 50_000, tmp_path)
    assert published["sample"] / 3600 == pytest.approx(42, rel=0.1)
    assert published["train"] == workload.START_SECONDS
    _, _, shared = foreseen("s2", H100, 1000, tmp_path)
    assert set(shared) == set(STAGES)


def test_several_devices_share_what_torchrun_may_share(tmp_path):
    sections, network, alone = foreseen("s2", H100, 1000, tmp_path)
    speeds = workload.speeds(H100, "fp32")
    eight = workload.seconds(sections, network, 1000, speeds, devices=8, cores=2)
    shared = {name for name in STAGES if eight[name] < alone[name]}
    told = {name for name in STAGES if "together=True" in (ROOT / "dit" / "stages" / f"{name}.py").read_text()}
    assert shared == told == SHARED


def test_guidance_in_an_interval_costs_that_part_of_it(tmp_path):
    setting = {"name": "x", "cfg_scale": 2.0, "sampler": "heun", "num_steps": 10}
    took = [
        foreseen("digits", CPU, 1797, tmp_path, sample__settings=[setting | more])[2]["sample"]
        for more in ({"cfg_scale": 1.0}, {"cfg_interval": [0.5, 1.0]}, {})
    ]
    assert took[1] - took[0] == pytest.approx((took[2] - took[0]) / 2)


def test_memory_and_disk_of_imagenet_are_what_the_preset_says(tmp_path):
    sections, network, _ = foreseen("xl2", H100, 1_281_167, tmp_path)
    said = re.search(r"(\d+) GB of memory for the latents", (ROOT / "presets" / "xl2.yaml").read_text())[1]
    assert workload.latents_bytes(sections, network, 1_281_167) / 1e9 == pytest.approx(float(said), rel=0.02)
    disk = workload.disk_bytes(sections, network, 1_281_167)
    assert disk["encode"] * 0.99 == pytest.approx(workload.latents_bytes(sections, network, 1_281_167), rel=1e-3)
    assert disk["sample"] == 2 * 50_000 * 3 * 256**2 and disk["ema"] == pytest.approx(4 * 675.1e6, rel=0.01)
    held = workload.memory(sections, network)["train"]
    most = workload.largest_training_batch(network, device_named("A100").memory_bytes)
    assert held < 80e9 and most > network["batch_size"]
    assert workload.largest_training_batch(network, 10e9) == 0


def test_devices_share_as_training_will_decide(tmp_path):
    """The same answer as wrapping.kind's, on either side of the room that a copy of everything needs."""
    from dit.model import DiT
    from dit.parallel import World
    from dit.wrapping import kind

    sections, network, _ = foreseen("digits", H100, 1797, tmp_path, run__device_batch_size=4)
    train, run = sections["train"], sections["run"]
    shape = {name: network[name] for name in ("input_size", "in_channels", "num_classes")}
    real = DiT(network["config"], **shape)
    needed = workload.memory(sections, network)["train"] / ROOM
    for room, shared in ((needed * 1.01, 1), (needed * 0.99, 8)):
        assert workload.sharing(network, "auto", 8, Machine("cuda", "x", int(room), None)) == shared
        assert (kind(real, train, run, World(0, 8), room) == "fsdp") == (shared == 8)
    assert workload.sharing(network, "auto", 1, Machine("cuda", "x", 1, None)) == 1
    eighth = workload.memory(sections, network | {"shared_by": 8})["train"]
    assert needed * ROOM / 8 < eighth < needed * ROOM / 2
