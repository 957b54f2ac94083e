"""What was freed goes back to the system, also from below something that is still in use."""

from __future__ import annotations

import subprocess
import sys

import pytest

CODE = """
import torch
from strop.native.freed_memory import give_back_freed_memory

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

pieces = [torch.ones(25_000) for _ in range(2000)]  # 100 KB each: from the heap, not pages of their own
last = pieces[-1]
del pieces
before = resident()
give_back_freed_memory()
print(before - resident())
"""


def test_memory_below_a_live_tensor_is_given_back() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 100e6


PHASES = """
import torch
from strop.native.freed_memory import give_back_between_phases

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

kept = torch.ones(int(LIVE * resident() / 4))
pieces = [torch.ones(25_000) for _ in range(4000)]
last = pieces[-1]
del pieces
before = resident()
give_back_between_phases()
print(before - resident())
"""


@pytest.mark.parametrize(("live", "is_given_back"), [(0.0, True), (3.0, False)])
def test_between_phases_only_the_larger_part_of_a_process_is_given_back(live: float, is_given_back: bool) -> None:
    """400 MB are free, of a process that is not much more, or more than twice that."""
    code = PHASES.replace("LIVE", str(live))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (int(done.stdout) > 100e6) == is_given_back
