"""flows/deploy.py: what prefect.yaml promises is what the presets and the flows take, and the server gets just that."""

import shutil
import subprocess
import sys

import pytest
import test_automations
from prefect.client.orchestration import get_client
from ruamel.yaml import YAML
from toy_pipeline import REPOSITORY

from dit import presets
from dit.config import read_params
from flows import deploy, placement, pools

server = test_automations.server
ACCELERATOR = {"local": {"digits", "smoke", "own-64"}}  # every other preset's training is for pool gpu


@pytest.fixture
def checkout(tmp_path):
    """A checkout with the deployments of this one, of images of its own."""
    for name in ("flows", "dit", "infra/work_pools", "presets"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copytree(REPOSITORY / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("prefect.yaml", "dvc.yaml"):
        shutil.copy(REPOSITORY / name, tmp_path)
    own_data(tmp_path, "birds", "/data/birds")
    return tmp_path


def own_data(root, name, source):
    text = (REPOSITORY / "params.yaml").read_text()
    (root / "params.yaml").write_text(
        text.replace("name: digits ", f"name: {name} ", 1).replace("source: digits ", f"source: {source} ", 1)
    )


def edit(root, change):
    plan = YAML().load(root / "prefect.yaml")
    change(plan["deployments"])
    YAML().dump(plan, root / "prefect.yaml")


def by_name(plan):
    return {f"{one['flow']}/{one['name']}": one for one in plan}


def test_every_preset_has_its_deployment_and_every_data_set_its_retraining():
    plan = by_name(deploy.plan(REPOSITORY))
    assert len(plan) == len(deploy.plan(REPOSITORY))
    for name in presets.names(REPOSITORY / "presets"):
        pool = {} if name in ACCELERATOR["local"] else {"pool": "gpu"}
        assert plan[f"train-dit/{name}"]["parameters"] == {"preset": name, **pool}
        assert plan[f"train-dit/{name}"]["work_pool"]["name"] == "local"
    hops = {f"on-{pool}" for pool in ("gpu", *pools.KUBERNETES_POOLS)}
    for hop in hops:
        one = plan[f"train-dit/{hop}"]
        assert (one["parameters"], one["work_pool"]["name"]) == ({}, hop.removeprefix("on-"))
    trained = {name.partition("/")[2] for name in plan if name.startswith("train-dit/")}
    assert trained == {*presets.names(REPOSITORY / "presets"), *hops, "any"}
    data = {
        presets.resolve(name, REPOSITORY / "presets")["data"]["name"] for name in presets.names(REPOSITORY / "presets")
    }
    assert {name for name in plan if name.startswith("retrain/")} == {f"retrain/{name}" for name in data}
    assert {"study/any", "study/sizes", "study/digits-sizes"} <= set(plan)
    for one in plan.values():
        assert one["description"] and one["tags"] == ["dit"] and one["pull"]
        for schedule in one.get("schedules") or []:
            assert schedule["active"] is False
        if one["flow"] == "retrain":
            [trigger] = one["triggers"]
            assert trigger["match"] == {"prefect.resource.id": f"dit.dataset.{one['name']}"}
            preset = one["parameters"].get("preset")
            assert not preset or presets.resolve(preset, REPOSITORY / "presets")["data"]["name"] == one["name"]
    assert str(REPOSITORY) not in (REPOSITORY / "prefect.yaml").read_text()


def test_the_flows_take_the_parameters_of_their_deployments():
    flows, refused = deploy._Flows(REPOSITORY), []
    for one in deploy.plan(REPOSITORY):
        try:
            flows.refuse(one)
        except ValueError as error:
            refused.append(str(error))
    assert refused == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parameters": {"presett": "xl2"}}, "train-dit/any: the flow takes no parameter presett"),
        ({"parameters": {"push": "perhaps"}}, "train-dit/any: .*push"),
        ({"entrypoint": "flows/train_dit.py:train_dot"}, "flows/train_dit.py:train_dot can't be loaded"),
        ({"entrypoint": "flows/nothing.py:train_dit"}, "flows/nothing.py:train_dit can't be loaded"),
        ({"entrypoint": ""}, "deployment any has no entrypoint"),
        ({"entrypoint": 5}, "deployment any: name and entrypoint must be texts"),
        ({"work_pool": "local"}, "deployment any: write its work_pool as {name: local}"),
        ({"schedules": [{"cron": "x y"}]}, "train-dit/any: .*cron"),
    ],
)
def test_a_deployment_that_its_flow_would_refuse_is_refused_before(checkout, change, message):
    edit(checkout, lambda deployments: deployments[0].update(change))
    with pytest.raises(ValueError, match=rf"^prefect.yaml: {message}") as told:
        flows = deploy._Flows(checkout)
        for one in deploy.plan(checkout):
            flows.refuse(one)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("text", ["deployments: 5", "deployments: [x]", "deployments: {any: {name: any}}"])
def test_deployments_of_another_form_are_a_line(tmp_path, text):
    (tmp_path / "prefect.yaml").write_text(text)
    with pytest.raises(ValueError, match="^prefect.yaml: deployments must be a list of sections"):
        deploy.plan(tmp_path)


def test_the_variants_of_the_studies_are_settings_that_exist(tmp_path):
    from dit import check
    from dit.paths import Paths

    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    shutil.copytree(REPOSITORY / "presets", tmp_path / "presets")
    params = tmp_path / "params.yaml"
    count = 0
    for one in deploy.plan(REPOSITORY):
        for overrides in (one["parameters"] or {}).get("variants", {}).values():
            shutil.copy(REPOSITORY / "params.yaml", params)
            presets.apply(one["parameters"]["preset"], params, tmp_path / "presets")
            presets.override(params, overrides)
            check.check(Paths(tmp_path), files=False)
            count += 1
    assert count == 16


def test_the_checkouts_own_data_set_is_retrained_every_night_as_params_says(checkout):
    own = by_name(deploy.plan(checkout))["retrain/birds"]
    assert own["parameters"] == {} and own["work_pool"]["name"] == "local"
    assert [schedule["active"] for schedule in own["schedules"]] == [True]
    assert own["triggers"][0]["match"] == {"prefect.resource.id": "dit.dataset.birds"}
    assert deploy.watched(deploy.plan(checkout)) == ["birds"]
    own_data(checkout, "imagenet256", "/data/imagenet/train")  # one that a preset has too: this checkout's counts
    own = [one for one in deploy.plan(checkout) if (one["flow"], one["name"]) == ("retrain", "imagenet256")]
    assert [one["parameters"] for one in own] == [{}] and own[0]["schedules"][0]["active"]
    own_data(checkout, "digits", "digits")  # the embedded ones never change
    assert not deploy.watched(deploy.plan(checkout))
    (checkout / "params.yaml").unlink()
    assert "retrain/birds" not in by_name(deploy.plan(checkout))


def test_without_a_server_there_is_a_line(checkout, monkeypatch):
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with temporary_settings({PREFECT_API_URL: None}), pytest.raises(ValueError, match="^there is no Prefect server: "):
        deploy.deploy_all(checkout)


@pytest.mark.slow
def test_twice_is_once_and_what_went_is_removed_and_prefects_own_command_makes_the_same(server, checkout):
    said = []
    put(checkout, deploy.plan(checkout), said.append, ours=True)
    assert any(line.startswith("left out     train-dit/on-kubernetes-gpu: ") for line in said)
    first = described()
    elsewhere = {f"train-dit/on-{pool}" for pool in pools.KUBERNETES_POOLS}
    expected = by_name(deploy.plan(checkout)).keys() - elsewhere
    assert first.keys() == expected
    assert first["retrain/birds"]["schedules"] == [("0 3 * * *", True, "nightly")]
    assert first["train-dit/any"]["form"] >= {"preset", "set", "source", "force", "pool"}
    with get_client(sync_client=True) as client:
        assert client.read_work_queue_by_name("studies", work_pool_name="local").concurrency_limit == 2
        pool = client.read_work_pool("local")
        assert pool.base_job_template["variables"]["properties"]["working_dir"]["default"] == str(checkout)

    put(checkout, deploy.plan(checkout), said.append, ours=True)
    assert described() == first

    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy"]
    environment = test_automations.environment(server, checkout)
    for name in ("train-dit/xl2", "retrain/imagenet256", "study/digits-sizes"):
        done = subprocess.run([*command, "-n", name], cwd=checkout, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    assert described() == first

    edit(checkout, lambda deployments: deployments.pop(1))
    own_data(checkout, "cats", "/data/cats")
    put(checkout, deploy.plan(checkout), said.append, ours=True, kubernetes=True)
    now = described()
    assert first.keys() - now.keys() == {"train-dit/digits", "retrain/birds"}
    assert now.keys() - first.keys() == {"retrain/cats", *elsewhere}
    assert "removed      retrain/birds: no longer in prefect.yaml" in said
    assert now["train-dit/on-kubernetes-cpu"]["variables"] == {"hosts": "2"}
    for pool in pools.KUBERNETES_POOLS:  # what a run that has prepared everything starts there
        told = {"branch": f"runs/xl2/{pool}", "force": ["train"], "anyway": True, "push": True}
        assert placement.start(f"train-dit/on-{pool}", told).work_pool_name == pool
    assert not [name for one in now.values() for name in one["triggers"] if "birds" in name]

    # On another's server nothing of others is touched.
    edit(checkout, lambda deployments: deployments.pop(1))
    moved = checkout.rename(checkout.with_name("moved"))
    said.clear()
    put(moved, deploy.plan(moved), said.append, ours=False)
    assert described() == now
    assert f"work pool    local works in {checkout}: left as it is" in said
    assert any(line.startswith("not ours     train-dit/smoke: ") for line in said)


def put(root, plan, say, *, ours, kubernetes=False):
    deploy.prepare(root, plan, say, ours=ours, kubernetes=kubernetes)
    deploy.deploy(root, plan, say, prune=ours)


def described():
    """What the server knows of our deployments."""
    with get_client(sync_client=True) as client:
        flows = {flow.id: flow.name for flow in client.read_flows()}
        return {
            f"{flows[one.flow_id]}/{one.name}": {
                "id": one.id,
                "parameters": one.parameters,
                "form": set(one.parameter_openapi_schema["properties"]),
                "entrypoint": one.entrypoint,
                "description": one.description,
                "tags": one.tags,
                "pull": one.pull_steps,
                "pool": (one.work_pool_name, one.work_queue_name),
                "schedules": [(each.schedule.cron, each.active, each.slug) for each in one.schedules],
                "triggers": {
                    each.name: each.trigger.match.root
                    for each in client.read_resource_related_automations(f"prefect.deployment.{one.id}")
                },
                "variables": one.job_variables,
                "enforced": one.enforce_parameter_schema,
            }
            for one in client.read_deployments(limit=200)
        }


def test_what_prefect_yaml_says_is_what_was_read():
    """Anchors and merges mean the same to our reader as to Prefect's."""
    import yaml

    theirs = yaml.safe_load((REPOSITORY / "prefect.yaml").read_text())["deployments"]
    assert read_params(REPOSITORY / "prefect.yaml")["deployments"] == theirs
