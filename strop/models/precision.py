"""The compute dtype, chosen by measurement: bf16 is several times faster than fp32 on some CPUs, slower on others.

"int8" is bf16 whose matrix products round their operands to 8 bits (native/products.py). It is asked for, never chosen:
it adds noise of its own, some three times bf16's.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.nn.functional as F

from strop.native import products

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""What a tensor can be, by the names of configs."""


def measure_gemm(name: str, device: torch.device | str = "cpu", *, rows: int = 512, repeats: int = 5) -> float:
    """GFLOP/s of a linear layer of a small language model, the best of `repeats` after one warm-up."""
    dtype = weight_dtype(name)
    x = torch.randn(rows, 1024, device=device, dtype=dtype)
    weight = torch.randn(2048, 1024, device=device, dtype=dtype)
    multiply = products.linear if name == "int8" else F.linear
    best = float("inf")
    for index in range(repeats + 1):
        start = time.perf_counter()
        with products.int8(name == "int8"):
            multiply(x, weight)
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


def compute_in(requested: str = "auto", device: torch.device | str = "cpu") -> torch.dtype:
    """Set this process up for a compute dtype, and return what its weights are in.

    "auto" is whichever of bf16 and fp32 multiplies matrices faster here: ten milliseconds of measurement. A run records
    the answer and a resumed run reuses it, since another dtype would give other numbers. Raises ValueError for another
    name than "auto", "float32", "bfloat16" and "int8", and for int8 where there are no kernels for it.
    """
    name = resolved(requested, device)
    products.set_int8(name == "int8")
    return weight_dtype(name)


def resolved(requested: str = "auto", device: torch.device | str = "cpu") -> str:
    """The name that compute_in would compute in, without setting anything; errors as there but for missing kernels."""
    name = fastest(measure_dtypes(device)) if requested == "auto" else requested
    if name not in (*DTYPES, "int8"):
        raise ValueError(f'dtype="{name}" is unknown: use "auto", "float32", "bfloat16" or "int8"')
    if name == "int8" and torch.device(device).type != "cpu":
        raise ValueError(f'dtype="int8" has kernels for the CPU only, not for {device}: use "bfloat16"')
    return name


@contextmanager
def own_precision(requested: str, device: torch.device | str = "cpu") -> Iterator[None]:
    """A block of code that may call compute_in: in int8 from its beginning on where that is requested, and otherwise
    not; after it the process computes as it did before. Raises ValueError as compute_in."""
    with products.int8(requested == "int8" and resolved(requested, device) == "int8"):
        yield


def weight_dtype(name: str) -> torch.dtype:
    """What weights and activations are in: in int8 only the operands of products are 8 bits."""
    return torch.bfloat16 if name == "int8" else DTYPES[name]


def name_of(dtype: torch.dtype) -> str:
    """The name, in a config, of what this process computes in with weights of this dtype."""
    return "int8" if dtype == torch.bfloat16 and products.are_in_int8() else str(dtype).removeprefix("torch.")


def measure_dtypes(device: torch.device | str = "cpu") -> dict[str, float]:
    """GFLOP/s here of each dtype that "auto" chooses from."""
    return {name: measure_gemm(name, device) for name in DTYPES}


def fastest(rates: Mapping[str, float]) -> str:
    """The dtype that multiplies fastest; of equals the first, which is float32."""
    return max(rates, key=lambda name: rates[name])
