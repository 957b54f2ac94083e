"""Attention over packed trees by the kernels of strop.native, with its gradient. attention.py says what is computed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from strop.models.fused import Known
from strop.native import kernels as native
from strop.native.products import input_gradient, linear, weight_gradient

if TYPE_CHECKING:
    from strop.models.attention import AttentionPlan


def has_kernels(x: Tensor) -> bool:
    """Whether the kernels take heads of this width, in this dtype and on this machine."""
    return x.shape[-1] % 32 == 0 and native.has_kernels(x)


def kernel_attention(
    qkv_TXH: Tensor, rope: tuple[Tensor, Tensor] | None, num_kv_heads: int, plan: AttentionPlan, scale: float
) -> Tensor:
    """AttentionPlan.attend_projected_, by the kernels: shape (T, N, H). The projection is overwritten."""
    assert qkv_TXH.shape[0] == plan.num_tokens  # the kernels do not look
    if torch.is_grad_enabled() and qkv_TXH.requires_grad:
        return _KernelAttention.apply(qkv_TXH, rope, num_kv_heads, plan, scale)
    if rope is not None:
        native.rotate_(qkv_TXH, *rope, num_heads=qkv_TXH.shape[1] - num_kv_heads)
    return native.attention(*_split(qkv_TXH, num_kv_heads), plan.native_rows[0], scale)[0]


def kernel_attention_linear(
    qkv_TXH: Tensor,
    rope: tuple[Tensor, Tensor] | None,
    num_kv_heads: int,
    plan: AttentionPlan,
    scale: float,
    weight: Tensor,
    bias: Tensor | None,
    known: Known | None = None,
) -> Tensor:
    """kernel_attention, then W x + bias, shape (T, D); the attention's output is made again in the backward pass.

    Where the result is known the projection is rotated already.
    """
    assert qkv_TXH.shape[0] == plan.num_tokens
    return _KernelAttentionLinear.apply(qkv_TXH, weight, bias, rope, num_kv_heads, plan, scale, known)


def _split(qkv_TXH: Tensor, num_kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = qkv_TXH.split([qkv_TXH.shape[1] - 2 * num_kv_heads, num_kv_heads, num_kv_heads], dim=1)
    return q, k, v


class _KernelAttention(torch.autograd.Function):
    """Rotation in place and attention in one: the rotated projection and the output are kept."""

    @staticmethod
    def forward(
        ctx: Any,
        qkv_TXH: Tensor,
        rope: tuple[Tensor, Tensor] | None,
        num_kv_heads: int,
        plan: AttentionPlan,
        scale: float,
    ) -> Tensor:
        if rope is not None:
            native.rotate_(qkv_TXH, *rope, num_heads=qkv_TXH.shape[1] - num_kv_heads)
        output_TNH, lse_TN = native.attention(*_split(qkv_TXH, num_kv_heads), plan.native_rows[0], scale)
        ctx.save_for_backward(qkv_TXH, output_TNH, lse_TN)
        ctx.rope, ctx.num_kv_heads, ctx.plan, ctx.scale = rope, num_kv_heads, plan, scale
        return output_TNH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TNH: Tensor) -> tuple[Tensor | None, ...]:
        qkv_TXH, output_TNH, lse_TN = ctx.saved_tensors
        dqkv_TXH = _gradient(ctx, qkv_TXH, output_TNH, lse_TN, grad_TNH.contiguous())
        return dqkv_TXH, None, None, None, None


class _KernelAttentionLinear(torch.autograd.Function):
    """_KernelAttention and the projection of its output, which is made again instead of kept."""

    @staticmethod
    def forward(
        ctx: Any,
        qkv_TXH: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rope: tuple[Tensor, Tensor] | None,
        num_kv_heads: int,
        plan: AttentionPlan,
        scale: float,
        known: Known | None,
    ) -> Tensor:
        ctx.rope, ctx.num_kv_heads, ctx.plan, ctx.scale = rope, num_kv_heads, plan, scale
        if known is not None:
            ctx.save_for_backward(qkv_TXH, weight)
            return known.value
        y_TD = qkv_TXH.new_empty(qkv_TXH.shape[0], weight.shape[0])  # first: see fused.py's _room_for_product
        if rope is not None:
            native.rotate_(qkv_TXH, *rope, num_heads=qkv_TXH.shape[1] - num_kv_heads)
        output_TNH, _ = native.attention(*_split(qkv_TXH, num_kv_heads), plan.native_rows[0], scale)
        ctx.save_for_backward(qkv_TXH, weight)
        x_TE = output_TNH.flatten(1)
        return linear(x_TE, weight, bias, out=y_TD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        qkv_TXH, weight = ctx.saved_tensors
        _, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        dweight = torch.empty_like(weight) if needs_weight else None
        output_TNH, lse_TN = native.attention(*_split(qkv_TXH, ctx.num_kv_heads), ctx.plan.native_rows[0], ctx.scale)
        if dweight is not None:
            weight_gradient(grad_TD, output_TNH.flatten(1), out=dweight)
        grad_TNH = input_gradient(grad_TD, weight).view(output_TNH.shape)
        dqkv_TXH = _gradient(ctx, qkv_TXH, output_TNH, lse_TN, grad_TNH)
        return dqkv_TXH, dweight, grad_TD.sum(0) if needs_bias else None, None, None, None, None, None


def _gradient(ctx: Any, qkv_TXH: Tensor, output_TNH: Tensor, lse_TN: Tensor, grad_TNH: Tensor) -> Tensor:
    """The gradient of the projection before its rotation, from that of the attention's output."""
    dqkv_TXH = torch.empty_like(qkv_TXH)
    rows, segments = ctx.plan.native_rows
    native.attention_backward(
        _split(qkv_TXH, ctx.num_kv_heads),
        output_TNH,
        grad_TNH,
        lse_TN,
        _split(dqkv_TXH, ctx.num_kv_heads),
        rows,
        segments,
        ctx.scale,
    )
    if ctx.rope is not None:
        native.rotate_(dqkv_TXH, *ctx.rope, num_heads=qkv_TXH.shape[1] - ctx.num_kv_heads, back=True)
    return dqkv_TXH
