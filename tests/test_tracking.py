"""One MLflow run per trained model, against a real store."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from ports import free_port
from tiny_model import write_training
from waiting import until

from dit import tracking
from dit.paths import Paths, write_json
from flows import services


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    """A set-up database for all tests of this file; each has an experiment of its own."""
    home = tmp_path_factory.mktemp("mlflow")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{home}/mlflow.db")
        tracking.connect(Paths(home))
        yield home


@pytest.fixture
def paths(tmp_path, database):
    write_training(Paths(tmp_path))
    return Paths(tmp_path)


def told(paths, run_id):
    return tracking.connect(paths).get_run(run_id)


def test_a_run_holds_settings_curves_pictures_inputs_and_its_end(paths, monkeypatch):
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.1")
    data = tracking.Dataset("digits", "f" * 64, "artifacts/encode", "train")
    with tracking.open_run(paths, "first", experiment="whole", datasets=[data], tags={"colour": "blue"}) as run:
        started = time.monotonic()
        for step in range(3000):
            run.log(step, {"loss": 1 / (step + 1), "lr": 0.1})
        assert time.monotonic() - started < 5  # a store that is waited for needs more
        run.image("preview", np.zeros((8, 8, 3), np.uint8), step=100)
        run.artifact("notes/hello.txt", "hello")
        run.tags({"size": 7})
        run.metrics({"cfg1.5": {"fid_x_1k": 1.7}, "flat": 2})
        until(lambda: "system/cpu_utilization_percentage" in told(paths, run.id).data.metrics)
        assert "MLFLOW_RUN_ID" not in os.environ
    got, client = told(paths, run.id), tracking.connect(paths)
    assert got.info.status == "FINISHED" and got.info.run_name == "first"
    assert got.data.params == {"preset": "tiny", "train.max_steps": "10", "train.betas": "[0.9, 0.999]"}
    assert got.data.tags.items() >= {"preset": "tiny", "colour": "blue", "size": "7"}.items()
    assert got.data.metrics["cfg1.5/fid_x_1k"] == 1.7 and got.data.metrics["flat"] == 2
    losses = client.get_metric_history(run.id, "loss")
    assert sorted((m.step, m.value) for m in losses) == [(step, 1 / (step + 1)) for step in range(3000)]
    (entry,) = got.inputs.dataset_inputs
    assert entry.dataset.name == "digits" and entry.tags[0].value == "train"
    assert {a.path for a in client.list_artifacts(run.id)} >= {"notes", "images"}


@pytest.mark.parametrize(("error", "status"), [(ValueError, "FAILED"), (KeyboardInterrupt, "KILLED")])
def test_a_training_that_breaks_off_is_told_as_it_ended(paths, error, status):
    with pytest.raises(error), tracking.open_run(paths, "x", experiment="broken") as run:
        raise error
    assert told(paths, run.id).info.status == status


def test_a_resumed_training_goes_on_with_its_run(paths):
    with pytest.raises(KeyboardInterrupt), tracking.open_run(paths, "x", experiment="resumed") as run:
        for step in range(20):
            run.log(step, {"loss": step / 2})
        raise KeyboardInterrupt
    assert told(paths, run.id).info.status == "KILLED"
    paths.params.write_text(paths.params.read_text().replace(": 10", ": 30"))  # train.max_steps was raised
    with tracking.open_run(paths, "x", experiment="resumed", run_id=run.id) as again:
        assert told(paths, run.id).info.status == "RUNNING"
        for step in range(10, 30):  # from the last checkpoint, some steps for the second time
            again.log(step, {"loss": step / 2})
    got = told(paths, run.id)
    assert again.id == run.id and got.info.status == "FINISHED"
    assert got.data.params["train.max_steps"] == "10" and got.data.tags["changed.train.max_steps"] == "30"
    history = tracking.connect(paths).get_metric_history(run.id, "loss")
    assert {m.step: m.value for m in history} == {step: step / 2 for step in range(30)}
    client = tracking.connect(paths)
    assert len(client.search_runs([got.info.experiment_id])) == 1


def test_a_training_interrupted_and_resumed_while_the_server_was_away_ends_as_one_finished_run(paths):
    with pytest.raises(KeyboardInterrupt), tracking.open_run(paths, "x", experiment="away at the end") as run:
        run.log(1, {"loss": 1.0})
        raise KeyboardInterrupt
    write_training(paths, run.id)  # resumed to its end, and MLflow was told nothing
    tracking.continue_run(paths, experiment="away at the end").close()
    got, client = told(paths, run.id), tracking.connect(paths)
    assert got.info.status == "FINISHED" and got.data.metrics["loss"] == 1 / 10
    assert len(client.search_runs([got.info.experiment_id])) == 1


def test_a_picture_that_cannot_be_sent_keeps_no_run_from_its_end(paths, capsys):
    with tracking.open_run(paths, "x", experiment="bad picture") as run:
        run.image("preview", np.zeros((3, 4, 5, 6), np.uint8), step=1)  # of no shape that a picture has
        run.log(1, {"loss": 1.0})
    assert told(paths, run.id).info.status == "FINISHED" and told(paths, run.id).data.metrics["loss"] == 1.0
    assert capsys.readouterr().out.count("goes on without it") == 1


def test_the_last_call_says_how_long_a_request_may_take(paths, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "120")
    tracking.connect(paths, timeout_seconds=300)
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "300"
    tracking.connect(paths)
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "10"


def test_later_stages_add_to_the_run_that_the_file_names(paths):
    with tracking.open_run(paths, "x", experiment="later") as run:
        pass
    write_training(paths, run.id)
    with pytest.raises(ValueError), tracking.continue_run(paths, experiment="later") as more:
        more.metrics({"plain": {"fid": 3.0}})
        raise ValueError("the stage failed, the training did not")
    got = told(paths, run.id)
    assert more.id == run.id and got.info.status == "FINISHED" and got.data.metrics == {"plain/fid": 3.0}


@pytest.mark.parametrize("original", ["0" * 32, None], ids=["unknown to this server", "trained while it was away"])
def test_a_run_that_is_not_known_is_made_again_once(paths, original):
    write_training(paths, original)
    write_json(paths.artifacts / "evaluate" / "metrics.json", {"settings": {"plain": {"fid": 4.0}}})
    experiment = f"restored {original}"
    with tracking.continue_run(paths, experiment=experiment) as first:
        pass
    with tracking.continue_run(paths, experiment=experiment) as second:
        pass
    got = told(paths, first.id)
    assert first.id == second.id and got.info.status == "FINISHED"
    assert got.data.tags[tracking.ORIGIN] == original or original is None
    assert got.data.params["train.max_steps"] == "10" and got.data.metrics["plain/fid"] == 4.0
    losses = tracking.connect(paths).get_metric_history(first.id, "loss")
    assert {m.step: m.value for m in losses} == {step: 1 / step for step in range(1, 11)}


def test_every_column_of_the_losses_becomes_a_curve_and_an_empty_cell_no_point(paths):
    write_training(paths, None)
    head = "step,loss,lr,grad_norm,skipped,loss_t1,loss_t2,loss_t3,loss_t4\n"
    rows = "2,1.5,0.1,3.0,0,1.25,1.5,,2.0\n4,,0.1,,2,,,,\n"
    (paths.artifacts / "train" / "loss.csv").write_text(head + rows)
    with tracking.continue_run(paths, experiment="columns") as run:
        pass
    client, told = tracking.connect(paths), {}
    for name in head.strip().split(","):
        told[name] = {point.step: point.value for point in client.get_metric_history(run.id, name)}
    assert told == {
        "step": {},
        "loss": {2: 1.5},
        "lr": {2: 0.1, 4: 0.1},
        "grad_norm": {2: 3},
        "skipped": {2: 0, 4: 2},
    } | {
        "loss_t1": {2: 1.25},
        "loss_t2": {2: 1.5},
        "loss_t3": {},
        "loss_t4": {2: 2},
    }


def test_a_run_whose_end_the_server_missed_is_completed(paths):
    run = tracking.open_run(paths, "x", experiment="missed")
    write_training(paths, run.id)
    tracking.continue_run(paths, experiment="missed").close()
    got = told(paths, run.id)
    assert got.info.status == "FINISHED" and got.data.metrics["loss"] == 1 / 10
    run.close()


def test_a_training_resumed_elsewhere_has_its_whole_curve_in_the_end(paths):
    with tracking.open_run(paths, "x", experiment="elsewhere", run_id="1" * 32) as run:
        run.log(10, {"loss": 1 / 10})
    write_training(paths, run.id)
    tracking.continue_run(paths, experiment="elsewhere").close()
    got = told(paths, run.id)
    assert got.data.tags[tracking.ORIGIN] == "1" * 32 and tracking.PARTIAL not in got.data.tags
    history = tracking.connect(paths).get_metric_history(run.id, "loss")
    assert {m.step for m in history} == set(range(1, 11))


def test_without_a_server_the_work_goes_on_and_it_is_said_once(tmp_path, monkeypatch, capsys):
    paths = Paths(tmp_path)
    write_training(paths)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    started = time.monotonic()
    for _ in range(2):
        with tracking.open_run(paths, "x", experiment="x") as run, tracking.continue_run(paths, experiment="x") as more:
            run.log(1, {"loss": 1.0})
            more.metrics({"fid": 1.0})
    assert time.monotonic() - started < 20 and run.id is None  # MLflow itself would try for minutes
    assert capsys.readouterr().out.count("\n") == 1


@pytest.fixture
def server(tmp_path):
    """A real MLflow server on a free port, and its process."""
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1"]
    command += [
        "--backend-store-uri",
        f"sqlite:///{tmp_path}/server.db",
        "--artifacts-destination",
        f"{tmp_path}/files",
    ]
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    process = subprocess.Popen(
        command,
        env=environment,
        cwd=tmp_path,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        until(lambda: services.answers(f"http://127.0.0.1:{port}/health"))
        yield f"http://127.0.0.1:{port}", process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.slow
def test_a_server_that_dies_stops_nobody(server, tmp_path, monkeypatch, capsys):
    uri, process = server
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setattr("dit.outbox.FLUSH_SECONDS", 0.1)
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.5")
    paths = Paths(tmp_path)
    write_training(paths)
    run = tracking.open_run(paths, "x", experiment="served")
    assert run.id and run.tracking_uri == uri
    run.log(1, {"loss": 1.0})
    run.artifact("a.txt", "through the server")
    until(lambda: [a.path for a in tracking.connect(paths).list_artifacts(run.id)] == ["a.txt"])
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    started = time.monotonic()
    for step in range(2, 1000):
        run.log(step, {"loss": 1.0})
        run.image("preview", np.zeros((8, 8, 3), np.uint8), step=step)
    logged = time.monotonic() - started
    time.sleep(1)
    started = time.monotonic()
    run.close("FINISHED")
    assert logged < 5 and time.monotonic() - started < 25  # a server that is waited for costs more, and an end 30 s
    said = [line for line in capsys.readouterr().out.splitlines() if "mlflow" in line]
    assert len(said) == 1 and "goes on without it" in said[0]
