"""Locks, between real processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from waiting import until

from dit import locks

HERE = Path(__file__).parents[1]
HOLDER = """
import sys
from pathlib import Path
from dit import locks

with locks.held(Path(sys.argv[1]), lambda line: print(line, flush=True), sys.argv[2], say_every_seconds=0.2):
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def file(tmp_path):
    return tmp_path / "folder" / "lock"


@pytest.fixture
def holder(file):
    running = []

    def start(who=""):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        running.append(subprocess.Popen([sys.executable, "-c", HOLDER, str(file), who], cwd=HERE, **pipes))
        return running[-1]

    yield start
    for process in running:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("end", ["well", "killed"])
def test_the_second_waits_says_for_whom_again_and_again_and_has_it_however_the_first_ends(holder, end):
    first = holder()
    assert first.stdout.readline() == "held\n"
    second = holder()
    told = f"waiting for process {first.pid} on {os.uname().nodename} (in {HERE}), "
    assert [second.stdout.readline().startswith(told) for _ in range(3)] == [True] * 3
    if end == "killed":
        first.kill()
    else:
        first.communicate("\n")
    until(lambda: second.stdout.readline() == "held\n")


def test_a_holder_may_say_who_it_is(holder, file):
    first, said = holder("run 'first'"), []
    assert first.stdout.readline() == "held\n" and not locks.free(file)

    def say(line):
        said.append(line)
        first.kill()

    with locks.held(file, say):
        pass
    process = f"process {first.pid} on {os.uname().nodename}"
    assert said[0].startswith(f"waiting for run 'first' ({process}, since 20") and said[0].endswith("), 0 s so far")


def test_a_lock_that_is_held_is_tried_in_vain(holder, file):
    process = holder()
    assert process.stdout.readline() == "held\n"
    with locks.tried(file) as free:
        assert not free
    process.communicate("\n")
    with locks.tried(file) as free, locks.tried(file) as again:
        assert free and not again


def test_an_error_inside_frees_it(file):
    assert locks.free(file)
    with pytest.raises(RuntimeError), locks.held(file):
        assert not locks.free(file)
        raise RuntimeError
    assert locks.free(file)


def test_a_descriptor_handed_on_keeps_it(file):
    with locks.held(file) as lock:
        wait = [sys.executable, "-c", "import sys; sys.stdin.read()"]
        child = subprocess.Popen(wait, stdin=subprocess.PIPE, pass_fds=(lock,))
    said = []

    def say(line):
        said.append(line)
        child.stdin.close()

    with locks.held(file, say):
        assert said
    assert child.wait(timeout=60) == 0
