"""What several hosts are made of: the Indexed Job that runs a stage on each, and the Service that names them.

Rendering alone: nothing here talks to a cluster. `hosts` creates and watches what is rendered here.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dit import config
from dit.pipeline import SHARED

HOSTS, SETTINGS_FILE = "DIT_HOSTS", "infra/kubernetes/hosts.yaml"
RUN, STAGE = "dit-pipeline/run", "dit-pipeline/stage"  # labels
GRACE_MARGIN_SECONDS = 30


@dataclass(frozen=True)
class HostSettings:
    """What each host is (infra/kubernetes/hosts.yaml). Quantities are Kubernetes' own: "64Gi", "500m"."""

    image: str = ""  # empty: the coordinator's, DIT_IMAGE
    claim: str = "dit-work"  # the ReadWriteMany volume's claim
    mount: str = "/work"  # where it is mounted, here and there
    namespace: str = ""  # empty: the coordinator's, POD_NAMESPACE
    accelerator: str = "nvidia.com/gpu"
    accelerators: int = 8  # a host; 0 = none
    processes: int | Literal["gpu", "auto"] = "gpu"  # a host, for stages that several can share
    cpu: str = "8"
    memory: str = "64Gi"
    shm: str = "16Gi"
    extra_resources: dict[str, int | str] = field(default_factory=dict)
    node_selector: dict[str, str] = field(default_factory=dict)
    tolerations: tuple[dict[str, str | int], ...] = ()
    priority_class: str = ""
    secrets: tuple[str, ...] = ("dit-secrets",)
    env: dict[str, str] = field(default_factory=dict)
    user: int = 1000
    save_seconds: int = 300  # to save in, when a host is taken away or the run cancelled
    port: int = 29500

    def __post_init__(self) -> None:
        if self.accelerators < 0 or self.save_seconds < 1:
            raise ValueError("accelerators must not be negative, and save_seconds be at least 1")
        if not 0 < self.port < 65536:
            raise ValueError(f"port must be a port number, got {self.port}")


def wanted(root: Path, environment: Mapping[str, str] = os.environ) -> tuple[int, HostSettings] | None:
    """The hosts that the work pool gives to stages of the accelerator (DIT_HOSTS); None: they run in this pod.

    Raises ValueError where the variable or the settings' file is wrong.
    """
    text = environment.get(HOSTS, "")
    if text in ("", "0"):
        return None
    if not text.isdecimal():
        raise ValueError(f"{HOSTS} must be a number of hosts, got {text!r}")
    file = root / environment.get("DIT_HOST_SETTINGS", SETTINGS_FILE)
    known = {"image": environment.get("DIT_IMAGE", ""), "namespace": environment.get("POD_NAMESPACE", "")}
    said = config.read_params(file)
    filled = said | {key: value for key, value in known.items() if not said.get(key)}
    return int(text), config.parse("hosts", filled, HostSettings, source=file.name)


def job_name(stage: str, run: str) -> str:
    """The name of a run's stage, for Job and Service: short enough for `<name>-<index>` to be a host's name."""
    return f"dit-{re.sub('[^a-z0-9]+', '-', stage.lower())[:30].strip('-')}-{re.sub('[^a-z0-9]', '', run.lower())[:12]}"


def manifests(
    stage: str,
    root: Path,
    *,
    hosts: int,
    settings: HostSettings,
    environment: Mapping[str, str],
    run: str,
    owner: Mapping[str, str] | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The Job and the headless Service that gives its pods their names.

    Raises ValueError for what can't be: a stage that is not shared on several hosts, a folder off the volume.
    """
    if hosts < 1 or (hosts > 1 and stage not in SHARED):
        raise ValueError(f"hosts: {stage} runs on one host, not on {hosts}: only {', '.join(sorted(SHARED))} share")
    if not root.resolve().is_relative_to(settings.mount):
        raise ValueError(f"hosts.mount: {root.resolve()} is not on the volume at {settings.mount}, which hosts share")
    if not settings.image:
        raise ValueError("hosts.image: no image is named, there or in DIT_IMAGE")
    name, labels = job_name(stage, run), {RUN: run, STAGE: stage}
    count = {settings.accelerator: settings.accelerators} if settings.accelerators else {}
    limits = {"memory": settings.memory} | count | settings.extra_resources
    env = dict(environment) | settings.env | {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(settings.save_seconds)}
    container = {
        "name": "stage",
        "image": settings.image,
        "command": _command(stage, name, hosts, settings),
        "workingDir": str(root.resolve()),
        "env": [{"name": key, "value": value} for key, value in env.items()],
        "envFrom": [{"secretRef": {"name": secret, "optional": True}} for secret in settings.secrets],
        "resources": {"requests": {"cpu": settings.cpu, **limits}, "limits": limits},
        "volumeMounts": [
            {"name": "work", "mountPath": settings.mount},
            {"name": "shm", "mountPath": "/dev/shm"},
        ],
    }
    pod = {
        "restartPolicy": "Never",
        "subdomain": name,
        "automountServiceAccountToken": False,
        # Beyond what the ranks have, which torchrun ends before Kubernetes ends torchrun.
        "terminationGracePeriodSeconds": settings.save_seconds + GRACE_MARGIN_SECONDS,
        "securityContext": {"runAsUser": settings.user, "runAsGroup": settings.user, "fsGroup": settings.user},
        "nodeSelector": settings.node_selector,
        "tolerations": list(settings.tolerations),
        "containers": [container],
        "volumes": [
            {"name": "work", "persistentVolumeClaim": {"claimName": settings.claim}},
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": settings.shm}},
        ],
    }
    if settings.priority_class:
        pod["priorityClassName"] = settings.priority_class
    taken_away = {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    metadata = {"name": name, "namespace": settings.namespace or "default", "labels": labels}
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": metadata | ({"ownerReferences": [dict(owner)]} if owner else {}),
        "spec": {
            "completionMode": "Indexed",
            "completions": hosts,
            "parallelism": hosts,
            "backoffLimit": 0,  # one pod alone would come back to ranks that are gone
            "podFailurePolicy": {"rules": [taken_away]},
            "ttlSecondsAfterFinished": 3600,  # the coordinator removes it; this is for one that never comes back
            "template": {"metadata": {"labels": labels}, "spec": pod},
        },
    }
    # Names before the pods are ready: rank 0 is only ready when the others have found it.
    names = {"clusterIP": "None", "publishNotReadyAddresses": True, "selector": labels}
    ports = [{"name": "torchrun", "port": settings.port}]
    return job, {"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": names | {"ports": ports}}


def _command(stage: str, name: str, hosts: int, settings: HostSettings) -> list[str]:
    if stage not in SHARED:
        return ["python", "-m", f"dit.stages.{stage}"]
    return [
        *["torchrun", "--nnodes", str(hosts), "--nproc-per-node", str(settings.processes)],
        *["--node-rank", "$(JOB_COMPLETION_INDEX)"],  # Kubernetes puts it in
        *["--master-addr", f"{name}-0.{name}", "--master-port", str(settings.port)],
        *["--rdzv-conf", f"timeout={7 * 24 * 3600}"],  # the last host may have to wait for its accelerators
        *["-m", f"dit.stages.{stage}"],
    ]
