"""infra/: base job templates as Prefect takes them, what they render to as Kubernetes takes it, and the rest's facts."""

import asyncio
import inspect
import json
import re
import shlex
import uuid
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
INFRA = ROOT / "infra"
POOLS = {file.stem: json.loads(file.read_text()) for file in sorted((INFRA / "work_pools").glob("*.json"))}
KUBERNETES = [name for name in POOLS if name != "process"]
needs_kubernetes = pytest.mark.skipif(
    "not __import__('importlib.util').util.find_spec('prefect_kubernetes')"
    " or not __import__('importlib.util').util.find_spec('kubernetes_validate')",
    reason="needs prefect-kubernetes and kubernetes-validate, of the dev extra",
)


def placeholders(template):
    return set(re.findall(r"{{\s*([\w.\-]+)\s*}}", json.dumps(template)))


def test_there_is_a_template_for_each_kind_of_pool():
    assert list(POOLS) == ["kubernetes-cpu", "kubernetes-gpu", "kubernetes-tpu", "process"]


@pytest.mark.parametrize("name", POOLS)
def test_placeholders_and_variables_are_the_same_names(name):
    assert placeholders(POOLS[name]["job_configuration"]) == set(POOLS[name]["variables"]["properties"])


@pytest.mark.parametrize("name", POOLS)
def test_prefects_server_takes_the_template_and_its_defaults(name):
    from prefect.server.schemas.actions import WorkPoolCreate
    from prefect.utilities.schema_tools import is_valid_schema, validate

    WorkPoolCreate(name=name, type=name.partition("-")[0], base_job_template=POOLS[name])
    schema = POOLS[name]["variables"]
    is_valid_schema(schema)
    defaults = {key: about["default"] for key, about in schema["properties"].items() if "default" in about}
    validate(defaults, schema, raise_on_error=True)
    assert all(about.get("description") and about.get("title") for about in schema["properties"].values())


def test_the_process_template_takes_what_prefects_own_does():
    from prefect.workers.process import ProcessWorker

    own = ProcessWorker.get_default_base_job_template()
    assert POOLS["process"]["job_configuration"] == own["job_configuration"]
    assert set(POOLS["process"]["variables"]["properties"]) == set(own["variables"]["properties"])


def rendered(name, /, **values):
    """The Job that Prefect's worker would make for a flow run, and the two fields it puts where Kubernetes has none."""
    from prefect.client.orchestration import PrefectClient
    from prefect.client.schemas.objects import FlowRun
    from prefect_kubernetes.worker import KubernetesWorkerJobConfiguration

    async def render():
        # It asks the server for nothing, unless a template refers to a block.
        make = inspect.unwrap(KubernetesWorkerJobConfiguration.from_template_and_values.__func__)
        client = PrefectClient("http://127.0.0.1:9/api")
        return await make(KubernetesWorkerJobConfiguration, POOLS[name], values, client=client)

    configuration = asyncio.run(render())
    configuration.prepare_for_flow_run(FlowRun(id=uuid.uuid4(), flow_id=uuid.uuid4(), name="xl2 on a pool"))
    job = configuration.job_manifest
    # Prefect's own check wants them in the pod too. Kubernetes drops them with a warning.
    surplus = {key: job["spec"]["template"]["spec"].pop(key) for key in ("parallelism", "completions")}
    assert surplus == {"parallelism": 1, "completions": 1}
    return job


def parts(job):
    pod = job["spec"]["template"]["spec"]
    return pod, pod["containers"][0], {one["name"]: one.get("value") for one in pod["containers"][0]["env"]}


@needs_kubernetes
@pytest.mark.parametrize("name", KUBERNETES)
def test_kubernetes_takes_what_is_rendered(name):
    import toy_cluster

    job = rendered(name)
    toy_cluster.validate(job)
    pod, container, env = parts(job)
    assert (job["spec"]["parallelism"], job["spec"]["completions"], job["spec"]["backoffLimit"]) == (1, 1, 0)
    assert env["PREFECT_FLOW_RUN_EXECUTE_SIGTERM_BEHAVIOR"] == "reschedule"  # what is taken away goes on elsewhere
    assert container["args"] == ["prefect", "flow-run", "execute"]
    assert "{{" not in json.dumps(job) and None not in (pod.get("priorityClassName", ""), env.get("DIT_HOSTS", ""))


@needs_kubernetes
@pytest.mark.parametrize("name", KUBERNETES)
def test_a_stage_has_its_time_to_save_within_prefects_and_kubernetes_grace(name):
    from flows import dag, leash

    pod, _, env = parts(rendered(name))
    steps = leash.escalation(leash.save_seconds(env))
    needed = sum(seconds for _, seconds in steps) + dag.DRAIN_SECONDS
    assert needed < 30 < pod["terminationGracePeriodSeconds"]


@needs_kubernetes
@pytest.mark.parametrize("name", KUBERNETES)
def test_the_options_that_all_have_reach_the_job(name):
    import toy_cluster

    spot = [{"key": "spot", "operator": "Exists", "effect": "NoSchedule"}]
    job = rendered(
        name,
        **{"namespace": "ns", "image": "r/i:2", "claim": "disk", "mount": "/disk", "working_dir": "/disk/x"},
        **{"secret": "s3", "cpu": "3", "memory": "5Gi", "shm_size": "4Gi", "tolerations": spot, "grace_seconds": 99},
        **{"priority_class": "low", "save_seconds": "20", "finished_job_ttl": 7, "service_account_name": "me"},
        **{
            "env": {"A": "1", "DIT_SAVE_SECONDS": "25"},
            "labels": {"team": "x"},
            "annotations": {"k": "v"},
            "name": "n",
        },
    )
    toy_cluster.validate(job)
    pod, container, env = parts(job)
    assert job["metadata"]["namespace"] == "ns" and job["metadata"]["generateName"] == "n-"
    assert job["spec"]["template"]["metadata"]["labels"]["team"] == "x" and job["metadata"]["annotations"] == {"k": "v"}
    assert job["spec"]["ttlSecondsAfterFinished"] == 7 and pod["serviceAccountName"] == "me"
    assert (container["image"], container["workingDir"]) == ("r/i:2", "/disk/x")
    assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == "disk"
    assert container["volumeMounts"][0]["mountPath"] == "/disk"
    assert pod["volumes"][1]["emptyDir"] == {"medium": "Memory", "sizeLimit": "4Gi"}
    assert container["volumeMounts"][1] == {"name": "shm", "mountPath": "/dev/shm"}
    assert container["envFrom"] == [{"secretRef": {"name": "s3", "optional": True}}]
    assert (container["resources"]["requests"]["cpu"], container["resources"]["limits"]["memory"]) == ("3", "5Gi")
    assert (pod["tolerations"], pod["terminationGracePeriodSeconds"], pod["priorityClassName"]) == (spot, 99, "low")
    assert (env["A"], env["DIT_SAVE_SECONDS"], env["PYTHONPATH"]) == ("1", "25", "/disk/x")  # a run's own comes first
    assert [one["name"] for one in container["env"]].count("DIT_SAVE_SECONDS") == 1


@needs_kubernetes
def test_accelerators_where_the_scheduler_looks_for_them():
    pod, container, _ = parts(rendered("kubernetes-gpu", accelerators=8, node_selector={"gpu": "h100"}))
    assert (
        container["resources"]["limits"]["nvidia.com/gpu"] == container["resources"]["requests"]["nvidia.com/gpu"] == 8
    )
    assert pod["nodeSelector"] == {"gpu": "h100"} and pod["tolerations"][0]["key"] == "nvidia.com/gpu"

    tpu = {"accelerators": 8, "tpu_accelerator": "tpu-v5-lite-podslice", "tpu_topology": "2x4"}
    pod, container, _ = parts(rendered("kubernetes-tpu", **tpu, spot="true", reservation="r"))
    assert container["resources"]["limits"]["google.com/tpu"] == 8
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "2x4",
        "cloud.google.com/gke-spot": "true",
        "cloud.google.com/reservation-name": "r",
    }
    plain, _, _ = parts(rendered("kubernetes-tpu"))
    assert set(plain["nodeSelector"]) == {"cloud.google.com/gke-tpu-accelerator", "cloud.google.com/gke-tpu-topology"}

    _, container, _ = parts(rendered("kubernetes-cpu"))
    assert set(container["resources"]["limits"]) == {"memory"}


@needs_kubernetes
def test_the_pool_that_walks_for_several_hosts_tells_the_flow_what_it_needs():
    from flows import manifests

    _, container, env = parts(rendered("kubernetes-cpu", hosts="4", image="r/i:2"))
    fields = {one["name"]: one["valueFrom"]["fieldRef"]["fieldPath"] for one in container["env"] if "valueFrom" in one}
    wanted = {"POD_NAME": "metadata.name", "POD_UID": "metadata.uid", "POD_NAMESPACE": "metadata.namespace"}
    assert fields == wanted
    count, settings = manifests.wanted(ROOT, env | {"POD_NAMESPACE": "ns"})
    assert (count, settings.image, settings.claim, settings.mount) == (4, "r/i:2", "dit-work", "/work")
    assert manifests.wanted(ROOT, parts(rendered("kubernetes-cpu"))[2]) is None


def typed(readme):
    """The runs that a README tells to start: deployment, parameters, job variables, as Prefect's command reads them."""
    for line in re.findall(r"^prefect deployment run (.*)$", readme, flags=re.MULTILINE):
        name, *options = shlex.split(line)
        pairs = [(flag, *text.split("=", 1)) for flag, text in zip(options[::2], options[1::2], strict=True)]
        told = {flag: {key: json.loads(text) for one, key, text in pairs if one == flag} for flag, _, _ in pairs}
        assert set(told) <= {"-p", "--job-variable"}
        yield name, told.get("-p", {}), told.get("--job-variable", {})


@needs_kubernetes
def test_what_the_readme_types_for_several_hosts_reaches_them():
    from prefect.utilities.schema_tools import validate

    from flows import deploy, manifests
    from flows.train_dit import train_dit

    plan = {f"{one['flow']}/{one['name']}": one for one in deploy.plan(ROOT)}
    (direct, _, variables), (hop, parameters, none) = commands = list(typed((INFRA / "README.md").read_text()))
    pool = parameters["pool"]
    assert direct == f"train-dit/on-{pool}" and hop in plan and not none  # as placement.hand_over names what it starts
    for name, given, _ in commands:
        train_dit.validate_parameters({**plan[name]["parameters"], **given})
        assert plan[name]["entrypoint"] == "flows/train_dit.py:train_dit"
    handed_over = plan[direct]["work_pool"]
    assert handed_over["name"] == pool
    for values, hosts in ((handed_over["job_variables"], 2), ({**handed_over["job_variables"], **variables}, 4)):
        validate(values, POOLS[pool]["variables"], raise_on_error=True)
        _, _, env = parts(rendered(pool, **values))
        assert manifests.wanted(ROOT, env | {"POD_NAMESPACE": "ns"})[0] == hosts


def test_what_a_variable_cannot_be_is_refused_by_prefect():
    from prefect.utilities.schema_tools import ValidationError, validate

    for name, wrong in (
        ("kubernetes-gpu", {"accelerators": 0}),
        ("kubernetes-gpu", {"save_seconds": "soon"}),
        ("kubernetes-cpu", {"hosts": "two"}),
        ("kubernetes-tpu", {"spot": "yes"}),
    ):
        with pytest.raises(ValidationError):
            validate(wrong, POOLS[name]["variables"], raise_on_error=True)


@needs_kubernetes
def test_the_ground_is_what_kubernetes_takes_and_names_what_the_pools_name():
    import toy_cluster

    documents = toy_cluster.documents(INFRA / "kubernetes" / "ground.yaml")
    for document in documents:
        toy_cluster.validate(document)
    names = {(one["kind"], one["metadata"]["name"]) for one in documents}
    assert len(names) == len(documents)
    for pool in KUBERNETES:
        default = {key: about.get("default") for key, about in POOLS[pool]["variables"]["properties"].items()}
        assert {
            ("PersistentVolumeClaim", default["claim"]),
            ("ServiceAccount", default["service_account_name"]),
        } <= names
    [worker] = [one for one in documents if one["kind"] == "Deployment"]
    command = worker["spec"]["template"]["spec"]["containers"][0]["command"]
    assert command[command.index("--pool") + 1] in POOLS
    mounts = [mount["mountPath"] for one in documents if one["kind"] == "Job" for mount in parts_of(one)]
    assert mounts == [POOLS["kubernetes-gpu"]["variables"]["properties"]["mount"]["default"]]


def parts_of(job):
    return job["spec"]["template"]["spec"]["containers"][0]["volumeMounts"]


def test_the_hosts_file_holds_valid_settings_and_each_of_them():
    from dataclasses import fields

    from dit.config import read_params
    from flows import manifests

    _, settings = manifests.wanted(ROOT, {"DIT_HOSTS": "1", "DIT_IMAGE": "i"})
    written = set(read_params(INFRA / "kubernetes" / "hosts.yaml"))
    assert written == {field.name for field in fields(settings)} - {"image", "namespace"}
    assert settings.tolerations[0]["key"] == "nvidia.com/gpu"


def test_the_image_has_the_makefiles_torch_and_a_python_that_the_project_takes():
    dockerfile, makefile = (INFRA / "docker" / "Dockerfile").read_text(), (ROOT / "Makefile").read_text()
    assert re.search(r"ARG TORCH=(\S+)", dockerfile)[1] == re.search(r"^TORCH := (\S+)", makefile, re.M)[1]
    assert (3, 11) <= tuple(map(int, re.search(r"FROM python:(\d+)\.(\d+)", dockerfile).groups())) < (3, 14)
    for copied in re.findall(r"^COPY (\S+)", dockerfile, re.M):
        assert (ROOT / copied).exists()
    workdir = re.search(r"^WORKDIR (\S+)", dockerfile, re.M)[1]
    assert workdir == POOLS["kubernetes-gpu"]["variables"]["properties"]["working_dir"]["default"]
    uid = re.search(r"--uid (\d+)", dockerfile)[1]
    template = POOLS["kubernetes-gpu"]["job_configuration"]["job_manifest"]["spec"]["template"]["spec"]
    assert template["securityContext"]["runAsUser"] == int(uid)


def test_the_readme_says_what_was_not_run_and_names_every_file():
    text = (INFRA / "README.md").read_text()
    assert "not run on a cluster" in text.lower()
    for file in INFRA.rglob("*"):
        if file.is_file() and file.name != "README.md":
            assert file.name in text, file
    for variable in (
        POOLS["kubernetes-gpu"]["variables"]["properties"] | POOLS["kubernetes-tpu"]["variables"]["properties"]
    ):
        if variable not in ("name", "labels", "annotations", "command"):
            assert f"`{variable}`" in text, variable
