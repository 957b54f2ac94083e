"""The kernels of a training step and of the sampler as functions on tensors.

Callers ask `has_kernels` first: nothing here falls back. All take contiguous bf16 tensors on the CPU, compute in
float32 and round each result once; the 8-bit products of gemm(in_int8=True) round their operands too.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from functools import cache

import torch
from torch import Tensor

from strop.native.build import library

_POINTER, _LONG, _INT, _FLOAT, _DOUBLE = (
    ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float, ctypes.c_double,
)  # fmt: skip
_SIGNATURES = {
    "strop_has_amx": [],
    "strop_rms_norm": [*[_POINTER] * 3, _LONG, _LONG, _FLOAT, _INT],
    "strop_rms_norm_backward": [*[_POINTER] * 6, _LONG, _LONG, _FLOAT, _INT],
    "strop_swiglu": [_POINTER, _POINTER, _LONG, _LONG, _INT],
    "strop_swiglu_backward": [*[_POINTER] * 3, _LONG, _LONG, _INT],
    "strop_rotate": [*[_POINTER] * 3, *[_LONG] * 4, _FLOAT, _INT],
    "strop_gemm": [*[_POINTER] * 4, *[_LONG] * 3, *[_INT] * 3],
    "strop_gemm8": [*[_POINTER] * 4, *[_LONG] * 3, *[_INT] * 3],
    "strop_sample": [*[_POINTER] * 5, _LONG, _LONG, _INT],
    "strop_head_statistics": [*[_POINTER] * 5, *[_LONG] * 3, _FLOAT, _INT],
    "strop_head_gradient": [*[_POINTER] * 6, *[_LONG] * 3, _FLOAT, _INT],
    "strop_use_large_pages": [_POINTER, _LONG],
    "strop_attention": [*[_POINTER] * 6, *[_LONG] * 5, _FLOAT, _INT],
    "strop_attention_backward": [*[_POINTER] * 11, *[_LONG] * 5, _FLOAT, _INT],
    "strop_adamw": [*[_POINTER] * 3, _INT, _POINTER, _POINTER, _LONG, *[_DOUBLE] * 8, _INT],
    "strop_adamw8": [*[_POINTER] * 3, _INT, *[_POINTER] * 5, _LONG, *[_DOUBLE] * 8, _INT],
    "strop_square_sum": [_POINTER, _INT, _LONG, _INT],
    "strop_accumulate": [_POINTER, _POINTER, _LONG, _INT],
}
_PIECE_ROWS = 32
"""ROWS_PER_PIECE of train.cpp."""


def has_kernels(tensor: Tensor) -> bool:
    """Whether this tensor's dtype and device, and this machine, have the kernels."""
    return tensor.dtype == torch.bfloat16 and tensor.device.type == "cpu" and _kernels() is not None


@cache
def _kernels() -> ctypes.CDLL | None:
    kernels = library()
    if kernels is not None:
        for name, arguments in _SIGNATURES.items():
            getattr(kernels, name).argtypes = arguments
            getattr(kernels, name).restype = None
        kernels.strop_square_sum.restype = _DOUBLE
        kernels.strop_has_amx.restype = _INT
    return kernels


def has_amx() -> bool:
    """Whether products of bf16 tensors run on matrix tiles here."""
    return bool(_loaded().strop_has_amx())


def _loaded() -> ctypes.CDLL:
    kernels = _kernels()
    assert kernels is not None, "has_kernels was not asked"
    return kernels


def _at(tensor: Tensor) -> int:
    assert tensor.is_contiguous()
    return tensor.data_ptr()


def rms_norm(x_TD: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension."""
    out = torch.empty_like(x_TD)
    width = x_TD.shape[-1]
    _loaded().strop_rms_norm(
        _at(x_TD), _at(weight), _at(out), x_TD.numel() // width, width, eps, torch.get_num_threads()
    )
    return out


def rms_norm_backward(grad_TD: Tensor, x_TD: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(dx, dweight) of rms_norm."""
    num_rows, width = x_TD.shape
    dx, dweight = torch.empty_like(x_TD), torch.empty_like(weight)
    partial = torch.empty(-(-num_rows // _PIECE_ROWS), width)
    _loaded().strop_rms_norm_backward(
        _at(grad_TD), _at(x_TD), _at(weight), _at(dx), _at(dweight), _at(partial), num_rows, width, eps,
        torch.get_num_threads(),
    )  # fmt: skip
    return dx, dweight


def swiglu(gate_up_TI: Tensor) -> Tensor:
    """silu(gate) * up, where a row is all gates, then all ups."""
    num_rows, width = gate_up_TI.shape[0], gate_up_TI.shape[1] // 2
    out = gate_up_TI.new_empty(num_rows, width)
    _loaded().strop_swiglu(_at(gate_up_TI), _at(out), num_rows, width, torch.get_num_threads())
    return out


def swiglu_backward_(grad_TI: Tensor, gate_up_TI: Tensor, *, in_place: bool = False) -> Tensor:
    """The gradient of gate_up from that of swiglu(gate_up); grad_TI becomes swiglu(gate_up).

    in_place: the result is written over gate_up_TI.
    """
    dgate_up = gate_up_TI if in_place else torch.empty_like(gate_up_TI)
    num_rows, width = grad_TI.shape
    _loaded().strop_swiglu_backward(
        _at(gate_up_TI), _at(grad_TI), _at(dgate_up), num_rows, width, torch.get_num_threads()
    )
    return dgate_up


def rotate_(x_TNH: Tensor, cos_T1H: Tensor, sin_T1H: Tensor, num_heads: int, *, back: bool = False) -> None:
    """Turn the first num_heads heads of each row by its angles, in place; `back` turns the other way (the gradient)."""
    num_rows, all_heads, width = x_TNH.shape
    _loaded().strop_rotate(
        _at(x_TNH), _at(cos_T1H), _at(sin_T1H), num_rows, all_heads * width, num_heads, width, -1.0 if back else 1.0,
        torch.get_num_threads(),
    )  # fmt: skip


def gemm(
    a: Tensor,
    b: Tensor,
    out: Tensor,
    length: int,
    *,
    sums_over_rows_of_a: bool = False,
    b_is_transposed: bool = False,
    bias: Tensor | None = None,
    in_int8: bool = False,
) -> None:
    """Write the product a b, plus bias, into out; length is what is summed over. See products.py: use that instead.

    sums_over_rows_of_a takes a^T, b_is_transposed b^T. in_int8 rounds both operands as tile8.h says.
    """
    multiply = _loaded().strop_gemm8 if in_int8 else _loaded().strop_gemm
    multiply(
        _at(a),
        _at(b),
        None if bias is None else _at(bias),
        _at(out),
        *out.shape,
        length,
        sums_over_rows_of_a,
        b_is_transposed,
        torch.get_num_threads(),
    )


def sample(logits_SV: Tensor, temperatures_S: Tensor, uniforms_S: Tensor) -> tuple[Tensor, Tensor]:
    """(token_ids_S int64, logprobs_S float32): see generation.Sampler, without filters.

    temperatures_S is float32, 0 for the largest logit; uniforms_S float64.
    """
    assert temperatures_S.dtype == torch.float32 and uniforms_S.dtype == torch.float64
    num_rows, vocab_size = logits_SV.shape
    tokens_S, logprobs_S = torch.empty(num_rows, dtype=torch.int64), torch.empty(num_rows)
    _loaded().strop_sample(
        _at(logits_SV), _at(temperatures_S), _at(uniforms_S), _at(tokens_S), _at(logprobs_S), num_rows, vocab_size,
        torch.get_num_threads(),
    )  # fmt: skip
    return tokens_S, logprobs_S


STATISTICS_STEP = 1024
"""SUM_PIECE of train.cpp."""


def head_statistics(
    logits: Tensor,
    num_columns: int,
    block: int,
    labels_R: Tensor,
    logprobs_R: Tensor,
    lse_R: Tensor,
    entropy_R: Tensor | None,
    scale: float,
) -> None:
    """Write each row's label log-probability, log-sum-exp and (if wanted) entropy under softmax(logits * scale).

    The logits are matrices (R, block), one after the other, the last one with the columns that are left. block is a
    multiple of STATISTICS_STEP, or num_columns: then they are one matrix.

    ValueError for a label that is no column.
    """
    num_rows = labels_R.shape[0]
    assert logits.numel() == num_rows * num_columns and (block >= num_columns or block % STATISTICS_STEP == 0)
    if num_rows and not 0 <= int(labels_R.min()) <= int(labels_R.max()) < num_columns:
        raise ValueError(f"a label is outside [0, {num_columns}), the vocabulary that the logits cover")
    _loaded().strop_head_statistics(
        _at(logits), _at(labels_R), _at(logprobs_R), _at(lse_R), None if entropy_R is None else _at(entropy_R),
        num_rows, num_columns, block, scale, torch.get_num_threads(),
    )  # fmt: skip


def use_large_pages(tensor: Tensor) -> None:
    """Ask the system for large pages behind a tensor that nothing has been written to yet."""
    _loaded().strop_use_large_pages(_at(tensor), tensor.nbytes)


def head_gradient_(
    logits_RW: Tensor,
    labels_R: Tensor,
    lse_R: Tensor,
    grad_logprobs_R: Tensor,
    entropy_and_grad_R: tuple[Tensor, Tensor] | None,
    first: int,
    scale: float,
) -> None:
    """Replace the logits of the columns from `first` on by their gradient."""
    entropy, grad_entropy = (None, None) if entropy_and_grad_R is None else map(_at, entropy_and_grad_R)
    _loaded().strop_head_gradient(
        _at(logits_RW), _at(labels_R), _at(lse_R), _at(grad_logprobs_R), entropy, grad_entropy, *logits_RW.shape, first,
        scale, torch.get_num_threads(),
    )  # fmt: skip


def attention(q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, rows: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(outputs (T, N, H), log-sum-exp (T, N) in float32); the inputs may be views of one (T, N + 2K, H).

    rows int64 (rows, 4): start, length, trunk start, trunk length.
    """
    num_tokens, num_heads, width = q_TNH.shape
    lse = torch.empty(num_tokens, num_heads)  # first: it may be kept for longer
    out = q_TNH.new_empty(q_TNH.shape)
    _loaded().strop_attention(
        *(x.data_ptr() for x in (q_TNH, k_TKH, v_TKH)), _at(out), _at(lse), _at(rows), rows.shape[0], num_heads,
        k_TKH.shape[1], width, _row_stride(q_TNH, k_TKH, v_TKH), scale, torch.get_num_threads(),
    )  # fmt: skip
    return out, lse


def attention_backward(
    qkv: tuple[Tensor, Tensor, Tensor],
    out_TNH: Tensor,
    grad_TNH: Tensor,
    lse_TN: Tensor,
    dqkv: tuple[Tensor, Tensor, Tensor],
    rows: Tensor,
    segments: Tensor,
    scale: float,
) -> None:
    """Write the gradients of q, k and v into dqkv, whose strides are those of qkv.

    segments int64: the number of each segment's first row, and at the end the number of rows.
    """
    num_heads, num_kv_heads, width = qkv[0].shape[1], qkv[1].shape[1], qkv[0].shape[2]
    stride = _row_stride(*qkv)
    assert stride == _row_stride(*dqkv)
    _loaded().strop_attention_backward(
        *(x.data_ptr() for x in qkv), _at(out_TNH), _at(grad_TNH), _at(lse_TN), *(x.data_ptr() for x in dqkv),
        _at(rows), _at(segments), segments.shape[0] - 1, num_heads, num_kv_heads, width, stride, scale,
        torch.get_num_threads(),
    )  # fmt: skip


def _row_stride(*tensors: Tensor) -> int:
    strides = {tensor.stride(0) for tensor in tensors}
    assert len(strides) == 1 and all(x.stride(2) == 1 and x.stride(1) == x.shape[2] for x in tensors)
    return strides.pop()


def adamw_(
    parameter: Tensor,
    rest: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: int,
    grad_scale: float,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """One AdamW update of the master that `parameter` (bf16) and `rest` (int16) are together; see join_master."""
    _loaded().strop_adamw(
        _at(parameter), _at(rest), _at(gradient), gradient.dtype == torch.bfloat16, _at(exp_avg), _at(exp_avg_sq),
        parameter.numel(), grad_scale, lr, *betas, eps, weight_decay, 1 - betas[0] ** step,
        (1 - betas[1] ** step) ** 0.5, torch.get_num_threads(),
    )  # fmt: skip


def adamw8_(
    parameter: Tensor,
    rest: Tensor,
    gradient: Tensor,
    moments: Mapping[str, Tensor],
    tables: Sequence[Tensor],
    *,
    step: int,
    grad_scale: float,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """adamw_ with moments of one byte; optim/eight_bit.py says what moments and tables are."""
    keys = ("exp_avg", "exp_avg_sq", "exp_avg_scale", "exp_avg_sq_scale")
    _loaded().strop_adamw8(
        _at(parameter), _at(rest), _at(gradient), gradient.dtype == torch.bfloat16,
        *(_at(moments[key]) for key in keys),
        (_POINTER * len(tables))(*map(_at, tables)), parameter.numel(), grad_scale, lr, *betas, eps, weight_decay,
        1 - betas[0] ** step, (1 - betas[1] ** step) ** 0.5, torch.get_num_threads(),
    )  # fmt: skip


def square_sum(values: Tensor) -> float:
    """The sum of squares of bf16 or float32 entries; inf or nan where one is not finite."""
    assert values.dtype in (torch.bfloat16, torch.float32)
    return _loaded().strop_square_sum(
        _at(values), values.dtype == torch.bfloat16, values.numel(), torch.get_num_threads()
    )


def accumulate_(total: Tensor, gradient: Tensor) -> None:
    """total (float32) += gradient (bf16)."""
    assert total.dtype == torch.float32 and gradient.dtype == torch.bfloat16
    _loaded().strop_accumulate(_at(total), _at(gradient), total.numel(), torch.get_num_threads())
