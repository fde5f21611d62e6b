import multiprocessing
import os
import resource
import signal
import threading
import time
from contextlib import contextmanager

import pytest
import torch
from test_states import VALUES, same, saved, tensors
from waiting import until

from dit.parallel import World
from dit.saving import Saver
from dit.states import TrainingState, forget, latest_state, steps

FORK = multiprocessing.get_context("fork")  # a child that has torch already


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "abc"


@contextmanager
def files_of_at_most(size):
    """As on a disk that fills up: no file of this process may become larger."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def killed(work):
    """`work` in a process that gets SIGKILL when the block ends."""
    child = FORK.Process(target=work, daemon=True)
    child.start()
    yield child
    os.kill(child.pid, signal.SIGKILL)
    child.join()


def names(folder):
    return sorted(file.name for file in folder.iterdir())


def test_the_last_few_are_kept(folder):
    saver = Saver(folder, 2)
    for step in (5, 10, 15):
        saver.save(TrainingState(step, tensors(step), VALUES))
    saver.close()
    assert names(folder) == [f"step-000000{step}.{end}" for step in (10, 15) for end in ("json", "safetensors")]
    assert saver.last == latest_state(folder) and saver.seconds > 0


def test_the_loop_goes_on_at_once_and_what_it_changes_is_not_saved(folder):
    go, seen = threading.Event(), []

    def before(state):
        seen.append(state.step)
        assert go.wait(60)

    saver, live, values = Saver(folder, 2, before=before), tensors(5), {"rows": [[1, 2.0]]}
    saver.save(TrainingState(5, live, values))  # it returns, though its thread can't end
    for tensor in live.values():
        tensor.fill_(9)
    values["rows"].append([2, 3.0])
    until(lambda: seen, pause=0.0005)
    assert latest_state(folder) is None, "it does not count before all that belongs to it is there"
    second = threading.Thread(target=saver.save, args=(TrainingState(6, live, values),))
    second.start()
    second.join(0.05)
    assert second.is_alive() and seen == [5], "one at a time"
    go.set()
    second.join()
    saver.wait()
    assert same(saver.last.read(), live) and saver.last.values == {"rows": [[1, 2.0], [2, 3.0]]}
    forget(folder, 6)
    assert same(latest_state(folder).read(), tensors(5)) and latest_state(folder).values == {"rows": [[1, 2.0]]}


def test_a_full_disk_is_the_loops_error_and_leaves_what_was_there(folder):
    saved(folder, 5)
    saver, big = Saver(folder, 1), {"a": torch.ones(100_000)}
    with files_of_at_most(50_000):
        saver.save(TrainingState(10, big, {}))
        with pytest.raises(OSError, match="File too large"):
            saver.wait()
    assert names(folder) == ["step-00000005.json", "step-00000005.safetensors"]
    saver.wait()  # said once
    saver.save(TrainingState(10, big, {}))
    saver.wait()
    assert latest_state(folder).step == 10 and steps(folder) == [10]


def test_what_fails_before_it_counts_is_raised_at_the_next_save(folder):
    def fails(state):
        raise OSError(28, "No space left on device")

    saved(folder, 5)
    saver = Saver(folder, 1, before=fails)
    saver.save(TrainingState(10, tensors(10), VALUES))
    with pytest.raises(OSError, match="No space left"):
        saver.save(TrainingState(15, tensors(15), VALUES))
    assert names(folder) == ["step-00000005.json", "step-00000005.safetensors"]


def test_a_state_that_was_passed_over_costs_no_good_one_its_place(folder, capsys):
    saved(folder, 5, 10)
    (folder / "step-00000010.safetensors").write_bytes(b"torn")
    assert saved(folder, 6, keep=1).step == 6 and latest_state(folder).step == 6
    saved(folder, 10, keep=1)
    assert same(latest_state(folder).read(), tensors(10)) and steps(folder) == [10]


def test_sigkill_while_tensors_are_written(folder):
    saved(folder, 5)
    big = {"a": torch.ones(30_000_000)}

    def work():
        saver = Saver(folder, 2)
        saver.save(TrainingState(10, big, VALUES))
        saver.wait()

    for _ in range(9):  # if it was faster than what watches it: once more
        with killed(work) as child:
            until(lambda: list(folder.glob(".step-00000010*")) or not child.is_alive(), pause=0.0005)
        if latest_state(folder).step == 5:
            break
        forget(folder, 10)
    assert same(latest_state(folder).read(), tensors(5)), "seen in the midst of it"
    saved(folder, 10)
    assert len(names(folder)) == 4, "what was left of it is cleared away"


def test_sigkill_between_tensors_and_sidecar(folder):
    saved(folder, 5)
    with killed(lambda: saved_slowly(folder, 10)):
        until((folder / "step-00000010.safetensors").exists, pause=0.0005)
    assert latest_state(folder).step == 5
    Saver(folder, 2)
    assert names(folder) == ["step-00000005.json", "step-00000005.safetensors"]


def saved_slowly(folder, step):
    saver = Saver(folder, 2, before=lambda state: time.sleep(60))
    saver.save(TrainingState(step, tensors(step), VALUES))
    saver.wait()


def test_of_several_that_have_the_same_the_main_one_writes(folder):
    other = Saver(folder, 2, world=World(1, 2))
    other.save(TrainingState(5, tensors(5), VALUES))
    other.close()
    assert not folder.exists() and other.last is None
    main = Saver(folder, 2, world=World(0, 2))
    main.save(TrainingState(5, tensors(5), VALUES))
    main.wait()
    assert main.last.step == 5
