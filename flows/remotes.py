"""The DVC remote and the git remote of a run: where its results go, and where another machine finds them.

Neither is needed on one machine. Where a DVC remote is configured (`dvc remote add -d`), every run pulls what the run-cache there knows,
and pushes what it made. A git remote carries branches and refs/dit/last between machines.
"""

import configparser
import subprocess
from pathlib import Path

from flows import worktrees


def default(root: Path) -> str | None:
    """The name of the default DVC remote, None where there is none."""
    for name in ("config.local", "config"):
        config = configparser.RawConfigParser(strict=False)
        try:
            config.read_string((root / ".dvc" / name).read_text())
        except (OSError, configparser.Error):
            continue
        if told := config.get("core", "remote", fallback="").strip().strip("'\""):
            return told
    return None


def committed(root: Path) -> bool:
    """Whether the commit of a worktree names a default DVC remote: that much other machines can see."""
    config = configparser.RawConfigParser(strict=False)
    config.read_string(worktrees.git(root, "show", "HEAD:.dvc/config"))
    return bool(config.get("core", "remote", fallback=""))


def push(root: Path) -> str:
    """Push what dvc.lock names, and the run-cache; returns why not, or an empty text."""
    return _reason(worktrees.dvc(root, "push", "--run-cache"))


def git_remote(home: Path) -> str | None:
    """`origin`, or the only remote that git knows; None where there is none."""
    names = worktrees.git(home, "remote").split()
    return "origin" if "origin" in names else names[0] if len(names) == 1 else None


def fetch_branch(home: Path, branch: str) -> None:
    """Have a branch that another machine pushed. Raises ValueError where it is not to be had."""
    if (remote := git_remote(home)) is not None:
        tree = worktrees.describe(home, *reversed(branch.split("/")[1:])).root
        if not tree.exists():  # git refuses to move a branch that is checked out
            worktrees.git(home, "fetch", "-q", remote, f"+refs/heads/{branch}:refs/heads/{branch}")


def push_branch(home: Path, branch: str) -> None:
    """Give a branch, and what is known of successes, to other machines. Raises ValueError where that fails."""
    if (remote := git_remote(home)) is None:
        raise ValueError("git has no remote, through which another machine finds this run: git remote add origin URL")
    worktrees.git(home, "push", "-q", "--force", remote, f"refs/heads/{branch}:refs/heads/{branch}")
    if worktrees.git(home, "for-each-ref", "refs/dit/last/"):
        worktrees.git(home, "push", "-q", "--force", remote, "refs/dit/last/*:refs/dit/last/*")


def give_back(home: Path, branch: str) -> None:
    """Push a branch where it came from, if that was a git remote and not this very checkout. Raises ValueError."""
    remote = git_remote(home)
    if remote is not None and worktrees.git(home, "ls-remote", remote, f"refs/heads/{branch}"):
        push_branch(home, branch)


def fetch_history(home: Path) -> None:
    """Have what other machines know of successes, where they share a DVC remote with this one and git answers."""
    if default(home) is None:
        return
    try:
        if (remote := git_remote(home)) is not None:
            worktrees.git(home, "fetch", "-q", remote, "+refs/dit/last/*:refs/dit/elsewhere/*")
    except ValueError:
        pass  # no network: what is known here counts


def _reason(done: "subprocess.CompletedProcess[str]") -> str:
    if done.returncode == 0:
        return ""
    lines = (done.stderr or done.stdout).strip().splitlines()
    return next(
        (line for line in reversed(lines) if line.startswith("ERROR")), lines[-1] if lines else "no reason given"
    )
