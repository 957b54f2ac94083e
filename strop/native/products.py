"""The three products of a linear layer in training, by our kernel where it is ahead, otherwise by torch.

Both arrange their operands anew for every product. On a Zen 4 core (234 GFLOP/s from registers) oneDNN then reaches 200
to 215 GFLOP/s, ours 210 to 222, in the shapes of a 135M model. Results are rounded once, from float32 sums.

In int8 (`set_int8`) the same kernel's 8-bit form takes them: 300 to 350 GFLOP/s. Operands and results stay bf16; what
is 8 bits lives for one product. It is a setting of the process, as torch.set_float32_matmul_precision is, so that
whatever a run computes with on the CPU in bf16, its rollouts, trainer, critic, reward models and judges, rounds alike.
Products of other dtypes stay as they are, and so do those of a width that is no multiple of 32, an adapter's rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from strop.native import kernels
from strop.native.build import library, why_missing

_COLUMNS = 32
"""A tile's width (tile.h): every dimension but the tokens is a multiple of it."""
_MIN_TOKENS = 32
"""With fewer, arranging the weight costs what the inner loop saves."""
_in_int8 = False


def set_int8(on: bool) -> None:
    """Whether products of bf16 tensors are made in 8 bits from now on, in blocks of 64 with a scale each (tile8.h).

    Raises ValueError where this machine has no kernels for it.
    """
    global _in_int8
    if on and library() is None:
        raise ValueError(
            f'dtype="int8" cannot be had here: {why_missing()}; use "auto", "bfloat16" or "float32". A run that '
            "began in int8 goes on only where it can be had: here, start a new run from its checkpoint (--from)"
        )
    _in_int8 = on


def are_in_int8() -> bool:
    return _in_int8


@contextmanager
def int8(on: bool = True) -> Iterator[None]:
    """set_int8 for a block of code."""
    before = _in_int8
    set_int8(on)
    try:
        yield
    finally:
        set_int8(before)


def linear(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
    """x W^T + bias, shape (T, O)."""
    if not _has_kernel(x_TI, weight_OI, *weight_OI.shape):
        if bias_O is None:
            return torch.mm(x_TI, weight_OI.T, out=out)
        return torch.addmm(bias_O, x_TI, weight_OI.T, out=out)
    out = x_TI.new_empty(x_TI.shape[0], weight_OI.shape[0]) if out is None else out
    kernels.gemm(
        x_TI.contiguous(), weight_OI.contiguous(), out, x_TI.shape[1], b_is_transposed=True, bias=bias_O,
        in_int8=_in_int8,
    )  # fmt: skip
    return out


def input_gradient(grad_TO: Tensor, weight_OI: Tensor) -> Tensor:
    """grad W, shape (T, I): what linear's x gets."""
    if not _has_kernel(grad_TO, weight_OI, *weight_OI.shape):
        return grad_TO @ weight_OI
    out = grad_TO.new_empty(grad_TO.shape[0], weight_OI.shape[1])
    kernels.gemm(grad_TO.contiguous(), weight_OI.contiguous(), out, grad_TO.shape[1], in_int8=_in_int8)
    return out


def weight_gradient(grad_TO: Tensor, x_TI: Tensor, *, out: Tensor | None = None) -> Tensor:
    """grad^T x, shape (O, I): what linear's weight gets."""
    if not _has_kernel(grad_TO, x_TI, grad_TO.shape[1], x_TI.shape[1]):
        return torch.mm(grad_TO.T, x_TI, out=out)
    out = grad_TO.new_empty(grad_TO.shape[1], x_TI.shape[1]) if out is None else out
    kernels.gemm(
        grad_TO.contiguous(), x_TI.contiguous(), out, grad_TO.shape[0], sums_over_rows_of_a=True, in_int8=_in_int8
    )
    return out


def _has_kernel(rows_T: Tensor, other: Tensor, *widths: int) -> bool:
    """Whether the kernel takes a product of these over T tokens, whose other dimensions are `widths`.

    In bf16 torch is as good a choice, where operands are few or would have to be copied; in int8 it would be another
    precision. On matrix tiles torch sums few rows in another order than many, and rollouts would round as no trainer.
    """
    return (
        rows_T.dtype == other.dtype
        and kernels.has_kernels(rows_T)
        and not any(width % _COLUMNS for width in widths)
        and (
            _in_int8
            or kernels.has_amx()
            or (rows_T.shape[0] >= _MIN_TOKENS and rows_T.is_contiguous() and other.is_contiguous())
        )
    )
