"""The work pools: this machine's, and those of infra/work_pools for a cluster."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

PROCESS_POOLS = {"local": "runs on this machine", "gpu": "runs that hold this machine's accelerators"}
KUBERNETES_POOLS = {f"kubernetes-{kind}": f"jobs on a cluster: {kind.upper()}s" for kind in ("cpu", "gpu", "tpu")}
# A study waits for runs of the same worker: few at a time, else all places would be taken by those who wait.
STUDIES, STUDIES_AT_ONCE = "studies", 2  # the work queue, and its limit


def make(root: Path, *, ours: bool, kubernetes: bool) -> list[str]:
    """The work pools: this machine's, which know where the checkout lies, and (`kubernetes`) those of infra/work_pools.

    Args:
        ours: the server is this checkout's own: its pools belong here, wherever they pointed before.

    Returns lines for a person. What a person set on a pool (its limit, whether it is paused) stays.
    """
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
    from prefect.exceptions import ObjectAlreadyExists

    here = _template(root, "process")
    here["variables"]["properties"]["working_dir"]["default"] = str(root.resolve())
    wanted = {name: ("process", words, here) for name, words in PROCESS_POOLS.items()}
    if kubernetes:
        wanted |= {name: ("kubernetes", words, _template(root, name)) for name, words in KUBERNETES_POOLS.items()}
    said = []
    with get_client(sync_client=True) as client:
        there = {pool.name: pool for pool in client.read_work_pools()}
        for name, (kind, words, template) in wanted.items():
            if name not in there:
                pool = WorkPoolCreate(name=name, type=kind, description=words, base_job_template=template)
                client.create_work_pool(pool)
                said.append(f"work pool    {name} ({kind})")
                continue
            before = there[name]
            if before.type != kind:
                raise ValueError(f"the server has a work pool {name} of type {before.type}, and ours is {kind}")
            elsewhere = _working_dir(before.base_job_template) if kind == "process" else None
            if elsewhere not in (None, str(root.resolve())) and not ours:
                said.append(f"work pool    {name} works in {elsewhere}: left as it is")
            elif (before.base_job_template, before.description) != (template, words):
                client.update_work_pool(name, WorkPoolUpdate(base_job_template=template, description=words))
        with suppress(ObjectAlreadyExists):
            client.create_work_queue(STUDIES, work_pool_name="local", concurrency_limit=STUDIES_AT_ONCE)
    return said


def _working_dir(template: dict[str, Any]) -> str | None:
    return template.get("variables", {}).get("properties", {}).get("working_dir", {}).get("default")


def _template(root: Path, name: str) -> dict[str, Any]:
    file = root / "infra" / "work_pools" / f"{name}.json"
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} is needed to make a work pool, and can't be read: {error}") from None
