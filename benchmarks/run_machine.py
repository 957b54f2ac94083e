"""One measurement of the machine itself: python -m benchmarks.run_machine machine MODEL.

The floor of everything else: the fastest matrix products, and the fastest reads and copies of memory that is in no
cache. Rates are the best of several tries, since whatever disturbs a try can only slow it down.
"""

from __future__ import annotations

import torch

from benchmarks import work
from strop.stages.forecast_probe import best_seconds

GEMM_SHAPES = ((2048, 2048, 2048), (2048, 576, 1536), (1024, 1024, 4096), (4096, 1536, 576))
"""Rows, inner, columns: square, and those of a small language model's layers."""
MEMORY_BYTES = 2**29
TRIES = 12


def main() -> None:
    numbers = torch.ones(MEMORY_BYTES // 4)
    target = torch.empty_like(numbers)
    figures = {
        "gemm_bf16_gflops": gemm_peak(torch.bfloat16),
        "gemm_fp32_gflops": gemm_peak(torch.float32),
        "read_gb_per_second": MEMORY_BYTES / best_seconds(lambda: numbers.sum(), TRIES) / 1e9,
        # As the memory sees it: every byte is read once and written once.
        "copy_gb_per_second": 2 * MEMORY_BYTES / best_seconds(lambda: target.copy_(numbers), TRIES) / 1e9,
        "threads": torch.get_num_threads(),
    }
    work.emit(figures)


def gemm_peak(dtype: torch.dtype) -> float:
    """GFLOP/s of the fastest of GEMM_SHAPES."""
    best = 0.0
    for rows, inner, columns in GEMM_SHAPES:
        x, weight = torch.randn(rows, inner).to(dtype), torch.randn(columns, inner).to(dtype)
        out = torch.empty(rows, columns, dtype=dtype)
        seconds = best_seconds(lambda x=x, weight=weight, out=out: torch.mm(x, weight.T, out=out), TRIES)
        best = max(best, 2 * rows * inner * columns / seconds / 1e9)
    return best


if __name__ == "__main__":
    main()
