"""What Prefect shows of a run: one progress artifact while its stages work, and a page at its end.

A stage writes how far it is into the file that DIT_PROGRESS names (`dit.progress`); a small thread beside it reads the
file and tells Prefect. This is a picture of the run and no part of it: a server that is gone or slow costs the run
nothing, and whatever goes wrong here is said once.
"""

import contextvars
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import ArtifactCreate, ArtifactUpdate
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterKey,
    FlowRunFilter,
    FlowRunFilterId,
)
from prefect.runtime import flow_run
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, get_current_settings, temporary_settings

from dit.progress import FILE, clock
from flows import events

KEY = "progress"
LOOK_SECONDS = 2.0  # between two looks at the file; of a long stage ever longer, since each update is kept as an event
LOOK_SECONDS_AT_MOST = 30.0
TELL_SECONDS = 60.0  # between two events that say that the run advances
ANSWER_SECONDS = 5.0  # for the server to answer one request
LEAVE_SECONDS = 1.0  # that a stage's end waits for the last update
_BAR = 10


@contextmanager
def following(root: Path, say: Callable[[str], None]) -> Iterator[dict[str, str]]:
    """Show the progress of whatever runs in the block; yields what its environment needs for that.

    All stages of a flow run share one artifact, which is made once there is something to show. The block ends as it
    would without this.
    """
    file = (root / "scratch" / "progress.json").resolve()
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.unlink(missing_ok=True)  # an earlier stage's
    ended, run = threading.Event(), flow_run.id
    # Prefect keeps its settings and the run's identity in context variables, of which a thread starts with none.
    watch = contextvars.copy_context().run
    watcher = threading.Thread(target=watch, args=(_watch, file, str(run), ended, say), name=KEY, daemon=True)
    if run:
        watcher.start()
    try:
        yield {FILE: str(file)}
    finally:
        ended.set()
        if run:
            watcher.join(LEAVE_SECONDS)


def show_page(key: str, markdown: str, description: str, say: Callable[[str], None]) -> None:
    """Add a page of Markdown to the flow run. Never fails."""
    key = re.sub(r"[^a-z0-9]+", "-", key.lower()).strip("-")
    try:
        with _client() as client:
            page = {"key": key, "type": "markdown", "description": description, "data": markdown}
            client.create_artifact(ArtifactCreate(flow_run_id=flow_run.id, **page))
    except Exception as error:
        say(f"the page {key!r} is not shown in Prefect ({_line(error)})")


def line(told: dict[str, Any], elapsed: float) -> str:
    """A stage's progress for a person, in Markdown: what matters most first, since Prefect's cards show the beginning."""
    share = _share(told)
    filled = int(share * _BAR)
    done = told["done"] >= told["total"]
    left = f"done in {clock(elapsed)}" if done else f"{clock(told['eta_seconds'])} left"
    speed = told.get("images_per_second")
    parts = [
        left,
        f"{told['rate']:,.4g} {told['unit']}/s" if speed is None else f"{speed:,.0f} images/s",
        " ".join([f"{told['done']:,} of {told['total']:,} {told['unit']}", told.get("note", "").strip(" ,")]).strip(),
        *([] if done else [f"{clock(elapsed)} so far"]),
    ]
    return f"**{told['what']}** {'▰' * filled}{'▱' * (_BAR - filled)} {share:.0%}, {', '.join(parts)}"


def _watch(file: Path, run: str, ended: threading.Event, say: Callable[[str], None]) -> None:
    began, announced, seen, complained = time.monotonic(), float("-inf"), None, False
    show = _Artifact(run)
    last = False
    while not last:
        elapsed = time.monotonic() - began
        last = ended.wait(min(max(LOOK_SECONDS, elapsed / 100), LOOK_SECONDS_AT_MOST))
        elapsed = time.monotonic() - began
        try:
            told = _read(file)
            if told is None or told == seen:
                continue
            seen = told
            if elapsed - announced >= TELL_SECONDS:
                announced = elapsed
                events.emit(events.RUN_PROGRESS, events.run(run), told | {"elapsed_seconds": elapsed})
            show(round(100 * _share(told), 1), line(told, elapsed))
        except Exception as error:  # of whatever kind: a run does not end because it isn't watched
            if not complained:
                say(f"progress is not shown in Prefect ({_line(error)}); the run goes on")
            complained = True


class _Artifact:
    """The one progress artifact of a flow run, which an earlier stage (or attempt) may have made."""

    def __init__(self, run: str):
        self.run, self.id = run, None

    def __call__(self, percent: float, description: str) -> None:
        with _client() as client:
            if self.id is None:
                mine = FlowRunFilter(id=FlowRunFilterId(any_=[self.run]))
                key = ArtifactFilter(key=ArtifactFilterKey(any_=[KEY]))
                self.id = next(
                    (one.id for one in client.read_artifacts(artifact_filter=key, flow_run_filter=mine)), None
                )
            if self.id is None:
                new = ArtifactCreate(key=KEY, type=KEY, flow_run_id=self.run, description=description, data=percent)
                self.id = client.create_artifact(new).id
            else:
                client.update_artifact(self.id, ArtifactUpdate(data=percent, description=description))


@contextmanager
def _client() -> Iterator[SyncPrefectClient]:
    """A client of its own that gives up soon (1.5 s where nobody listens): the flow's tries again for a minute and more."""
    if not get_current_settings().api.url:  # Prefect would start a server for it
        raise ValueError("there is no server")
    with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}):
        with get_client(httpx_settings={"timeout": ANSWER_SECONDS}, sync_client=True) as client:
            yield client


def _share(told: dict[str, Any]) -> float:
    return min(max(told["done"] / max(told["total"], 1), 0.0), 1.0)


def _read(file: Path) -> dict[str, Any] | None:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return None


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
