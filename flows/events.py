"""What this project tells Prefect's event stream: data that changed, runs that advance, models that win.

Deployments and automations listen to these names (`prefect.yaml`, `flows.automations`); each event concerns a
resource, so that one data set's changes start that data set's retraining and no other. An event is news, never a
record: one that can't be delivered is dropped by `emit`. Only a person's `dit notify` insists (`send`).
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dit.config import parse, read_params
from dit.paths import Paths, write_json
from dit.sources import DataConfig
from flows import probe

DATA_CHANGED = "dit.data.changed"  # of a data set: its source may hold other images; whoever retrains looks
DATA_NEW = "dit.data.new"  # of a data set: a model was retrained on changes; the payload counts them
RUN_PROGRESS = "dit.run.progress"  # of a run: it advances
RUN_IDLE = "dit.run.idle"  # of a run: a stage ended, and no progress is due for now
MODEL_CHAMPION = "dit.model.champion"  # of a model: this version is the best now


def dataset(name: str) -> str:
    """The resource of a data set: data.name."""
    return f"dit.dataset.{name}"


def model(name: str) -> str:
    """The resource of a registered model: register.model_name."""
    return f"dit.model.{name}"


def run(flow_run_id: str) -> str:
    """The resource of a flow run."""
    return f"dit.run.{flow_run_id}"


def emit(name: str, resource: str, payload: Mapping[str, Any] | None = None) -> bool:
    """Send an event on its way, from within a flow; False where there is no server or the event can't be sent."""
    try:
        from prefect.events import emit_event
        from prefect.settings import get_current_settings

        if not get_current_settings().api.url:  # else Prefect starts a server for it
            return False
        return emit_event(name, resource=_resource(resource), payload=dict(payload or {})) is not None
    except Exception:  # of whatever kind: a run goes on without its news
        return False


def send(name: str, resource: str, payload: Mapping[str, Any] | None = None) -> None:
    """Deliver an event now. Raises ValueError, one line, where no server takes it."""
    from prefect.client.orchestration import get_client
    from prefect.events.schemas.events import Event
    from prefect.settings import get_current_settings

    address = get_current_settings().api.url
    if not address:
        raise ValueError("there is no Prefect server to notify: start one with `dit up`, or set PREFECT_API_URL")
    event = Event(event=name, resource=_resource(resource), payload=dict(payload or {}))
    try:
        with get_client(sync_client=True) as client:
            client.request("POST", "/events", json=[event.model_dump(mode="json")])
    except Exception as error:
        raise ValueError(f"Prefect's server at {address} took no event ({_line(error)}): does it run?") from None


def notify(paths: Paths, name: str | None = None, *, if_changed: bool = False) -> str:
    """Tell that a data set (params.yaml's, unless `name` is given) has changed; returns a line for a person.

    With `if_changed` the source is listed first, without reading any image, and nothing is sent where it holds what
    it held when this was last asked. Raises ValueError, one line.
    """
    data = _data(paths) if name is None or if_changed else None
    if data and name not in (None, data.name):
        raise ValueError(
            f"--if-changed looks at params.yaml's data.source, which is of {data.name!r} and not of {name!r}"
        )
    name = name or data.name
    if not if_changed:
        send(DATA_CHANGED, dataset(name))
        return f"sent: {name} changed; {_listener(name)}"
    seen = probe.look(data, paths)
    if seen == probe.last(paths, name):
        return f"{name}: {seen.files:,} files, unchanged"
    send(DATA_CHANGED, dataset(name), {"files": seen.files})
    probe.keep(paths, name, seen)  # after it was delivered: what nobody heard is told again
    return f"sent: {name} changed, {seen.files:,} files; {_listener(name)}"


def tell_champion(paths: Paths) -> bool:
    """Send MODEL_CHAMPION where `register` has made a new champion: once a version, however often its stage runs."""
    try:
        told = json.loads((paths.artifacts / "register" / "model.json").read_text())
    except (OSError, ValueError):
        return False
    if told.get("alias") != "champion" or told.get("decision") != "champion":
        return False
    file = paths.memory / "champion" / f"{told['name']}.json"
    news = {key: told.get(key) for key in ("version", "digest")}
    if _read(file) == news:
        return False
    payload = {key: told.get(key) for key in ("name", "version", "metric", "value", "setting", "reasons")}
    payload |= {"before": told.get("champion_version"), "before_value": told.get("champion_value")}
    emit(MODEL_CHAMPION, model(told["name"]), payload)
    write_json(file, news)
    return True


def _data(paths: Paths) -> DataConfig:
    return parse("data", read_params(paths.params).get("data"), DataConfig, source=paths.params.name)


def _listener(name: str) -> str:
    """What will come of it, as far as the server says."""
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound

    deployment = f"retrain/{name}"
    try:
        with get_client(sync_client=True) as client:
            found = client.read_deployment_by_name(deployment)
    except ObjectNotFound:
        return f"nothing will come of it: there is no deployment {deployment} (`dit deploy`)"
    return f"{deployment} is paused" if found.paused else f"{deployment} starts"


def _resource(resource: str) -> dict[str, str]:
    return {"prefect.resource.id": resource, "prefect.resource.name": resource.rpartition(".")[2]}


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
