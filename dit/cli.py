"""The `dit` command: names and help; the work is done in the rooms below, imported when they are needed."""

import argparse
import sys
from pathlib import Path

from dit import __version__, judge, trial


def main(arguments: list[str] | None = None) -> int:
    """Run one command; 0 is success, 2 means that the input has to change."""
    parser = argparse.ArgumentParser(prog="dit", description="Train diffusion transformers on your own images.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    for add in (_add_settings, _add_weights, trial.add_command, judge.add_command, _add_notify, _add_servers):
        add(commands)
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except ValueError as error:
        complain(error)
        return 2
    except BrokenPipeError:  # `dit preset | head`
        sys.stderr.close()
        return 1
    except OSError as error:  # of a place that cannot be written or read
        complain(f"{error.filename}: {error.strerror}" if error.filename else error)
        return 2
    return 0


def complain(what: object) -> None:
    """Tell a person what is wrong, on standard error: each line begins with `dit: `, whatever the command."""
    for line in str(what).splitlines():
        print(f"dit: {line}", file=sys.stderr)


def _add_settings(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "check", help="validate params.yaml for every stage at once, and say what a run will do"
    )
    command.add_argument("--device", help="what it will run on: H100, ..., cpu; default: this machine's")
    command.add_argument(
        "--devices",
        type=int,
        metavar="N",
        help="how many of them; default: run.processes, or all of this machine's, or 1",
    )
    command.add_argument("--stale", metavar="STAGES", help="the stages to run, with commas; default: as DVC says")
    command.add_argument("--no-push", dest="push", action="store_false", help="do without the DVC remote")
    command.add_argument("--elsewhere", action="store_true", help="it will run on another machine, with its own files")
    command.add_argument("--anyway", action="store_true", help="succeed although it can't end well")
    command.add_argument(
        "--json", action="store_true", dest="as_json", help="for programs; nothing is refused but settings"
    )
    command.set_defaults(run=check)

    command = commands.add_parser("preset", help="put a preset into params.yaml, keeping its comments")
    command.add_argument("name", nargs="?", help="a file in presets/ without .yaml; none: list them")
    command.add_argument("--dry-run", action="store_true", help="show the difference and change nothing")
    command.set_defaults(run=preset)

    command = commands.add_parser("init", help="look at a folder of images and at this machine, and write params.yaml")
    command.add_argument("folder", help="PNG, JPEG, WebP: a sub-folder for each class, or all in one")
    command.add_argument("--name", help="a-z 0-9 _ ; default: the folder's")
    command.add_argument("--preset", help="default: chosen by the images and the machine")
    command.add_argument(
        "--no-mirror", action="store_true", help="for text, digits, and whatever has a left and a right"
    )
    command.add_argument("--dry-run", action="store_true", help="show what would change and change nothing")
    command.set_defaults(run=init)

    command = commands.add_parser("adopt", help="bring a flow run's settings and results into this checkout")
    command.add_argument("wanted", metavar="RUN", help="its id, the beginning of it, or its branch runs/PRESET/ID")
    command.set_defaults(run=adopt)

    command = commands.add_parser("clean", help="delete the states of earlier trainings in scratch/ (results stay)")
    command.set_defaults(run=clean)


def _add_weights(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser("import", help="turn published DiT or SiT weights, or a diffusers folder, into ours")
    command.add_argument("source", metavar="FILE|FOLDER", type=Path)
    command.add_argument("--output", type=Path, help="default: weights/NAME, of the source's name")
    command.add_argument("--license", help="of the weights; default: as their folder says, CC-BY-NC-4.0 for a DiT file")
    command.add_argument("--objective", choices=("diffusion", "transport"), help="default: by the name, DiT or SiT")
    command.add_argument("--num-classes", type=int, help="another number than theirs begins the label table anew")
    command.add_argument("--image-size", type=int, help="pixels; another than theirs computes the position table anew")
    command.add_argument("--num-heads", type=int, help="default: the published network's of the same width")
    command.add_argument("--factor", type=int, help="pixels per latent; default: the folder's autoencoder's, else 8")
    command.add_argument(
        "--timestep-embedding",
        choices=("published", "diffusers"),
        help="default: published, and diffusers for a diffusers folder that is no conversion of published weights",
    )
    command.set_defaults(run=import_weights)

    command = commands.add_parser("export", help="write a checkpoint for other software")
    command.add_argument("checkpoint", nargs="?", type=Path, default=Path("artifacts/ema"))
    command.add_argument("--format", choices=("diffusers",), required=True)
    command.add_argument("--output", type=Path, required=True)
    command.add_argument("--vae", type=Path, default=Path("artifacts/vae"))
    command.add_argument("--with-code", action="store_true", help="exact for published timestep frequencies, by code")
    command.set_defaults(run=export_weights)

    command = commands.add_parser("info", help="what a network costs: parameters, Gflops, memory, hours, price")
    command.add_argument("name", nargs="?", help="DiT-S/2 to SiT-XL/8, or params (params.yaml's); none: all twelve")
    command.add_argument("--image-size", type=int, help="pixels; default: 256")
    command.add_argument("--block", help="adaln_zero (default), adaln, cross_attention or in_context")
    command.add_argument("--batch-size", type=int, help="images on a device at a time; default: params.yaml's, 32")
    command.add_argument("--precision", choices=("bf16", "fp32"), help="of training; default: params.yaml's, bf16")
    command.add_argument("--device", default="H100", help="A100, H100 (default), H200, L4, RTX 4090, TPU v3 to v6e")
    command.add_argument("--price", type=float, help="US dollars an hour of one device; default: the table's")
    command.add_argument("--mfu", type=float, help="share of the peak that training reaches; default: 0.2, fp32 0.1")
    command.add_argument("--json", action="store_true", dest="as_json", help="for programs")
    command.set_defaults(run=info)


def _add_notify(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "notify", help="tell the Prefect server that a data set changed: retrain looks at once"
    )
    command.add_argument("--dataset", metavar="NAME", help="default: params.yaml's data.name")
    command.add_argument(
        "--if-changed", action="store_true", help="only if files came, went or changed since this was last asked"
    )
    command.set_defaults(run=notify)


def _add_servers(commands: argparse._SubParsersAction) -> None:
    for name, words in {
        "up": "start Prefect's and MLflow's servers and workers on this machine, or use those that run",
        "down": "end this checkout's servers and workers; runs that it ends go on at the next `dit up`",
        "status": "what runs of this checkout's servers and workers, and its health",
        "deploy": "bring prefect.yaml's deployments, work pools and automations to the Prefect server",
    }.items():
        command = commands.add_parser(name, help=words)
        if name == "deploy":
            command.add_argument("--kubernetes", action="store_true", help="with the work pools of infra/work_pools")
        if name == "up":
            command.add_argument(
                "--gpus-per-run", type=int, metavar="N", help="default: all GPUs here, one run at a time"
            )
        command.set_defaults(run=servers, what=name)


def servers(options: argparse.Namespace) -> None:
    import subprocess

    # A process of its own: the checkout's flows are run, wherever `dit` is installed, and Prefect stays out of here.
    more = ["--kubernetes"] if getattr(options, "kubernetes", False) else []
    if (count := getattr(options, "gpus_per_run", None)) is not None:
        more = ["--gpus-per-run", str(count)]
    command = [sys.executable, "-m", "flows.local", options.what, *more]
    if not Path("flows/local.py").exists():
        raise ValueError(f"no flows in {Path.cwd()}: run in the project's folder")
    with subprocess.Popen(command) as local:
        try:
            code = local.wait()
        except KeyboardInterrupt:  # the other one has it too, and ends what it was at
            code = local.wait()
    if code:
        raise SystemExit(code)


def check(options: argparse.Namespace) -> None:
    import os

    from dit.paths import Paths

    if "DVC_STAGE" in os.environ:  # set by DVC for its commands
        from dit import check

        check.check_in_dvc(Paths())
        return
    from dit import preflight

    told = {name: getattr(options, name) for name in ("device", "devices", "push", "elsewhere")}
    stale = None if options.stale is None else [name for name in options.stale.split(",") if name]
    found = preflight.checked(Paths(), stale=stale, **told)
    print(found.dump() if options.as_json else found.line)
    if not options.as_json:
        doubts = [*found.warnings, *(found.faults if options.anyway else [])]
        for doubt in doubts:
            complain(doubt)
        preflight.refuse(found, options.anyway)


def preset(options: argparse.Namespace) -> None:
    from dit import presets

    if options.name is None:
        for name in presets.names():
            print(f"{name:<15} {presets.headline(name)}")
        return
    change = presets.apply(options.name, Path("params.yaml"), write=not options.dry_run)
    print(change or f"params.yaml holds the preset {options.name} already")


def init(options: argparse.Namespace) -> None:
    from dit import start
    from dit.paths import Paths

    wanted = {"name": options.name, "preset": options.preset, "mirror": not options.no_mirror}
    print("\n".join(start.init(options.folder, Paths(), **wanted, write=not options.dry_run)))


def adopt(options: argparse.Namespace) -> None:
    from flows import worktrees

    print("\n".join(worktrees.adopt(Path.cwd(), options.wanted)))


def notify(options: argparse.Namespace) -> None:
    from dit.paths import Paths
    from flows import events

    print(events.notify(Paths(), options.dataset, if_changed=options.if_changed))


def clean(options: argparse.Namespace) -> None:
    from dit import entry, resume
    from dit.paths import Paths

    with entry.stage_lock("train", Paths()):  # a running training keeps its state
        freed = resume.clean(Paths())
    print(f"{freed / 1e6:.1f} MB freed")


def info(options: argparse.Namespace) -> None:
    import json

    from dit import check, info
    from dit.paths import Paths

    def mine() -> dict:
        sections, artifacts = check.check(Paths(), files=False), Paths().artifacts
        index, fit = (artifacts / name for name in ("encode/index.json", "vae/fit.json"))
        encoded = json.loads(index.read_text()) if index.is_file() else None
        if encoded and fit.is_file():
            encoded["pretrained"] = json.loads(fit.read_text()).get("pretrained")
        return info.of_params(sections, check.latent_factor(sections["vae"]), encoded)

    told = {name: value for name, value in vars(options).items() if name != "run"}
    print(info.answer(told.pop("name"), mine=mine, **told))


def import_weights(options: argparse.Namespace) -> None:
    from dit import importing

    name = options.source.stem if options.source.is_file() else options.source.resolve().name
    output = options.output or Path("weights") / name
    told = {name: value for name, value in vars(options).items() if name not in ("run", "source", "output")}
    chosen = options.output is not None
    said = importing.import_weights(options.source, output, importing.Wanted(**told), replace=chosen)
    print("\n".join([f"{output}:", *said]))


def export_weights(options: argparse.Namespace) -> None:
    from dit import exporting

    said = exporting.export_diffusers(options.checkpoint, options.vae, options.output, with_code=options.with_code)
    print("\n".join([f"{options.output}:", *said]))


if __name__ == "__main__":
    sys.exit(main())
