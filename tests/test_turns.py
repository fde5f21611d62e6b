"""flows/turns.py: one holder at a time, a waiting one knows for whom it waits, and a killed holder holds nothing."""

import subprocess
import sys
import time

import pytest
from toy_pipeline import REPOSITORY, until

from flows.turns import turn

HOLDER = """
import sys, time
from pathlib import Path
from flows.turns import turn
with turn(Path(sys.argv[1]), "flow", "run 'first'", print):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def hold(folder, seconds):
    command = [sys.executable, "-c", HOLDER, str(folder), str(seconds)]
    holder = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
    return holder


def test_a_second_one_waits_and_says_for_whom(tmp_path):
    holder, said = hold(tmp_path, 1.2), []
    with turn(tmp_path, "flow", "second", said.append, say_every_seconds=0.5):
        assert holder.wait(timeout=1) == 0
    assert len(said) >= 2
    assert all(line.startswith(f"waiting for run 'first' (process {holder.pid}, since 20") for line in said)
    holder.stdout.close()


def test_the_lock_of_a_killed_process_is_free(tmp_path):
    holder, said = hold(tmp_path, 1000), []
    holder.kill()
    holder.communicate()
    began = time.monotonic()
    with turn(tmp_path, "flow", "second", said.append):
        assert time.monotonic() - began < 1 and not said


def test_an_error_inside_frees_it(tmp_path):
    with pytest.raises(RuntimeError), turn(tmp_path, "flow", "first", print):
        raise RuntimeError
    said = []
    with turn(tmp_path, "flow", "second", said.append):
        assert not said


def test_a_descriptor_handed_on_keeps_it(tmp_path):
    with turn(tmp_path, "flow", "first", print) as held:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1)"], pass_fds=(held,))
    said = []
    with turn(tmp_path, "flow", "second", said.append):
        assert child.poll() is not None or until(lambda: child.poll() is not None, seconds=1) is not None
    assert said
    child.wait()
