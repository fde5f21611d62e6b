"""flows/display.py under a real Prefect server: what is shown, and that nobody waits for it."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import pytest
from prefect import flow, task
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.runtime import flow_run
from prefect.settings import PREFECT_API_URL, temporary_settings
from toy_pipeline import REPOSITORY
from waiting import until

from flows import display, events

TOLD = {
    "what": "train",
    "done": 153_600,
    "total": 307_200,
    "unit": "images",
    "rate": 2100.0,
    "eta_seconds": 73.1,
    "note": "(step 1200/2400, loss 0.1234)",
    "images_per_second": 2100.0,
    "time": 0.0,
}
STAGE = """
import time
from dit.progress import Progress
progress = Progress("train", 400, say=lambda line: None)
progress(100, " (step 1/4)")
time.sleep({seconds})
progress(300, " (step 4/4)")
"""


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(display, "LOOK_SECONDS", 0.1)


@pytest.fixture
def as_a_run(monkeypatch):
    """This process is a flow run's, as far as Prefect tells."""
    monkeypatch.setenv("PREFECT__FLOW_RUN_ID", str(uuid.uuid4()))


@pytest.fixture(params=["dead", "mute"])
def lost_server(request):
    """A server that is gone, or takes connections and never answers; gives the listening socket and its kind."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if request.param == "mute":
            listener.listen()
            listener.settimeout(60.0)
        with temporary_settings({PREFECT_API_URL: f"http://127.0.0.1:{listener.getsockname()[1]}/api"}):
            yield listener, request.param


def work(environment, seconds=0.0):
    """A stage, in a process of its own as DVC's are."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), **environment}
    subprocess.run([sys.executable, "-c", STAGE.format(seconds=seconds)], env=environment, check=True)


@pytest.mark.slow
def test_one_artifact_a_run_follows_its_stages_and_a_page_closes_it(quick, tmp_path, monkeypatch):
    from prefect.testing.utilities import prefect_test_harness

    for name in ("LEAVE_SECONDS", "ANSWER_SECONDS"):  # the last update is one of those that are looked at
        monkeypatch.setattr(display, name, 60.0)
    with prefect_test_harness(server_startup_timeout=120):
        seen, said = [], []

        @task
        def stage(what):
            with display.following(tmp_path, said.append) as environment:
                if what == "train":
                    return work(environment, seconds=0.5)
                Path(environment["DIT_PROGRESS"]).write_text(json.dumps(TOLD | {"what": what}))
                run = str(flow_run.id)
                seen.append(until(lambda: [one for one in artifacts(run) if what in one[3]]))

        @flow
        def shown():
            for what in ("first", "second", "train"):
                stage(what)
            display.show_page("Train-DiT (own_64)", "# a page", "pictures", said.append)

        state = shown(return_state=True)
        assert state.is_completed(), state.message
        run = str(state.state_details.flow_run_id)
        assert [[one[:3] for one in found] for found in seen] == [[("progress", "progress", 50.0)]] * 2
        assert seen[0][0][3].startswith(
            "**first** ▰▰▰▰▰▱▱▱▱▱ 50%, 1m13s left, 2,100 images/s, 153,600 of 307,200 images"
        )
        page, (key, kind, percent, text) = sorted(artifacts(run), key=lambda one: one[1])
        assert page == ("train-dit-own-64", "markdown", "# a page", "pictures")
        assert (key, kind, percent) == ("progress", "progress", 100.0)  # the end was told too
        assert text.startswith("**train** ▰▰▰▰▰▰▰▰▰▰ 100%, done in ") and text.endswith("400 of 400 images (step 4/4)")
        assert said == []
        (*_, last) = until(lambda: told_of(run, 3))  # each stage told once: none took a minute
        assert last["what"] == "train" and last["total"] == 400


def artifacts(run):
    with get_client(sync_client=True) as client:
        found = client.read_artifacts(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[run])))
    return [(one.key, one.type, one.data, one.description) for one in found]


def told_of(run, count):
    """The payloads of the run's `count` events that it advances, in their order; None if there are not so many."""
    wanted = {"event": {"name": [events.RUN_PROGRESS]}, "resource": {"id": [events.run(run)]}, "order": "ASC"}
    with get_client(sync_client=True) as client:
        sent = client.request("POST", "/events/filter", json={"filter": wanted}).json()["events"]
    return [one["payload"] for one in sent] if len(sent) == count else None


def test_a_lost_server_costs_a_moment_and_one_line(quick, as_a_run, lost_server, tmp_path, monkeypatch):
    assert display.LEAVE_SECONDS + 2 < display.ANSWER_SECONDS
    monkeypatch.setattr(display, "ANSWER_SECONDS", 60.0)
    said = []
    with display.following(tmp_path, said.append) as environment:
        Path(environment["DIT_PROGRESS"]).write_text(json.dumps(TOLD))
        if lost_server[1] == "dead":
            until(lambda: said)  # Prefect's client tries to connect for 1.5 s
        else:
            question, _ = lost_server[0].accept()  # kept open: no answer comes
        began = time.monotonic()
    assert time.monotonic() - began < display.LEAVE_SECONDS + 20 < display.ANSWER_SECONDS
    assert len(said) == (lost_server[1] == "dead") and all("is not shown in Prefect" in line for line in said)


def test_nothing_to_show_asks_no_server_and_costs_no_time(as_a_run, lost_server, tmp_path, monkeypatch):
    monkeypatch.setattr(display, "LEAVE_SECONDS", 60.0)  # what is asked of a dead server is said by then
    said, (listener, kind) = [], lost_server
    (tmp_path / "scratch").mkdir()
    (tmp_path / "scratch" / "progress.json").write_text(json.dumps(TOLD))  # an earlier stage's
    began = time.monotonic()
    with display.following(tmp_path, said.append):
        pass
    assert time.monotonic() - began < 20 and said == []
    if kind == "mute":
        listener.settimeout(3.0)
        with pytest.raises(TimeoutError):
            listener.accept()


def test_what_ends_the_stage_goes_on_unchanged_and_a_fault_is_said_once(quick, as_a_run, lost_server, tmp_path):
    said = []
    with pytest.raises(KeyboardInterrupt), display.following(tmp_path, said.append) as environment:
        file = Path(environment["DIT_PROGRESS"])
        for content in ('{"what": 3}', "[]", '{"done": "x"}'):  # of another program: not ours to understand
            file.write_text(content)
            until(lambda: said)
            time.sleep(0.5)  # several looks
        raise KeyboardInterrupt
    assert len(said) == 1 and "KeyError" in said[0]


def test_outside_of_a_flow_nothing_is_shown_and_all_goes_on(lost_server, tmp_path):
    before = set(threading.enumerate())
    with display.following(tmp_path, pytest.fail) as environment:
        Path(environment["DIT_PROGRESS"]).write_text(json.dumps(TOLD))
        assert set(threading.enumerate()) <= before


def test_a_page_that_no_server_takes_is_one_line(as_a_run, lost_server, monkeypatch):
    monkeypatch.setattr(display, "ANSWER_SECONDS", 0.3)
    said, began = [], time.monotonic()
    display.show_page("train-dit", "# a page", "pictures", said.append)
    assert time.monotonic() - began < 30  # Prefect's own patience is a minute
    assert len(said) == 1 and said[0].startswith("the page 'train-dit' is not shown in Prefect (")


def test_a_line_tells_steps_as_steps_and_an_end_as_an_end():
    steps = {"unit": "steps", "rate": 12.34, "images_per_second": None, "note": "", "done": 300, "total": 1200}
    told = display.line(TOLD | steps | {"what": "vae"}, 125.0)
    assert told == "**vae** ▰▰▱▱▱▱▱▱▱▱ 25%, 1m13s left, 12.34 steps/s, 300 of 1,200 steps, 2m05s so far"
    told = display.line(TOLD | {"done": 307_200, "note": ""}, 125.0)
    assert told == "**train** ▰▰▰▰▰▰▰▰▰▰ 100%, done in 2m05s, 2,100 images/s, 307,200 of 307,200 images"
    assert "0%" in display.line(TOLD | {"done": 0, "total": 0, "eta_seconds": 0.0}, 1.0)
