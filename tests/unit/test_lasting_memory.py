"""What training keeps has pages of its own, and takes memory only where it is written; in processes of their own."""

from __future__ import annotations

import subprocess
import sys

import pytest

RESIDENT = """
import torch
torch.set_num_threads(1)

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096
"""

MOMENTS = (
    RESIDENT
    + """
from torch import nn
from strop.native import kernels as native
from strop.optim import AdamW, optimizer_step

weight = nn.Parameter(torch.ones(50_000, 256, dtype=torch.bfloat16))
assert native.has_kernels(weight)
optimizer = AdamW([("w", weight)])
before = resident()
rows = torch.arange(40)
for _ in range(2):
    nn.functional.embedding(rows, weight).sum().backward()
    optimizer_step(optimizer, lr=1e-3, max_grad_norm=1.0)
few = resident() - before
nn.functional.embedding(torch.arange(50_000), weight).sum().backward()
optimizer_step(optimizer, lr=1e-3, max_grad_norm=1.0)
print(few, resident() - before)
"""
)


def run(code: str) -> list[int]:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return [int(word) for word in done.stdout.split()]


@pytest.fixture
def has_kernels() -> None:
    from strop.native.build import library, why_unavailable

    reason = why_unavailable()
    if reason is not None and not reason.startswith("there is no C++ compiler"):
        pytest.skip(reason)  # another processor; a missing compiler is a failure
    assert library() is not None, reason


@pytest.mark.usefixtures("has_kernels")
def test_moments_of_rows_without_a_gradient_take_no_memory() -> None:
    few, all_rows = run(MOMENTS)
    # 12.8 million entries: 8 bytes of moments and 2 of the master's low half each.
    assert few < 40e6, "40 of 50,000 rows were trained"
    assert all_rows > 10 * 12.8e6, "the control: every row was trained"


RESTORED = (
    RESIDENT
    + """
from strop.optim.own_pages import fill_lasting_, lasting_zeros

values = torch.zeros(20_000_000)
values[:1000] = 1.0
values.numpy().tobytes()  # its pages are there before anything is counted
target = lasting_zeros(values.shape, values.dtype, values.device)
before = resident()
fill_lasting_(target, values)
few = resident() - before
assert torch.equal(target[:2000], values[:2000])
target.fill_(1.0)
print(few, resident() - before)
"""
)


def test_what_is_restored_takes_memory_where_it_is_not_zero() -> None:
    few, everywhere = run(RESTORED)
    assert few < 10e6 < 70e6 < everywhere
