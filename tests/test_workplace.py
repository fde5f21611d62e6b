"""flows/workplace.py: what a run finds and what it leaves, in a toy checkout."""

import json
import threading

import pytest
import toy_pipeline
from test_worktrees import RUN, git, repro

from dit import locks
from flows import remotes, workplace, worktrees
from flows.workplace import Wanted

toy, toy_template = toy_pipeline.toy, toy_pipeline.toy_template
OTHER = "fedcba9876543210"


def opened(toy, run=RUN, wanted=None, said=None, **options):
    return workplace.opened(toy, run, wanted or Wanted("smoke"), (said if said is not None else []).append, **options)


def test_settings_are_committed_on_the_runs_branch_and_the_checkout_keeps_its_own(toy):
    before, said = (toy / "params.yaml").read_bytes(), []
    (toy / "train.py").write_text((toy / "train.py").read_text() + "# edited\n")
    with opened(toy, wanted=Wanted("smoke", ("train.max_steps=8",)), said=said) as place:
        assert (place.params["preset"], place.params["train"]) == ("smoke", {"max_steps": 8})
        assert (place.label, place.branch) == ("smoke-set", "runs/smoke-set/01234567")
        assert not git(place.root, "status", "--porcelain")
        assert "# a comment to keep" in (place.root / "params.yaml").read_text()
    assert said[0] == "not committed, so not in this run: train.py"
    assert (toy / "params.yaml").read_bytes() == before and not place.root.exists()
    assert "max_steps: 8" in git(toy, "show", "runs/smoke-set/01234567:params.yaml")


def test_the_same_settings_take_turns_and_others_do_not(toy):
    said, order, inside, leave = [], [], threading.Event(), threading.Event()

    def first():
        with opened(toy):
            inside.set()
            leave.wait(200)
            order.append("first")

    other = threading.Thread(target=first)
    other.start()
    assert inside.wait(200)
    with opened(toy, OTHER, Wanted("digits")):
        pass  # at once

    def say(line):
        said.append(line)
        if line.startswith("waiting"):
            leave.set()

    with workplace.opened(toy, OTHER, Wanted("smoke"), say):
        order.append("second")
    other.join()
    assert order == ["first", "second"]
    assert [line for line in said if line.startswith("waiting for train-dit run smoke-01234567 (process")]


def test_what_was_kept_comes_back_and_a_success_is_remembered(toy):
    with opened(toy) as place:
        repro(place.root)
        place.keep("finished")
        place.succeeded()
    assert worktrees.last_success(toy, "data", "smoke") == git(toy, "rev-parse", place.branch).strip()
    with opened(toy, OTHER) as place:
        assert "Running stage" not in repro(place.root)


def test_a_branch_is_gone_on_with(toy):
    with opened(toy) as place:
        repro(place.root, "scan")
        place.keep("prepared")
    with opened(toy, OTHER, Wanted(), branch="runs/smoke/01234567") as place:
        assert place.branch == "runs/smoke/01234567" and place.params["preset"] == "smoke" and place.continued
        assert (place.root / "dvc.lock").exists()
        place.keep("finished")


def test_an_error_leaves_no_worktree_and_a_signal_leaves_it_for_the_next_attempt(toy):
    with pytest.raises(ValueError, match="mine"), opened(toy) as place:
        raise ValueError("mine")
    assert not place.root.exists()
    with pytest.raises(KeyboardInterrupt), opened(toy) as place:
        (place.root / "scratch" / "half").write_text("work")
        raise KeyboardInterrupt
    with opened(toy) as place:
        assert (place.root / "scratch" / "half").exists()


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (Wanted("nosuch"), "preset 'nosuch' does not exist: choose one of digits, smoke, xl2"),
        (Wanted(set=("train.max_step=1",)), "train.max_step"),
        (Wanted(set=("train=1",)), "train"),
    ],
)
def test_what_is_wrong_is_one_line_and_leaves_nothing(toy, wanted, message):
    with pytest.raises(ValueError, match=message) as error, opened(toy, wanted=wanted):
        raise AssertionError("it should not have begun")
    assert "\n" not in str(error.value)
    assert not list((toy / "scratch" / "worktrees").glob("*"))
    assert locks.free(toy / "scratch" / "lock" / worktrees.lock_name("digits-01234567"))


def test_the_dvc_remote_gets_what_is_kept_and_gives_it_to_another_machine(toy, tmp_path):
    assert remotes.default(toy) is None
    worktrees.dvc(toy, "remote", "add", "-d", "store", str(tmp_path / "store"))
    git(toy, "commit", "-qam", "remote")
    bare = tmp_path / "bare.git"
    git(tmp_path, "clone", "-q", "--bare", str(toy), str(bare))
    git(toy, "remote", "add", "origin", str(bare))
    worktrees.dvc(toy, "push", "ready.dvc")
    with opened(toy) as place:
        assert place.remote == "store"
        repro(place.root, "train")
        place.keep("prepared")
        assert place.unpushed == ""
    remotes.push_branch(toy, place.branch)
    # Another machine: it has a clone, and no cache.
    git(tmp_path, "clone", "-q", str(bare), "elsewhere")
    with opened(tmp_path / "elsewhere", OTHER, Wanted(), branch=place.branch) as there:
        printed = repro(there.root, "--pull")
        assert "Running stage 'train'" not in printed and "Running stage 'report'" in printed
        there.keep("finished")
        there.succeeded()
    remotes.fetch_branch(toy, place.branch)
    remotes.fetch_history(toy)
    assert (
        worktrees.last_success(toy, "data", "smoke") == git(tmp_path / "elsewhere", "rev-parse", there.branch).strip()
    )
    worktrees.adopt(toy, "01234567")
    assert (toy / "page").read_text() == "listing\nweights"


def test_a_push_that_fails_is_told_and_loses_nothing(toy, tmp_path):
    (tmp_path / "file").write_text("no folder")
    worktrees.dvc(toy, "remote", "add", "-d", "store", str(tmp_path / "file" / "store"))
    git(toy, "commit", "-qam", "remote")
    said = []
    with opened(toy, said=said) as place:
        repro(place.root)
        place.keep("finished")
    assert place.unpushed and said[-1].startswith("the results could not be pushed to the DVC remote store: ")
    assert worktrees.lock_at(toy, place.branch)["stages"].keys() == {"scan", "train", "report"}


def test_the_history_is_the_last_success_and_else_the_checkouts_own(toy):
    listing = toy / worktrees.LISTING
    listing.parent.mkdir(parents=True)
    listing.write_text(json.dumps("mine"))
    with opened(toy) as place:
        assert json.loads((place.root / worktrees.LISTING).read_text()) == "mine"
    dvc_yaml = (toy / "dvc.yaml").read_text()
    scan = f"cmd: mkdir -p artifacts/scan; echo new > {worktrees.LISTING}; echo listing > listing"
    dvc_yaml = dvc_yaml.replace("cmd: echo scanning; echo listing > listing", scan)
    (toy / "dvc.yaml").write_text(dvc_yaml.replace("outs: [listing]", f"outs: [listing, {worktrees.LISTING}]"))
    listing.unlink()
    (toy / ".gitignore").write_text((toy / ".gitignore").read_text() + "/artifacts\n")
    git(toy, "commit", "-qam", "scan writes a listing")
    with opened(toy, "1111111111") as place:
        assert not (place.root / worktrees.LISTING).exists()
        repro(place.root)
        place.keep("finished")
        place.succeeded()
    with opened(toy, OTHER) as place:
        assert (place.root / worktrees.LISTING).read_text() == "new\n"


def test_a_trial_with_settings_of_its_own_is_no_success_of_the_preset(toy):
    with opened(toy, wanted=Wanted("smoke", ("train.max_steps=8",))) as place:
        repro(place.root, "scan")
        place.keep("finished")
        place.succeeded()
    assert worktrees.last_success(toy, "data", "smoke") is None and worktrees.last_success(toy, "data") is not None
