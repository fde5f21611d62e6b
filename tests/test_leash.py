"""flows/leash.py: exit codes and output pass through, and nothing of the command remains, however it hides."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from toy_pipeline import REPOSITORY, until

LEASH = [sys.executable, "-P", str(REPOSITORY / "flows" / "leash.py")]
SLEEP = "import time; time.sleep(1000)"
# Ignores what can be ignored, and starts a child in a session of its own that does the same.
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
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_output_and_exit_code_pass_through():
    leash = leashed("sh", "-c", "echo out; echo err >&2; exit 7")
    assert leash.stdout.read() == b"out\nerr\n"
    assert leash.wait(timeout=10) == 7


def test_a_signal_is_told_as_a_shell_does():
    leash = leashed("sh", "-c", "kill -9 $$")
    leash.wait(timeout=10)
    assert leash.returncode == 128 + signal.SIGKILL


def test_much_output_arrives_whole():
    leash = leashed(sys.executable, "-c", "print('x' * 1_000_000)")
    assert len(leash.stdout.read()) == 1_000_001


def test_a_process_that_hid_itself_is_ended_after_a_success():
    # A shell's background process in a new session, whose parent is gone: only an adopting leash still finds it.
    leash = leashed("sh", "-c", f'{sys.executable} -c "{SLEEP}" & echo $!; exit 0', stderr=subprocess.DEVNULL)
    hidden = int(leash.stdout.readline())
    said = leash.stdout.read().decode()
    assert leash.wait(timeout=10) == 0
    assert gone(hidden) and f"left behind: [{hidden}]" in said


def test_what_ignores_signals_is_killed(tmp_path):
    deaf = tmp_path / "deaf.py"
    deaf.write_text(DEAF)
    quick = "leash.ESCALATION = tuple((number, 0.3) for number, _ in leash.ESCALATION)"
    code = f"import leash, sys; {quick}; sys.exit(leash.main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, sys.executable, str(deaf)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY / "flows")}
    leash = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
    pids = [int(word) for word in leash.stdout.readline().split()]
    time.sleep(0.2)  # the child too must have come to ignore them
    leash.stdin.close()
    assert leash.wait(timeout=10) == 128 + signal.SIGKILL
    assert all(gone(pid) for pid in pids)
    leash.stdout.close()


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
    assert leash.wait(timeout=10) == 3


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
    leash.wait(timeout=10)
    assert (tmp_path / "saved").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
def test_a_leash_that_is_killed_takes_its_command_with_it():
    leash = leashed(sys.executable, "-c", f"import os; print(os.getpid(), flush=True); {SLEEP}")
    command = int(leash.stdout.readline())
    leash.kill()
    leash.communicate()
    until(lambda: gone(command), seconds=5)
    assert gone(command)
