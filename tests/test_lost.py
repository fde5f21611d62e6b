"""flows/lost.py on a real Prefect server: a run without a process starts again or is over; one with a process is let be."""

import os
import sys

import pytest
import test_automations
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.states import Cancelling, Crashed, Pending, Running

from flows import lost, services

server = test_automations.server
pytestmark = pytest.mark.slow


@pytest.fixture
def begun(server):
    """begun(state, ...) makes a run of pool `local` that went through these states."""
    with get_client(sync_client=True) as client:
        client.create_work_pool(WorkPoolCreate(name="local", type="process"), overwrite=True)
        flow = client.create_flow_from_name("train-dit")
        deployment = client.create_deployment(flow, "any", work_pool_name="local", entrypoint="x:y")

        def begin(*states):
            run = client.create_flow_run_from_deployment(deployment)
            for state in states:
                assert client.set_flow_run_state(run.id, state, force=True).status == "ACCEPT"
            return lambda: client.read_flow_run(run.id)

        yield begin


def test_what_has_no_process_starts_again_or_is_over(server, begun, tmp_path):
    scheduled, running, cancelling = begun(), begun(Pending(), Running()), begun(Running(), Cancelling())
    pending, alive = begun(Pending()), begun(Running())
    tired = begun(*[state for _ in range(6) for state in (Running(), Crashed())], Running())
    environment = {**os.environ, lost.RUN_ID: str(alive().id)}
    command = [sys.executable, "-c", "import time; time.sleep(100)", "prefect.engine"]  # as a worker starts a flow
    process = services.start(tmp_path, "flow", command, environment, tmp_path)
    try:
        assert list(lost.flows(tmp_path)) == [process.pid]
        names = lost.settle(server, tmp_path)
    finally:
        services.end(tmp_path, process)
    assert sorted(names) == sorted(run().name for run in (running, cancelling, pending, tired))
    after = [run().state.name for run in (scheduled, running, cancelling, pending, alive, tired)]
    assert after == ["Scheduled", "AwaitingRetry", "Cancelled", "Scheduled", "Running", "Crashed"]
    assert lost.waiting(server) == [running().name]
    # Its process is gone now, and no worker is there.
    assert lost.settle_ended(server, tmp_path, {str(alive().id)}) == [alive().name]


def test_a_pool_with_a_worker_is_left_to_it(server, begun, tmp_path):
    pending, running = begun(Pending()), begun(Running())
    assert running().name in lost.settle(server, tmp_path, staffed={"local"})
    assert pending().state.name == "Pending"
    assert running().state.name == "Crashed"  # and the automation does the rest, once its worker has let go of it
