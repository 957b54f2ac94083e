"""A thread that ends takes its OpenMP team along, so that libgomp counts it no more."""

import subprocess
import sys

import pytest

from strop.native.teams import in_own_thread

PROGRAM = """
import os, time, torch
from strop.native.teams import in_own_thread

torch.set_num_threads(2)
product = lambda: torch.ones(512, 512) @ torch.ones(512, 512)
count = lambda: len(os.listdir("/proc/self/task"))
before = count()
in_own_thread(product)
deadline = time.monotonic() + 10
while count() > before and time.monotonic() < deadline:
    time.sleep(0.01)  # the threads of a team end in their own time
print(count() - before)
product()
print(count() - before)
"""


def test_no_team_is_left_behind() -> None:
    finished = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    after_own_thread, after_this_thread = map(int, finished.stdout.split())
    assert after_own_thread == 0
    assert after_this_thread == 1


def test_what_the_work_raises_is_raised() -> None:
    assert in_own_thread(lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        in_own_thread(lambda: 1 // 0)
