"""`dit train --profile`: params.yaml's training on the latents that are there, for some steps, and nothing of it kept."""

import argparse

from dit.paths import Paths


def add_command(commands: argparse._SubParsersAction) -> None:
    """`dit train` among the commands."""
    command = commands.add_parser("train", help="where a training step's time goes, with --profile")
    command.add_argument(
        "--profile", action="store_true", help="train for a few steps, keep nothing, write scratch/profile"
    )
    command.add_argument("--steps", type=int, default=20, metavar="N", help="how many are traced; default: 20")
    command.set_defaults(run=train)


def train(options: argparse.Namespace) -> None:
    """Run the command. Raises ValueError where it is not asked for a profile: training itself is a stage of DVC's."""
    if not options.profile:
        raise ValueError("`dvc repro train` trains; `dit train --profile` tells where a step's time goes")
    print(profile(Paths(), options.steps))


def profile(paths: Paths, steps: int) -> str:
    """Profile the training that params.yaml asks for on artifacts/encode: what to print of it.

    The weights are drawn, also where train.init_from names others: a step costs the same.
    """
    import torch

    from dit import config, runtime
    from dit.latents import read_index
    from dit.objective import require_objective
    from dit.parallel import world
    from dit.profiling import profile_training
    from dit.stages.train import new_network, training_latents
    from dit.stages.train import train as stage

    told = config.load(stage, paths.params)
    model, objective, train, run = (told[name] for name in ("model", "objective", "train", "run"))
    device = runtime.start(run)
    require_objective(model, objective)
    encoded, folder = paths.artifacts / "encode", paths.scratch / "profile"
    torch.manual_seed(train.seed)
    network = new_network(model, read_index(encoded)).to(device)
    data = training_latents(train, run, paths, world())
    found = profile_training(network, data, objective, train, run, folder, steps)
    data.close()
    size = f"{sum(p.numel() for p in network.parameters()):,} parameters, {train.global_batch_size} images a step"
    files = f"{folder / 'table.txt'}, {folder / 'trace.json'} (for ui.perfetto.dev or chrome://tracing)"
    return f"{size} on {device}\n{found.table()}\n\n{files}"
