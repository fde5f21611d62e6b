"""A git worktree for each flow run: a checkout of its own, in which it disturbs nobody and is disturbed by nobody.

    HOME/scratch/worktrees/<label>-<id>    on the branch runs/<label>/<id>

It shares with HOME what makes a second run cheap: DVC's cache, the tracking database, and what scratch/ remembers (see
`dit.paths`). What a run made is found again by git alone: its branch holds params.yaml and dvc.lock, and
refs/dit/last/<dataset>/<label> the last run that succeeded. Knows nothing of Prefect.
"""

import configparser
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from ruamel.yaml import YAML

from dit import locks
from dit.config import read_params
from dit.paths import write_atomic
from dit.reuse import cache_folder
from flows.dag import dvc_environment

LISTING = "artifacts/scan/listing.json"
ABANDONED_SECONDS = 86400.0  # a worktree that no process holds is a killed run's, who may come back; then it goes
_OURS = ("params.yaml", "dvc.lock")
_OF_ANOTHER_CHECKOUT = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")  # git sets them for its hooks


@dataclass(frozen=True)
class Worktree:
    """A run's checkout: its folder, the checkout it came of, its branch, and the two parts of its name."""

    root: Path
    home: Path
    branch: str
    label: str
    id: str


def describe(home: Path, run_id: str, label: str) -> Worktree:
    """Where the worktree of a run is, or would be."""
    short = run_id[:8]
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", label).strip("-.") or "run"
    home = home.resolve()
    return Worktree(home / "scratch" / "worktrees" / f"{name}-{short}", home, f"runs/{name}/{short}", name, short)


def open_worktree(tree: Worktree, start: str = "HEAD") -> None:
    """Make the worktree at the commit `start`, or go on with what an earlier attempt of this run has left.

    Raises ValueError where there is no such commit.
    """
    if _git(tree.home, "rev-parse", "-q", "--verify", f"{start}^{{commit}}", check=False) is None:
        begin = "" if _git(tree.home, "rev-parse", "--git-dir", check=False) else "git init && "
        raise ValueError(
            f"git knows no commit {start} here, and a run works on what is committed: {begin}git add -A && git commit"
        )
    if not _is_worktree(tree.root):
        shutil.rmtree(tree.root, ignore_errors=True)  # half made: its maker was killed
        _git(tree.home, "worktree", "prune")
        known = _git(tree.home, "rev-parse", "-q", "--verify", f"refs/heads/{tree.branch}", check=False)
        where = [str(tree.root), tree.branch] if known else ["-b", tree.branch, str(tree.root), start]
        _git(tree.home, "worktree", "add", "-q", *where)
    # Left by a git that was killed; whoever opens a worktree holds its lock, so no other git is at work in it.
    (Path(str(_git(tree.root, "rev-parse", "--absolute-git-dir"))) / "index.lock").unlink(missing_ok=True)
    (tree.root / "scratch").mkdir(exist_ok=True)
    write_atomic(tree.root / "scratch" / "home", f"{tree.home}\n".encode())
    _share_cache(tree)
    _check_out_inputs(tree.root)


def commit(tree: Worktree, message: str) -> str:
    """Put params.yaml, dvc.lock and what else git follows on the run's branch; returns the commit."""
    there = [name for name in _OURS if (tree.root / name).exists()]
    _git(tree.root, "add", "--force", "--", *there)
    _git(tree.root, "add", "-u")
    if _git(tree.root, "diff", "--cached", "--quiet", check=False) is None:
        _git(tree.root, *_identity(tree.root), "commit", "-q", "--no-verify", "-m", message)
    return str(_git(tree.root, "rev-parse", "HEAD"))


def close(tree: Worktree) -> None:
    """Remove the folder; the branch stays."""
    if _git(tree.home, "worktree", "remove", "--force", str(tree.root), check=False) is None:
        shutil.rmtree(tree.root, ignore_errors=True)
        _git(tree.home, "worktree", "prune")


def sweep(home: Path) -> list[str]:
    """Remove worktrees that were left by runs which were killed and did not come back; returns their names."""
    swept = []
    for folder in sorted((home / "scratch" / "worktrees").glob("*")):
        lock = home / "scratch" / "lock" / lock_name(folder.name)
        signs = (folder, folder / "scratch", lock)  # while a stage works, it writes its progress into scratch/
        last = max((file.stat().st_mtime for file in signs if file.exists()), default=0)
        if time.time() - last > ABANDONED_SECONDS and locks.free(lock):
            close(Worktree(folder, home, "", "", ""))
            swept.append(folder.name)
    return swept


def lock_name(name: str) -> str:
    """The lock in scratch/lock that a run holds while its worktree is in use."""
    return f"worktree-{name}"


def uncommitted(home: Path) -> list[str]:
    """The files of a checkout whose changes no run sees. dvc.lock is not told: it holds results."""
    told = _git(home, "status", "--porcelain", "-z", check=False) or ""
    names, items = [], iter(told.split("\0"))
    for item in items:
        if item[:2].startswith("R"):
            next(items, None)  # the name that it had
        names += [item[3:]] if item else []
    return [name for name in names if name != "dvc.lock"]


def last_success(home: Path, dataset: str, label: str | None = None) -> str | None:
    """The commit of the last run on a dataset that succeeded: of one label's runs, or of any."""
    where = [f"refs/dit/{known}/{dataset}/" + (label or "") for known in ("last", "elsewhere")]
    newest = ["--sort=-committerdate", "--count=1", "--format=%(objectname)"]
    return _git(home, "for-each-ref", *newest, *where, check=False) or None


def mark_success(tree: Worktree, dataset: str, label: str) -> None:
    """Remember the worktree's commit as the last success of a label on a dataset."""
    _git(tree.root, "update-ref", f"refs/dit/last/{dataset}/{label}", "HEAD")


def is_success(home: Path, branch: str) -> bool:
    """Whether a branch is at the last success of some label."""
    return bool(_git(home, "for-each-ref", "--points-at", branch, "refs/dit/last/", check=False))


def lock_at(home: Path, commit: str) -> dict:
    """dvc.lock as a commit has it; empty where it has none."""
    told = _git(home, "show", f"{commit}:dvc.lock", check=False)
    return (YAML(typ="safe", pure=True).load(told) or {}) if told else {}


def bring_listing(tree: Worktree, commit: str | None) -> bool:
    """Put the listing that a commit's dvc.lock records where `scan` looks for its own last one; whether it was there.

    Out of DVC's cache, else from its remote. Without a commit: the one that lies in HOME.
    """
    target = tree.root / LISTING
    if commit is None:
        if (tree.home / LISTING).is_file():
            write_atomic(target, (tree.home / LISTING).read_bytes())
            return True
        return False
    outs = lock_at(tree.home, commit).get("stages", {}).get("scan", {}).get("outs", [])
    for md5 in (out.get("md5", "") for out in outs if out.get("path") == LISTING):
        kept = cache_folder(tree.root) / md5[:2] / md5[2:]
        if kept.is_file():
            write_atomic(target, kept.read_bytes())
            return True
        target.parent.mkdir(parents=True, exist_ok=True)
        got = dvc(tree.root, "get", str(tree.home), LISTING, "--rev", commit, "--force", "-o", LISTING)
        return got.returncode == 0
    return False


def adopt(home: Path, run: str) -> list[str]:
    """Bring a run's params.yaml, dvc.lock and artifacts into the checkout; returns lines for a person.

    `run`: its id or the beginning of it, or its branch. Raises ValueError where there is no such run or no result.
    """
    branch = _branch_of(home, run)
    if not lock_at(home, branch):
        raise ValueError(f"the run of branch {branch} has no result yet: no stage of it was finished")
    said = [line for name in _OURS if (line := _keep_copy(home, name, branch))]
    theirs = [name for name in _OURS if _git(home, "cat-file", "-e", f"{branch}:{name}", check=False) is not None]
    _git(home, "checkout", branch, "--", *theirs)
    done = dvc(home, "checkout")
    if done.returncode != 0:  # made on another machine
        done = dvc(home, "pull", "--run-cache")
    if done.returncode != 0:
        reason = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["no reason given"]
        raise ValueError(
            f"{' and '.join(theirs)} are those of {branch}, but not all artifacts are to be had: {reason[0]}"
        )
    said.append(f"{', '.join(theirs)} and artifacts/ are those of {branch}; keep them: git commit -m 'adopt {branch}'")
    if _git(home, "diff", "--quiet", branch, "--", "dit", "dvc.yaml", check=False) is None:
        said.append("the code here is not the run's: `dvc status` shows what it would make anew")
    return said


def _keep_copy(home: Path, name: str, branch: str) -> str:
    """Copy a file that is in no commit to scratch/ before a branch's takes its place; returns what to say of it."""
    file = home / name
    known = [_git(home, "rev-parse", "-q", "--verify", f"{commit}:{name}", check=False) for commit in ("HEAD", branch)]
    if not file.exists() or _git(home, "hash-object", name) in known:
        return ""
    stem, _, suffix = name.rpartition(".")
    kept = home / "scratch" / f"{stem}.before-{branch.replace('/', '-')}.{datetime.now():%Y%m%d-%H%M%S}.{suffix}"
    write_atomic(kept, file.read_bytes())
    return f"{name} as it was, in no commit, is kept as {kept.relative_to(home)}"


def dvc(root: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run DVC there, without a question to anybody."""
    command = [sys.executable, "-m", "dvc", *words]
    quiet = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True}
    return subprocess.run(command, cwd=root, env=dvc_environment(), **quiet)


def git(root: Path, *words: str) -> str:
    """What git answers there. Raises ValueError with its own last line where it refuses."""
    return str(_git(root, *words))


def _branch_of(home: Path, run: str) -> str:
    told = _git(home, "for-each-ref", "--format=%(refname:short)", "refs/heads/runs/") or ""
    branches = told.split()
    short = run.removeprefix("runs/").rpartition("/")[2][:8]
    found = [name for name in branches if name in (run, f"runs/{run}") or (short and name.endswith(f"/{short}"))]
    found = found or [name for name in branches if short and name.rpartition("/")[2].startswith(short)]
    if len(found) == 1:
        return found[0]
    newest = _git(home, "for-each-ref", "--sort=-committerdate", "--format=%(refname:short)", "refs/heads/runs/") or ""
    known = ", ".join(newest.split()[:5]) or "none yet"
    what = f"{run!r} could be {' or '.join(found)}" if found else f"there is no run {run!r}"
    raise ValueError(f"{what}: give its id or its branch (the newest: {known})")


def _is_worktree(folder: Path) -> bool:
    return (folder / ".git").is_file() and _git(folder, "rev-parse", "HEAD", check=False) is not None


def _share_cache(tree: Worktree) -> None:
    """Write .dvc/config.local: HOME's, with its cache and its remotes, those on this disk by their absolute paths.

    Without it a worktree has an empty cache of its own, a relative remote would lie inside of it, and one that is not
    committed yet would not be there: what a run made would stay on this machine without a word.
    """
    own = tree.home / ".dvc"
    if not own.is_dir():
        raise ValueError(f"{tree.home} is no DVC project: dvc init")
    config = configparser.RawConfigParser(strict=False)
    config.optionxform = str
    for name in ("config", "config.local"):
        if (own / name).is_file():
            config.read_string((own / name).read_text())
    local = configparser.RawConfigParser(strict=False)
    local.optionxform = str
    if (own / "config.local").is_file():
        local.read_string((own / "config.local").read_text())
    changed = {"cache": {"dir": str(cache_folder(tree.home).parents[1].resolve())}}
    if chosen := config.get("core", "remote", fallback=""):
        changed["core"] = {"remote": chosen}
    for section in config.sections():
        if section.strip("'").startswith("remote "):
            changed[section] = dict(config.items(section))
            url = changed[section].get("url", "").strip().strip("'\"")
            if url and "://" not in url and not os.path.isabs(url):
                changed[section]["url"] = str((own / url).resolve())
    for section, values in changed.items():
        if not local.has_section(section):
            local.add_section(section)
        for key, value in values.items():
            local.set(section, key, value)
    (tree.root / ".dvc").mkdir(exist_ok=True)
    with open(tree.root / ".dvc" / "config.local", "w") as file:
        local.write(file)


def _check_out_inputs(root: Path) -> None:
    """Bring what stages read and `dvc add` keeps; images are read where they lie in HOME, however they are kept."""
    stages = read_params(root / "dvc.yaml").get("stages") or {}
    deps = {dep for stage in stages.values() for dep in stage.get("deps") or [] if isinstance(dep, str)}
    missing = [f"{dep}.dvc" for dep in sorted(deps) if (root / f"{dep}.dvc").is_file() and not (root / dep).exists()]
    if missing and dvc(root, "checkout", *missing).returncode != 0 and dvc(root, "pull", *missing).returncode != 0:
        raise ValueError(f"{', '.join(missing)}: neither in DVC's cache nor in its remote: dvc add, or dvc pull, first")


def _identity(root: Path) -> list[str]:
    """A committer, where git knows none: a worker's account often has no name."""
    known = _git(root, "config", "user.email", check=False)
    return [] if known else ["-c", "user.name=dit", "-c", "user.email=dit@localhost"]


def _git(root: Path, *words: str, check: bool = True) -> str | None:
    """git's answer, None where it fails and that may be. A person's hooks are not run: they are for persons."""
    command = ["git", "-c", "core.hooksPath=/dev/null", *words]
    kept = {name: value for name, value in os.environ.items() if name not in _OF_ANOTHER_CHECKOUT}
    kept = {"GIT_SSH_COMMAND": "ssh -o BatchMode=yes", **kept, "GIT_TERMINAL_PROMPT": "0"}  # nobody is there to answer
    try:
        done = subprocess.run(command, cwd=root, env=kept, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    except FileNotFoundError:
        raise ValueError("git is not installed: a run needs it") from None
    if done.returncode == 0:
        return done.stdout.strip("\n")
    if check:
        reason = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["no reason given"]
        raise ValueError(f"git {words[0]}: {reason[0]}")
    return None
