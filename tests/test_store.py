"""Finding MLflow's store: quick to say no, and never a half-made database."""

import socket
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dit import store, tracking
from dit.paths import Paths

ROOT = Path(__file__).parents[1]


@pytest.fixture
def paths(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return Paths(tmp_path)


@pytest.fixture
def refused():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{free.getsockname()[1]}"  # bound, but nobody listens


def why_not(paths, uri, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    started = time.monotonic()
    with pytest.raises(store.Unreachable) as caught:
        tracking.connect(paths)
    assert time.monotonic() - started < 30 and "\n" not in str(caught.value)
    return str(caught.value)


def test_a_server_that_is_not_there(paths, refused, monkeypatch):
    assert "refused" in why_not(paths, refused, monkeypatch)
    assert "refused" in why_not(paths, refused.replace("http", "postgresql"), monkeypatch)


def test_a_server_that_never_answers(paths, monkeypatch):
    monkeypatch.setattr(store, "PROBE_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        assert "timed out" in why_not(paths, f"http://127.0.0.1:{mute.getsockname()[1]}", monkeypatch)


def test_a_file_that_is_no_database(paths, monkeypatch):
    (paths.root / "x.db").write_text("not a database " * 100)
    assert "not a database" in why_not(paths, f"sqlite:///{paths.root}/x.db", monkeypatch)


def test_a_place_where_no_file_can_be(paths, monkeypatch):
    (paths.root / "file").write_text("")
    assert "file" in why_not(paths, f"sqlite:///{paths.root}/file/mlflow.db", monkeypatch)


def test_a_database_that_another_process_holds(paths, monkeypatch):
    monkeypatch.setattr(store, "PROBE_SECONDS", 0.2)
    held = sqlite3.connect(paths.root / "held.db", isolation_level=None)
    held.execute("CREATE TABLE t (x)")
    held.execute("BEGIN EXCLUSIVE")
    assert "locked" in why_not(paths, f"sqlite:///{paths.root}/held.db", monkeypatch)
    held.close()


def test_an_address_of_no_known_kind(paths, monkeypatch):
    assert "foo" in why_not(paths, "foo://bar", monkeypatch)


def test_its_absence_is_said_once_by_all_stages_of_a_pipeline(paths, capsys, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@host")
    for _ in range(3):
        store.say_unreachable(paths, "http://me:secret@host\n  refused it")
    said = capsys.readouterr().out
    assert said == "mlflow: http://host cannot be used (http://host refused it): going on without it\n"
    store.say_unreachable(paths, "another reason")
    assert "another reason" in capsys.readouterr().out


@given(st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1))
def test_no_password_is_shown_whatever_stands_in_it(password):
    for place in ("h/mlflow", "h:5432"):
        assert store.without_password(f"x://user:{password}@{place}") == f"x://{place}"
        assert store.one_line(f"cannot reach x://user:{password}@{place} now") == f"cannot reach x://{place} now"


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("http://user:pa@ss@h", "http://h"),
        ("postgresql://user:pa/ss@h:5432/db", "postgresql://h:5432/db"),
        ("https://token@h/a", "https://h/a"),
        ("http://h:5000/a", "http://h:5000/a"),
        ("http://h/people/me@home", "http://h/people/me@home"),
        ("sqlite:////home/me@work/a:b@c/mlflow.db", "sqlite:////home/me@work/a:b@c/mlflow.db"),
    ],
)
def test_an_address_without_its_password(uri, shown):
    assert store.without_password(uri) == shown


def test_a_password_that_tears_the_address_is_not_quoted(paths, monkeypatch):
    for uri in ("postgresql://user:half/secret@h/db", "http://user:half/secret@h"):
        assert "%2F" in (said := why_not(paths, uri, monkeypatch)) and "half" not in said


def test_what_mlflow_raises_is_told_apart_from_the_programs_own_errors(paths):
    client = tracking.connect(paths)
    with pytest.raises(store.Unreachable, match="No Experiment"), store.translated():
        client.get_experiment("77")
    with pytest.raises(KeyError), store.translated():
        raise KeyError("ours")
    with pytest.raises(Exception) as caught:
        client.get_experiment("77")
    assert store.absent(caught.value) and not store.absent(KeyError("ours"))


RACER = """
import sys
from pathlib import Path
from dit import tracking
from dit.paths import Paths
run = tracking.open_run(Paths(Path(sys.argv[1])), "racer", experiment="race")
run.log(1, {"loss": 1.0})
run.close("FINISHED")
print(run.id)
"""


def test_three_processes_race_for_a_fresh_database(paths):
    (paths.root / "mlflow.db.new").write_text("left by one that was killed half-way")
    command = [sys.executable, "-c", RACER, str(paths.root)]
    racers = [
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in "123"
    ]
    ids = [racer.communicate(timeout=250)[0].strip() for racer in racers]
    assert all(len(id) == 32 for id in ids), ids
    client = tracking.connect(paths)
    (experiment,) = [e for e in client.search_experiments() if e.name == "race"]
    assert {run.info.run_id for run in client.search_runs([experiment.experiment_id])} == set(ids)
    assert experiment.artifact_location == (paths.root / "mlartifacts").resolve().as_uri()
    assert [file.name for file in paths.root.glob("mlflow.db*")] == ["mlflow.db"]


def test_the_stamp_changes_when_something_is_written_and_only_then(paths):
    assert store.store_stamp(paths) is None
    client = tracking.connect(paths)
    before = store.store_stamp(paths)
    tracking.connect(paths).search_experiments()
    assert store.store_stamp(paths) == before
    client.create_experiment("one more")
    assert store.store_stamp(paths) != before


@pytest.mark.parametrize("told", [None, "sqlite:///mlflow.db"])
def test_a_worktree_uses_the_database_of_its_home(tmp_path, monkeypatch, told):
    if told:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", told)
    else:
        monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    tree = Paths(tmp_path / "tree")
    tree.scratch.mkdir(parents=True)
    (tree.scratch / "home").write_text(str(tmp_path))
    monkeypatch.chdir(tree.root)
    assert store.tracking_uri(tree) == f"sqlite:///{tmp_path}/mlflow.db"
    client = tracking.connect(tree)
    experiment = client.get_experiment(tracking._experiment(client, "x", store.tracking_uri(tree)))
    assert experiment.artifact_location == (tmp_path / "mlartifacts").as_uri()
    assert (tmp_path / "mlflow.db").is_file() and not (tree.root / "mlflow.db").exists()


def test_an_absolute_database_and_a_server_stay_as_they_are(paths, monkeypatch):
    for uri in ("sqlite:////abs/x.db", "http://host:5000", "postgresql://u:p@h/d"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        assert store.tracking_uri(paths) == uri
