"""`dit evaluate`: the figures of anyone's images, and of a training's snapshots."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def add_command(commands: argparse._SubParsersAction) -> None:
    """`dit evaluate` among the commands."""
    command = commands.add_parser("evaluate", help="FID and its like of any images, and of a training's snapshots")
    command.add_argument("samples", nargs="?", type=Path, help="an .npz (arr_0), .npy, folder of images, or .tar files")
    command.add_argument(
        "--reference", type=Path, required=True, help="artifacts/reference, ADM's .npz, a statistics file, or images"
    )
    command.add_argument(
        "--extractor", help="inception, classifier, random, or torch-fidelity's; default: the reference's, or inception"
    )
    command.add_argument("--weights", type=Path, help="of Inception; default: in $TORCH_HOME, else downloaded")
    command.add_argument("--labels", type=Path, help=".npy, or .npz with `labels`; default: the images' own")
    command.add_argument("--training", type=Path, metavar="IMAGES", help="look for copies of these; needs --heldout")
    command.add_argument("--heldout", type=Path, metavar="IMAGES", help="real images that the model never saw")
    command.add_argument("--papers", action="store_true", help="beside the papers' figures on ImageNet")
    command.add_argument(
        "--bootstrap", type=int, default=20, metavar="N", help="resamplings behind an interval; 0: none"
    )
    command.add_argument(
        "--keep-reference", type=Path, metavar="FOLDER", help="where to keep what the reference became"
    )
    command.add_argument("--output", type=Path, metavar="FILE", help="default: SAMPLES.metrics.json, in this folder")
    command.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    command.add_argument("--snapshots", type=Path, metavar="FOLDER", help="artifacts/train: its averages, not SAMPLES")
    command.add_argument("--setting", help="of sample.settings, for --snapshots; default: the first")
    command.add_argument("--num-images", type=int, metavar="N", help="for --snapshots; default: sample.num_images")
    command.set_defaults(run=evaluate)


def evaluate(options: argparse.Namespace) -> None:
    """Run the command. Raises ValueError where what was asked for does not go together."""
    from dit import scorecard

    told = {name: value for name, value in vars(options).items() if name != "run"}
    over_training = {name: told.pop(name) for name in ("snapshots", "setting", "num_images")}
    if (told["samples"] is None) == (over_training["snapshots"] is None):
        raise ValueError("name the images to evaluate, or a training's folder with --snapshots: one of the two")
    if over_training["snapshots"] is None:
        if over_training["setting"] is not None or over_training["num_images"] is not None:
            raise ValueError("--setting and --num-images are for --snapshots: images that are there need neither")
        with _one_of_several():
            scorecard.evaluate(scorecard.Asked(**told))
        return
    unused = ("labels", "training", "heldout", "papers", "keep_reference")
    if given := [f"--{name.replace('_', '-')}" for name in unused if told[name]]:
        raise ValueError(f"{' and '.join(given)} cannot be had with --snapshots: draw images, and name those")
    from dit import trajectory
    from dit.paths import Paths

    with _one_of_several():
        trajectory.evaluate_snapshots(scorecard.Asked(**told), *over_training.values(), paths=Paths())


@contextmanager
def _one_of_several() -> Iterator[None]:
    """Whoever ends, by a signal or because another process did, puts away its scratch files and says so in one line."""
    from dit import entry
    from dit.cli import complain
    from dit.parallel import world

    us = world()
    try:
        with entry.interruptible():
            yield
    except entry.Interrupted as error:
        if us.main:
            complain(f"{error}: no result was written")
        raise SystemExit(entry.INTERRUPTED) from None
    except ValueError as error:
        if us.main:
            raise
        raise ValueError(f"process {us.rank}: {error}") from None
    except RuntimeError as error:
        if us.size == 1 or not entry.lost_another(error):
            raise
        raise SystemExit(entry.INTERRUPTED) from None  # the process that ended says why
