"""Kubernetes' API, as far as one Job of several hosts needs it: plain calls, with plain dictionaries.

The client (kubernetes_asyncio, imported late) lives in a loop on a thread of its own. A signal's exception
(KeyboardInterrupt, Prefect's TerminationSignal) is raised in the main thread, wherever that is; inside a loop's callback
it would be swallowed, and a cancelled run would train on.
"""

import asyncio
import concurrent.futures
import json
import os
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

ANSWER_SECONDS = 20.0
RECONNECT_SECONDS = 1.0
_DENIED = "give the service account the Role in infra/kubernetes/ground.yaml"


class NoAnswer(Exception):
    """The API could not be reached, or failed by itself: the same question may be answered later."""


class Cluster:
    """One namespace of the cluster that this process runs in, else of the one that the kubeconfig names.

    Each method raises ValueError (one line) for what the API refuses, and NoAnswer.
    """

    def __init__(self, namespace: str):
        self.namespace = namespace
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="kubernetes", daemon=True).start()
        try:
            self._client = self._wait(_connect())
        except BaseException:
            self._loop.call_soon_threadsafe(self._loop.stop)
            raise

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(self, *error: Any) -> None:
        try:
            self._wait(_close(self._client))
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)

    def job(self, name: str) -> dict[str, Any] | None:
        return self._ask("BatchV1Api", "read_namespaced_job", name, missing_ok=True)

    def pods(self, selector: str) -> list[dict[str, Any]]:
        return self._ask("CoreV1Api", "list_namespaced_pod", label_selector=selector)["items"]

    def create_job(self, manifest: Mapping[str, Any]) -> dict[str, Any]:
        """Create the Job; one of this name that is there already (a lost answer, asked again) is taken for it."""
        return self._create("BatchV1Api", "job", manifest)

    def create_service(self, manifest: Mapping[str, Any]) -> dict[str, Any]:
        return self._create("CoreV1Api", "service", manifest)

    def delete_job(self, name: str) -> None:
        """Ask for the Job's end: its pods get SIGTERM and their grace; it is gone when they are."""
        options = {"propagation_policy": "Foreground", "missing_ok": True}
        self._ask("BatchV1Api", "delete_namespaced_job", name, **options)

    def own_job(self, name: str, owners: list[dict[str, Any]]) -> None:
        """Name the owners without which Kubernetes removes the Job, instead of those so far."""
        body = {"metadata": {"ownerReferences": owners}}
        self._ask("BatchV1Api", "patch_namespaced_job", name, body=body, _content_type="application/merge-patch+json")

    def tail(self, pod: str, lines: int) -> list[str]:
        """The last lines that a pod said."""
        reply = self._ask("CoreV1Api", "read_namespaced_pod_log", pod, tail_lines=lines, missing_ok=True)
        return (reply or "").splitlines()

    def follow(self, pod: str, put: Callable[[str], Any]) -> "concurrent.futures.Future[None]":
        """Hand each line of a pod to `put`, on another thread, until it ends. The future is done when it did."""
        return asyncio.run_coroutine_threadsafe(_follow(self._client, pod, self.namespace, put), self._loop)

    def _create(self, api: str, kind: str, manifest: Mapping[str, Any]) -> dict[str, Any]:
        made = self._ask(api, f"create_namespaced_{kind}", body=manifest, field_validation="Strict", exists_ok=True)
        return made or self._ask(api, f"read_namespaced_{kind}", manifest["metadata"]["name"])

    def _ask(self, api: str, method: str, name: str | None = None, **options: Any) -> Any:
        return self._wait(_ask(self._client, api, method, [*filter(None, [name]), self.namespace], **options))

    def _wait(self, question: Any) -> Any:
        future = asyncio.run_coroutine_threadsafe(question, self._loop)
        try:
            return future.result()
        except BaseException:
            # Interrupted while a Job is being asked for: it must be known to be there before it can be deleted.
            concurrent.futures.wait([future], ANSWER_SECONDS)
            raise


async def _connect() -> Any:
    try:
        from kubernetes_asyncio import client, config
    except ImportError:
        raise ValueError("several hosts need Kubernetes' client: pip install 'dit-pipeline[kubernetes]'") from None
    try:
        settings = client.Configuration()
        try:
            config.load_incluster_config(client_configuration=settings)
        except config.ConfigException:
            await config.load_kube_config(config_file=os.environ.get("KUBECONFIG"), client_configuration=settings)
    except (config.ConfigException, OSError, TypeError) as error:
        raise ValueError(f"no Kubernetes cluster: this is no pod, and there is no kubeconfig ({error})") from None
    return client.ApiClient(configuration=settings)


async def _close(client: Any) -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    await client.close()


async def _ask(
    connection: Any,
    api: str,
    method: str,
    words: list[str],
    *,
    missing_ok: bool = False,
    exists_ok: bool = False,
    **options: Any,
) -> Any:
    import aiohttp
    from kubernetes_asyncio import client

    ask = getattr(getattr(client, api)(connection), method)
    try:
        # Not by the client's models: they are of one version of Kubernetes, and raise for what another leaves out.
        async with await ask(*words, _preload_content=False, _request_timeout=ANSWER_SECONDS, **options) as reply:
            text = (await reply.read()).decode(errors="replace")
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        raise NoAnswer(f"Kubernetes does not answer: {error or type(error).__name__}") from None
    if reply.status < 400:
        return json.loads(text) if reply.content_type == "application/json" else text
    if (missing_ok and reply.status == 404) or (exists_ok and reply.status == 409):
        return None
    said = _message(text) or reply.reason
    if reply.status not in (400, 401, 403, 404, 409, 413, 422):
        raise NoAnswer(f"Kubernetes answers {reply.status}: {said}")
    what = method.replace("_namespaced_", " ").replace("_", " ")
    advice = f": {_DENIED}" if reply.status in (401, 403) else ""
    raise ValueError(f"Kubernetes refuses to {what} in namespace {words[-1]}: {said}{advice}")


def _message(text: str) -> str:
    try:
        return " ".join(json.loads(text)["message"].split())
    except (ValueError, KeyError, TypeError, AttributeError):
        return ""


async def _follow(connection: Any, pod: str, namespace: str, put: Callable[[str], Any]) -> None:
    """Read a pod's log as it grows; a connection that breaks is opened again, and no line comes twice."""
    import aiohttp
    from kubernetes_asyncio import client

    last, heard, options = "", time.monotonic(), {}
    while True:
        known = last
        try:
            reply = await client.CoreV1Api(connection).read_namespaced_pod_log(
                pod, namespace, follow=True, timestamps=True, _preload_content=False, **options
            )
            async with reply:
                if reply.status == 404:
                    return
                async for line in reply.content if reply.status == 200 else _nothing():
                    stamp, _, text = line.decode(errors="replace").rstrip("\r\n").partition(" ")
                    heard = time.monotonic()
                    if stamp > known:
                        last = stamp
                        put(text.rpartition("\r")[2])
            if reply.status == 200 and await _is_over(connection, pod, namespace):
                return
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError):  # ValueError: a line beyond all measure
            pass
        await asyncio.sleep(RECONNECT_SECONDS)
        if last:
            options = {"since_seconds": int(time.monotonic() - heard) + 5}


async def _is_over(connection: Any, pod: str, namespace: str) -> bool:
    try:
        found = await _ask(connection, "CoreV1Api", "read_namespaced_pod", [pod, namespace], missing_ok=True)
    except NoAnswer:
        return False
    return found is None or found["status"].get("phase") in ("Succeeded", "Failed")


async def _nothing() -> Any:
    for line in ():
        yield line
