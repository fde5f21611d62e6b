"""Where a result comes from."""

import subprocess

import pytest

from dit.paths import Paths
from dit.provenance import flatten, inputs, provenance, settings


def test_settings_become_dotted_names_and_long_values_are_cut():
    told = flatten({"preset": "digits", "train": {"lr": 1e-3, "betas": [0.9, 0.99], "note": "x" * 9000, "step": None}})
    assert told["train.lr"] == "0.001" and told["train.betas"] == "[0.9, 0.99]" and told["preset"] == "digits"
    assert told["train.step"] == "null" and len(told["train.note"]) == 500


@pytest.fixture
def checkout(tmp_path):
    def git(*arguments):
        subprocess.run(["git", "-C", str(tmp_path), *arguments], check=True, capture_output=True)

    (tmp_path / "params.yaml").write_text("preset: digits\ntrain: {lr: 1e-3}\n")
    (tmp_path / "dvc.yaml").write_text("stages:\n  train:\n    deps: [artifacts/encode, dit/model.py]\n")
    lock = "stages:\n  encode:\n    outs: [{path: artifacts/encode, md5: abc.dir}]\n"
    (tmp_path / "dvc.lock").write_text(lock + "  train:\n    deps: [{path: artifacts/encode, md5: old.dir}]\n")
    git("init", "-q")
    git("add", "-A")
    git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "begin")
    return tmp_path


def test_commit_preset_and_inputs(checkout):
    told = provenance(Paths(checkout))
    assert told["preset"] == "digits" and len(told["git.commit"]) == 40 and told["git.dirty"] == "false"
    # the hash of the stage that made it, not the one that train saw the last time
    assert told["dvc.artifacts/encode"] == "abc.dir" and inputs(checkout, "train") == {"artifacts/encode": "abc.dir"}


def test_a_change_makes_it_dirty_but_for_what_dvc_writes_itself(checkout):
    (checkout / "dvc.lock").write_text("stages: {}\n")
    assert provenance(Paths(checkout))["git.dirty"] == "false"
    (checkout / "params.yaml").write_text("preset: other\n")
    assert provenance(Paths(checkout)) == provenance(Paths(checkout)) | {"git.dirty": "true", "preset": "other"}


def test_what_is_not_known_is_left_out(tmp_path):
    assert provenance(Paths(tmp_path)) == {"preset": ""} and settings(Paths(tmp_path)) == {}


def test_in_a_runs_worktree_the_commit_is_the_branchs_own_and_holds_its_settings(checkout):
    def git(folder, *arguments):
        told = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
        return subprocess.run(told, check=True, capture_output=True, text=True).stdout.strip()

    (checkout / ".gitignore").write_text("/scratch\n")
    tree = checkout / "scratch" / "worktrees" / "digits-1"
    git(checkout, "worktree", "add", "-q", "-b", "runs/digits/1", str(tree))
    (tree / "scratch").mkdir()
    (tree / "scratch" / "home").write_text(f"{checkout}\n")
    (tree / "params.yaml").write_text("preset: digits\ntrain: {lr: 2e-3}\n")
    assert provenance(Paths(tree))["git.dirty"] == "true"
    git(tree, "commit", "-qam", "settings")
    (tree / "dvc.lock").write_text("stages: {}\n")  # as DVC does while the run goes on
    (checkout / "params.yaml").write_text("preset: being edited\n")
    told = provenance(Paths(tree))
    assert told["git.commit"] == git(checkout, "rev-parse", "runs/digits/1") != git(checkout, "rev-parse", "HEAD")
    assert told["git.dirty"] == "false" and told["preset"] == "digits"
    assert "lr: 2e-3" in git(checkout, "show", f"{told['git.commit']}:params.yaml")
    assert provenance(Paths(checkout))["git.dirty"] == "true"
