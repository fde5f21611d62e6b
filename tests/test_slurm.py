"""infra/slurm/train.sbatch, with srun, scontrol and a batch system's signals that are this file's own."""

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from ports import free_port
from tiny_model import write_model
from waiting import until

ROOT = Path(__file__).parents[1]
# srun: the command once for each node, with what a step is told; signals are passed on, the highest status is its own.
SRUN = """
import os, signal, subprocess, sys, time
options = [word for word in sys.argv[1:] if word.startswith("--")]
command, nodes = sys.argv[1 + len(options):], int(options[0].removeprefix("--nodes="))
assert options[1:3] == [f"--ntasks={nodes}", "--ntasks-per-node=1"], options
step = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_NODES": str(nodes), "SLURM_STEP_NUM_TASKS": str(nodes)}
step |= {"SLURM_STEP_NODELIST": "localhost,node[2-9]"}
got = []
for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):  # first: one may come as soon as the tasks are seen
    signal.signal(number, lambda number, _: got.append(number))
tasks = [subprocess.Popen(command, env=os.environ | step | {"SLURM_NODEID": str(i)}) for i in range(nodes)]
while [task for task in tasks if task.poll() is None]:
    for number in [got.pop(0) for _ in got[:]]:
        [task.send_signal(number) for task in tasks]
    time.sleep(0.02)
sys.exit(max(task.returncode for task in tasks))
"""
# dvc repro: its commands one after the other, each by $SHELL, of whose status nothing but failure is left.
DVC = """
import os, subprocess, sys
open("asked", "a").write(" ".join(sys.argv[1:]) + "\\n")
for command in open("commands").read().splitlines():
    shell = subprocess.run([os.environ["SHELL"], "-c", command], env=os.environ | {"DVC_STAGE": "x"})
    if shell.returncode:
        sys.exit(255)
"""
# A stage that takes two starts: it saves when it is told to stop, and is done at the next.
TOY = """
import os, signal, sys, time
from pathlib import Path
node, stop = os.environ.get("SLURM_NODEID", "alone"), []
saved = Path(f"saved-{node}")
if saved.exists():
    sys.exit(0)
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, lambda number, _: stop.append(signal.Signals(number).name))
Path(f"begun-{node}").write_text(str("DVC_STAGE" in os.environ))
while not stop:
    time.sleep(0.02)
time.sleep(0.3)
saved.write_text(stop[0])
sys.exit(75)
"""


@pytest.fixture
def job(tmp_path):
    """start(commands, **environment) is the job's script; `requeued` is what scontrol was asked."""
    for name in ("infra/slurm", "dit/stages", "bin"):
        (tmp_path / name).mkdir(parents=True)
    script = tmp_path / "infra" / "slurm" / "train.sbatch"
    script.write_bytes((ROOT / "infra" / "slurm" / "train.sbatch").read_bytes())
    (tmp_path / "dit" / "pipeline.py").write_bytes((ROOT / "dit" / "pipeline.py").read_bytes())
    for stage in ("sample", "shard"):
        (tmp_path / "dit" / "stages" / f"{stage}.py").write_text(TOY)
    started, tools = (
        [],
        {"srun": SRUN, "dvc": DVC, "scontrol": "import sys; open('requeued', 'a').write(' '.join(sys.argv[1:]))"},
    )
    for name, code in tools.items():
        (tmp_path / "bin" / name).write_text(f"#!{sys.executable}\n{textwrap.dedent(code)}")
    for file in (script, *(tmp_path / "bin").iterdir()):
        file.chmod(file.stat().st_mode | stat.S_IXUSR)

    def start(commands, *words, **environment):
        (tmp_path / "commands").write_text("\n".join(commands))
        slurm = {"SLURM_JOB_ID": "77", "SLURM_JOB_NUM_NODES": "2", "SLURM_NNODES": "2", "SLURM_NODEID": "0"}
        slurm |= {"SLURM_JOB_NODELIST": "localhost,node[2-9]", "SLURM_SUBMIT_DIR": str(tmp_path)}
        path = {"PATH": f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"}
        process = subprocess.Popen(
            ["/bin/bash", script, *words],
            cwd="/",
            env=os.environ | path | slurm | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield tmp_path, start
    for process in started:
        if process.poll() is None:
            process.terminate()
            process.communicate(timeout=60)


SAMPLE, SHARD = "python -m dit.stages.sample", "python -m dit.stages.shard"


def test_before_its_limit_a_job_saves_on_all_nodes_is_queued_again_and_goes_on(job):
    folder, start = job
    first = start([SAMPLE], "sample")
    until(lambda: (folder / "begun-0").exists() and (folder / "begun-1").exists())
    first.send_signal(signal.SIGUSR1)
    said, _ = first.communicate(timeout=120)
    assert first.returncode == 0, said
    assert [(folder / f"saved-{node}").read_text() for node in (0, 1)] == ["SIGUSR1"] * 2
    assert (folder / "begun-1").read_text() == "False", "another node has no DVC to watch"
    assert (folder / "requeued").read_text() == "requeue 77" and "goes back into the queue" in said
    (folder / "requeued").unlink()
    again = start([SAMPLE, f"true && {SAMPLE}"], "sample", SLURM_RESTART_COUNT="1")
    until((folder / "begun-0").exists)
    said, _ = again.communicate(timeout=120)
    assert again.returncode == 0 and not (folder / "requeued").exists(), said
    assert (folder / "asked").read_text() == "repro sample\nrepro sample\n"


def test_a_cancelled_job_saves_and_is_not_queued_again_and_a_stage_of_one_process_runs_on_one_node(job):
    folder, start = job
    process = start([f"true && {SHARD}", SAMPLE])
    until((folder / "begun-0").exists)  # the batch script's own node
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 255, said
    assert (folder / "saved-0").read_text() == "SIGTERM" and not (folder / "requeued").exists()
    assert not (folder / "begun-1").exists(), "no further command is begun"


def test_a_job_that_fails_ends_and_one_that_stopped_by_itself_goes_on(job):
    folder, start = job
    for code, requeued in ((1, False), (75, True)):
        process = start([f"exit {code}"])
        said, _ = process.communicate(timeout=120)
        assert process.returncode == (0 if requeued else 255), said
        assert (folder / "requeued").exists() == requeued


DVC_YAML = "stages: {sample: {cmd: python -m dit.stages.sample, deps: [artifacts/ema], outs: [artifacts/sample]}}"
SECTIONS = {
    "sample": {
        **{"num_images": 240, "seed": 0, "labels": "balanced", "block_images": 4},
        "settings": [{"name": "plain", "cfg_scale": 1.0, "sampler": "heun", "num_steps": 20}],
    },
    "run": {"device": "cpu"},
}


@pytest.mark.slow
def test_dvc_and_the_stage_itself_on_two_nodes_stop_before_the_limit_and_one_node_goes_on(job):
    folder, start = job
    shutil.rmtree(folder / "dit")
    shutil.copytree(ROOT / "dit", folder / "dit", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "bin" / "dvc").write_text(f"#!{sys.executable}\nfrom dvc.cli import main; import sys; sys.exit(main())")
    write_model(folder / "artifacts")
    (folder / "params.yaml").write_text(json.dumps(SECTIONS))
    (folder / "dvc.yaml").write_text(DVC_YAML)
    for command in (["git", "init", "-q"], [sys.executable, "-m", "dvc", "init", "-q"]):
        subprocess.run(command, cwd=folder, check=True)
    first = start([], MASTER_PORT=str(free_port()))
    until(lambda: len(list(folder.glob("scratch/sample/*/*.safetensors"))) > 3)
    first.send_signal(signal.SIGUSR1)
    said, _ = first.communicate(timeout=60)
    outcome = json.loads((folder / "scratch" / "outcome" / "sample.json").read_text())
    assert (first.returncode, outcome["status"]) == (0, "interrupted"), said
    assert outcome["launch"] == "77.0.", "two nodes were one team"
    assert (folder / "requeued").exists() and not (folder / "dvc.lock").exists()
    (folder / "requeued").unlink()
    again = start([], SLURM_JOB_NUM_NODES="1", SLURM_RESTART_COUNT="1")  # a smaller job goes on as well
    said, _ = again.communicate(timeout=120)
    assert again.returncode == 0 and not (folder / "requeued").exists(), said
    assert (folder / "dvc.lock").exists() and (folder / "artifacts" / "sample" / "plain" / "samples.npz").exists()
