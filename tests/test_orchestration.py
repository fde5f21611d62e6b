"""All of it together: `dit up`, deployments, worktrees, kills, S3 and retraining, on the `micro` settings.

The servers, the worker, the bucket (moto's server) and every signal are real.
"""

import contextlib
import io
import json
import logging
import os
import re
import signal
import subprocess
import sys
import urllib.request

import checkout
import mlflow
import psutil
import pytest
from ports import free_port
from test_pipeline import lengthen, states
from toy_pipeline import processes_in
from waiting import until

from dit.check import STAGES
from dit.shards import SPLITS, stream_split
from flows import dag, servers, services, worktrees

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
PREFECT = os.path.join(os.path.dirname(sys.executable), "prefect")
IDENTITY = ("-c", "user.name=t", "-c", "user.email=t@example.org")
EVERY_TIME = {"scan", "register"}

# Small enough that a run is the cost of its processes: what is tested is who starts, ends and finds what.
BUCKET = """\
# Pictures in a bucket, for tests.
base: micro
data:
  name: pictures
  source: s3://photos/set
  num_classes: 2
  shard_images: 16
  held_out_fraction: 0.25
  max_bad_fraction: 0.2
reference:
  max_features: 100
sample:
  num_images: 20
evaluate:
  kid_subset_size: 5
  training_images: 0
  bootstrap: 0
register:
  model_name: dit-pictures
retrain:
  min_new_images: 3
  quiet_seconds: 1
"""


class Local:
    """A micro checkout with servers of its own, as `dit up` starts them, and a bucket."""

    def __init__(self, root, home, endpoint):
        self.root, self.port = root, free_port()
        ports = {"PREFECT_PORT": str(self.port), "MLFLOW_PORT": str(free_port())}
        keys = {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s", "AWS_DEFAULT_REGION": "us-east-1"}
        self.environment = {**ports, **keys, "AWS_ENDPOINT_URL": endpoint, "HOME": str(home), "COLUMNS": "200"}
        self.folder = servers.folder_of(root)

    def do(self, *command, code=0):
        return checkout.run(self.root, *command, code=code, **self.environment)

    def dit(self, *words, code=0):
        return self.do(sys.executable, "-m", "dit.cli", *words, code=code)

    def start(self, name, *parameters):
        """Start a run of a deployment; returns its id."""
        words = [word for parameter in parameters for word in ("-p", parameter)]
        return re.search(r"UUID: ([0-9a-f-]{36})", self.do(PREFECT, "deployment", "run", name, *words))[1]

    def ask(self, path, body=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/api/{path}", data, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as reply:
            return json.loads(reply.read())

    def run(self, number):
        return self.ask(f"flow_runs/{number}")

    def finished(self, number, seconds=400):
        """Wait for a run's end, whatever restarts it; returns it, and {task: its state's name}."""

        def ended():
            run = self.run(number)
            return run if run["state_type"] in ("COMPLETED", "FAILED", "CANCELLED") else None

        run = until(ended, seconds)
        ends = ("COMPLETED", "FAILED", "CANCELLED", "CRASHED")

        def last_told():  # tasks' ends reach the server as events, a moment later; those of a killed process never do
            told = self.ask("task_runs/filter", {"flow_runs": {"id": {"any_": [number]}}})
            ordered = sorted((task for task in told if task["start_time"]), key=lambda task: task["start_time"])
            last = {task["name"]: task["state"] for task in ordered}
            whole = all(state["type"] in ends for state in last.values())
            return [last] if whole or run["state_type"] != "COMPLETED" else None  # there may be none at all

        [last] = until(last_told)
        return run, {name: state["name"] for name, state in last.items()}

    def completed(self, number, seconds=400):
        run, tasks = self.finished(number, seconds)
        assert run["state_type"] == "COMPLETED", (run["state"], self.logs(number)[-3000:])
        return run, tasks

    def logs(self, number):
        lines, wanted = [], {"logs": {"flow_run_id": {"any_": [number]}}, "sort": "TIMESTAMP_ASC"}
        while told := self.ask("logs/filter", wanted | {"limit": 200, "offset": len(lines)}):  # the most that it gives
            lines += [line["message"] for line in told]
        return "\n".join(lines)

    def result(self, run, file, text=True):
        """A file of artifacts/ as a run made it, from DVC's cache."""
        got = subprocess.run(
            [sys.executable, "-m", "dvc", "get", "-q", ".", f"artifacts/{file}", "--rev", self.branch(run), "-o", "got"],
            cwd=self.root, env=checkout.environment(), capture_output=True, text=True,
        )  # fmt: skip
        assert got.returncode == 0, got.stderr
        content = (self.root / "got").read_bytes()
        (self.root / "got").unlink()
        return json.loads(content) if text else content

    def branch(self, run):
        [branch] = [name for name in self.branches() if name.endswith(run[:8])]
        return branch

    def branches(self):
        told = subprocess.run(
            ["git", "branch", "--format=%(refname:short)"], cwd=self.root, capture_output=True, text=True
        )
        return told.stdout.split()

    def stage(self, module):
        """The processes of a stage that runs anywhere below the checkout."""
        found = []
        for process in processes_in(self.root):
            try:
                if f"dit.stages.{module}" in process.cmdline()[:4]:
                    found.append(process)
            except psutil.Error:
                pass
        return found

    def flow(self, number):
        """The process of a run."""
        found = [pid for pid, its in services.marked(self.folder).items() if its.get("PREFECT__FLOW_RUN_ID") == number]
        return min(found, default=None)


def image(seed):
    import numpy as np
    from PIL import Image

    pixels = np.random.default_rng(seed).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def picture(seed):
    """The pixels of `image(seed)` as a shard of these settings has them."""
    from PIL import Image

    from dit.sources import center_crop

    return center_crop(Image.open(io.BytesIO(image(seed))), 16).tobytes()


@pytest.fixture(scope="module")
def bucket():
    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    told = {"aws_access_key_id": "k", "aws_secret_access_key": "s", "region_name": "us-east-1"}
    client = boto3.client("s3", endpoint_url=f"http://{host}:{port}", **told)
    client.endpoint = f"http://{host}:{port}"
    client.create_bucket(Bucket="photos")
    for number in range(48):
        client.put_object(Bucket="photos", Key=f"set/{'ab'[number % 2]}/{number:03}.png", Body=image(number))
    yield client
    server.stop()


@pytest.fixture(scope="module")
def local(tmp_path_factory, bucket):
    root = checkout.make(tmp_path_factory.mktemp("micro"))
    for name in ("micro", "other"):
        text = (root / "tests" / "micro.yaml").read_text()
        (root / "presets" / f"{name}.yaml").write_text(text.replace("num_steps: 2", f"num_steps: {len(name) - 2}"))
    (root / "presets" / "bucket.yaml").write_text(BUCKET)
    it = Local(root, tmp_path_factory.mktemp("home"), bucket.endpoint)
    it.dit("preset", "bucket")
    checkout.run(root, "git", "add", "-A")
    checkout.run(root, "git", *IDENTITY, "commit", "-qm", "presets")
    it.first_words = it.dit("up")
    try:
        yield it
    finally:
        it.dit("down")
        left = processes_in(root) + list(services.marked(it.folder))
        services.signal_each([getattr(one, "pid", one) for one in left], signal.SIGKILL)
    assert not left


@pytest.fixture(scope="module")
def micro(local):
    """The first run of the micro settings."""
    return local.start("train-dit/any", 'preset="micro"')


# Long enough to be disturbed; its stages are tried again at once.
LONG = [
    'preset="micro"',
    'set=["train.max_steps=6000", "run.checkpoint_every_steps=200", "run.preview_every_steps=0", "run.retry_seconds=0.5"]',
]


def undisturbed(root, clone):
    """The weights of the long training that nobody disturbs: made in a clone that shares nothing."""
    checkout.run(root, "git", "clone", "-q", str(root), str(clone))
    checkout.run(clone, sys.executable, "-m", "dit.cli", "preset", "micro")
    lengthen(clone, 6000)
    checkout.repro(clone, "train")
    return (clone / "artifacts" / "train" / "model.safetensors").read_bytes()


def test_two_settings_run_at_once_and_the_same_twice_take_turns_the_second_finding_all_cached(local, micro):
    again, other = local.start("train-dit/any", 'preset="micro"'), local.start("train-dit/any", 'preset="other"')
    runs = {number: local.completed(number) for number in (micro, again, other)}
    times = {number: (run["start_time"], run["end_time"]) for number, (run, _) in runs.items()}
    assert times[other][0] < times[micro][1] and times[micro][0] < times[other][1]  # beside each other
    first, second = sorted((micro, again), key=lambda number: list(runs[number][1].values()).count("Cached"))
    run, tasks = runs[first]
    assert list(tasks) == ["preflight", *dag.stages(local.root)] and "Cached" not in tasks.values()
    stages = {name: state for name, state in runs[second][1].items() if name in STAGES}
    assert stages == {name: "Completed" if name in EVERY_TIME else "Cached" for name in STAGES}
    assert "waiting for train-dit run micro-" in local.logs(second)
    assert not list(local.root.glob("scratch/worktrees/*"))
    assert not (local.root / "artifacts").exists()  # the checkout is a person's
    assert f"dit adopt {first[:8]}" in run["state"]["message"]
    said = local.dit("adopt", first[:8])
    assert f"runs/micro/{first[:8]}" in said and (local.root / "artifacts" / "report" / "index.html").exists()
    restore(local.root)


def test_what_the_server_can_see_to_be_wrong_is_refused_at_once(local):
    said = local.do(PREFECT, "deployment", "run", "train-dit/any", "-p", 'preset="nosuch"', code=1)
    assert "nosuch" in said and "Traceback" not in said


def test_a_training_that_is_cancelled_and_killed_in_every_way_ends_as_if_nothing_had_happened(local, micro, tmp_path):
    local.completed(micro)
    most = 0

    def goes_on(run, after=None):
        """Wait until the training has come further than it was: in another process, where the one before was ended."""
        before = states(local.root)

        def further():
            nonlocal most
            most = max(most, len(local.stage("train")))
            assert local.run(run)["state_type"] not in ("COMPLETED", "FAILED"), local.logs(run)[-3000:]
            new = [stage for stage in local.stage("train") if after is None or stage.pid != after.pid]
            return new and states(local.root) - before and new

        return until(further, 300)[0]

    first = local.start("train-dit/any", *LONG)
    goes_on(first)
    local.do(PREFECT, "flow-run", "cancel", first)
    run, _ = local.finished(first)
    assert run["state_type"] == "CANCELLED"
    until(lambda: not local.stage("train") and local.flow(first) is None)

    number = local.start("train-dit/any", *LONG)
    stage = goes_on(number)
    stage.kill()
    stage = goes_on(number, stage)
    next(one for one in stage.parents() if "dvc" in one.cmdline()[:4]).kill()
    stage = goes_on(number, stage)
    os.kill(local.flow(number), signal.SIGKILL)
    stage = goes_on(number, stage)
    worker = services.find(local.folder, "worker-local")
    os.kill(worker.pid, signal.SIGKILL)  # its flow goes on by itself
    assert "worker-local  does not run" in local.dit("status", code=1)
    local.dit("up")
    goes_on(number)
    worker = services.find(local.folder, "worker-local")
    for pid in (worker.pid, local.flow(number)):  # as when the machine went down
        os.kill(pid, signal.SIGKILL)
    local.dit("up")
    goes_on(number, stage)

    _, tasks = local.completed(number)
    assert most == 1 and tasks["train"] == "Completed"
    assert local.logs(number).count("going on at step") >= 5
    until(lambda: local.flow(number) is None)
    assert not list(local.root.glob(f"scratch/worktrees/*{number[:8]}"))
    assert local.result(number, "train/model.safetensors", text=False) == undisturbed(local.root, tmp_path / "clone")


@pytest.mark.long
def test_what_is_prepared_here_goes_on_on_another_machine_and_nothing_is_booked_for_what_is_done(
    local, micro, tmp_path
):
    """The other machine is a clone with a cache of its own; git and DVC remotes are all that both know."""
    local.completed(micro)
    root, there, bare = local.root, tmp_path / "there", tmp_path / "bare.git"
    checkout.run(root, "git", "clone", "-q", "--bare", str(root), str(bare))
    asked = ['preset="other"', 'set=["train.max_steps=20"]', 'pool="kubernetes-gpu"']
    with pool_of(local, there, bare):
        run, _ = local.finished(local.start("train-dit/any", *asked))
        assert "through a DVC remote: dvc remote add -d" in run["state"]["message"]
        checkout.run(root, sys.executable, "-m", "dvc", "remote", "add", "-d", "store", str(tmp_path / "store"))
        checkout.run(root, "git", "remote", "add", "origin", str(bare))
        run, _ = local.finished(local.start("train-dit/any", *asked))
        assert "is not committed" in run["state"]["message"]
        checkout.run(root, "git", *IDENTITY, "commit", "-qm", "remote", "--", ".dvc/config")
        try:
            number = local.start("train-dit/any", *asked)
            run, tasks = local.completed(number)
            assert "train" not in tasks and "train-dit/on-kubernetes-gpu" in run["state"]["message"]
            assert (there / "scratch" / "train").is_dir() and not list(there.glob("scratch/worktrees/*"))
            local.dit("adopt", number)
            assert (root / "artifacts" / "report" / "index.html").exists()
            restore(root)
            run, tasks = local.completed(local.start("train-dit/any", *asked))
            assert "on-kubernetes-gpu" not in run["state"]["message"]
            assert tasks["train"] == "Cached" and "nothing is left that needs an accelerator" in local.logs(run["id"])
        finally:
            checkout.run(root, "git", "reset", "-q", "--hard", "HEAD~1")
            checkout.run(root, "git", "remote", "remove", "origin")


@contextlib.contextmanager
def pool_of(local, there, bare):
    """A work pool of the name of a cluster's, whose worker is a process in a clone."""
    checkout.run(local.root, "git", "clone", "-q", str(bare), str(there))
    environment = checkout.environment(**local.environment, PREFECT_API_URL=f"http://127.0.0.1:{local.port}/api")
    environment |= {"PREFECT_HOME": str(there / "scratch" / "prefect"), "PREFECT_WORKER_QUERY_SECONDS": "2"}
    template = json.loads((local.root / "infra" / "work_pools" / "process.json").read_text())
    template["variables"]["properties"]["working_dir"]["default"] = str(there)
    pool = {"name": "kubernetes-gpu", "type": "process", "base_job_template": template}
    local.ask("work_pools/", pool)
    (local.folder / "deployed").unlink()
    local.dit("up")  # brings the deployments whose pool is there by now
    words = [PREFECT, "worker", "start", "--pool", "kubernetes-gpu", "--type", "process", "--name", "there"]
    worker = subprocess.Popen(words, cwd=there, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until(lambda: local.ask("work_pools/kubernetes-gpu/workers/filter", {}))
        yield
    finally:
        worker.terminate()
        worker.wait(90)


def restore(root):
    """Undo what `dit adopt` did to the checkout."""
    checkout.run(root, "git", "checkout", "-q", "HEAD", "--", "params.yaml")
    checkout.run(root, "git", "rm", "-q", "--cached", "--ignore-unmatch", "dvc.lock")
    (root / "dvc.lock").unlink()


def test_new_images_in_the_bucket_retrain_and_nothing_else_does(local, bucket):
    first = local.start("retrain/pictures")
    local.completed(first)
    listing = local.result(first, "scan/listing.json")
    assert len(listing["rows"]) == 48
    assert local.result(first, "register/model.json")["alias"] == "champion"
    idle = local.start("retrain/pictures")
    run, tasks = local.completed(idle)
    assert run["state"]["name"] == "NothingNew" and "encode" not in tasks
    assert not [name for name in local.branches() if name.endswith(idle[:8])]

    for number in range(100, 106):
        bucket.put_object(Bucket="photos", Key=f"set/{'ab'[number % 2]}/{number}.png", Body=image(number))
    for number in range(3):
        bucket.put_object(Bucket="photos", Key=f"set/a/corrupt{number}.png", Body=image(number)[:40])
    gone = "a/000.png"
    bucket.delete_object(Bucket="photos", Key=f"set/{gone}")
    before = local.ask("flow_runs/count", {"flows": {"name": {"any_": ["retrain"]}}})
    assert "retrain/pictures starts" in local.dit("notify")

    def started():
        runs = local.ask("flow_runs/filter", {"flows": {"name": {"any_": ["retrain"]}}, "sort": "START_TIME_DESC"})
        return [run["id"] for run in runs if run["id"] not in (first, idle)]

    [number] = until(started)
    assert local.ask("flow_runs/count", {"flows": {"name": {"any_": ["retrain"]}}}) == before + 1
    _, tasks = local.completed(number)
    assert tasks["train"] == "Completed"
    said = local.logs(number)
    assert "9 new, 0 changed, 1 gone" in said
    assert {row["key"] for row in local.result(number, "shard/quarantine.json")} == {
        f"a/corrupt{n}.png" for n in range(3)
    }
    model = local.result(number, "register/model.json")
    assert model["version"] == 2 and model["decision"] in ("champion", "challenger") and model["reasons"]
    client = mlflow.MlflowClient(f"http://127.0.0.1:{local.environment['MLFLOW_PORT']}")
    champion = client.get_model_version_by_alias("dit-pictures", "champion").version
    assert champion == ("2" if model["decision"] == "champion" else "1")
    old, new = (
        {shard["sha256"] for shard in local.result(run, "shard/manifest.json")["shards"]} for run in (first, number)
    )
    assert len(old & new) >= 2
    assert f"{len(new)} shards of latents: {len(new - old)} encoded, {len(old & new)} reused" in said
    left_no_trace(local, number, gone, next(row[2] for row in listing["rows"] if row[0] == gone))

    run, tasks = local.completed(local.start("retrain/pictures"))
    assert run["state"]["name"] == "NothingNew"


def left_no_trace(local, run, key, digest):
    """Neither the key nor the picture of a deleted image is in any artifact of a run."""
    tree = worktrees.describe(local.root, "look" + run, "look")
    worktrees.open_worktree(tree, local.branch(run))
    try:
        assert worktrees.dvc(tree.root, "checkout").returncode == 0
        files = [file for file in (tree.root / "artifacts").rglob("*") if file.is_file()]
        assert len(files) > 20
        for file in files:
            content = file.read_bytes()
            assert key.encode() not in content and digest.encode() not in content, file
        pictures = {
            image.tobytes()
            for split in SPLITS
            for _, _, image in stream_split(tree.root / "artifacts" / "shard", split)
        }
        assert pictures == {picture(number) for number in (*range(1, 48), *range(100, 106))}
        index = json.loads((tree.root / "artifacts" / "encode" / "index.json").read_text())
        assert sum(shard["samples"] for shard in index["shards"]) == len(pictures)
    finally:
        worktrees.close(tree)
