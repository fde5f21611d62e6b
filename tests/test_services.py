"""flows/services.py: a process is ours by number and start time, or it isn't."""

import json
import os
import socket
import subprocess
import sys

import pytest
from toy_pipeline import REPOSITORY
from waiting import until

from flows import services
from flows.services import Service

# Ends on SIGTERM; its child, in a group of its own, does not end with it.
PARENT = "import subprocess, sys, time; print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(1000)'], start_new_session=True).pid, flush=True); time.sleep(1000)"


@pytest.fixture
def folder(tmp_path):
    yield tmp_path
    left = list(services.marked(tmp_path))
    services.signal_each(left, 9)
    services.wait_gone(left, 5)


def start(folder, code="import time; time.sleep(1000)"):
    return services.start(folder, "sleeper", [sys.executable, "-c", code], dict(os.environ), folder)


def test_a_service_is_found_again_and_ended(folder):
    service = start(folder)
    assert services.find(folder, "sleeper") == service and services.runs(service)
    assert os.getsid(service.pid) == service.pid  # no terminal's end reaches it
    services.end(folder, service)
    assert not services.runs(service) and services.find(folder, "sleeper") is None


def test_its_output_goes_to_its_log(folder):
    service = start(folder, "print('first'); print('last words')")
    services.wait_gone([service.pid], 60)
    assert services.last_lines(folder, "sleeper", 1) == "last words"


def test_a_process_that_only_has_the_number_is_not_ours(folder):
    other = start(folder)
    written = json.loads((folder / "sleeper.json").read_text())
    (folder / "sleeper.json").write_text(json.dumps({**written, "started": written["started"] - 1}))
    assert services.find(folder, "sleeper") is None
    services.end(folder, Service("sleeper", other.pid, other.started - 1))
    assert services.runs(other)


@pytest.mark.parametrize("content", ["", "{}", '{"name": "sleeper", "pid": 1, "started": 5.0}', "[1]"])
def test_what_is_written_down_wrongly_is_nothing(folder, content):
    (folder / "sleeper.json").write_text(content)
    assert services.find(folder, "sleeper") is None


def test_descendants_are_known_by_their_mark_after_their_parent_is_gone(folder):
    service = start(folder, PARENT)
    log = folder / "sleeper.log"
    until(lambda: log.read_text().endswith("\n"))
    child = int(log.read_text())
    services.end(folder, service)
    assert list(services.marked(folder)) == [child]
    assert not services.marked(folder / "other")


def test_the_holder_of_a_port_is_named():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"process {os.getpid()} " in services.holder(port)
    assert services.holder(port) is None


@pytest.mark.parametrize(
    ("command", "code"), [(["flows.local", "up"], 1), (["dit.cli", "up"], 2), (["flows.train_dit"], 1)]
)
def test_outside_a_checkout_there_is_one_line_and_nothing_is_made(tmp_path, command, code):
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == code and done.stderr.count("\n") == 1 and "run in the project's folder" in done.stderr
    assert not (tmp_path / "scratch").exists()
