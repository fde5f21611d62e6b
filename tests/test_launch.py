"""dit/launch.py and dit/team.py, with torchrun itself, real signals, and processes that are killed."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest
from ports import free_port
from waiting import until

from dit import launch, team
from dit.runtime import RunConfig

ROOT = Path(__file__).parents[1]
CPU, TWO = RunConfig(device="cpu"), RunConfig(device="cpu", processes=2, restarts=1)

STAGE = """
import json, os, signal, sys, time
from pathlib import Path
from dit import entry, parallel, runtime
from dit.paths import Paths, publish
from dit.runtime import RunConfig

def toy(run: RunConfig, *, paths: Paths) -> None:
    us, what, again = parallel.world(), os.environ.get("WHAT", "work"), os.environ.get("TORCHELASTIC_RESTART_COUNT") != "0"
    device = runtime.start(run)
    group = parallel.device_group(device)
    told = {"pid": os.getpid(), "torchrun": os.getppid(), "device": str(device), "tpu": os.environ.get("TPU_CHIPS")}
    told |= {"devices": sorted(d.type for d in group._device_types), "torch_tpu": "torch_tpu" in sys.modules}
    (paths.root / f"new-{us.rank}").write_text(json.dumps(told | {"size": us.size}))
    (paths.root / f"new-{us.rank}").rename(paths.root / f"rank-{us.rank}{'-again' * again}")  # whole, once it is there
    if us.rank == 1 and not again and what == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if us.rank == 1 and what == "bug":
        us.no_such_thing
    if us.rank == 1 and what == "refused":
        refuse()
    if what == "step":
        with entry.deferred_interrupts(run) as stop:
            agreement = parallel.Agreement()
            us.barrier()  # whoever hears of it may signal all of them: none is still on its way here
            print("stepping", flush=True)
            while not agreement.ask(stop()):
                time.sleep(0.02)
            time.sleep(0.5)
            (paths.root / f"saved-{us.rank}").touch()
        raise entry.Interrupted("stopped at step 3")
    us.barrier()
    if us.main:
        with publish(paths.artifacts / "toy", paths.scratch) as folder:
            (folder / "done").write_text(str(us.size))

def refuse():
    raise ValueError("the second process cannot read this")

if __name__ == "__main__":
    entry.main(toy, together=True)
"""


@pytest.fixture
def toy(tmp_path):
    (tmp_path / "toy.py").write_text(textwrap.dedent(STAGE))
    (tmp_path / "params.yaml").write_text("run: {device: cpu, processes: 2, restarts: 1}\n")
    started = []

    def start(what="work", **environment):
        told = {"PYTHONPATH": str(ROOT), "WHAT": what, "DIT_SAVE_SECONDS": "20", "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            [sys.executable, "toy.py"],
            cwd=tmp_path,
            env=os.environ | told | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield tmp_path, start
    for process in started:
        process.kill()
        process.communicate()


def outcome(folder):
    told = json.loads((folder / "scratch" / "outcome" / "toy.json").read_text())
    return told["status"], told["message"], told["retry"]


def rank(folder, number, again=""):
    return json.loads((folder / f"rank-{number}{again}").read_text())


def gone(pid):
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.mark.slow
def test_one_command_starts_the_processes_and_a_signal_lets_all_of_them_save(toy):
    folder, start = toy
    process = start("step")
    assert process.stdout.readline() == "stepping\n"
    until(lambda: all((folder / f"rank-{number}").exists() for number in (0, 1)))
    process.send_signal(signal.SIGUSR1)
    _, stderr = process.communicate(timeout=200)
    message = "stopped at step 3: the same command goes on where this one stopped"
    assert (process.returncode, outcome(folder)) == (75, ("interrupted", message, True)), stderr
    assert stderr == f"toy: {message}\n"
    assert [(folder / f"saved-{number}").exists() for number in (0, 1)] == [True, True]
    one, two = rank(folder, 0), rank(folder, 1)
    assert (one["size"], two["size"], one["devices"], one["torch_tpu"]) == (2, 2, ["cpu"], False)
    assert all(gone(pid) for pid in (one["pid"], two["pid"], one["torchrun"]))
    assert [file.name for file in (folder / "scratch" / "outcome").iterdir()] == ["toy.json"]


def test_what_cannot_be_is_refused_in_one_line_before_anything_is_started(toy):
    folder, start = toy
    process = start(MASTER_ADDR="localhost", NNODES="2")
    _, stderr = process.communicate(timeout=200)
    line = "NODE_RANK must be a whole number where there are several hosts, got ''"
    assert (process.returncode, stderr, outcome(folder)) == (2, f"toy: {line}\n", ("refused", line, False))


@pytest.mark.slow
@pytest.mark.parametrize(
    "what, code, told",
    [
        ("killed", 0, ("completed", "", False)),
        ("refused", 2, ("refused", "the second process cannot read this", False)),
        ("bug", 1, ("failed", "AttributeError: 'World' object has no attribute 'no_such_thing'", False)),
    ],
)
def test_all_are_started_again_where_another_try_may_mend_it(toy, what, code, told):
    folder, start = toy
    _, stderr = (process := start(what)).communicate(timeout=200)
    assert (process.returncode, outcome(folder)) == (code, told), stderr
    assert stderr.endswith(f"toy: {told[1]}\n") or not code
    assert (folder / "rank-0-again").exists() == (folder / "artifacts" / "toy").exists() == (what == "killed")
    assert [file.name for file in (folder / "scratch" / "outcome").iterdir()] == ["toy.json"]


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["launcher", "torchrun"])
def test_none_outlives_another_and_the_ranks_save(toy, victim):
    folder, start = toy
    process = start("step")
    until(lambda: all((folder / f"rank-{number}").exists() for number in (0, 1)))
    assert process.stdout.readline() == "stepping\n"
    pids = [rank(folder, 0)["pid"], rank(folder, 1)["pid"], rank(folder, 0)["torchrun"]]
    os.kill({"launcher": process.pid, "torchrun": pids[2]}[victim], signal.SIGKILL)
    process.communicate(timeout=200)
    until(lambda: all(gone(pid) for pid in pids))
    assert [(folder / f"saved-{number}").exists() for number in (0, 1)] == [True, True]
    if victim == "torchrun":
        message = "the launcher's torchrun was ended by SIGKILL: the same command goes on where it stopped"
        assert (process.returncode, outcome(folder)) == (1, ("failed", message, True))
    else:
        assert outcome(folder)[0] == "interrupted"


@pytest.mark.slow
def test_two_hosts_are_one_team_and_the_fake_tpu_runtime_is_told(toy):
    folder, start = toy
    (folder / "torch_tpu.py").write_text(textwrap.dedent(TORCH_TPU))
    (folder / "params.yaml").write_text("run: {device: tpu, restarts: 1}\n")
    where = {"PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": str(free_port()), "PET_NNODES": "2"}
    both = [start(**where, PET_NODE_RANK=str(host), PYTHONPATH=f"{folder}:{ROOT}") for host in (1, 0)]
    said = [process.communicate(timeout=200) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert outcome(folder) == ("completed", "", False) and (folder / "artifacts" / "toy" / "done").read_text() == "4"
    told = [rank(folder, number) for number in range(4)]
    assert [one["device"] for one in told] == ["tpu:0", "tpu:1"] * 2 and {one["tpu"] for one in told} == {"told"}
    assert told[0]["devices"] == ["cpu", "tpu"] and len({one["torchrun"] for one in told}) == 2


# What torch_tpu shows of itself to those who use it: two chips, and gloo for what they exchange.
TORCH_TPU = """
import os, sys, types
import torch, torch.distributed
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

class Chips(_DummyBackendModule):
    def device_count(self):
        return 2

chips = Chips()
chips.distributed = types.SimpleNamespace(set_tpu_launch_env=lambda: os.environ.update(TPU_CHIPS="told"))
_setup_privateuseone_for_python_backend("tpu", backend_module=chips)
torch.distributed.Backend.register_backend("tpu_dist", lambda *told: torch.distributed.ProcessGroupGloo(*told), devices=["tpu"])
"""


def test_a_machine_without_a_device_says_what_it_lacks(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_tpu", None)
    with pytest.raises(ValueError, match="run.device: tpu needs torch_tpu: pip install 'dit-pipeline\\[tpu\\]'"):
        launch.team(RunConfig(device="tpu"), {})


def test_a_process_works_alone_or_starts_as_many_as_are_asked_for():
    assert launch.team(CPU, {}) is None and launch.team(None, {"MASTER_ADDR": "a", "NNODES": "2"}) is None
    assert launch.team(TWO, {"RANK": "0", "WORLD_SIZE": "2"}) is None, "it was started by torchrun"
    two = launch.team(TWO, {})
    assert (two.processes, two.restarts, two.hosts) == (2, 1, 1) and two.id != launch.team(TWO, {}).id
    words = two.command(["-m", "dit.stages.sample"])
    assert words[-2:] == ["-m", "dit.stages.sample"] and words[words.index("--nproc-per-node") + 1] == "2"


SLURM = {"SLURM_JOB_ID": "31017", "SLURM_STEP_ID": "2", "SLURM_STEP_NUM_NODES": "3", "SLURM_NODEID": "1"}


@pytest.mark.parametrize(
    "environment, expected",
    [
        ({}, None),
        ({"NNODES": "2"}, None),  # of nobody who tells where the first one is
        ({"MASTER_ADDR": "a", "NNODES": "1"}, None),
        ({"MASTER_ADDR": "a", "NNODES": "2", "NODE_RANK": "1"}, (2, 1, "a", 29500)),
        ({"PET_MASTER_ADDR": "a", "PET_NNODES": "4", "PET_NODE_RANK": "3", "PET_MASTER_PORT": "7"}, (4, 3, "a", 7)),
        ({**SLURM, "SLURM_STEP_NODELIST": "gpu[007-009,12],b"}, (3, 1, "gpu007", 16017)),
        ({**SLURM, "SLURM_JOB_NODELIST": "a,b,c", "MASTER_PORT": "9"}, (3, 1, "a", 9)),
        ({"SLURM_NNODES": "3", "SLURM_NODEID": "0", "SLURM_JOB_NODELIST": "a,b,c"}, None),  # the batch script itself
    ],
)
def test_where_the_other_hosts_are(environment, expected):
    told = team.hosts(environment)
    assert (told and (told["hosts"], told["host"], told["address"], told["port"])) == expected


@pytest.mark.parametrize(
    "environment, line",
    [
        ({"MASTER_ADDR": "a", "NNODES": "two", "NODE_RANK": "0"}, "NNODES must be a whole number .* got 'two'"),
        ({"MASTER_ADDR": "a", "NNODES": "2", "NODE_RANK": "2"}, "this is host 2 of 2 at 'a'"),
        ({**SLURM, "SLURM_STEP_NUM_TASKS": "24", "SLURM_JOB_NODELIST": "a"}, "24 tasks on 3 nodes: start one on each"),
        (SLURM, "this is host 1 of 3 at ''"),
    ],
)
def test_hosts_that_cannot_be_are_refused(environment, line):
    with pytest.raises(ValueError, match=line):
        team.hosts(environment)


def test_the_deadline_is_the_nearest_of_those_there_are():
    assert launch.deadline(CPU, {}) is None and not launch.Deadline(None).near(1e9)
    limited = RunConfig(device="cpu", time_limit_minutes=2)
    assert launch.deadline(limited, {"DIT_STARTED": "1000"}) == 1120
    assert launch.deadline(limited, {"DIT_STARTED": "1000", "SLURM_JOB_END_TIME": "1060"}) == 1060
    assert launch.deadline(CPU, {"SLURM_JOB_END_TIME": "1060"}) == 1060
    soon = launch.Deadline(time.time() + 100)
    assert not soon.near() and soon.near(save_seconds=95) and launch.Deadline(time.time() + 1).near(1)


def test_the_time_to_save_is_a_number():
    assert launch.save_seconds({}) == 300 and launch.save_seconds({"DIT_SAVE_SECONDS": "7.5"}) == 7.5
    for wrong in ("soon", "0", "nan"):
        with pytest.raises(ValueError, match=f"DIT_SAVE_SECONDS must be a number of seconds above 0, got '{wrong}'"):
            launch.save_seconds({"DIT_SAVE_SECONDS": wrong})
