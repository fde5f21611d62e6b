"""flows/placement.py under a real Prefect server: where a pool's jobs run, and what becomes of a job that was started."""

import json
import threading
from pathlib import Path

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.flow_engine import run_flow
from prefect.runtime import flow_run
from prefect.states import Cancelling, Completed, Crashed, Running, Scheduled
from waiting import until

from dit.estimate import DEVICES
from flows import placement
from flows.placement import Devices

ROOT = Path(__file__).parents[1]
POOLS = ROOT / "infra" / "work_pools"
NAME = "train-dit/on-gpu"


@pytest.fixture(scope="module")
def client(server):
    """A client of a Prefect server which knows `train-dit/on-gpu`."""
    with get_client(sync_client=True) as client:
        client.create_work_pool(WorkPoolCreate(name="gpu", type="process"))
        flow_id = client.create_flow_from_name("train-dit")
        client.create_deployment(flow_id, "on-gpu", work_pool_name="gpu", entrypoint="x:y", parameters={})
        yield client


@pytest.fixture
def coordinator(client):
    """coordinator(work) calls `work` in a flow; with `deployed=True` as a run of a deployment."""

    def run(work, deployed=False):
        @flow(name="coordinator", persist_result=False)
        def coordinator():
            return work()

        if not deployed:
            return coordinator()
        deployment = client.create_deployment(client.create_flow(coordinator), "any", entrypoint="x:y")
        return run_flow(coordinator, flow_run=client.create_flow_run_from_deployment(deployment))

    return run


def test_where_the_jobs_of_a_pool_run(client, tmp_path):
    def pool(name, **variables):
        properties = {key: {"type": "string", "default": value} for key, value in variables.items()}
        template = {"job_configuration": {"name": "job"}, "variables": {"type": "object", "properties": properties}}
        kind = "process" if "working_dir" in variables else "kubernetes"
        client.create_work_pool(WorkPoolCreate(name=name, type=kind, base_job_template=template))

    pool("same", working_dir=str(tmp_path))
    pool("other", working_dir=str(tmp_path / "other"), device="H100")
    pool("cluster", device="A100-80")
    assert placement.where(None, tmp_path) == "here"
    found = [placement.where(name, tmp_path) for name in ("same", "other", "cluster")]
    assert found == ["beside", "elsewhere", "elsewhere"]
    told = [placement.device_of(name) for name in ("same", "other", "cluster")]
    assert told == [None, Devices("H100", None), Devices("A100-80", None)]
    with pytest.raises(ValueError, match="no work pool 'nosuch'"):
        placement.where("nosuch", tmp_path)


SHIPPED = {
    "process": None,
    "kubernetes-cpu": None,
    "kubernetes-gpu": Devices("H100", 1),
    "kubernetes-tpu": Devices("TPU v6e", 4),
}


@pytest.mark.parametrize("name", sorted(file.stem for file in POOLS.glob("*.json")))
def test_every_shipped_pool_says_what_its_jobs_get(client, name):
    template = json.loads((POOLS / f"{name}.json").read_text())
    client.create_work_pool(WorkPoolCreate(name=name, type=name.partition("-")[0], base_job_template=template))
    assert placement.device_of(name, ROOT) == SHIPPED[name]
    said = template["variables"]["properties"].get("device", {})
    assert set(said.get("enum", [])) <= set(DEVICES) and (name == "process" or said["default"] in said["enum"])
    # A deployment's own word counts more than the pool's.
    flow_id = client.create_flow_from_name("train-dit")
    more, given = {
        "process": ({}, None),
        "kubernetes-cpu": ({"hosts": "3", "device": "H200"}, Devices("H200", 24, 3)),
        "kubernetes-gpu": ({"accelerators": 8, "device": "L4"}, Devices("L4", 8)),
        "kubernetes-tpu": ({"accelerators": 8, "device": "TPU v5e"}, Devices("TPU v5e", 8)),
    }[name]
    deployment = {"work_pool_name": name, "entrypoint": "x:y", "parameters": {}, "job_variables": more}
    client.create_deployment(flow_id, f"on-{name}", **deployment)
    assert placement.device_of(name, ROOT) == given


def test_hosts_say_how_many_devices_they_have_together(tmp_path):
    def on(hosts, device="H100", **settings):
        file = tmp_path / "infra" / "kubernetes" / "hosts.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(settings))
        return placement.device_of(None, tmp_path, {"DIT_HOSTS": hosts, "DIT_DEVICE": device})

    assert on("0") is None and on("") is None and placement.device_of(None, tmp_path, {}) is None
    assert on("4") == Devices("H100", 32, 4)
    assert on("4", accelerators=2) == Devices("H100", 8, 4) and on("2", processes=3) == Devices("H100", 6, 2)
    assert on("2", device="") == Devices(None, 16, 2)
    assert on("2", accelerators=0) == Devices(None, None, 2)  # the hosts' processors
    with pytest.raises(ValueError, match="DIT_HOSTS must be a number of hosts, got 'two'"):
        on("two")


def test_a_run_that_starts_again_finds_its_job_and_another_is_another(coordinator):
    def twice():
        return [placement.start(NAME, {"branch": branch}).id for branch in ("a", "a", "b")]

    first, again, other = coordinator(twice)
    assert first == again != other
    with pytest.raises(ValueError, match="no deployment train-dit/on-nosuch"):
        coordinator(lambda: placement.start("train-dit/on-nosuch", {}))


def test_a_job_that_crashed_and_comes_back_is_waited_for(client, coordinator, monkeypatch):
    monkeypatch.setattr(placement, "ASK_EVERY_SECONDS", 0.02)
    job = coordinator(lambda: placement.start(NAME, {"branch": "crashing"}))
    ends = []
    waiting = threading.Thread(target=lambda: ends.append(placement.wait(job.id)))
    waiting.start()
    for state in (Running(), Crashed(), Scheduled(), Running()):
        client.set_flow_run_state(job.id, state, force=True)
        assert not waiting.join(0.2) and not ends
    client.set_flow_run_state(job.id, Completed(), force=True)
    assert until(lambda: ends)[0].is_completed()

    monkeypatch.setattr(placement, "COMES_BACK_SECONDS", 0.1)
    client.set_flow_run_state(job.id, Crashed(), force=True)
    assert placement.wait(job.id).is_crashed()


@pytest.mark.parametrize(
    ("deployed", "cancelled", "ended"),
    [(False, False, "Cancelled"), (True, True, "Cancelled"), (True, False, "Scheduled")],
    ids=["typed", "cancelled", "killed"],
)
def test_a_job_ends_with_a_run_that_is_cancelled_and_not_with_one_that_starts_again(
    client, coordinator, deployed, cancelled, ended
):
    def work():
        jobs = [placement.start(NAME, {"branch": str(number)}) for number in range(2)]
        client.set_flow_run_state(jobs[1].id, Completed(), force=True)
        if cancelled:
            client.set_flow_run_state(flow_run.id, Cancelling(), force=True)
        placement.cancel(jobs)
        return [job.id for job in jobs]

    states = [client.read_flow_run(job).state.name for job in coordinator(work, deployed)]
    assert states == [ended, "Completed"]


def test_a_pool_that_nobody_looks_after_is_refused_unless_anyway(client):
    for at, way in (("beside", "`dit up` starts one"), ("elsewhere", "prefect worker start --pool gpu")):
        with pytest.raises(ValueError, match=f"pool: no worker looks after gpu, .*{way}"):
            placement.require_worker("gpu", at, anyway=False)
        placement.require_worker("gpu", at, anyway=True)
    client.send_worker_heartbeat("gpu", "worker-gpu-0", heartbeat_interval_seconds=30)
    placement.require_worker("gpu", "beside", anyway=False)
