"""How a stage ended, in scratch/outcome/<stage>.json, for whoever comes next: exit codes do not pass through DVC.

Where several processes do the stage, one that fails leaves a note beside it, <stage>.process-<rank>.json: the main
process, which torchrun then ends, tells the reason as its own, and the next try of the same start heeds it.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dit import launch
from dit.paths import Paths, write_json

COMPLETED, FAILED, REFUSED, INTERRUPTED = 0, 1, 2, 75  # 75 is EX_TEMPFAIL of sysexits.h: run the same command again
_STATUS = {COMPLETED: "completed", FAILED: "failed", REFUSED: "refused", INTERRUPTED: "interrupted"}


@dataclass(frozen=True)
class End:
    """How it ended: the exit code, what to say of it, and whether another try may mend it."""

    code: int = COMPLETED
    message: str | None = ""  # None: another host says it
    retry: bool = False
    start: str = ""  # of the processes that it is the end of, where there were several

    def told(self, name: str) -> dict[str, Any]:
        """The words of the outcome's file."""
        status = {"stage": name, "status": _STATUS[self.code], "message": self.message, "exit_code": self.code}
        return status | {"retry": self.retry} | ({"launch": self.start} if self.start else {})


@dataclass(frozen=True)
class Outcome:
    """What is told of a stage's end in the folder of one checkout. Where the disk is full, nothing is."""

    name: str
    paths: Paths

    @property
    def file(self) -> Path:
        return self.paths.scratch / "outcome" / f"{self.name}.json"

    @property
    def notes(self) -> list[Path]:
        return sorted(self.file.parent.glob(f"{self.name}.process-*.json"))

    def tell(self, end: End, seconds: float) -> None:
        """Write the outcome."""
        with contextlib.suppress(OSError):
            write_json(self.file, end.told(self.name) | {"seconds": round(seconds, 2)})
            for note in self.notes:
                note.unlink(missing_ok=True)

    def note(self, end: End, rank: int) -> None:
        """Leave the main process a note: this one failed."""
        with contextlib.suppress(OSError):
            file = self.file.with_name(f"{self.name}.process-{rank}.json")
            write_json(file, end.told(self.name))

    def ends(self, start: str, *, notes_only: bool = False) -> Iterator[End]:
        """What the processes of a start have told: the outcome, if it is there, and the notes."""
        for _, end in self._found(self.notes if notes_only else [self.file, *self.notes], start):
            yield end

    def forget(self, start: str) -> None:
        """Remove what the processes of a start have told."""
        for file, _ in self._found([self.file, *self.notes], start):
            file.unlink(missing_ok=True)

    def _found(self, files: list[Path], start: str) -> Iterator[tuple[Path, End]]:
        for file in files:
            with contextlib.suppress(OSError, ValueError, KeyError):
                told = json.loads(file.read_text())
                if told["launch"] == start:
                    yield file, End(told["exit_code"], told["message"], told["retry"], start)


def started() -> str:
    """A name for the start of processes that this one belongs to: our launcher's, for all its tries, or torchrun's."""
    return launch.launched() or "/".join(
        os.environ.get(key, "")
        for key in ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")
    )
