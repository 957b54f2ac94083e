"""The compute dtype, chosen by measurement: bf16 is several times faster than fp32 on some CPUs, slower on others."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch
import torch.nn.functional as F

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def measure_gemm(dtype: torch.dtype, device: torch.device | str = "cpu", *, rows: int = 512, repeats: int = 5) -> float:
    """GFLOP/s of a linear layer of a small language model, the best of `repeats` after one warm-up."""
    x = torch.randn(rows, 1024, device=device, dtype=dtype)
    weight = torch.randn(2048, 1024, device=device, dtype=dtype)
    best = float("inf")
    for index in range(repeats + 1):
        start = time.perf_counter()
        F.linear(x, weight)
        if x.is_cuda:
            torch.cuda.synchronize()
        if index:
            best = min(best, time.perf_counter() - start)
    return 2 * rows * 1024 * 2048 / best / 1e9


def measure_bandwidth(num_bytes: int = 2**28, repeats: int = 3) -> tuple[float, float]:
    """(read, copy) of this machine's memory in GB/s, the best of `repeats`; a copy counts every byte twice.

    num_bytes must be far larger than any cache.
    """
    source = torch.ones(num_bytes // 4)
    target = torch.empty_like(source)
    best = [float("inf")] * 2
    for index in range(repeats + 1):
        for number, run in enumerate((source.sum, lambda: target.copy_(source))):
            start = time.perf_counter()
            run()
            if index:
                best[number] = min(best[number], time.perf_counter() - start)
    return num_bytes / best[0] / 1e9, 2 * num_bytes / best[1] / 1e9


def choose_dtype(requested: str = "auto", device: torch.device | str = "cpu") -> torch.dtype:
    """The dtype named by `requested`; for "auto", whichever of bf16 and fp32 multiplies matrices faster here.

    Ten milliseconds of measurement. A run records the answer and a resumed run reuses it, since another dtype would
    give other numbers. Raises ValueError for a name that is neither "auto", "float32" nor "bfloat16".
    """
    if requested in DTYPES:
        return DTYPES[requested]
    if requested != "auto":
        raise ValueError(f'dtype="{requested}" is unknown: use "auto", "float32" or "bfloat16"')
    return fastest(measure_dtypes(device))


def measure_dtypes(device: torch.device | str = "cpu") -> dict[torch.dtype, float]:
    """GFLOP/s of each of DTYPES here."""
    return {dtype: measure_gemm(dtype, device) for dtype in DTYPES.values()}


def fastest(rates: Mapping[torch.dtype, float]) -> torch.dtype:
    """The dtype that multiplies fastest; of equals the first, which is float32."""
    return max(rates, key=lambda dtype: rates[dtype])
