"""flows/servers.py: which server is used, what it is started with, and what is said where it doesn't start."""

import os
import socket
import sys

import pytest
from ports import free_port
from waiting import until

from flows import servers, services
from flows.services import Service

# Answers as healthy as either server.
HEALTHY = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path in ("/api/health", "/health") else 404)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


@pytest.fixture
def root(tmp_path, monkeypatch):
    """An empty checkout with ports of its own; what was started there is ended."""
    for name in [name for name in os.environ if name.startswith(("PREFECT_", "MLFLOW_TRACKING"))]:
        monkeypatch.delenv(name)
    for name in servers.NAMES:
        monkeypatch.setenv(f"{name.upper()}_PORT", str(free_port()))
    yield tmp_path
    left = list(services.marked(servers.folder_of(tmp_path)))
    services.signal_each(left, 9)
    services.wait_gone(left, 5)


def run_instead(monkeypatch, code):
    """Start this Python code where a server would be; its argument is the port."""
    monkeypatch.setattr(servers, "_command", lambda name, root, port: [sys.executable, "-c", code, str(port)])


def test_servers_are_started_once_and_used_then(root, monkeypatch):
    run_instead(monkeypatch, HEALTHY)
    started, again, said = [], [], []
    found = servers.ensure(root, servers.NAMES, started, said.append)
    assert started == list(found.values()) and list(found) == ["prefect", "mlflow"]
    assert said == [f"starting prefect on port {found['prefect'].port} and mlflow on port {found['mlflow'].port} ..."]
    assert all(servers.answers(server) for server in started)
    assert servers.ensure(root, servers.NAMES, again, said.append) == found and not again and len(said) == 1
    for server in started:
        services.end(servers.folder_of(root), server)
    assert not any(servers.answers(server) for server in started)


def test_a_server_that_ends_is_told_with_its_last_words(root, monkeypatch):
    run_instead(monkeypatch, "print('reading'); raise SystemExit('no such table: flow')")
    with pytest.raises(
        ValueError, match=r"(?s)^prefect ended at once; .*prefect\.log ends:\nreading\nno such table: flow$"
    ):
        servers.ensure(root, ("prefect",), [], print)


def test_a_server_that_does_not_come_up_is_ended(root, monkeypatch):
    run_instead(monkeypatch, "import time; time.sleep(1000)")
    monkeypatch.setattr(servers, "START_SECONDS", 0.4)
    with pytest.raises(ValueError, match="prefect does not answer after 0 s"):
        servers.for_this_process(root, None, print)
    assert not services.marked(servers.folder_of(root)) and not (root / "prefect.toml").exists()


def test_a_flow_starts_prefect_alone_points_at_it_and_says_that_it_stays(root, monkeypatch):
    run_instead(monkeypatch, HEALTHY)
    said = []
    wanted = servers.for_this_process(root, None, said.append)
    url = f"http://127.0.0.1:{os.environ['PREFECT_PORT']}"
    assert wanted["PREFECT_API_URL"] == f"{url}/api" and "MLFLOW_TRACKING_URI" not in wanted
    assert said[-1] == f"Prefect: {url} (it stays; `make down` ends it)"
    # The next one reads its own prefect.toml as what is configured: that is no person's choice.
    assert f'url = "{url}/api"' in (root / "prefect.toml").read_text()
    assert servers.for_this_process(root, f"{url}/api", said.append)["PREFECT_API_URL"] == f"{url}/api"
    assert said[-1] == f"Prefect: {url}"


def test_a_flow_uses_mlflows_server_if_it_runs_and_nothing_else_was_chosen(root, monkeypatch):
    run_instead(monkeypatch, HEALTHY)
    mlflow = servers.ensure(root, servers.NAMES, [], print)["mlflow"]
    assert servers.for_this_process(root, None)["MLFLOW_TRACKING_URI"] == mlflow.url
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://their.server")
    assert "MLFLOW_TRACKING_URI" not in servers.for_this_process(root, None)


def test_mlflows_start_waits_for_a_stage_that_sets_up_the_same_database(root, monkeypatch):
    from dit import locks

    run_instead(monkeypatch, HEALTHY)
    said = []

    def release(line):
        said.append(line)
        if line.startswith("waiting"):
            os.close(held.pop())

    with locks.held(root / "scratch" / "lock" / "mlflow", print, "a stage") as lock:
        held = [os.dup(lock)]
    servers.ensure(root, ("mlflow",), [], release)
    assert said[-1].startswith("waiting for a stage (process ") and not held


def test_a_server_of_another_checkout_is_never_used(root, monkeypatch):
    run_instead(monkeypatch, HEALTHY)
    other = servers.ensure(root, ("prefect",), [], print)["prefect"]
    with pytest.raises(ValueError, match=rf"^port {other.port} is taken by process {other.pid} .*PREFECT_PORT=\.\.\.$"):
        servers.ensure(root / "elsewhere", ("prefect",), [], print)


def test_a_port_that_is_no_number_is_refused(monkeypatch, root):
    for port in ("http", "0", "65536", "-1"):
        monkeypatch.setenv("MLFLOW_PORT", port)
        with pytest.raises(ValueError, match=f"MLFLOW_PORT must be a port number, got '{port}'"):
            servers.ensure(root, ("mlflow",), [], print)


def test_if_one_port_is_taken_nothing_is_started(monkeypatch, root):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        monkeypatch.setenv("MLFLOW_PORT", str(taken.getsockname()[1]))
        started = []
        with pytest.raises(ValueError, match=r"^port \d+ is taken by process .* MLFLOW_PORT=\.\.\.$"):
            servers.ensure(root, servers.NAMES, started, print)
    assert not started and not services.marked(servers.folder_of(root))


def test_prefects_settings_of_the_person_do_not_reach_ours(monkeypatch, root):
    monkeypatch.setenv("PREFECT_API_KEY", "secret")
    monkeypatch.setenv("PREFECT_LOGGING_LEVEL", "DEBUG")
    environment = servers.environment(root, {"prefect": Service("prefect", 1, 1, 4321)})
    assert "PREFECT_API_KEY" not in environment and environment["PREFECT_LOGGING_LEVEL"] == "DEBUG"
    assert environment["PREFECT_API_URL"] == "http://127.0.0.1:4321/api"
    assert environment["PREFECT_HOME"] == str(root / "scratch" / "local" / "prefect")
    assert environment["PATH"].startswith(os.path.dirname(sys.executable) + os.pathsep)


def test_the_pointer_is_written_and_removed_but_never_a_persons(root):
    prefect = Service("prefect", 1, 1, 4321)
    servers.point_away(root)  # there is none
    assert servers.point_here(root, prefect) and servers.point_here(root, prefect)
    assert 'url = "http://127.0.0.1:4321/api"' in (root / "prefect.toml").read_text()
    servers.point_away(root)
    assert not (root / "prefect.toml").exists()
    (root / "prefect.toml").write_text('[api]\nurl = "https://their.server/api"\n')
    assert not servers.point_here(root, prefect)
    servers.point_away(root)
    assert "their.server" in (root / "prefect.toml").read_text()


def test_a_server_that_the_person_chose_is_used(root):
    assert servers.for_this_process(root, "https://their.server/api") == {}
    assert not (root / "scratch").exists()


def test_both_listen_on_this_machine_alone_and_mlflow_keeps_the_pipelines_own_store(root):
    prefect, mlflow = (" ".join(servers._command(name, root, 4321)) for name in servers.NAMES)
    assert all("--host 127.0.0.1 --port 4321" in command for command in (prefect, mlflow))
    assert f"--backend-store-uri sqlite:///{root}/mlflow.db" in mlflow
    assert f"--no-serve-artifacts --default-artifact-root file://{root}/mlartifacts" in mlflow


@pytest.mark.slow
def test_mlflows_server_really_starts_and_answers_for_this_store(root):
    import mlflow

    started = []
    server = servers.ensure(root, ("mlflow",), started, print)["mlflow"]
    experiment = mlflow.MlflowClient(server.url).create_experiment("through the server")
    assert (root / "mlflow.db").exists()
    assert mlflow.MlflowClient(f"sqlite:///{root}/mlflow.db").get_experiment(experiment).name == "through the server"
    services.end(servers.folder_of(root), server)
    until(lambda: not services.marked(servers.folder_of(root)))
    assert services.holder(server.port) is None


FATHERLESS = """
import os, subprocess, sys, time
subprocess.Popen([sys.executable, "-c", CODE, sys.argv[1]])
time.sleep(600)
"""


def test_what_a_killed_server_left_behind_does_not_keep_its_port(root, monkeypatch):
    """MLflow's server is a parent and a child that listens: a kill -9 of the parent leaves the child."""
    run_instead(monkeypatch, f"CODE = {HEALTHY!r}\n{FATHERLESS}")
    first = servers.ensure(root, ("mlflow",), [], print)["mlflow"]
    os.kill(first.pid, 9)
    services.wait_gone([first.pid], 30)
    until(lambda: servers.answers(first), 30)  # else the child is gone as well: nothing is tested
    second = servers.ensure(root, ("mlflow",), [], print)["mlflow"]
    assert second.pid != first.pid and servers.answers(second)


def test_both_servers_on_one_port_are_refused(root, monkeypatch):
    monkeypatch.setenv("PREFECT_PORT", os.environ["MLFLOW_PORT"])
    with pytest.raises(ValueError, match="PREFECT_PORT and MLFLOW_PORT are both .*: they must differ"):
        servers.ensure(root, servers.NAMES, [], print)
