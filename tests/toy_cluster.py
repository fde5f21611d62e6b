"""A Kubernetes of one machine, for the tests of flows/hosts.py: its API over HTTP, and pods that are real processes.

What is created must pass Kubernetes' own schemas, and what is asked must be allowed by the Role `dit-run` of
infra/kubernetes/ground.yaml. Written from Kubernetes' documentation, for what the tests need: Indexed Jobs, foreground
deletion with the pods' grace, owners, `backoffLimit: 0`, disruptions, logs that are followed.
"""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import uuid
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

GROUND = Path(__file__).parents[1] / "infra" / "kubernetes" / "ground.yaml"
VERSIONS = ("1.28", "1.32", "1.37")


def documents(file):
    from ruamel.yaml import YAML

    return list(YAML(typ="safe", pure=True).load_all(file.read_text()))


def allowed():
    """{(verb, resource)} of the Role dit-run."""
    [role] = [one for one in documents(GROUND) if one["kind"] == "Role" and one["metadata"]["name"] == "dit-run"]
    return {(verb, resource) for rule in role["rules"] for resource in rule["resources"] for verb in rule["verbs"]}


def validate(manifest, versions=VERSIONS):
    import kubernetes_validate

    for version in versions:
        kubernetes_validate.validate(manifest, version, strict=True)


def now():
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "000Z")


class Refused(Exception):
    def __init__(self, code, message):
        super().__init__(message)
        self.code, self.message = code, message


class Pod:
    def __init__(self, cluster, job, index):
        self.cluster, self.grace = cluster, job["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
        self.name, self.process, self.lines, self.pulled = f"{job['metadata']['name']}-{index}-x", None, [], True
        annotations = {"batch.kubernetes.io/job-completion-index": str(index)}
        metadata = {"name": self.name, "uid": str(uuid.uuid4()), "annotations": annotations}
        self.body = {"apiVersion": "v1", "kind": "Pod", "status": {"phase": "Pending", "conditions": []}}
        self.body |= {"metadata": metadata | {"labels": job["spec"]["template"]["metadata"]["labels"]}}
        self.body |= {"spec": job["spec"]["template"]["spec"]}
        self.index = index

    @property
    def status(self):
        return self.body["status"]

    def start(self):
        spec = self.body["spec"]["containers"][0]
        own = {"JOB_COMPLETION_INDEX": str(self.index)} | {one["name"]: one["value"] for one in spec["env"]}
        words = [re.sub(r"\$\((\w+)\)", lambda found: own[found[1]], word) for word in spec["command"]]
        name = f"{self.body['spec']['subdomain']}-0.{self.body['spec']['subdomain']}"
        words = ["127.0.0.1" if word == name else word for word in words]  # its DNS
        self.process = subprocess.Popen(
            [sys.executable, *words[1:]] if words[0] == "python" else words,
            cwd=spec["workingDir"],
            env={**os.environ, "PATH": self.cluster.path, "PYTHONUNBUFFERED": "1", **own},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.status["phase"] = "Running"
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        for line in self.process.stdout:
            self.lines.append((now(), line.rstrip("\n")))
        code = self.process.wait()
        with self.cluster.lock:
            code = code if code >= 0 else 128 - code
            ended = {"exitCode": code, "reason": "Error" if code else "Completed", "finishedAt": now()}
            self.status["containerStatuses"] = [{"name": "stage", "state": {"terminated": ended}}]
            self.status["phase"] = "Failed" if code else "Succeeded"

    def stop(self):
        if self.process and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            late = threading.Timer(self.grace, self.process.kill)
            late.daemon = True  # nobody waits minutes for it when the tests are over
            late.start()

    @property
    def over(self):
        return self.status["phase"] in ("Succeeded", "Failed") or (self.process is None and self.cluster.ending)


class ToyCluster:
    """`url` is the API's address. `full`: why no pod is scheduled; `down`: the API fails; `seen`: what was asked."""

    def __init__(self, path):
        self.path, self.lock = path, threading.RLock()
        self.jobs, self.services, self.pods, self.seen, self.made = {}, {}, {}, [], []
        self.full, self.down, self.unpullable, self.ending, self.break_logs = "", False, False, False, 0
        self.roles = allowed()
        cluster = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self):
                cluster._answer(self)

            do_GET = do_POST = do_PATCH = do_DELETE = answer

            def log_message(self, *words):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=[0.05], daemon=True).start()
        self.controller = threading.Thread(target=self._control, daemon=True)
        self.controller.start()

    def close(self):
        self.ending = True
        self.controller.join()
        self.server.shutdown()
        self.server.server_close()
        for pod in self.pods.values():
            if pod.process and pod.process.poll() is None:
                pod.process.kill()
                pod.process.wait()

    def kubeconfig(self, file):
        named = {"clusters": [{"name": "toy", "cluster": {"server": self.url}}], "users": [{"name": "me", "user": {}}]}
        named |= {"contexts": [{"name": "toy", "context": {"cluster": "toy", "user": "me"}}]}
        file.write_text(json.dumps({"apiVersion": "v1", "kind": "Config", "current-context": "toy", **named}))

    def of(self, index):
        return next((pod for pod in self.pods.values() if pod.index == index), None)

    def take_away(self, index, reason="PreemptionByScheduler"):
        """As a scheduler or a cloud takes a node: the pod learns why, and gets its grace."""
        with self.lock:
            self.of(index).status["conditions"].append({"type": "DisruptionTarget", "status": "True", "reason": reason})
        self.of(index).stop()

    def remove_owner(self, uid):
        """The garbage collector: what belongs to nobody else is removed."""
        with self.lock:
            for job in self.jobs.values():
                owners = job["metadata"].get("ownerReferences", [])
                if owners and all(owner["uid"] == uid for owner in owners):
                    self._delete(job)

    def _control(self):
        """The Job controller and the kubelet."""
        while not self.ending:
            with self.lock:
                for name, job in list(self.jobs.items()):
                    ours = [
                        pod for pod in self.pods.values() if pod.body["metadata"]["labels"] == job["metadata"]["labels"]
                    ]
                    self._step(name, job, ours)
            time.sleep(0.02)

    def _step(self, name, job, pods):
        conditions = job["status"].setdefault("conditions", [])
        if job["metadata"].get("deletionTimestamp"):
            if all(pod.over or pod.process is None for pod in pods):
                self.pods = {key: pod for key, pod in self.pods.items() if pod not in pods}
                self.services = {
                    k: v for k, v in self.services.items() if v["metadata"]["ownerReferences"][0]["name"] != name
                }
                del self.jobs[name]
            return
        if conditions:
            return
        for index in range(job["spec"]["completions"] if not pods else 0):
            pod = Pod(self, job, index)
            self.pods[pod.name] = pod
        for pod in pods:
            if pod.process is None:
                waiting = {"type": "PodScheduled", "status": "False", "message": self.full}
                pod.status["conditions"] = [waiting] if self.full else []
                pull = {"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}}
                pod.status["containerStatuses"] = [{"name": "stage", "state": pull}] if self.unpullable else []
                if not self.full and not self.unpullable:
                    pod.start()
        failed = [pod for pod in pods if pod.status["phase"] == "Failed"]
        if failed:
            taken = any(one["type"] == "DisruptionTarget" for one in failed[0].status["conditions"])
            reason = "PodFailurePolicy" if taken else "BackoffLimitExceeded"
            conditions.append({"type": "Failed", "status": "True", "reason": reason})
            for pod in pods:
                pod.stop()
        elif pods and all(pod.status["phase"] == "Succeeded" for pod in pods):
            conditions.append({"type": "Complete", "status": "True"})

    def _delete(self, job):
        if not job["metadata"].get("deletionTimestamp"):
            job["metadata"]["deletionTimestamp"] = now()
            for pod in self.pods.values():
                if pod.body["metadata"]["labels"] == job["metadata"]["labels"]:
                    pod.stop()

    def _answer(self, request):
        length = int(request.headers.get("Content-Length") or 0)
        body = json.loads(request.rfile.read(length)) if length else None
        where, asked = urlsplit(request.path), {k: v[0] for k, v in parse_qs(urlsplit(request.path).query).items()}
        try:
            if self.down:
                raise Refused(503, "the server is busy")
            found = re.fullmatch(r"/(?:api|apis/batch)/v1/namespaces/runs/(\w+)(?:/([\w.-]+))?(/log)?", where.path)
            if not found:
                raise Refused(404, f"no such path: {where.path}")
            resource, name, log = found[1] + (found[3] or ""), found[2], found[3]
            verb = {"GET": "get" if name else "list", "POST": "create"}.get(request.command, request.command.lower())
            with self.lock:
                self.seen.append((verb, resource))
            if (verb, resource) not in self.roles:
                raise Refused(403, f"{resource} is forbidden: cannot {verb}")
            if log:
                return self._log(request, name, asked)
            with self.lock:
                self._reply(request, 200, self._do(verb, resource, name, body, asked))
        except Refused as refused:
            self._reply(request, refused.code, {"kind": "Status", "message": refused.message})

    def _do(self, verb, resource, name, body, asked):
        kept = {"jobs": self.jobs, "services": self.services}.get(resource)
        if verb == "create":
            assert asked.get("fieldValidation") == "Strict"
            validate(body, VERSIONS[-1:])
            if body["metadata"]["name"] in kept:
                raise Refused(409, f"{resource} {body['metadata']['name']!r} already exists")
            self.made.append(body)
            metadata = body["metadata"] | {"uid": str(uuid.uuid4())}
            kept[metadata["name"]] = body | {"metadata": metadata, "status": {}}
            return kept[metadata["name"]]
        if resource == "pods" and verb == "list":
            wanted = dict(pair.split("=") for pair in asked["labelSelector"].split(","))
            ours = [pod.body for pod in self.pods.values() if wanted.items() <= pod.body["metadata"]["labels"].items()]
            return {"apiVersion": "v1", "kind": "PodList", "items": ours}
        if name not in (self.pods if resource == "pods" else kept):
            raise Refused(404, f"{resource} {name!r} not found")
        if resource == "pods":
            return self.pods[name].body
        if verb == "patch":
            kept[name]["metadata"] |= body["metadata"]
        if verb == "delete":
            assert asked["propagationPolicy"] == "Foreground"
            self._delete(kept[name])
        return kept[name]

    def _log(self, request, name, asked):
        pod = self.pods.get(name)
        if pod is None:
            raise Refused(404, f"pods {name!r} not found")
        if "tailLines" in asked:
            return self._reply(request, 200, None, "\n".join(line for _, line in pod.lines[-int(asked["tailLines"]) :]))
        self._head(request, 200, "text/plain")
        sent = 0
        while True:
            over = pod.over
            lines = pod.lines[sent:]
            request.wfile.write("".join(f"{stamp} {line}\n" for stamp, line in lines).encode())
            request.wfile.flush()
            sent += len(lines)
            if sent and self.break_logs:
                self.break_logs -= 1
                return
            if over and sent == len(pod.lines):
                return
            time.sleep(0.02)

    def _reply(self, request, code, body, text=None):
        content = (json.dumps(body) if text is None else text).encode()
        self._head(request, code, "application/json" if text is None else "text/plain", len(content))
        request.wfile.write(content)

    def _head(self, request, code, kind, length=None):
        request.send_response(code)
        request.send_header("Content-Type", kind)
        request.send_header("Connection", "close")
        if length is not None:
            request.send_header("Content-Length", str(length))
        request.end_headers()
        request.close_connection = True
