"""flows/leash.py: exit codes and output pass through, and nothing of the command remains, however it hides."""

import os
import re
import signal
import subprocess
import sys

import psutil
import pytest
from toy_pipeline import REPOSITORY
from waiting import until

from flows import dag
from flows.leash import escalation, save_seconds

LEASH = [sys.executable, "-P", str(REPOSITORY / "flows" / "leash.py")]
SLEEP = "import time; time.sleep(1000)"
# Ignores what can be ignored, and starts a child in a session of its own that does the same, by inheritance.
DEAF = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if len(sys.argv) < 2:
    child = subprocess.Popen([sys.executable, __file__, "child"], start_new_session=True)
    print(os.getpid(), child.pid, flush=True)
time.sleep(1000)
"""


def leashed(*command, **options):
    """A leash with open ends; its standard input must stay open for as long as the command shall run."""
    return subprocess.Popen([*LEASH, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, **options)


def gone(pid):
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_output_and_exit_code_pass_through():
    leash = leashed("sh", "-c", "echo out; echo err >&2; exit 7")
    assert leash.stdout.read() == b"out\nerr\n"
    assert leash.wait(timeout=120) == 7


def test_a_signal_is_told_as_a_shell_does():
    leash = leashed("sh", "-c", "kill -9 $$")
    leash.wait(timeout=120)
    assert leash.returncode == 128 + signal.SIGKILL


def test_much_output_arrives_whole():
    leash = leashed(sys.executable, "-c", "print('x' * 1_000_000)")
    assert len(leash.stdout.read()) == 1_000_001


def test_a_process_that_hid_itself_is_ended_after_a_success():
    # A shell's background process in a new session, whose parent is gone: only an adopting leash still finds it.
    leash = leashed("sh", "-c", f'{sys.executable} -c "{SLEEP}" & echo $!; exit 0', stderr=subprocess.DEVNULL)
    hidden = int(leash.stdout.readline())
    said = leash.stdout.read().decode()
    assert leash.wait(timeout=120) == 0
    assert gone(hidden) and f"left behind: [{hidden}]" in said


def test_what_ignores_signals_is_killed(tmp_path):
    deaf = tmp_path / "deaf.py"
    deaf.write_text(DEAF)
    leash = leashed(sys.executable, str(deaf), env={**os.environ, "DIT_SAVE_SECONDS": "0.6"})
    pids = [int(word) for word in leash.stdout.readline().split()]
    leash.stdin.close()
    assert leash.stdout.read().decode().splitlines() == [
        "2 process(es) still run after 0.3 s and get SIGTERM",
        "2 process(es) still run after 0.6 s and get SIGKILL; DIT_SAVE_SECONDS gives more time to save",
    ]
    assert leash.wait(timeout=120) == 128 + signal.SIGKILL
    assert all(gone(pid) for pid in pids)


def test_the_time_to_save_can_be_set_and_fits_into_prefects_unless_it_is():
    assert save_seconds({}) == save_seconds({"DIT_SAVE_SECONDS": ""}) == 23
    assert escalation(23) == ((signal.SIGINT, 18), (signal.SIGTERM, 5), (signal.SIGKILL, 2))
    assert sum(seconds for _, seconds in escalation(save_seconds({}))) + dag.DRAIN_SECONDS < 30
    assert escalation(300)[:2] == ((signal.SIGINT, 295), (signal.SIGTERM, 5))
    assert save_seconds({"DIT_SAVE_SECONDS": "300"}) == 300


@pytest.mark.parametrize("text", ["five", "0", "-1", "nan", "inf", "1e300"])
def test_a_time_to_save_that_is_none_starts_nothing(text):
    message = f"DIT_SAVE_SECONDS must be a number of seconds above 0, got '{text}'"
    with pytest.raises(ValueError, match=re.escape(message)):
        save_seconds({"DIT_SAVE_SECONDS": text})
    leash = leashed("echo", "started", env={**os.environ, "DIT_SAVE_SECONDS": text}, stderr=subprocess.STDOUT)
    assert leash.communicate()[0].decode() == f"leash: {message}\n" and leash.returncode == 2


@pytest.mark.parametrize("command", [["flows.train_dit"], ["flows.local", "up"]])
def test_such_a_time_is_refused_before_anything_starts(tmp_path, command):
    for name in ("dvc.yaml", "prefect.yaml"):
        (tmp_path / name).touch()
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "DIT_SAVE_SECONDS": "long"}
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "DIT_SAVE_SECONDS must be a number of seconds above 0, got 'long'" in done.stderr
    assert not (tmp_path / "scratch").exists()


def test_a_stage_gets_the_time_that_was_set(tmp_path):
    # It takes longer than 0.6 s, after which another is killed (see above); how much longer does not matter to that one.
    slow = (
        "import signal, sys, time\n"
        "def save(*_):\n"
        f"    time.sleep(float(sys.argv[1])); open({str(tmp_path / 'saved')!r}, 'w').close(); sys.exit(75)\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nsignal.signal(signal.SIGINT, save)\n"
        "print('ready', flush=True)\ntime.sleep(1000)"
    )
    for seconds, takes, code in (("0.6", "100", 128 + signal.SIGKILL), ("20", "1", 75)):
        leash = leashed(sys.executable, "-c", slow, takes, env={**os.environ, "DIT_SAVE_SECONDS": seconds})
        assert leash.stdout.readline() == b"ready\n" and not (tmp_path / "saved").exists()
        leash.stdin.close()
        leash.stdout.close()
        assert leash.wait(timeout=120) == code
    assert (tmp_path / "saved").exists()


def test_each_process_gets_an_interrupt_once(tmp_path):
    counting = (
        "import signal, sys, time\n"
        "def note(*_):\n    print('interrupted', flush=True)\n    time.sleep(.5)\n    sys.exit(3)\n"
        "signal.signal(signal.SIGINT, note)\nprint('ready', flush=True)\ntime.sleep(1000)"
    )
    leash = leashed(sys.executable, "-c", counting)
    assert leash.stdout.readline() == b"ready\n"
    leash.stdin.close()
    assert leash.stdout.read() == b"interrupted\n"
    leash.stdout.close()
    assert leash.wait(timeout=120) == 3


def test_a_command_may_go_on_speaking_when_nobody_listens_any_more(tmp_path):
    saving = (
        "import signal, sys, time\n"
        "def save(*_):\n"
        "    for i in range(50): print('saving', i, flush=True); time.sleep(.01)\n"
        f"    open({str(tmp_path / 'saved')!r}, 'w').close(); sys.exit()\n"
        "signal.signal(signal.SIGINT, save)\nprint('ready', flush=True)\ntime.sleep(1000)"
    )
    leash = leashed(sys.executable, "-c", saving)
    leash.stdout.readline()
    leash.stdout.close()
    leash.stdin.close()
    leash.wait(timeout=120)
    assert (tmp_path / "saved").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
def test_a_leash_that_is_killed_takes_its_command_with_it():
    leash = leashed(sys.executable, "-c", f"import os; print(os.getpid(), flush=True); {SLEEP}")
    command = int(leash.stdout.readline())
    leash.kill()
    leash.communicate()
    until(lambda: gone(command))
