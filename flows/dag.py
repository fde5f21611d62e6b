"""DVC's DAG, walked from outside: which stages there are, and one stage run as `dvc repro --single-item`.

DVC stays the only owner of the graph and of the cache: what is stale is never decided here. Only its command line is
used (its Python API is private and would hold the repository's lock in this process). Knows nothing of Prefect.
"""

import codecs
import graphlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from flows.leash import KILL_SECONDS, save_seconds

LAST_LINES = 15
PROGRESS_EVERY_SECONDS = 10.0
# A leash that has sent its last signal needs no more than this to end; it is killed then.
DRAIN_SECONDS = 2.0
_ADVICE = (
    *("To track the changes with git, run:", "To enable auto staging, run:", "Use `dvc push` to send your updates"),
    *("\tgit add ", "\tdvc config core.autostage"),
)


@dataclass(frozen=True)
class StageResult:
    """What became of a stage.

    `status`: `ran`; `cached` (DVC did not run it: unchanged, or taken from its cache); `interrupted` (it saved and
    stopped: not a success); `lost` (killed, or failed for a reason that another try may mend); `failed` (only a person
    can mend it). `message` is empty for the first two, else what a person needs to know.
    """

    name: str
    status: Literal["ran", "cached", "interrupted", "lost", "failed"]
    seconds: float
    message: str = ""


def stages(root: Path) -> dict[str, tuple[str, ...]]:
    """The stages of dvc.yaml in topological order, each with the stages it directly depends on.

    Raises ValueError with DVC's own words where it can't read the pipeline.
    """
    # Both at once: each takes about half a second, nearly all of it imports.
    listing, graph = _ask_dvc(root, ["stage", "list", "--name-only"], ["dag", "--dot"])
    names = listing.split()
    edges = set(re.findall(r'^"([^"]+)" -> "([^"]+)";', graph, flags=re.MULTILINE))
    # The graph also has the nodes of *.dvc files.
    needs = {name: tuple(other for other in names if (other, name) in edges) for name in names}
    sorter = graphlib.TopologicalSorter(needs)
    sorter.prepare()
    order: list[str] = []
    while sorter.is_active():
        ready = sorted(sorter.get_ready(), key=names.index)  # among equals: as in dvc.yaml
        order += ready
        sorter.done(*ready)
    return {name: needs[name] for name in order}


def run_stage(
    name: str,
    root: Path,
    on_line: Callable[[str], None],
    *,
    force: bool = False,
    pull: bool = False,
    environment: Mapping[str, str] | None = None,
    hold: int | None = None,
) -> StageResult:
    """Bring one stage up to date, its predecessors being so already.

    Args:
        on_line: gets each line as it comes; of a progress bar (carriage returns) one line every 10 s.
        force: run it although nothing changed.
        pull: take from DVC's remote what its cache lacks.
        environment: set for the stage in addition.
        hold: a file descriptor that stays open until the stage's last process is gone (a lock, see `dit.locks`).

    An exception that arrives meanwhile (KeyboardInterrupt, Prefect's TerminationSignal) first ends the stage, which
    may save, and goes on once all its processes are gone. If this process is killed, they end too (see `leash`).
    Raises ValueError where DIT_SAVE_SECONDS is no number.
    """
    patience = save_seconds() + KILL_SECONDS + DRAIN_SECONDS
    words = ["repro", "--single-item", *(["--force"] if force else []), *(["--pull"] if pull else []), name]
    started, clock = time.time(), time.monotonic()
    last: deque[str] = deque(maxlen=LAST_LINES)
    skipped, unsaved = False, ""
    with subprocess.Popen(
        # Another DVC command in this checkout (a person's `dvc status`) is waited for, not failed on.
        [sys.executable, "-P", str(Path(__file__).with_name("leash.py")), *_dvc_command("--wait-for-lock", *words)],
        cwd=root,
        env=dvc_environment() | dict(environment or {}),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # a Ctrl-C at the terminal is this process's to handle
        pass_fds=() if hold is None else (hold,),
    ) as leash:
        assert leash.stdin and leash.stdout
        try:
            for line in _lines(_chunks(leash.stdout)):
                last.append(line)
                skipped = skipped or _says_skipped(line, name)
                unsaved = unsaved or (line if line.startswith("ERROR: failed to transfer ") else "")
                on_line(line)
            code = leash.wait()
        except BaseException:
            leash.stdin.close()
            _drain(leash, on_line, patience)
            raise
    outcome = _outcome(root, name, since=started)
    seconds = time.monotonic() - clock
    if outcome.get("status") == "interrupted":
        return StageResult(
            name, "interrupted", seconds, outcome.get("message") or "interrupted: run it again to continue"
        )
    if code != 0:
        lines = "\n".join(last)
        said = outcome.get("message") if outcome.get("status") in ("refused", "failed") else None
        again = outcome.get("retry", False) if outcome else _was_killed(code, last)
        message = f"{said}\n{lines}" if said else lines or f"dvc exited with {code}"
        if said and outcome["status"] == "refused":  # a person's mistake: the line says it all
            message = said
        return StageResult(name, "lost" if again else "failed", seconds, message)
    if unsaved:  # a full disk, say: DVC itself exits with 0, and the results would go with the worktree
        return StageResult(name, "failed", seconds, f"not all of {name}'s results are in DVC's cache: {unsaved}")
    return StageResult(name, "cached" if skipped else "ran", seconds)


def dvc_environment() -> dict[str, str]:
    """This process's environment with this interpreter first on PATH: dvc.yaml's `python` is the one found there."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    return os.environ | {"PATH": path, "DVC_NO_ANALYTICS": "1", "DO_NOT_TRACK": "true", "PYTHONUNBUFFERED": "1"}


def _dvc_command(*words: str) -> list[str]:
    return [sys.executable, "-m", "dvc", *words]


def _ask_dvc(root: Path, *questions: list[str]) -> list[str]:
    asked = [
        subprocess.Popen(
            _dvc_command(*words),
            cwd=root,
            env=dvc_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for words in questions
    ]
    answers = [dvc.communicate() for dvc in asked]
    for dvc, (answer, complaint) in zip(asked, answers, strict=True):
        if dvc.returncode != 0:
            raise ValueError(f"dvc can't read the pipeline: {complaint.strip() or answer.strip()}")
    return [answer for answer, _ in answers]


def _says_skipped(line: str, name: str) -> bool:
    return line in (
        f"Stage '{name}' didn't change, skipping",
        f"Stage '{name}' is cached - skipping run, checking out outputs",
        f"Verifying outputs in frozen stage: '{name}'",
    )


def _lines(chunks: Iterable[bytes]) -> Iterator[str]:
    """Lines of output as they come, without colours, empty ones and DVC's advice on git.

    What ends in a carriage return is a progress bar: the newest is passed on every PROGRESS_EVERY_SECONDS, and the
    last one unless something was written over it.
    """
    decode = codecs.getincrementaldecoder("utf-8")("replace").decode
    pending, progress, passed = "", "", float("-inf")
    for data in chunks:
        *complete, pending = re.split(r"(?<=[\r\n])", pending + decode(data))
        for piece in complete:
            text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", piece).rstrip()
            if piece.endswith("\n"):
                if (text := text or progress) and not text.startswith(_ADVICE):
                    yield text
                progress, passed = "", float("-inf")
            elif text:
                progress = text
                if time.monotonic() - passed >= PROGRESS_EVERY_SECONDS:
                    yield progress
                    progress, passed = "", time.monotonic()
    yield from filter(None, [pending.rstrip() or progress])


def _chunks(source: BinaryIO) -> Iterator[bytes]:
    """Bytes as soon as there are any."""
    return iter(lambda: os.read(source.fileno(), 65536), b"")


def _drain(leash: subprocess.Popen[bytes], on_line: Callable[[str], None], seconds: float) -> None:
    """Pass on what an ending stage still says; kill the leash only if it doesn't end in time."""
    import threading

    late = threading.Timer(seconds, leash.kill)
    late.start()
    try:
        assert leash.stdout
        for line in _lines(_chunks(leash.stdout)):
            on_line(line)
        leash.wait()
    finally:
        late.cancel()


def _was_killed(code: int, last: Iterable[str]) -> bool:
    """Whether DVC or its stage was ended from outside: a stage that ends by itself tells its outcome."""
    by_signal = 128 < code < 128 + signal.NSIG  # and not DVC's own 255, which may be a person's mistake
    return by_signal or any(re.search(r"exited with (-\d+|1(2[89]|[3-9]\d))$", line) for line in last)


def _outcome(root: Path, name: str, since: float) -> dict[str, Any]:
    """What the stage itself wrote about its end, if it ran this time."""
    file = root / "scratch" / "outcome" / f"{name}.json"
    try:
        if file.stat().st_mtime < since - 0.02:  # file times lag by up to a tick of the kernel
            return {}
        outcome = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return outcome if isinstance(outcome, dict) else {}
