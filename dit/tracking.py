"""The door to MLflow: where its store is, and one run per trained model.

The files under artifacts/ are the truth and MLflow mirrors them. So whatever fails here is said in one line and the
pipeline goes on: nobody waits for a server that does not answer, and a training does not even wait for one that does.
"""

import contextlib
import csv
import hashlib
import io
import json
import logging
import os
import re
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dit import store
from dit.outbox import BATCH, Outbox, Point
from dit.paths import Paths
from dit.provenance import provenance, settings

CLOSE_SECONDS = 30.0  # the longest wait at a run's end
ORIGIN = "dit.original_run_id"  # tag of a run that was made again: the run it stands for
PARTIAL = "dit.partial"  # tag of one whose beginning is to be filled in from loss.csv
_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # its own seven take minutes, and a repeated POST could register twice
}
_ABSENT = ("RESOURCE_DOES_NOT_EXIST", "NOT_FOUND")


def connect(paths: Paths, *, timeout_seconds: int = 10) -> Any:
    """An `MlflowClient` of a store that answers; a fresh SQLite database is set up first.

    Raises `store.Unreachable` within seconds where there is none. `timeout_seconds` bounds each request thereafter.
    """
    uri = store.tracking_uri(paths)
    for name, value in {**_ENVIRONMENT, "MLFLOW_HTTP_REQUEST_TIMEOUT": str(timeout_seconds)}.items():
        os.environ.setdefault(name, value)
    try:
        store.require(uri, paths, migrate=lambda file: _client(f"sqlite:///{file}"))
        client = _client(uri)
    except Exception as error:  # of sqlalchemy, requests, sqlite3, the file system: here they all mean the same
        raise store.Unreachable(store.one_line(error)) from error
    (paths.scratch / "mlflow-unreachable").unlink(missing_ok=True)
    return client


def _client(uri: str) -> Any:
    import mlflow

    for name in ("mlflow", "alembic", "urllib3.connectionpool"):
        logging.getLogger(name).setLevel(logging.ERROR)
    mlflow.set_tracking_uri(uri)
    client = mlflow.MlflowClient(uri)
    client.search_experiments(max_results=1)
    return client


@dataclass(frozen=True)
class Dataset:
    """An input of a run. `digest` names its content, `source` the place, `split` its use (train, heldout)."""

    name: str
    digest: str
    source: str
    split: str


class Run:
    """A run at MLflow. `Run()` is nobody's: it takes all and keeps nothing. Only `close` ever waits, for seconds.

    A `live` run is one that is going on: the machine is watched, and the end of a `with` block is its end.
    """

    def __init__(self, client: Any = None, id: str | None = None, uri: str | None = None, live: bool = False):
        self.id, self.tracking_uri, self.live = id, uri and store.without_password(uri), live
        self._client, self._monitor, self._outbox = client, None, None
        if client is None:
            return
        self._outbox = Outbox(lambda points: _log_points(client, id, points), self._say)
        if live:
            from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

            self._monitor = SystemMetricsMonitor(id, resume_logging=True, tracking_uri=uri)
            self._monitor.start()

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        status = "FINISHED" if kind is None else "FAILED" if issubclass(kind, Exception) else "KILLED"
        self.close(status if self.live else None)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Points of curves, by name. Takes microseconds; they are sent every few seconds."""
        if self._outbox:
            now = _now()
            self._outbox.add([Point(name, float(value), now, step) for name, value in values.items()])

    def metrics(self, values: dict[str, Any]) -> None:
        """Final figures; nested names are joined: {"cfg1.5": {"fid_x_1k": 1.7}} becomes cfg1.5/fid_x_1k."""
        self.log(0, _figures(values))

    def tags(self, tags: dict[str, object]) -> None:
        """Set tags, replacing those of the same name."""
        for name, value in tags.items():
            self._do(lambda name=name, value=value: self._client.set_tag(self.id, name, str(value)[:5000]))

    def image(self, name: str, image: Any, step: int | None = None) -> None:
        """A picture, uint8 (H, W, 3). With a step it joins a series, which MLflow shows with a slider."""
        place = {"artifact_file": f"{name}.png"} if step is None else {"key": name, "step": step}
        self._do(lambda: self._client.log_image(self.id, image, **place))

    def figure(self, name: str, figure: Any) -> None:
        """A matplotlib figure, drawn here and now: matplotlib is for one thread."""
        if self._outbox:
            figure.savefig(drawn := io.BytesIO(), format="png")
            self.artifact(f"{name}.png", drawn.getvalue())

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


def open_run(
    paths: Paths,
    name: str,
    *,
    experiment: str,
    datasets: Iterable[Dataset] = (),
    tags: dict[str, str] | None = None,
    run_id: str | None = None,
) -> Run:
    """The run of a training: a new one, or `run_id` continued. Settings and provenance are taken from `paths`.

    Where MLflow does not answer, this is said, and a Run comes back that keeps nothing (its id is None). Where it does
    not know `run_id`, there is a new run, tagged with the original's id.
    """
    try:
        client, uri = connect(paths), store.tracking_uri(paths)
        run = _known(client, run_id)
        if run is None:
            origin = {ORIGIN: run_id, PARTIAL: "true"} if run_id else {}
            run = _create(client, paths, experiment, name, {**(tags or {}), **origin})
        else:
            client.update_run(run_id, status="RUNNING")
        _log_settings(client, run, settings(paths))
        _log_datasets(client, run.info.run_id, datasets)
        return Run(client, run.info.run_id, uri, live=True)
    except Exception as error:
        store.say_unreachable(paths, error)
        return Run()


def continue_run(paths: Paths, *, experiment: str) -> Run:
    """The run that artifacts/train/run.json names, for later stages to add to.

    A run that MLflow does not know, since it was restored elsewhere or trained while MLflow was away, is made again
    from params.yaml, loss.csv and metrics.json: once, tagged with the original's id. So is the rest of a run whose
    end MLflow missed.
    """
    train = paths.artifacts / "train"
    told = json.loads((train / "run.json").read_text()).get("mlflow_run_id")
    try:
        client = connect(paths)
        run = _known(client, told)
        if run is None:
            origin = told or f"offline-{_sha256(train / 'config.json', train / 'loss.csv')[:16]}"
            place = [_experiment(client, experiment, store.tracking_uri(paths))]
            again = client.search_runs(place, f"tags.`{ORIGIN}` = '{origin}'", max_results=1)
            run = again[0] if again else _create(client, paths, experiment, "restored", {ORIGIN: origin})
        if run.info.status == "RUNNING" or PARTIAL in run.data.tags:
            _log_settings(client, run, settings(paths))
            _replay(client, run.info.run_id, paths)
            client.set_terminated(run.info.run_id, "FINISHED")
            if PARTIAL in run.data.tags:
                client.delete_tag(run.info.run_id, PARTIAL)
        return Run(client, run.info.run_id, store.tracking_uri(paths))
    except Exception as error:
        store.say_unreachable(paths, error)
        return Run()


@contextlib.contextmanager
def translated() -> Iterator[None]:
    """Turn what MLflow and its libraries raise into `store.Unreachable`; other errors are the program's own."""
    try:
        yield
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in ("mlflow", "requests", "urllib3", "sqlalchemy"):
            raise
        raise store.Unreachable(store.one_line(error)) from error


def download(model_uri: str, folder: Path) -> Path:
    """Fetch a registered model's files into an empty folder; returns where MLflow put them."""
    import mlflow

    folder.mkdir(parents=True, exist_ok=True)
    return Path(mlflow.artifacts.download_artifacts(artifact_uri=model_uri, dst_path=str(folder)))


def _known(client: Any, run_id: str | None) -> Any:
    try:
        run = client.get_run(run_id) if run_id else None
    except Exception as error:
        if getattr(error, "error_code", None) not in _ABSENT:
            raise
        return None
    return run if run and run.info.lifecycle_stage == "active" else None


def _create(client: Any, paths: Paths, experiment: str, name: str, tags: dict[str, str]) -> Any:
    told = provenance(paths) | tags
    if "git.commit" in told:
        told["mlflow.source.git.commit"] = told["git.commit"]  # what MLflow's pages show
    return client.create_run(_experiment(client, experiment, store.tracking_uri(paths)), run_name=name, tags=told)


def _experiment(client: Any, name: str, uri: str) -> str:
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        database = store.database_file(uri)  # elsewhere the server knows where artifacts go
        try:
            return client.create_experiment(name, (database.parent / "mlartifacts").as_uri() if database else None)
        except Exception:
            experiment = client.get_experiment_by_name(name)  # another process may have been first
            if experiment is None:
                raise
    return experiment.experiment_id


def _log_settings(client: Any, run: Any, told: dict[str, str]) -> None:
    # MLflow's params never change, but a continued training may have a larger max_steps: that becomes a tag.
    from mlflow.entities import Param, RunTag

    before = run.data.params
    fresh = [Param(k, v) for k, v in told.items() if k not in before]
    changed = [RunTag(f"changed.{k}", v) for k, v in told.items() if before.get(k, v) != v]
    for start in range(0, max(len(fresh), len(changed)), 100):  # the server's limit
        client.log_batch(run.info.run_id, params=fresh[start : start + 100], tags=changed[start : start + 100])


def _log_datasets(client: Any, run_id: str, datasets: Iterable[Dataset]) -> None:
    from mlflow.entities import Dataset as Entity
    from mlflow.entities import DatasetInput, InputTag

    inputs = []
    for told in datasets:
        entity = Entity(told.name, told.digest[:36], source_type="local", source=json.dumps({"uri": told.source}))
        inputs.append(DatasetInput(entity, [InputTag("mlflow.data.context", told.split)]))
    if inputs:
        client.log_inputs(run_id, datasets=inputs)


def _log_points(client: Any, run_id: str, points: list[Point]) -> None:
    from mlflow.entities import Metric

    for start in range(0, len(points), BATCH):
        client.log_batch(run_id, metrics=[Metric(*point) for point in points[start : start + BATCH]])


def _replay(client: Any, run_id: str, paths: Paths) -> None:
    now, scores = _now(), paths.artifacts / "evaluate" / "metrics.json"
    with open(paths.artifacts / "train" / "loss.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    points = [Point(k, float(v), now, int(row["step"])) for row in rows for k, v in row.items() if k != "step" and v]
    if scores.is_file():
        points += [Point(k, v, now, 0) for k, v in _figures(json.loads(scores.read_text())["settings"]).items()]
    _log_points(client, run_id, points)


def _figures(values: dict[str, Any], prefix: str = "") -> dict[str, float]:
    flat: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _figures(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            flat[re.sub(r"[^\w\-. :/]", "_", f"{prefix}{name}")] = float(value)
    return flat


def _now() -> int:
    return time.time_ns() // 1_000_000


def _sha256(*files: Path) -> str:
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
