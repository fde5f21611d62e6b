"""Locks, between real processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dit import locks

HOLDER = """
import sys
from pathlib import Path
from dit import locks

with locks.held(Path(sys.argv[1]), lambda holder: print("waits for", holder, flush=True)):
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def holder(tmp_path):
    running = []

    def start():
        words = [sys.executable, "-c", HOLDER, str(tmp_path / "folder" / "lock")]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        running.append(subprocess.Popen(words, cwd=Path(__file__).parents[1], **pipes))
        return running[-1]

    yield start
    for process in running:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("end", ["well", "killed"])
def test_the_second_waits_says_for_whom_and_has_it_however_the_first_ends(holder, end):
    first = holder()
    assert first.stdout.readline() == "held\n"
    second = holder()
    told = f"waits for {first.pid} on {os.uname().nodename} (in {Path(__file__).parents[1]})\n"
    assert second.stdout.readline() == told
    if end == "killed":
        first.kill()
    else:
        first.communicate("\n")
    assert second.stdout.readline() == "held\n"


def test_a_lock_that_is_held_is_tried_in_vain(holder, tmp_path):
    process, file = holder(), tmp_path / "folder" / "lock"
    assert process.stdout.readline() == "held\n"
    with locks.tried(file) as free:
        assert not free
    process.communicate("\n")
    with locks.tried(file) as free, locks.tried(file) as again:
        assert free and not again
