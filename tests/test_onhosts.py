"""flows/onhosts.py: DVC itself, whose stages run on a Kubernetes of one machine."""

import subprocess
import sys

import pytest

pytest.importorskip("kubernetes_asyncio", reason="needs prefect-kubernetes: pip install 'dit-pipeline[kubernetes]'")
pytest.importorskip("kubernetes_validate", reason="needs kubernetes-validate, of the dev extra")

import test_hosts  # noqa: E402

from flows import dag, onhosts  # noqa: E402

root, toy = test_hosts.root, test_hosts.toy

DVC_YAML = """\
stages:
  scan:
    cmd: echo from here > listing
    outs: [listing]
  sample:
    cmd: python -m dit.stages.sample
    deps: [listing]
    outs: [scratch/pid-1]
"""


@pytest.fixture
def checkout(root):
    (root / "dvc.yaml").write_text(DVC_YAML)
    (root / "infra" / "kubernetes").mkdir(parents=True)
    said = f"{{image: 'dit:1', mount: {root.parent}, namespace: runs, save_seconds: 5, secrets: []}}"
    (root / "infra" / "kubernetes" / "hosts.yaml").write_text(said)
    for command in (["git", "init", "-q"], [sys.executable, "-m", "dvc", "init", "-q"]):
        subprocess.run(command, cwd=root, check=True)
    return root


def go(checkout, stage, lines):
    environment = {"DIT_FLOW_RUN_ID": test_hosts.RUN, "DIT_HOSTS": "2", **onhosts.shell({"DIT_HOSTS": "2"})}
    return dag.run_stage(stage, checkout, lines.append, environment=environment)


def test_dvc_runs_a_stage_on_two_hosts_and_records_it_and_other_commands_run_here(toy, checkout):
    lines = []
    assert go(checkout, "scan", lines).status == "ran" and not toy.made
    assert go(checkout, "sample", lines).status == "ran", lines
    [job, _] = toy.made
    names = {one["name"] for one in job["spec"]["template"]["spec"]["containers"][0]["env"]}
    assert job["spec"]["completions"] == 2 and "DIT_FLOW_RUN_ID" in names and not names & {"DVC_STAGE", "DIT_HOSTS"}
    assert go(checkout, "sample", lines).status == "cached"
    assert test_hosts.alone(toy, checkout)


def test_what_a_stage_says_of_its_end_is_the_walkers_to_act_on(toy, checkout):
    lines = []
    go(checkout, "scan", lines)
    test_hosts.todo(checkout, exit=["refused", 2, "sample.num_images: too many"])
    result = go(checkout, "sample", lines)
    assert result.status == "failed" and result.message.startswith("sample.num_images: too many")
    test_hosts.todo(checkout, exit=[None, 137], rank="0")
    assert go(checkout, "sample", lines).status == "lost"


def test_without_hosts_dvc_keeps_its_shell():
    assert onhosts.shell({}) == onhosts.shell({"DIT_HOSTS": "0"}) == {}
