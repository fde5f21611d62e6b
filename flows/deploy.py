"""Deployments on a Prefect server: those of prefect.yaml, and the retraining of this checkout's own data set.

Reads prefect.yaml as `prefect deploy --all` does and makes the same of it (a test compares), but in one process, which
takes a tenth of the time, skips work pools that the server doesn't have, and says what the server has beyond the file.
"""

import copy
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dit.config import read_params
from flows import pools

TAG = "dit"  # on every deployment of ours, and so on every run
NOTIFY_BLOCK = "dit-notify"  # the block, made by a person, through which the server tells news
EMBEDDED = "digits"  # a source that never changes


def plan(root: Path) -> list[dict[str, Any]]:
    """All deployments as prefect.yaml writes them, the checkout's own retraining included; each has a `flow` name.

    Raises ValueError, one line, where a file can't be read or a deployment lacks something.
    """
    file = root / "prefect.yaml"
    if not file.exists():
        raise ValueError(f"no prefect.yaml in {root.resolve()}: run in the project's folder")
    written = read_params(file)
    found = []
    listed = written.get("deployments") or []
    if not isinstance(listed, list) or not all(isinstance(one, dict) for one in listed):
        raise ValueError("prefect.yaml: deployments must be a list of sections, each with a name and so on")
    for one in listed:
        lacking = [key for key in ("name", "entrypoint", "work_pool") if not one.get(key)]
        if lacking:
            raise ValueError(f"prefect.yaml: deployment {one.get('name', '?')} has no {', '.join(lacking)}")
        if not (isinstance(one["name"], str) and isinstance(one["entrypoint"], str)):
            raise ValueError(f"prefect.yaml: deployment {one['name']}: name and entrypoint must be texts")
        if not (isinstance(one["work_pool"], dict) and one["work_pool"].get("name")):
            raise ValueError(f"prefect.yaml: deployment {one['name']}: write its work_pool as {{name: local}}")
        found.append({"pull": written.get("pull"), **one, "flow": _flow_name(one)})
    return _with_own(found, root)


def _flow_name(one: dict[str, Any]) -> str:
    """The flow's name as its function's, by this project's custom: `train_dit` is `train-dit`."""
    return one["entrypoint"].rpartition(":")[2].replace("_", "-")


def _with_own(found: list[dict[str, Any]], root: Path) -> list[dict[str, Any]]:
    """The retraining of params.yaml's data set: by params.yaml's settings, every night unless nothing can be new."""
    if not (root / "params.yaml").exists():
        return found
    data = read_params(root / "params.yaml").get("data")
    name = data.get("name") if isinstance(data, dict) else None
    retraining = [one for one in found if one["flow"] == "retrain"]
    if not isinstance(name, str) or not re.fullmatch(r"[a-z0-9_]+", name) or not retraining:
        return found
    own = copy.deepcopy(retraining[0])
    own |= {
        "name": name,
        "description": f"Look for new images of {name} and retrain if there are enough, as params.yaml says.",
        "parameters": {},
    }
    for schedule in own.get("schedules") or []:
        schedule["active"] = data.get("source") != EMBEDDED
    for trigger in own.get("triggers") or []:
        trigger["name"] = f"retrain {name}: the data changed"
        trigger["match"] = {"prefect.resource.id": f"dit.dataset.{name}"}
    return [one for one in found if one not in retraining or one["name"] != name] + [own]


def deploy(root: Path, wanted: Iterable[dict[str, Any]], say: Callable[[str], None], *, prune: bool) -> list[str]:
    """Make or renew these deployments, with their schedules and triggers; returns their names, `flow/deployment`.

    Those whose work pool the server doesn't have are left out, and said. `prune`: others of ours are deleted (the
    server is this checkout's own); else they are named. Raises ValueError, one line, for what a flow doesn't take.
    """
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterTags

    flows = _Flows(root)
    wanted = list(wanted)
    for one in wanted:
        flows.refuse(one)
    made, missing = {}, {}
    with _told(), get_client(sync_client=True) as client:
        there = {pool.name for pool in client.read_work_pools()}
        for one in wanted:
            name, pool = f"{one['flow']}/{one['name']}", one["work_pool"]["name"]
            if pool not in there:
                missing.setdefault(pool, []).append(name)
                continue
            made[_put(client, one, flows)] = name
        for pool, names in missing.items():
            hint = " (`dit deploy --kubernetes` makes it)" if pool.startswith("kubernetes") else ""
            say(f"left out     {', '.join(names)}: the server has no work pool {pool}{hint}")
        ours = DeploymentFilter(tags=DeploymentFilterTags(all_=[TAG]))
        known = {flow.id: flow.name for flow in client.read_flows()}
        for old in client.read_deployments(deployment_filter=ours, limit=200):
            name = f"{known.get(old.flow_id, '?')}/{old.name}"
            if old.id in made or name in sum(missing.values(), []):
                continue
            if prune:
                client.delete_deployment(old.id)
                say(f"removed      {name}: no longer in prefect.yaml")
            else:
                say(f"not ours     {name}: not in this prefect.yaml (`prefect deployment delete {name}`)")
    return list(made.values())


def _put(client: Any, one: dict[str, Any], flows: "_Flows") -> Any:
    flow = flows.load(one["entrypoint"])
    made = client.create_deployment(
        flow_id=client.create_flow_from_name(flow.name),
        name=one["name"],
        entrypoint=one["entrypoint"],
        description=one.get("description") or flow.description,
        parameters=one.get("parameters") or {},
        parameter_openapi_schema=flows.schema(one["entrypoint"]),
        enforce_parameter_schema=True,
        tags=one.get("tags") or [],
        work_pool_name=one["work_pool"]["name"],
        work_queue_name=one["work_pool"].get("work_queue_name"),
        job_variables=one["work_pool"].get("job_variables") or {},
        pull_steps=one.get("pull"),
        schedules=_schedules(one),
        paused=False,
    )
    owner = f"prefect.deployment.{made}"
    wanted = _triggers(one)
    if wanted or client.read_resource_related_automations(owner):
        client.delete_resource_owned_automations(owner)
    for trigger in wanted:
        trigger.set_deployment_id(made)
        client.create_automation(trigger.as_automation())
    return made


def _schedules(one: dict[str, Any]) -> list[Any]:
    from prefect.client.schemas.actions import DeploymentScheduleCreate
    from prefect.client.schemas.schedules import CronSchedule

    return [
        DeploymentScheduleCreate(
            schedule=CronSchedule(cron=schedule["cron"], timezone=schedule.get("timezone")),
            active=schedule.get("active", True),
            slug=schedule.get("slug"),
        )
        for schedule in one.get("schedules") or []
    ]


def _triggers(one: dict[str, Any]) -> list[Any]:
    from prefect.events import DeploymentEventTrigger

    return [DeploymentEventTrigger(**trigger) for trigger in one.get("triggers") or []]


class _Flows:
    """The flows that deployments name, each imported once."""

    def __init__(self, root: Path):
        self.root = root
        self._found: dict[str, Any] = {}

    def load(self, entrypoint: str) -> Any:
        """The flow of `flows/x.py:function`. Raises ValueError where there is none."""
        from prefect.flows import load_flow_from_entrypoint

        if entrypoint not in self._found:
            file, _, function = entrypoint.partition(":")
            place = f"{self.root / file}:{function}"
            try:
                self._found[entrypoint] = load_flow_from_entrypoint(place, use_placeholder_flow=False)
            except Exception as error:  # whatever the file does when it is imported
                cause = getattr(error, "user_exc", None) or error
                why = " ".join(str(cause).split())
                raise ValueError(f"prefect.yaml: {entrypoint} can't be loaded: {why}") from None
        return self._found[entrypoint]

    def schema(self, entrypoint: str) -> dict[str, Any]:
        from prefect.utilities.callables import parameter_schema

        return parameter_schema(self.load(entrypoint)).model_dump_for_openapi()

    def refuse(self, one: dict[str, Any]) -> None:
        """Raise ValueError where the flow doesn't take a deployment's parameters, or its schedule is none."""
        flow, name = self.load(one["entrypoint"]), f"{one['flow']}/{one['name']}"
        if flow.name != one["flow"]:
            raise ValueError(f"prefect.yaml: {name}: the flow of {one['entrypoint']} is called {flow.name}")
        parameters = one.get("parameters") or {}
        if unknown := [key for key in parameters if key not in flow.parameters.properties]:
            raise ValueError(f"prefect.yaml: {name}: the flow takes no parameter {', '.join(unknown)}")
        try:
            flow.validate_parameters(parameters)
            _schedules(one), _triggers(one)
        except Exception as error:
            raise ValueError(f"prefect.yaml: {name}: {' '.join(str(error).split())}") from None


def server(root: Path) -> tuple[dict[str, str], bool]:
    """The environment for the Prefect server that is configured, and whether it is this checkout's own.

    Raises ValueError where there is none.
    """
    from prefect.settings import get_current_settings

    from flows import servers, services

    configured = get_current_settings().api.url
    own = services.find(servers.folder_of(root), "prefect")
    if own and configured in (None, f"{own.url}/api"):
        return servers.environment(root, {"prefect": own}), True
    if configured and configured != servers.pointer(root):
        return {}, False
    raise ValueError("there is no Prefect server: `dit up` starts one here, and PREFECT_API_URL names another")


def deploy_all(root: Path, say: Callable[[str], None] = print, *, kubernetes: bool = False) -> None:
    """`dit deploy`: work pools, deployments and automations, on the configured server. Raises ValueError."""
    from prefect.context import refresh_global_settings_context

    wanted = plan(root)
    environment, ours = server(root)
    os.environ.update(environment)
    refresh_global_settings_context()  # Prefect read the environment when it was imported
    prepare(root, wanted, say, ours=ours, kubernetes=kubernetes)
    names = deploy(root, wanted, say, prune=ours)
    say(f"deployed     {len(names)}: {', '.join(names)}")


def prepare(
    root: Path, wanted: list[dict[str, Any]], say: Callable[[str], None], *, ours: bool, kubernetes: bool = False
) -> None:
    """What workers and deployments need: the work pools and the automations. Raises ValueError."""
    from flows import automations

    with _told():
        for line in pools.make(root, ours=ours, kubernetes=kubernetes):
            say(line)
        for line in automations.ship(watched=watched(wanted)):
            say(line)


@contextmanager
def _told() -> Iterator[None]:
    """What the server refuses or doesn't answer, as a ValueError of one line."""
    from httpx import TransportError
    from prefect.exceptions import PrefectHTTPStatusError

    try:
        yield
    except PrefectHTTPStatusError as error:
        raise ValueError(f"the Prefect server refused: {' '.join(str(error).split())}") from None
    except TransportError as error:
        raise ValueError(f"the Prefect server can't be reached: {error}") from None


def watched(wanted: list[dict[str, Any]]) -> list[str]:
    """The data sets whose retraining is scheduled: that nothing new comes is news there."""
    scheduled = (one for one in wanted if any(schedule.get("active") for schedule in one.get("schedules") or []))
    return [one["name"] for one in scheduled if one["flow"] == "retrain"]
