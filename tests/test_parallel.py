"""dit/parallel.py, as one process and as two that share a machine."""

import json
import os
import subprocess
import sys

import pytest
from ports import free_port
from test_launch import ROOT

from dit.parallel import Agreement, World, blocks, device_group, world

TOGETHER = """
import json, sys, time
from pathlib import Path
from dit.parallel import Agreement, device_group, world
us = world()
told = {"agree": [us.agree(us.rank == 1), us.agree(False)]}  # the first to talk, as a stage's start is
agreement = Agreement()
told["asked"] = [agreement.ask(us.rank == 1 and step == 2) for step in range(5)]
agreement.ask(us.rank == 0)
told["gathered"] = us.gather({"rank": us.rank})  # between a question and its answer
told["shared"] = us.share(f"by {us.rank}")
told["settled"] = [agreement.settle(), agreement.settle()]
answered, until = Path(sys.argv[1]), time.monotonic() + 40
while us.rank == 1 and not answered.exists() and time.monotonic() < until:
    time.sleep(0.02)
told["answered"] = us.rank == 0 or answered.exists()  # before this process has asked
agreement.ask(False)
if us.rank == 0:
    answered.touch()
us.barrier()
told["settled"].append(agreement.settle())
told["group"] = [device_group("cpu").size(), device_group("cpu") is device_group("cpu")]
try:
    device_group("cuda")
except ValueError as error:
    told["refused"] = str(error)
print(json.dumps(told))
"""


def test_two_processes_agree_without_waiting_and_on_the_same_answer(tmp_path):
    spread = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "PYTHONPATH": str(ROOT)}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", TOGETHER, str(tmp_path / "answered")],
            env=os.environ | spread | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
        )
        for rank in range(2)
    ]
    one, two = [json.loads(process.communicate(timeout=200)[0]) for process in both]
    for told in (one, two):
        assert told["agree"] == [True, False]
        assert told["asked"] == [False, False, False, True, False], "the answer is that of the call before"
        assert told["shared"] == "by 0" and told["settled"] == [True, False, False]
        assert told["group"] == [2, True]
        assert told["refused"] == ("run.device: the processes were joined without cuda: name the device from the start")
    assert one["gathered"] == [{"rank": 0}, {"rank": 1}] and two["gathered"] is None
    assert one["answered"] and two["answered"], "who asks does not wait for the others"


def test_one_process_is_answered_at_once_and_needs_no_group():
    agreement = Agreement()
    assert [agreement.ask(True), agreement.ask(False), agreement.settle()] == [True, False, False]
    assert device_group("cuda") is None and world() == World(0, 1) and world().main
    assert world().agree(True) and not world().agree(False)
    assert world().gather("a") == ["a"] and world().share("b") == "b"


@pytest.mark.parametrize("size", [1, 2, 3])
def test_each_block_is_somebodys(size):
    parts = blocks(11, 4)
    assert parts == [range(0, 4), range(4, 8), range(8, 11)]
    shared = [block for rank in range(size) for block in World(rank, size).mine(parts)]
    assert sorted(shared, key=lambda block: block.start) == parts
