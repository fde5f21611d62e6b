"""The door to MLflow: where its store is, and one run per trained model.

The files under artifacts/ are the truth and MLflow mirrors them. So whatever fails here is said in one line and the
pipeline goes on: nobody waits for a server that does not answer, and a training does not even wait for one that does.
"""

import json
import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from dit import store
from dit.config import digest
from dit.curves import read_losses
from dit.outbox import BATCH, Point
from dit.paths import Paths, file_sha256
from dit.provenance import provenance, settings
from dit.recording import Run, figures, now

REQUEST_SECONDS = 10  # for one request, where nothing large is sent
ORIGIN = "dit.original_run_id"  # tag of a run that was made again: the run it stands for
PARTIAL = "dit.partial"  # tag of one whose beginning is to be filled in from loss.csv
_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # its own seven take minutes, and a repeated POST could register twice
}


def connect(paths: Paths, *, timeout_seconds: int = REQUEST_SECONDS) -> Any:
    """An `MlflowClient` of a store that answers; a fresh SQLite database is set up first.

    Raises `store.Unreachable` within seconds where there is none. `timeout_seconds` bounds each request thereafter, of
    the whole process: MLflow reads it anew each time, so the last call counts.
    """
    uri = store.tracking_uri(paths)
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = str(timeout_seconds)
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
    uri = store.tracking_uri(paths)
    try:
        client = connect(paths)
        run = _known(client, run_id)
        if run is None:
            origin = {ORIGIN: run_id, PARTIAL: "true"} if run_id else {}
            run = _create(client, paths, experiment, name, {**(tags or {}), **origin})
        else:
            client.update_run(run_id, status="RUNNING")
        _log_settings(client, run, settings(paths))
        _log_datasets(client, run.info.run_id, datasets)
        return _recording(client, run.info.run_id, uri, live=True)
    except Exception as error:
        store.say_unreachable(paths, error)
        return Run()


def continue_run(paths: Paths, *, experiment: str, timeout_seconds: int = REQUEST_SECONDS) -> Run:
    """The run that artifacts/train/run.json names, for later stages to add to.

    A run that MLflow does not know, since it was restored elsewhere or trained while MLflow was away, is made again
    from params.yaml, loss.csv and metrics.json: once, tagged with the original's id. So is the rest of a run whose
    end MLflow missed: the training that left the file is finished, whatever MLflow says.
    """
    train = paths.artifacts / "train"
    told = json.loads((train / "run.json").read_text()).get("mlflow_run_id")
    try:
        client = connect(paths, timeout_seconds=timeout_seconds)
        run = _known(client, told)
        if run is None:
            origin = told or f"offline-{digest(*(file_sha256(train / name) for name in ('config.json', 'loss.csv')))}"
            place = [_experiment(client, experiment, store.tracking_uri(paths))]
            again = client.search_runs(place, f"tags.`{ORIGIN}` = '{origin}'", max_results=1)
            run = again[0] if again else _create(client, paths, experiment, "restored", {ORIGIN: origin})
        if run.info.status != "FINISHED" or PARTIAL in run.data.tags:
            _log_settings(client, run, settings(paths))
            _replay(client, run.info.run_id, paths)
            client.set_terminated(run.info.run_id, "FINISHED")
            if PARTIAL in run.data.tags:
                client.delete_tag(run.info.run_id, PARTIAL)
        return _recording(client, run.info.run_id, store.tracking_uri(paths))
    except Exception as error:
        store.say_unreachable(paths, error)
        return Run()


def _recording(client: Any, run_id: str, uri: str, live: bool = False) -> Run:
    monitor = None
    if live:
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        monitor = SystemMetricsMonitor(run_id, resume_logging=True, tracking_uri=uri)
        monitor.start()
    return Run(client, run_id, uri, lambda points: _log_points(client, run_id, points), monitor)


def _known(client: Any, run_id: str | None) -> Any:
    try:
        run = client.get_run(run_id) if run_id else None
    except Exception as error:
        if not store.absent(error):
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
    moment, scores = now(), paths.artifacts / "evaluate" / "metrics.json"
    rows = read_losses(paths.artifacts / "train" / "loss.csv")
    points = [Point(k, v, moment, int(row["step"])) for row in rows for k, v in row.items() if k != "step"]
    if scores.is_file():
        points += [Point(k, v, moment, 0) for k, v in figures(json.loads(scores.read_text())["settings"]).items()]
    _log_points(client, run_id, points)
