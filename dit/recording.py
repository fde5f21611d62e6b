"""A run that is written to while it goes on: curves, pictures, files, tags. Whoever writes never waits.

MLflow itself is not imported here: what is written goes through a queue to the client that `dit.tracking` made.
"""

import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dit import store
from dit.outbox import Outbox, Point

CLOSE_SECONDS = 30.0  # the longest wait at a run's end


class Run:
    """A run at MLflow. `Run()` is nobody's: it takes all and keeps nothing. Only `close` ever waits, for seconds.

    `send` takes points of curves to the store. A run with a `monitor`, which watches the machine, is one that is going
    on: the end of a `with` block is its end.
    """

    def __init__(
        self,
        client: Any = None,
        id: str | None = None,
        uri: str | None = None,
        send: Callable[[list[Point]], None] | None = None,
        monitor: Any = None,
    ):
        self.id, self.tracking_uri = id, uri and store.without_password(uri)
        self._client, self._monitor = client, monitor
        self._outbox = Outbox(send, self._say) if send else None

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        status = "FINISHED" if kind is None else "FAILED" if issubclass(kind, Exception) else "KILLED"
        self.close(status if self._monitor else None)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Points of curves, by name. Takes microseconds; they are sent every few seconds."""
        if self._outbox:
            moment = now()
            self._outbox.add([Point(name, float(value), moment, step) for name, value in values.items()])

    def metrics(self, values: dict[str, Any]) -> None:
        """Final figures; nested names are joined: {"cfg1.5": {"fid_x_1k": 1.7}} becomes cfg1.5/fid_x_1k."""
        self.log(0, figures(values))

    def tags(self, tags: dict[str, object]) -> None:
        """Set tags, replacing those of the same name."""
        for name, value in tags.items():
            self._do(lambda name=name, value=value: self._client.set_tag(self.id, name, str(value)[:5000]))

    def image(self, name: str, image: Any, step: int | None = None) -> None:
        """A picture, uint8 (H, W, 3). With a step it joins a series, which MLflow shows with a slider."""
        place = {"artifact_file": f"{name}.png"} if step is None else {"key": name, "step": step}
        self._do(lambda: self._client.log_image(self.id, image, **place))

    def artifact(self, name: str, content: Path | bytes | str) -> None:
        """A file: where it is, or what stands in it. Read at once and held in memory: for reports and pictures."""
        if not self._outbox:
            return
        if isinstance(content, Path):
            content = content.read_bytes()
        data = content.encode() if isinstance(content, str) else content
        folder, _, base = name.rpartition("/")

        def send() -> None:
            with tempfile.TemporaryDirectory() as there:
                (Path(there) / base).write_bytes(data)
                self._client.log_artifact(self.id, f"{there}/{base}", folder or None)

        self._do(send)

    def close(self, status: str | None = None) -> None:
        """Send what is left and set the status (FINISHED, FAILED, KILLED), if one is given."""

        def end() -> None:
            if self._monitor:
                self._monitor.finish()
            if status:
                self._client.set_terminated(self.id, status)

        if self._outbox:
            self._outbox.close(end, CLOSE_SECONDS)

    def _do(self, job: Any) -> None:
        if self._outbox:
            self._outbox.do(job)

    def _say(self, error: Exception) -> None:
        print(f"mlflow: {self.tracking_uri} failed ({store.one_line(error)}): the work goes on without it", flush=True)


def figures(values: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Nested figures as MLflow takes them: {"cfg1.5": {"fid_x_1k": 1.7}} becomes {"cfg1.5/fid_x_1k": 1.7}."""
    flat: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= figures(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            flat[re.sub(r"[^\w\-. :/]", "_", f"{prefix}{name}")] = float(value)
    return flat


def now() -> int:
    """Milliseconds since 1970, as MLflow counts them."""
    return time.time_ns() // 1_000_000
