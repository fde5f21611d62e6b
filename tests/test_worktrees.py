"""flows/worktrees.py: real git, real DVC, a toy checkout."""

import os
import subprocess
import sys
import time

import pytest
import toy_pipeline

from dit import locks
from flows import remotes, worktrees

toy, toy_template = toy_pipeline.toy, toy_pipeline.toy_template
RUN = "0123456789abcdef"


def git(root, *words):
    said = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org", *words]
    return subprocess.run(said, cwd=root, check=True, capture_output=True, text=True).stdout


def repro(root, *words):
    done = worktrees.dvc(root, "repro", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def tree(toy):
    tree = worktrees.describe(toy, RUN, "digits")
    worktrees.open_worktree(tree)
    return tree


def test_a_run_gets_what_is_committed_on_a_branch_of_its_own(toy):
    (toy / "train.py").write_text("raise SystemExit('not committed')")
    (toy / "new file").write_text("x")
    tree = worktrees.describe(toy, RUN, "digits")
    worktrees.open_worktree(tree)
    assert tree.root == toy / "scratch" / "worktrees" / "digits-01234567"
    assert git(tree.root, "branch", "--show-current").strip() == tree.branch == "runs/digits/01234567"
    assert "not committed" not in (tree.root / "train.py").read_text()
    assert worktrees.uncommitted(toy) == ["train.py", "new file"]
    assert (tree.root / "scratch" / "home").read_text() == f"{toy}\n"


def test_what_one_worktree_made_another_takes_from_the_shared_cache(toy, tree):
    assert "Running stage 'train'" in repro(tree.root)
    worktrees.commit(tree, "done")
    worktrees.close(tree)
    assert not tree.root.exists() and "worktrees" not in git(toy, "worktree", "list")
    other = worktrees.describe(toy, "fedcba9876543210", "digits")
    worktrees.open_worktree(other)
    again = repro(other.root)
    assert "Running stage" not in again and (other.root / "model").read_text() == "weights"
    assert "Running stage" not in repro(toy)


def test_an_earlier_attempt_is_gone_on_with_and_a_half_made_one_is_made_anew(toy, tree):
    (tree.root / "scratch" / "half").write_text("work")
    index_lock = toy / ".git" / "worktrees" / tree.root.name / "index.lock"
    index_lock.touch()  # of a git that was killed
    worktrees.open_worktree(tree)
    assert not index_lock.exists()
    assert (tree.root / "scratch" / "half").exists()
    (tree.root / ".git").unlink()  # its maker was killed
    worktrees.open_worktree(tree)
    assert not (tree.root / "scratch" / "half").exists() and (tree.root / "dvc.yaml").exists()
    # Closed and come back: the branch is where it was.
    (tree.root / "params.yaml").write_text("preset: mine\n")
    commit = worktrees.commit(tree, "settings")
    worktrees.close(tree)
    worktrees.open_worktree(tree)
    assert (tree.root / "params.yaml").read_text() == "preset: mine\n"
    assert git(tree.root, "rev-parse", "HEAD").strip() == commit


def test_commit_takes_settings_and_results_and_is_nothing_where_nothing_changed(toy, tree):
    before = git(tree.root, "rev-parse", "HEAD").strip()
    assert worktrees.commit(tree, "nothing") == before
    (tree.root / "params.yaml").write_text("preset: mine\n")
    (tree.root / "dvc.lock").write_text("schema: '2.0'\nstages: {}\n")
    (tree.root / "left lying about").write_text("x")
    after = worktrees.commit(tree, "settings and results")
    assert git(toy, "show", "--name-only", "--format=", after).split("\n")[:-1] == ["dvc.lock", "params.yaml"]


def test_a_commit_that_does_not_exist_is_one_line(toy):
    with pytest.raises(ValueError, match="git knows no commit nosuch here") as error:
        worktrees.open_worktree(worktrees.describe(toy, RUN, "digits"), "nosuch")
    assert "\n" not in str(error.value)


def test_without_a_repository_the_line_says_to_make_one(tmp_path):
    with pytest.raises(ValueError, match=": git init && git add -A && git commit$"):
        worktrees.open_worktree(worktrees.describe(tmp_path, RUN, "digits"))


def test_a_remote_that_is_not_committed_is_a_worktrees_too(toy, tree):
    for words in (["remote", "add", "-d", "far", "s3://bucket/prefix"], ["remote", "modify", "far", "region", "eu"]):
        assert worktrees.dvc(toy, *words).returncode == 0
    worktrees.open_worktree(tree)
    assert remotes.default(tree.root) == "far"
    assert worktrees.dvc(tree.root, "config", "remote.far.url").stdout == "s3://bucket/prefix\n"
    assert worktrees.dvc(tree.root, "config", "remote.far.region").stdout == "eu\n"


def test_a_relative_remote_and_a_cache_elsewhere_are_the_same_place_in_a_worktree(toy, tmp_path):
    for words in (["remote", "add", "-d", "store", "store"], ["cache", "dir", "--local", str(tmp_path / "cache")]):
        assert worktrees.dvc(toy, *words).returncode == 0  # DVC writes ../store, seen from .dvc
    (toy / ".dvc" / "cache").rename(tmp_path / "cache")
    git(toy, "commit", "-qam", "remote")
    tree = worktrees.describe(toy, RUN, "digits")
    worktrees.open_worktree(tree)
    repro(tree.root)
    assert worktrees.dvc(tree.root, "push", "--run-cache").returncode == 0
    assert (toy / "store" / "files").is_dir() and (tmp_path / "cache" / "files").is_dir()
    assert not (tree.root / "store").exists() and not (tree.root / ".dvc" / "cache").exists()


def test_the_last_success_is_a_labels_or_the_newest_of_a_dataset(toy, tree):
    assert worktrees.last_success(toy, "digits") is None
    worktrees.mark_success(tree, "digits", "smoke")
    (tree.root / "params.yaml").write_text("preset: later\n")
    environment = {**os.environ, "GIT_COMMITTER_DATE": f"{int(time.time()) + 60} +0000"}
    said = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "-qam", "later"]
    subprocess.run(said, cwd=tree.root, check=True, env=environment)
    worktrees.mark_success(tree, "digits", "digits")
    later = git(tree.root, "rev-parse", "HEAD").strip()
    assert worktrees.last_success(toy, "digits") == later == worktrees.last_success(toy, "digits", "digits")
    assert worktrees.last_success(toy, "digits", "smoke") == git(toy, "rev-parse", "HEAD").strip()
    assert worktrees.last_success(toy, "digit") is None


def test_adopt_brings_settings_and_results_and_keeps_what_was_there(toy, tree):
    (tree.root / "params.yaml").write_text("preset: other\ntrain:\n  max_steps: 7\n")
    repro(tree.root)
    worktrees.commit(tree, "done")
    worktrees.close(tree)
    (toy / "params.yaml").write_text("preset: digits\ntrain:\n  max_steps: 4  # mine, not committed\n")
    (toy / "dvc.lock").write_text("stages: {}  # mine too\n")
    said = worktrees.adopt(toy, RUN[:5])
    assert "max_steps: 7" in (toy / "params.yaml").read_text() and (toy / "model").read_text() == "weights"
    [kept] = (toy / "scratch").glob("params.before-runs-digits-01234567.*.yaml")
    assert "mine, not committed" in kept.read_text() and kept.name in said[0]
    [lock] = (toy / "scratch").glob("dvc.before-runs-digits-01234567.*.lock")
    assert "mine too" in lock.read_text() and "runs/digits/01234567" in said[2] and len(said) == 3
    assert len(worktrees.adopt(toy, RUN[:5])) == 1  # nothing is there to be kept
    assert "Running stage" not in repro(toy)


@pytest.mark.parametrize("run", ["nosuch", "", "runs/digits/00000000"])
def test_adopt_of_no_run_says_which_there_are(toy, tree, run):
    repro(tree.root, "scan")
    worktrees.commit(tree, "done")
    with pytest.raises(ValueError, match="there is no run .*the newest: runs/digits/01234567"):
        worktrees.adopt(toy, run)


def test_adopt_of_a_run_without_results_touches_nothing(toy, tree):
    with pytest.raises(ValueError, match="no result yet"):
        worktrees.adopt(toy, tree.branch)
    assert not git(toy, "status", "--porcelain")


def test_adopt_is_a_command(toy, tree):
    done = subprocess.run(
        [sys.executable, "-m", "dit.cli", "adopt", "nosuch"],
        cwd=toy,
        env={**os.environ, "PYTHONPATH": str(toy_pipeline.REPOSITORY)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and "there is no run 'nosuch'" in done.stderr


def test_only_abandoned_worktrees_are_swept(toy, tree):
    lock = toy / "scratch" / "lock"
    old = time.time() - worktrees.ABANDONED_SECONDS - 60
    assert worktrees.sweep(toy) == []  # young
    with locks.held(lock / worktrees.lock_name(tree.root.name), print, "me"):
        os.utime(lock / worktrees.lock_name(tree.root.name), (old, old))
        os.utime(tree.root / "scratch", (old, old))
        os.utime(tree.root, (old, old))
        assert worktrees.sweep(toy) == []  # at work
    os.utime(lock / worktrees.lock_name(tree.root.name), (old, old))
    assert worktrees.sweep(toy) == ["digits-01234567"] and not tree.root.exists()
    assert git(toy, "branch", "--list", tree.branch)
