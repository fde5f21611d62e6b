"""A stage on several hosts: an Indexed Job of Kubernetes, one pod a host, torchrun in each. Not run on a cluster.

    coordinator's pod (walks the DAG) --API--> Job --> pod 0 ... pod N-1: torchrun -m dit.stages.<stage>
            \\_______________ one ReadWriteMany volume: checkout, worktrees, DVC's cache ______________/

The flow's own Job stays one pod: with `parallelism` there, the whole flow would run N times. The ranks live and die
together: one pod's end fails the Job, and the walker starts it again as a whole (a stage goes on from its state).
The Job's name follows from run and stage. So a coordinator that was killed finds it again and watches on, two can't
start it twice; and it belongs to the coordinator's pod, with which Kubernetes removes it.
"""

import json
import os
import queue
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flows import pods
from flows.cluster import Cluster, NoAnswer
from flows.manifests import GRACE_MARGIN_SECONDS, RUN, STAGE, HostSettings, manifests

POLL_SECONDS = 3.0
STUCK_SECONDS = 600.0  # an image that can't be pulled for so long won't be
SAY_AGAIN_SECONDS = 300.0
LAST_LINES = 15
VISIBLE_SECONDS = 90.0  # a network file system remembers what was not there, by default for up to a minute


def run_on_hosts(
    stage: str,
    root: Path,
    on_line: Callable[[str], None],
    *,
    hosts: int,
    settings: HostSettings,
    environment: Mapping[str, str],
) -> tuple[pods.Status, str]:
    """Run a stage on `hosts` hosts and wait for its end; what is recorded of it is DVC's, whose shell asks (see `onhosts`).

    Args:
        on_line: gets what the main process prints, and what is being waited for.
        environment: for the stage; DIT_FLOW_RUN_ID in it tells whose Job it is. It stands in the Job for all to read:
            secrets come by `settings.secrets`.

    Returns `ran`; `interrupted` (saved and stopped, or the Job was deleted from outside); `lost` (infrastructure: again);
    `failed`, also for what Kubernetes or `manifests` refuses. An exception that arrives meanwhile first ends the Job.
    """
    try:
        if not (run := environment.get("DIT_FLOW_RUN_ID")):
            raise ValueError("hosts: DIT_FLOW_RUN_ID is not set: a Job must say to which run it belongs")
        made = {"hosts": hosts, "settings": settings, "environment": environment, "run": run, "owner": _this_pod()}
        job, service = manifests(stage, root, **made)
        with Cluster(job["metadata"]["namespace"]) as cluster:
            ours = _Job(cluster, job, service, root, on_line)
            ours.refuse_anothers()
            try:
                ours.begin()
                return ours.to_its_end()
            except BaseException:
                ours.end()
                ours.finish_log(5.0)  # the last that was said while it saved
                raise
    except ValueError as error:
        return "failed", str(error)
    except NoAnswer as error:
        return "lost", str(error)


def _this_pod() -> dict[str, str] | None:
    name, uid = os.environ.get("POD_NAME"), os.environ.get("POD_UID")
    return {"apiVersion": "v1", "kind": "Pod", "name": name, "uid": uid} if name and uid else None


class _Job:
    """The Job from its start to its end. Pods, once seen, are remembered: a node that is lost takes them with it."""

    def __init__(
        self, cluster: Cluster, job: dict[str, Any], service: dict[str, Any], root: Path, on_line: Callable[[str], None]
    ):
        self.cluster, self.job, self.service, self.on_line = cluster, job, service, on_line
        self.name, self.labels = job["metadata"]["name"], job["metadata"]["labels"]
        self.outcome = root / "scratch" / "outcome" / f"{self.labels[STAGE]}.json"
        self.hosts = job["spec"]["completions"]
        self.grace = job["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
        self.pods: dict[str, dict[str, Any]] = {}
        self.lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.log, self.told, self.told_at, self.stuck_since = None, "", 0.0, None

    def refuse_anothers(self) -> None:
        found = self.cluster.job(self.name)
        if found and (found["metadata"].get("labels") or {}).get(RUN) != self.labels[RUN]:
            raise ValueError(f"hosts: the Job {self.name} in namespace {self.cluster.namespace} is another run's")

    def begin(self) -> None:
        """Create the Job and its Service, or take over the Job that a coordinator of this run left behind."""
        found, owners = self.cluster.job(self.name), self.job["metadata"].get("ownerReferences")
        if found and (found["metadata"].get("deletionTimestamp") or pods.condition(found, "Failed")):
            self.on_line(f"Job {self.name} of an earlier process of this run ends or failed: removed first")
            if not self.end():
                raise NoAnswer(f"Job {self.name} of an earlier process of this run does not end")
            self.pods.clear()
            found = None
        if found:
            self.on_line(f"Job {self.name} runs already, for an earlier process of this run: watching on")
            if owners:
                self.cluster.own_job(self.name, owners)
        else:
            self.outcome.unlink(missing_ok=True)
            found = self.cluster.create_job(self.job)
            self.on_line(f"Job {self.name}: {self.hosts} host(s) in namespace {self.cluster.namespace}")
        belongs = {"apiVersion": "batch/v1", "kind": "Job", "name": self.name, "uid": found["metadata"]["uid"]}
        metadata = self.service["metadata"] | {"ownerReferences": [belongs]}
        self.cluster.create_service(self.service | {"metadata": metadata})

    def to_its_end(self) -> tuple[pods.Status, str]:
        """Watch until the Job ended; it is removed then, and its pods are gone."""
        while True:
            try:
                job = self._look()
            except NoAnswer as error:
                self._once(f"{error}; the Job goes on, asking again")
                job = {}
            if job is None:
                said = self._said()
                why = said.get("message") if said.get("status") == "interrupted" else ""
                return "interrupted", why or f"the Job {self.name} was deleted from outside"
            if ended := pods.condition(job, "Complete") or pods.condition(job, "Failed"):
                return self._conclude(ended)
            if self.stuck_since and time.monotonic() - self.stuck_since > STUCK_SECONDS:
                raise ValueError(f"{self.told}, for {STUCK_SECONDS / 60:g} minutes")
            self._pass_on()
            time.sleep(POLL_SECONDS)

    def end(self) -> bool:
        """Delete the Job and wait, as long as its pods' grace, until they are gone; returns whether they are."""
        seconds = self.grace + GRACE_MARGIN_SECONDS
        deadline, asked = time.monotonic() + seconds, False
        while time.monotonic() < deadline:
            try:
                if not asked:
                    self.cluster.delete_job(self.name)
                    asked = True
                if self.cluster.job(self.name) is None:
                    return True
                self._remember()
            except NoAnswer:
                pass
            self._pass_on()
            time.sleep(POLL_SECONDS)
        how = "it was asked to end" if asked else "the API was not reached"
        self.on_line(f"Job {self.name} is not gone after {seconds} s; {how}")
        return False

    def _look(self) -> dict[str, Any] | None:
        job, now = self.cluster.job(self.name), self._remember()
        mains = [pod for pod in now if pods.index(pod) == "0" and pods.phase(pod) in ("Running", "Succeeded", "Failed")]
        if mains and self.log is None:
            self.log = self.cluster.follow(mains[0]["metadata"]["name"], self.lines.put)
        running = sum(pods.phase(pod) in ("Running", "Succeeded") for pod in now)
        reasons = [why for pod in now if (why := pods.waits_for(pod))]
        if running < self.hosts and job and not pods.condition(job, "Failed"):
            self._once(f"{running} of {self.hosts} host(s) run" + (f"; {reasons[0]}" if reasons else ""))
        if not any(word in why for why in reasons for word in pods.STUCK):
            self.stuck_since = None
        elif self.stuck_since is None:
            self.stuck_since = time.monotonic()
        return job

    def _remember(self) -> list[dict[str, Any]]:
        now = self.cluster.pods(",".join(f"{key}={value}" for key, value in self.labels.items()))
        self.pods |= {pod["metadata"]["uid"]: pod for pod in now}
        return now

    def _conclude(self, ended: Mapping[str, Any]) -> tuple[pods.Status, str]:
        complete = ended["type"] == "Complete"
        self.finish_log(10.0 if complete else 2.0)
        if not complete:
            self._say_what_the_first_to_fail_said()
        self.end()
        self.finish_log(5.0)
        if not complete:
            return pods.verdict(ended, self.pods.values(), self._said())
        deadline = time.monotonic() + VISIBLE_SECONDS
        while self._said().get("status") != "completed":
            if time.monotonic() > deadline:
                return "lost", f"the Job ended well, but {self.outcome} does not say so: is the volume the hosts' own?"
            time.sleep(POLL_SECONDS)
        return "ran", ""

    def _say_what_the_first_to_fail_said(self) -> None:
        """The last lines of the host that failed first, unless it is the one whose lines come anyway."""
        failed = [pod for pod in self.pods.values() if pods.phase(pod) == "Failed"]
        for pod in sorted(failed, key=lambda pod: pods.ended(pod).get("finishedAt") or "~")[:1]:
            if pods.index(pod) != "0":
                for line in self.cluster.tail(pod["metadata"]["name"], LAST_LINES):
                    self.on_line(f"host {pods.index(pod)}: {line}")

    def _said(self) -> dict[str, Any]:
        """What the stage itself wrote about its end."""
        try:
            said = json.loads(self.outcome.read_text())
        except (OSError, ValueError):
            return {}
        return said if isinstance(said, dict) else {}

    def finish_log(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while self.log and not self.log.done() and time.monotonic() < deadline:
            time.sleep(0.05)
        self._pass_on()

    def _pass_on(self) -> None:
        while not self.lines.empty():
            self.on_line(self.lines.get())

    def _once(self, line: str) -> None:
        if line != self.told or time.monotonic() - self.told_at > SAY_AGAIN_SECONDS:
            self.told, self.told_at = line, time.monotonic()
            self.on_line(line)
