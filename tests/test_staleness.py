"""What is stale, as a real DVC tells it."""

import shutil
import subprocess
import sys

import pytest
from checkout import environment

from dit.staleness import restore, stale_stages

PLAN = """
stages:
  look:
    cmd: sort source.txt > seen.txt
    always_changed: true
    outs: [seen.txt: {persist: true}]
  double:
    cmd: mkdir two && cat seen.txt seen.txt > two/out.txt
    deps: [seen.txt]
    params: [times]
    outs: [two]
  end:
    cmd: wc -l < two/out.txt > end.txt
    deps: [two/out.txt]
    outs: [end.txt]
  apart:
    cmd: cp other.txt apart.txt
    deps: [other.txt]
    outs: [apart.txt]
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    for name, text in {"dvc.yaml": PLAN, "params.yaml": "times: 2\n", "source.txt": "b\na\n", "other.txt": "o"}.items():
        (folder / name).write_text(text)
    subprocess.run(["git", "init", "-q", folder], check=True)
    dvc(folder, "init", "-q")
    dvc(folder, "repro", "-q")
    return folder


@pytest.fixture
def project(made, tmp_path):
    return shutil.copytree(made, tmp_path / "project")


def dvc(folder, *words):
    command = [sys.executable, "-m", "dvc", *words]
    subprocess.run(command, cwd=folder, env=environment(), check=True, capture_output=True)


def test_what_is_stale_and_what_follows_it(project):
    assert stale_stages(project) == ["look"]
    (project / "params.yaml").write_text("times: 3\n")
    assert stale_stages(project) == ["look", "double", "end"]  # `end` has changed in nothing of its own yet
    shutil.rmtree(project / "two")  # as in a new worktree
    for name in ("seen.txt", "end.txt", "apart.txt"):
        (project / name).unlink()
    assert stale_stages(project) == ["look", "double", "end"]
    (project / "params.yaml").write_text("times: 2\n")
    assert stale_stages(project) == ["look"]
    (project / "dvc.lock").unlink()
    assert stale_stages(project) == ["look", "double", "end", "apart"]


def test_what_the_cache_knows_is_restored_and_nothing_runs(project):
    (project / "dvc.lock").unlink()
    (project / "end.txt").unlink()
    (project / "other.txt").write_text("another")
    restore(project)
    assert stale_stages(project) == ["look", "apart"]
    assert (project / "end.txt").read_text().strip() == "4" and (project / "seen.txt").read_text() == "a\nb\n"
    assert not (project / "apart.txt").exists()


def test_nobody_knows_without_a_plan_or_a_repository(tmp_path):
    assert stale_stages(tmp_path) is None
    (tmp_path / "dvc.yaml").write_text(PLAN)
    assert stale_stages(tmp_path) is None  # in no repository
    (tmp_path / "dvc.yaml").write_text("stages: 3\n")
    assert stale_stages(tmp_path) is None
