"""The `dit` command: names and help; the work is done in the rooms below, imported when they are needed."""

import argparse
import sys
from pathlib import Path

from dit import __version__


def main(arguments: list[str] | None = None) -> int:
    """Run one command; 0 is success, 2 means that the input has to change."""
    parser = argparse.ArgumentParser(prog="dit", description="Train diffusion transformers on your own images.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    command = commands.add_parser("check", help="validate params.yaml for every stage at once")
    command.set_defaults(run=check)

    command = commands.add_parser("preset", help="put a preset into params.yaml, keeping its comments")
    command.add_argument("name", nargs="?", help="a file in presets/ without .yaml; none: list them")
    command.add_argument("--dry-run", action="store_true", help="show the difference and change nothing")
    command.set_defaults(run=preset)

    command = commands.add_parser("clean", help="delete the states of earlier trainings in scratch/ (results stay)")
    command.set_defaults(run=clean)

    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except ValueError as error:
        print("\n".join(f"dit: {line}" for line in str(error).splitlines()), file=sys.stderr)
        return 2
    except BrokenPipeError:  # `dit preset | head`
        sys.stderr.close()
        return 1
    return 0


def check(options: argparse.Namespace) -> None:
    from dit import check
    from dit.paths import Paths

    check.check(Paths())


def preset(options: argparse.Namespace) -> None:
    from dit import presets

    if options.name is None:
        for name in presets.names():
            print(f"{name:<12} {presets.headline(name)}")
        return
    change = presets.apply(options.name, Path("params.yaml"), write=not options.dry_run)
    print(change or f"params.yaml holds the preset {options.name} already")


def clean(options: argparse.Namespace) -> None:
    from dit import entry, resume
    from dit.paths import Paths

    with entry.stage_lock("train", Paths()):  # a running training keeps its state
        freed = resume.clean(Paths())
    print(f"{freed / 1e6:.1f} MB freed")


if __name__ == "__main__":
    sys.exit(main())
