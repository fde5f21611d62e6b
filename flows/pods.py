"""What Kubernetes says of a Job and its pods, read: whether it ended, why, and what is still waited for.

All are dictionaries as the API gives them.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Literal

Status = Literal["ran", "interrupted", "lost", "failed"]
STUCK = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "CreateContainerConfigError", "CreateContainerError")
_TAKEN = ("Evicted", "Preempting", "NodeLost", "NodeShutdown", "Shutdown", "Terminated", "UnexpectedAdmissionError")
_KILLED = (137, 143)  # by SIGKILL, by SIGTERM: no doing of the stage's


def verdict(
    failed: Mapping[str, Any], pods: Iterable[Mapping[str, Any]], outcome: Mapping[str, Any]
) -> tuple[Status, str]:
    """What a failed Job means, from its condition, its pods and what the stage itself wrote of its end."""
    pods, said = list(pods), outcome.get("message") or ""
    if outcome.get("status") == "refused":
        return "failed", said
    for pod in pods:
        if ended(pod).get("reason") == "OOMKilled":
            return "failed", f"host {index(pod)} needed more memory than hosts.memory allows"
    if taken := [f"host {index(pod)} was taken away ({why})" for pod in pods if (why := taken_away(pod))]:
        return "lost", "; ".join(taken + [said] * bool(said))
    if outcome.get("status") == "interrupted":
        return "interrupted", said
    if outcome.get("status") == "failed":
        return ("lost" if outcome.get("retry") else "failed"), said
    codes = {index(pod): ended(pod).get("exitCode") for pod in pods if ended(pod).get("exitCode")}
    if killed := [host for host, code in codes.items() if code in _KILLED]:
        return "lost", f"host {killed[0]} was killed"
    for host, code in codes.items():
        return "failed", f"host {host} ended with exit code {code}"
    return "lost", failed.get("message") or failed.get("reason") or "the Job failed"


def taken_away(pod: Mapping[str, Any]) -> str:
    """Why Kubernetes or the cloud ended a pod (preemption, eviction, a lost node); empty if it did not."""
    for condition in pod["status"].get("conditions") or []:
        if condition["type"] == "DisruptionTarget" and condition["status"] == "True":
            return condition.get("reason") or "DisruptionTarget"
    reason = pod["status"].get("reason") or ""
    return reason if reason in _TAKEN else ""


def waits_for(pod: Mapping[str, Any]) -> str:
    """What a pod that doesn't run yet waits for; empty if it runs, or just starts."""
    for container in pod["status"].get("containerStatuses") or []:
        waiting = (container.get("state") or {}).get("waiting") or {}
        if waiting.get("reason") in STUCK:
            return f"host {index(pod)}: {waiting['reason']}: {waiting.get('message') or 'no further word'}"
    for condition in pod["status"].get("conditions") or []:
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            return f"host {index(pod)}: {condition.get('message') or condition.get('reason')}"
    return ""


def condition(job: Mapping[str, Any], kind: str) -> dict[str, Any] | None:
    """The condition of this kind (`Complete`, `Failed`) if it holds."""
    conditions = (job.get("status") or {}).get("conditions") or []
    return next((one for one in conditions if one["type"] == kind and one["status"] == "True"), None)


def index(pod: Mapping[str, Any]) -> str:
    """Which of the hosts a pod is, from 0."""
    return (pod["metadata"].get("annotations") or {}).get("batch.kubernetes.io/job-completion-index", "?")


def phase(pod: Mapping[str, Any]) -> str:
    """Pending, Running, Succeeded, Failed or Unknown."""
    return pod["status"].get("phase") or ""


def ended(pod: Mapping[str, Any]) -> dict[str, Any]:
    """How a pod's container ended: exitCode, reason, finishedAt; empty if it did not."""
    for container in pod["status"].get("containerStatuses") or []:
        if (container.get("state") or {}).get("terminated"):
            return container["state"]["terminated"]
    return {}
