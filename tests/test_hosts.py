"""flows/hosts.py and what it stands on, against a Kubernetes of one machine whose pods are real processes."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("kubernetes_asyncio", reason="needs prefect-kubernetes: pip install 'dit-pipeline[kubernetes]'")
pytest.importorskip("kubernetes_validate", reason="needs kubernetes-validate, of the dev extra")

import toy_cluster  # noqa: E402
from ports import free_port  # noqa: E402
from waiting import until

from flows import cluster, hosts, manifests, pods  # noqa: E402
from flows.hosts import HostSettings, run_on_hosts  # noqa: E402

ROOT = Path(__file__).parents[1]
RUN = "0f2a9c1e-7b44-4c57-9d0e-3f5a6b7c8d9e"
# A stage that does as scratch/todo.json says, and ends as ours do: an outcome file of the main process, exit codes.
STAGE = """
import json, os, signal, sys, time
rank, todo = os.environ.get("RANK", "0"), json.load(open("scratch/todo.json"))
def tell(status, code, message="", **more):
    if rank == "0":
        os.makedirs("scratch/outcome", exist_ok=True)
        told = {"status": status, "message": message, **more}
        json.dump(told, open("scratch/outcome/%s.json" % os.path.basename(__file__)[:-3], "w"))
    print(f"rank {rank}: {status}", flush=True)
    sys.exit(code)
def save(number, frame):
    time.sleep(0.1)
    open(f"scratch/saved-{rank}", "w").close()
    tell("interrupted", 75, "interrupted by SIGTERM", retry=True)
signal.signal(signal.SIGTERM, save)
open(f"scratch/pid-{rank}.new", "w").write(str(os.getpid()))
os.rename(f"scratch/pid-{rank}.new", f"scratch/pid-{rank}")
while not all(os.path.exists(f"scratch/pid-{other}") for other in range(int(os.environ.get("WORLD_SIZE", "1")))):
    time.sleep(0.01)  # as torchrun's meet: none ends before all of them can be told to save
print("begin", flush=True)
for step in range(todo.get("steps", 3)):
    time.sleep(0.05)
    print(f"step {step}", flush=True)
if "exit" in todo and rank == todo.get("rank", "0"):
    print("my last words", flush=True)
    tell(*todo["exit"], **todo.get("more", {})) if todo["exit"][0] else os._exit(todo["exit"][1])
while todo.get("forever"):
    time.sleep(0.05)
tell("completed", 0)
"""
TORCHRUN = """#!{python}
import os, sys
words = sys.argv[1:]
os.environ |= {{"RANK": words[words.index("--node-rank") + 1], "WORLD_SIZE": words[words.index("--nnodes") + 1]}}
os.execv(sys.executable, [sys.executable, *words[words.index("-m"):]])
"""


@pytest.fixture
def root(tmp_path):
    """A checkout with two stages: `train`, of one process, and `sample`, which several share."""
    root = tmp_path / "work" / "tree"
    (root / "dit" / "stages").mkdir(parents=True)
    for name in ("dit/__init__.py", "dit/stages/__init__.py"):
        (root / name).touch()
    for name in ("train", "sample"):
        (root / "dit" / "stages" / f"{name}.py").write_text(STAGE)
    (root / "scratch").mkdir()
    todo(root)
    return root


def todo(root, **what):
    (root / "scratch" / "todo.json").write_text(json.dumps(what))


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """The cluster, which the kubeconfig names; POD_NAME and POD_UID as a coordinator's pod has them."""
    torchrun = tmp_path / "bin" / "torchrun"
    torchrun.parent.mkdir()
    torchrun.write_text(TORCHRUN.format(python=sys.executable))
    torchrun.chmod(0o755)
    toy = toy_cluster.ToyCluster(f"{torchrun.parent}{os.pathsep}{os.environ['PATH']}")
    toy.kubeconfig(tmp_path / "kubeconfig")
    for name, value in (("KUBECONFIG", tmp_path / "kubeconfig"), ("POD_NAME", "flow-x"), ("POD_UID", "uid-1")):
        monkeypatch.setenv(name, str(value))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.setattr(hosts, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(hosts, "VISIBLE_SECONDS", 0.5)
    monkeypatch.setattr(cluster, "RECONNECT_SECONDS", 0.1)
    yield toy
    toy.close()


def settings(root, **more):
    plain = {"image": "dit:1", "mount": str(root.parent), "namespace": "runs", "save_seconds": 5, "secrets": ()}
    return HostSettings(**plain | more)


def go(root, stage="sample", count=2, lines=None, environment=(), **more):
    said = [] if lines is None else lines
    environment = {"DIT_FLOW_RUN_ID": RUN, **dict(environment)}
    result = run_on_hosts(
        stage, root, said.append, hosts=count, settings=settings(root, **more), environment=environment
    )
    return *result, said


def alone(toy, root):
    """Nothing is left: no Job, no Service, no pod, no process."""
    left = [file for file in (root / "scratch").glob("pid-*") if Path(f"/proc/{file.read_text()}").exists()]
    return not (toy.jobs or toy.services or toy.pods or left)


def test_a_stage_runs_on_each_host_and_the_main_processs_lines_arrive(toy, root):
    status, message, lines = go(root)
    assert (status, message) == ("ran", "")
    assert [line for line in lines if line[:4] in ("begi", "step", "rank")] == [
        *["begin", "step 0", "step 1", "step 2", "rank 0: completed"]
    ]
    assert (root / "scratch" / "pid-1").exists() and alone(toy, root)
    [job, service] = toy.made
    assert job["metadata"]["ownerReferences"] == [{"apiVersion": "v1", "kind": "Pod", "name": "flow-x", "uid": "uid-1"}]
    assert service["spec"]["selector"] == job["spec"]["template"]["metadata"]["labels"]
    assert service["metadata"]["ownerReferences"][0]["kind"] == "Job"


def test_all_that_is_asked_of_the_api_is_what_the_role_allows(toy, root):
    todo(root, exit=[None, 1], rank="1", forever=True)
    assert go(root)[0] != "ran"  # the last lines of another host are asked for
    todo(root, steps=1)
    assert go(root)[0] == "ran"
    manifest, name = {"ownerReferences": []}, manifests.job_name("sample", RUN)
    with cluster.Cluster("runs") as api:
        toy.jobs[name] = {"metadata": {"name": name, **manifest}, "status": {}, "spec": {"completions": 0}}
        api.own_job(name, [{"uid": "2"}])
    assert set(toy.seen) | {("get", "services")} == toy_cluster.allowed()  # asked only after a 409


def test_what_the_role_does_not_allow_is_one_line_that_says_what_to_do(toy, root):
    toy.roles -= {("create", "jobs")}
    status, message, lines = go(root)
    assert status == "failed" and not toy.jobs
    assert message.startswith("Kubernetes refuses to create job in namespace runs: jobs is forbidden")
    assert message.endswith("ground.yaml") and "\n" not in message


@pytest.mark.parametrize(
    ("ending", "status", "message"),
    [
        ({"exit": ["refused", 2, "train.lr: must be above 0"]}, "failed", "train.lr: must be above 0"),
        ({"exit": ["failed", 1, "the disk is full"], "more": {"retry": False}}, "failed", "the disk is full"),
        ({"exit": ["failed", 1, "bucket out of reach"], "more": {"retry": True}}, "lost", "bucket out of reach"),
        ({"exit": ["interrupted", 75, "stopped at step 3"]}, "interrupted", "stopped at step 3"),
        ({"exit": [None, 3]}, "failed", "host 0 ended with exit code 3"),
        ({"exit": [None, 137]}, "lost", "host 0 was killed"),
    ],
)
def test_how_a_stage_ended_is_what_it_says_itself(toy, root, ending, status, message):
    todo(root, **ending)
    (root / "scratch" / "outcome").mkdir()
    (root / "scratch" / "outcome" / "train.json").write_text('{"status": "refused", "message": "of yesterday"}')
    assert go(root, "train", 1)[:2] == (status, message)
    assert alone(toy, root)


def test_another_hosts_last_words_are_passed_on(toy, root):
    todo(root, forever=True, exit=[None, 3], rank="1")
    status, message, lines = go(root)
    assert "host 1: my last words" in lines
    assert (status, message) == ("interrupted", "interrupted by SIGTERM")  # host 0, when the Job ended it
    assert (root / "scratch" / "saved-0").exists() and alone(toy, root)


def test_a_host_that_is_taken_away_loses_the_job_and_the_others_save(toy, root):
    todo(root, forever=True)
    both = [root / "scratch" / f"pid-{rank}" for rank in (0, 1)]
    taker = threading.Thread(target=lambda: (until(lambda: all(f.exists() for f in both)), toy.take_away(1)))
    taker.start()
    status, message, _ = go(root)
    taker.join()
    assert status == "lost" and message.startswith("host 1 was taken away (PreemptionByScheduler)")
    assert (root / "scratch" / "saved-0").exists() and (root / "scratch" / "saved-1").exists() and alone(toy, root)
    todo(root)
    assert go(root)[0] == "ran"  # as the walker does: once more, as a whole


class Cancelled(BaseException):
    """As Prefect's TerminationSignal."""


def test_an_exception_ends_the_job_and_waits_until_all_have_saved(toy, root):
    todo(root, forever=True)

    def cancel(number, frame):
        raise Cancelled

    before = signal.signal(signal.SIGUSR1, cancel)
    main = os.getpid()
    lines = []  # "begin": both run, and what the main process says is heard
    canceller = threading.Thread(target=lambda: (until(lambda: "begin" in lines), os.kill(main, signal.SIGUSR1)))
    canceller.start()
    try:
        with pytest.raises(Cancelled):
            go(root, lines=lines)
    finally:
        canceller.join()
        signal.signal(signal.SIGUSR1, before)
    assert (root / "scratch" / "saved-0").exists() and (root / "scratch" / "saved-1").exists() and alone(toy, root)
    assert "rank 0: interrupted" in lines  # what it says while it saves is heard


def test_a_stage_that_ignores_signals_is_gone_after_the_grace(toy, root, monkeypatch):
    monkeypatch.setattr(manifests, "GRACE_MARGIN_SECONDS", 0)
    stage = root / "dit" / "stages" / "train.py"
    stage.write_text(
        STAGE.replace("signal.signal(signal.SIGTERM, save)", "signal.signal(signal.SIGTERM, signal.SIG_IGN)")
    )
    todo(root, forever=True)

    def cancel(line):
        if line == "step 2":
            raise Cancelled

    with pytest.raises(Cancelled):
        run_on_hosts(
            *("train", root, cancel),
            hosts=1,
            settings=settings(root, save_seconds=1),
            environment={"DIT_FLOW_RUN_ID": RUN},
        )
    assert alone(toy, root)


COORDINATOR = """
import sys
from pathlib import Path
from flows import hosts
hosts.POLL_SECONDS = 0.05
hosts.run_on_hosts("sample", Path(sys.argv[1]), print, hosts=2, environment={"DIT_FLOW_RUN_ID": sys.argv[2]},
    settings=hosts.HostSettings(image="dit:1", mount=str(Path(sys.argv[1]).parent), namespace="runs", secrets=()))
"""


def killed_coordinator(toy, root):
    todo(root, forever=True)
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    words = [sys.executable, "-c", COORDINATOR, str(root), RUN]
    first = subprocess.Popen(words, env={**os.environ, "PYTHONPATH": path, "POD_UID": "uid-0"})
    until(lambda: all((root / "scratch" / f"pid-{rank}").exists() for rank in (0, 1)))
    first.kill()
    first.wait()
    assert len(toy.jobs) == 1


def test_a_killed_coordinators_job_is_watched_on_and_not_started_twice(toy, root):
    killed_coordinator(toy, root)
    pids = [(root / "scratch" / f"pid-{rank}").read_text() for rank in (0, 1)]
    lines = []
    second = threading.Thread(target=lambda: lines.append(go(root)))
    second.start()
    [job] = toy.jobs.values()
    until(lambda: job["metadata"]["ownerReferences"][0]["uid"] == "uid-1")
    toy.remove_owner("uid-0")  # Kubernetes removes the first one's pod: the Job belongs to the second now
    time.sleep(0.2)
    assert not job["metadata"].get("deletionTimestamp")
    for pod in toy.pods.values():
        pod.stop()
    second.join(60)
    assert lines[0][:2] == ("interrupted", "interrupted by SIGTERM")
    assert pids == [(root / "scratch" / f"pid-{rank}").read_text() for rank in (0, 1)] and alone(toy, root)
    assert len([body for body in toy.made if body["kind"] == "Job"]) == 1


def test_no_orphan_trains_on_when_a_killed_coordinators_pod_is_removed(toy, root):
    killed_coordinator(toy, root)
    toy.remove_owner("uid-0")
    until(lambda: alone(toy, root))
    assert (root / "scratch" / "saved-0").exists()


def test_a_failed_or_ending_job_of_before_is_removed_first(toy, root):
    killed_coordinator(toy, root)
    toy.take_away(0)
    until(lambda: next(iter(toy.jobs.values()))["status"].get("conditions"))
    todo(root)
    status, _, lines = go(root)
    assert status == "ran" and "removed first" in lines[0] and alone(toy, root)


def test_another_runs_job_is_left_alone(toy, root):
    name = manifests.job_name("sample", RUN)
    toy.jobs[name] = {"metadata": {"name": name, "labels": {manifests.RUN: "another"}}, "status": {}}
    toy.jobs[name]["spec"] = {"completions": 0}
    status, message, _ = go(root)
    assert status == "failed" and "another run's" in message and name in toy.jobs


def test_what_is_waited_for_is_said_once(toy, root):
    toy.full, lines = "0/4 nodes are available: 4 Insufficient nvidia.com/gpu.", []
    line = f"0 of 2 host(s) run; host 0: {toy.full}"

    def free():
        until(lambda: line in lines)
        asked = len(toy.seen)
        until(lambda: len(toy.seen) > asked + 20)  # it looked again, ten times
        toy.full = ""

    threading.Thread(target=free).start()
    assert go(root, lines=lines)[0] == "ran"
    assert lines.count(line) == 1


def test_an_image_that_cannot_be_pulled_fails_in_the_end(toy, root, monkeypatch):
    monkeypatch.setattr(hosts, "STUCK_SECONDS", 0.3)
    toy.unpullable = True
    status, message, _ = go(root)
    assert status == "failed" and "ImagePullBackOff: no such image" in message and alone(toy, root)


def test_an_api_that_fails_for_a_while_ends_nothing(toy, root):
    todo(root, steps=40)
    toy.break_logs, lines = 2, []

    def complained():
        return any("Kubernetes answers 503" in line for line in lines)

    def fail():
        until((root / "scratch" / "pid-1").exists)
        toy.down = True
        until(complained)
        toy.down = False

    threading.Thread(target=fail).start()
    status, _, lines = go(root, lines=lines)
    assert status == "ran" and complained()
    steps = [line for line in lines if line.startswith("step")]
    assert steps == [f"step {number}" for number in range(40)]  # though the log broke twice: each line once


def test_an_api_that_is_out_of_reach_is_worth_another_try(toy, root):
    toy.down = True
    assert go(root)[:2] == ("lost", "Kubernetes answers 503: the server is busy")


def test_a_job_deleted_by_somebody_is_an_interruption(toy, root):
    todo(root, forever=True)

    def delete():
        until((root / "scratch" / "pid-0").exists)
        with toy.lock:
            toy._delete(next(iter(toy.jobs.values())))

    threading.Thread(target=delete).start()
    assert go(root)[:2] == ("interrupted", "interrupted by SIGTERM") and alone(toy, root)


def test_a_success_that_the_volume_does_not_show_is_none(toy, root):
    stage = root / "dit" / "stages" / "sample.py"
    stage.write_text(STAGE.replace('"scratch/outcome/', '"/dev/null" or "scratch/outcome/'))
    status, message, _ = go(root)
    assert status == "lost" and "does not say so" in message


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"stage": "vae", "count": 2}, "hosts: vae runs on one host, not on 2"),
        ({"mount": "/elsewhere"}, "hosts.mount: "),
        ({"image": ""}, "hosts.image: no image is named"),
        ({"environment": {"DIT_FLOW_RUN_ID": ""}}, "hosts: DIT_FLOW_RUN_ID is not set"),
    ],
)
def test_what_cannot_be_is_one_line_before_anything_is_asked(toy, root, change, said):
    status, message, _ = go(root, **change)
    assert status == "failed" and message.startswith(said) and "\n" not in message and not toy.seen


def test_without_a_cluster_one_line_says_so(root, monkeypatch, tmp_path):
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    status, message, _ = go(root)
    assert status == "failed" and message.startswith("no Kubernetes cluster: ") and "\n" not in message


def test_the_command_of_each_host():
    root, made = Path("/work/tree"), {"environment": {"A": "1"}, "run": RUN}
    job, service = manifests.manifests("sample", root, hosts=4, settings=HostSettings(image="i"), **made)
    name, spec = job["metadata"]["name"], job["spec"]
    [container] = spec["template"]["spec"]["containers"]
    assert " ".join(container["command"]) == (
        "torchrun --nnodes 4 --nproc-per-node gpu --node-rank $(JOB_COMPLETION_INDEX) "
        f"--master-addr {name}-0.{name} --master-port 29500 --rdzv-conf timeout=604800 -m dit.stages.sample"
    )
    assert (spec["completions"], spec["parallelism"], spec["completionMode"]) == (4, 4, "Indexed")
    assert spec["backoffLimit"] == 0 and "activeDeadlineSeconds" not in spec
    assert spec["template"]["spec"]["subdomain"] == service["metadata"]["name"] == name and len(name) < 57
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["publishNotReadyAddresses"]
    [alone] = manifests.manifests("vae", root, hosts=1, settings=HostSettings(image="i"), **made)[0]["spec"][
        "template"
    ]["spec"]["containers"]
    assert alone["command"] == ["python", "-m", "dit.stages.vae"]


def test_every_option_reaches_the_manifest_which_kubernetes_accepts():
    chosen = HostSettings(
        **{
            "image": "i",
            "claim": "disk",
            "accelerators": 4,
            "accelerator": "amd.com/gpu",
            "memory": "1Ti",
            "cpu": "96",
        },
        **{"shm": "99Gi", "extra_resources": {"rdma/ib": 1}, "node_selector": {"zone": "b"}, "priority_class": "high"},
        **{"tolerations": ({"key": "spot", "operator": "Exists"},), "secrets": ("s3",), "env": {"NCCL_DEBUG": "INFO"}},
        **{"user": 7, "save_seconds": 900, "namespace": "ns"},
    )
    job, service = manifests.manifests(
        *("sample", Path("/work/t")), hosts=2, settings=chosen, environment={"A": "1"}, run=RUN, owner=None
    )
    toy_cluster.validate(job)
    toy_cluster.validate(service)
    pod = job["spec"]["template"]["spec"]
    [container] = pod["containers"]
    assert container["resources"]["limits"] == {"memory": "1Ti", "amd.com/gpu": 4, "rdma/ib": 1}
    assert container["resources"]["requests"] == {"cpu": "96", "memory": "1Ti", "amd.com/gpu": 4, "rdma/ib": 1}
    env = {one["name"]: one["value"] for one in container["env"]}
    assert env == {"A": "1", "NCCL_DEBUG": "INFO", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "900"}
    assert container["envFrom"][0]["secretRef"]["name"] == "s3" and pod["securityContext"]["runAsUser"] == 7
    assert pod["terminationGracePeriodSeconds"] > 900 and pod["priorityClassName"] == "high"
    assert pod["nodeSelector"] == {"zone": "b"} and pod["tolerations"] == [{"key": "spot", "operator": "Exists"}]
    assert [volume.get("emptyDir", {}).get("sizeLimit") for volume in pod["volumes"]] == [None, "99Gi"]
    assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == "disk" and job["metadata"]["namespace"] == "ns"


def test_the_pools_variable_says_how_many_and_the_file_says_which(tmp_path):
    assert manifests.wanted(ROOT, {}) is None and manifests.wanted(ROOT, {"DIT_HOSTS": "0"}) is None
    count, chosen = manifests.wanted(ROOT, {"DIT_HOSTS": "4", "DIT_IMAGE": "i:2", "POD_NAMESPACE": "ns"})
    assert (count, chosen.image, chosen.namespace) == (4, "i:2", "ns")
    (tmp_path / "h.yaml").write_text("image: mine\nacelerators: 4\n")
    with pytest.raises(ValueError, match=r"hosts.acelerators: no such setting \(did you mean hosts.accelerators\?\)"):
        manifests.wanted(tmp_path, {"DIT_HOSTS": "1", "DIT_HOST_SETTINGS": "h.yaml"})
    with pytest.raises(ValueError, match="DIT_HOSTS must be a number of hosts, got 'two'"):
        manifests.wanted(ROOT, {"DIT_HOSTS": "two"})


@pytest.mark.parametrize(
    ("status", "said"),
    [
        ({"reason": "Evicted"}, ("lost", "host 0 was taken away (Evicted)")),
        ({"conditions": [{"type": "DisruptionTarget", "status": "False"}]}, ("lost", "it failed")),
        (
            {"containerStatuses": [{"state": {"terminated": {"reason": "OOMKilled", "exitCode": 137}}}]},
            ("failed", "host 0 needed more memory than hosts.memory allows"),
        ),
    ],
)
def test_what_kubernetes_says_of_a_pods_end(status, said):
    annotations = {"batch.kubernetes.io/job-completion-index": "0"}
    pod = {"metadata": {"annotations": annotations}, "status": {"phase": "Failed", **status}}
    assert pods.verdict({"message": "it failed"}, [pod], {}) == said


@pytest.mark.slow
def test_torchrun_itself_joins_two_hosts(toy, root):
    toy.path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    (root / "dit" / "stages" / "sample.py").write_text(JOINED)
    status, message, lines = go(root, environment={"OMP_NUM_THREADS": "1"}, processes=1, port=free_port())
    assert (status, message) == ("ran", ""), lines
    assert (root / "scratch" / "sum").read_text() == "3"


JOINED = """
import json, os, torch
import torch.distributed as dist
dist.init_process_group("gloo")
number = torch.tensor([dist.get_rank() + 1])
dist.all_reduce(number)
if dist.get_rank() == 0:
    os.makedirs("scratch/outcome")
    open("scratch/sum", "w").write(str(number.item()))
    json.dump({"status": "completed"}, open("scratch/outcome/sample.json", "w"))
dist.destroy_process_group()
"""
