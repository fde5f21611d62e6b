"""flows/automations.py on a real Prefect server: made once, kept off if switched off, and doing what they say."""

import ast
import http.server
import json
import threading
import time
import uuid

import pytest
from ports import free_port
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.events.schemas.events import Event
from prefect.settings import PREFECT_API_URL, PREFECT_HOME, temporary_settings
from prefect.states import Completed, Crashed, Failed, Running
from toy_pipeline import REPOSITORY
from waiting import until

from flows import automations, events, servers, services


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A Prefect server, as `make up` starts it; this process's Prefect talks to it."""
    root = tmp_path_factory.mktemp("server")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_PORT", str(free_port()))
        found = servers.ensure(root, ("prefect",), [], print)["prefect"]
        with temporary_settings({PREFECT_API_URL: f"{found.url}/api", PREFECT_HOME: root / "home"}):
            yield found
        services.end(servers.folder_of(root), found)


def environment(server, root):
    """For `prefect` in a process of its own."""
    return servers.environment(root, {"prefect": server})


@pytest.fixture
def client(server):
    with get_client(sync_client=True) as client:
        yield client


@pytest.fixture
def told():
    """What a local server is told by POST."""
    got = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            got.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    listening = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    got_at = f"http://127.0.0.1:{listening.server_port}"
    yield got_at, got
    listening.shutdown()
    listening.server_close()


def there(client):
    return {one.name.removeprefix(automations.NAME): one for one in automations._ours(client)}


def a_run(client, *, flow="train-dit", deployed=True):
    """A run as if a worker had begun it."""
    flow_id = client.create_flow_from_name(flow)
    if deployed:
        pool = WorkPoolCreate(name="test", type="process")
        client.create_work_pool(pool, overwrite=True)
        deployment = client.create_deployment(flow_id, f"of-{flow}", work_pool_name="test", entrypoint="x:y")
        made = client.create_flow_run_from_deployment(deployment)
    else:
        name = uuid.uuid4().hex[:8]
        made = client.request(
            "POST", "/flow_runs/", json={"flow_id": str(flow_id), "name": name, "state": {"type": "PENDING"}}
        )
        made = client.read_flow_run(made.json()["id"])
    assert client.set_flow_run_state(made.id, Running(), force=True).status == "ACCEPT"
    return made.id


def alive(client, run, flow="train-dit"):
    """Send a run's heartbeat, as the flow's own process does."""
    related = {
        "prefect.resource.id": f"prefect.flow.{client.create_flow_from_name(flow)}",
        "prefect.resource.role": "flow",
        "prefect.resource.name": flow,
    }
    beat = Event(
        event="prefect.flow-run.heartbeat",
        resource={"prefect.resource.id": f"prefect.flow-run.{run}"},
        related=[related],
    )
    client.request("POST", "/events", json=[beat.model_dump(mode="json")])


def test_every_end_that_a_run_of_ours_can_have_is_known():
    """A name missing here would be a run that is taken for dead nine minutes after it has ended."""
    ends = set()
    for file in (REPOSITORY / "flows").glob("*.py"):
        for call in ast.walk(ast.parse(file.read_text())):
            if isinstance(call, ast.Call) and getattr(call.func, "id", "") in (
                "Completed",
                "Failed",
                "Cancelled",
                "Crashed",
            ):
                ends |= {
                    word.value.value
                    for word in call.keywords
                    if word.arg == "name" and isinstance(word.value, ast.Constant)
                }
    assert ends and ends <= set(automations.ENDS)
    assert {"Completed", "Failed", "Crashed", "Cancelled", "TimedOut"} <= set(automations.ENDS)


@pytest.mark.slow
def test_they_exist_once_and_what_a_person_switched_off_stays_off(client):
    assert automations.ship() == [] and len(there(client)) == 2
    first = there(client)
    automations.ship()
    assert {one.id for one in there(client).values()} == {one.id for one in first.values()}
    one = first["a crashed run starts again"]
    client.pause_automation(one.id)
    shorter = next(new for new in automations.survival(pause_seconds=11) if new.name == one.name)
    client.update_automation(
        one.id, type(shorter)(**shorter.model_dump(exclude={"owner_resource", "enabled"}), enabled=False)
    )
    client.create_automation(shorter)  # a second of the same name, as two deploys at once would make
    automations.ship()
    after = there(client)["a crashed run starts again"]
    assert len(automations._ours(client)) == 2
    assert after.trigger.within.total_seconds() == automations.PAUSE_SECONDS
    assert not after.enabled
    client.resume_automation(after.id)


@pytest.mark.slow
def test_a_dead_run_crashes_and_starts_again_and_no_other_does(client):
    for one in automations._ours(client):
        client.delete_automation(one.id)
    for one in automations.survival(silent_seconds=10, pause_seconds=10):
        client.create_automation(one)
    dead, ended, odd, local = a_run(client), a_run(client), a_run(client), a_run(client, deployed=False)
    theirs = a_run(client, flow="theirs")
    for run, flow in (
        (dead, "train-dit"),
        (ended, "train-dit"),
        (odd, "train-dit"),
        (local, "train-dit"),
        (theirs, "theirs"),
    ):
        alive(client, run, flow)
    client.set_flow_run_state(odd, Completed(name="Odd"))
    client.set_flow_run_state(ended, Completed(name="NothingNew"))
    hopeless = client.create_flow_run_from_deployment(client.read_flow_run(dead).deployment_id).id
    client.set_flow_run_state(hopeless, Crashed())  # before it had begun

    until(lambda: client.read_flow_run(dead).state.name == "AwaitingRetry")
    states = [state.type.value for state in client.read_flow_run_states(dead)]
    assert states[-3:] == ["RUNNING", "CRASHED", "SCHEDULED"]
    until(lambda: client.read_flow_run(local).state.name == "Crashed")  # no worker could start it again
    assert client.read_flow_run(ended).state.name == "NothingNew"
    assert client.read_flow_run(odd).state.name == "Odd"
    assert client.read_flow_run(theirs).state.name == "Running"
    assert client.read_flow_run(hopeless).state.name == "Crashed"


@pytest.mark.slow
def test_people_are_told_through_the_block_and_not_without_it(client, told):
    from prefect.blocks.notifications import CustomWebhookNotificationBlock

    url, got = told
    automations.ship(watched=["birds"])
    assert not any(name.startswith("tell") for name in there(client))
    block = CustomWebhookNotificationBlock(
        name="test", url=url, method="POST", json_data={"subject": "{{subject}}", "body": "{{body}}"}
    )
    block.save(automations.BLOCK)
    assert automations.ship(watched=["birds"]) == ["notify by    the block dit-notify (custom-webhook)"]
    ours = {name for name in there(client) if name.startswith("tell")}
    assert ours == {
        f"tell: {what}"
        for what in ("a run failed or crashed", "a run stalls", "a new champion", "nothing new of birds")
    }
    document = next(one for one in client.read_block_documents() if one.name == automations.BLOCK)
    hasty = automations.notifications(document, ["birds"], stalled_seconds=10, quiet_days=10 / 86400)
    for one in hasty:
        if one.trigger.posture.value == "Proactive":
            client.delete_automation(there(client)[one.name.removeprefix(automations.NAME)].id)
            client.create_automation(one)

    failed = a_run(client)
    name = client.read_flow_run(failed).name
    client.set_flow_run_state(failed, Failed(message="train.lr must be above 0"))
    client.set_flow_run_state(a_run(client, flow="theirs"), Failed(message="not ours"))
    events.send(events.MODEL_CHAMPION, events.model("dit-birds"), {"version": 3, "metric": "fid", "value": 7.5})
    for run in ("idle", "stalled"):
        events.send(events.RUN_PROGRESS, events.run(run))
    time.sleep(3)  # the server takes events that come together in any order; it waits for the stalled one meanwhile
    events.send(events.RUN_IDLE, events.run("idle"))
    expected = {
        "a run stalls",
        "nothing new of birds",
        f"train-dit {name}: Failed",
        "new champion: dit-birds version 3",
    }
    until(lambda: expected <= {one["subject"] for one in got})
    subjects = {one["subject"]: one["body"] for one in got}
    assert "train.lr must be above 0" in subjects[f"train-dit {name}: Failed"]
    assert subjects["new champion: dit-birds version 3"] == "fid 7.5"
    assert subjects["a run stalls"].startswith("dit.run.stalled has told no progress")
    assert "not ours" not in str(got) and "dit.run.idle" not in str(got)

    client.delete_block_document(document.id)
    automations.ship(watched=["birds"])
    assert not any(name.startswith("tell") for name in there(client))
