"""What was freed goes back to the system, also from below something that is still in use."""

from __future__ import annotations

import subprocess
import sys

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
