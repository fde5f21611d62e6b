"""heap: what is freed is there for the next that asks."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FAULTS = """
import resource, sys
from dit import heap
if len(sys.argv) > 1:
    assert heap.keep()
def work():
    layers = [bytearray(4 << 20) for _ in range(8)]
work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(*words):
    told = subprocess.run(
        [sys.executable, "-c", FAULTS, *words], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    return int(told)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc gives back so soon")
def test_pages_are_made_once():
    pages = 10 * (32 << 20) // 4096
    assert faults() > pages / 2 and faults("keep") < pages / 100


def test_elsewhere_nothing_happens(monkeypatch):
    from dit import heap

    monkeypatch.setattr(heap.sys, "platform", "darwin")
    assert heap.keep() is False
