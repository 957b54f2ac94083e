"""Layers that keep less for their backward pass: what is cheap to compute again is computed again.

Per token and layer they leave the block's input, the rotated queries, keys and values, the attention's output and the
MLP's gate and up: about half of what autograd would keep. Values are those of the plain operations; in bf16 on a CPU
that has them, the kernels of strop.native round once where torch rounds after every operation.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from strop.native import train as native


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension, the mean of squares in float32 (Zhang and Sennrich 2019, eq. 4).

    Only x is kept.
    """
    if not torch.is_grad_enabled():
        return _normed(x, weight, eps)
    return _RMSNorm.apply(x, weight, eps)


def tied_embedding(token_ids_T: Tensor, weight_VD: Tensor) -> tuple[Tensor, Tensor]:
    """(The rows of an embedding (T, D), the same weight as the head should use it).

    The gradient that the head makes for its weight is dense, (V, D); the embedding's own few rows are added into that
    tensor. Left to autograd there would be a second dense one, zero almost everywhere.
    """
    if torch.is_grad_enabled() and weight_VD.requires_grad and native.has_kernels(weight_VD):
        return _TiedEmbedding.apply(token_ids_T, weight_VD)
    return F.embedding(token_ids_T, weight_VD), weight_VD


def norm_linear(x_TD: Tensor, norm_weight: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """linear(rms_norm(x)), shape (T, E). Of its activations only x is kept."""
    if not torch.is_grad_enabled():
        return F.linear(_normed(x_TD, norm_weight, eps), weight, bias)
    return _NormLinear.apply(x_TD, norm_weight, weight, bias, eps)


class Linear(nn.Linear):
    """nn.Linear that can lay its weight out once for many products with few rows (decoding).

    oneDNN arranges a bf16 weight for its kernel at every call; for a handful of rows that costs as much as the product.
    Values are the same to the bit.
    """

    packed: Tensor | None = None

    def pack(self, num_rows: int) -> None:
        """Keep a second copy of the weight, arranged for about num_rows rows. It does not follow updates."""
        self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach(), num_rows)

    def unpack(self) -> None:
        self.packed = None

    def decode(self, x_SD: Tensor) -> Tensor:
        """The product for a few rows, without gradient; from the packed weight where there is one."""
        if self.packed is None:
            return F.linear(x_SD, self.weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise(x_SD, self.packed, self.bias, "none", [], "")


def can_pack(weight: Tensor) -> bool:
    """Whether oneDNN has kernels for packed weights of this dtype on this machine."""
    is_bf16_on_cpu = weight.dtype == torch.bfloat16 and weight.device.type == "cpu"
    return is_bf16_on_cpu and torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def swiglu_linear(gate_up_TI: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """linear(silu(gate) * up), shape (T, D). Of its activations only gate_up is kept (Shazeer 2020, SwiGLU)."""
    if not torch.is_grad_enabled():
        return F.linear(_gated(gate_up_TI), weight, bias)
    return _SwigluLinear.apply(gate_up_TI, weight, bias)


class _TiedEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token_ids_T: Tensor, weight_VD: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(token_ids_T)
        ctx.weight_shape = weight_VD.shape
        ctx.set_materialize_grads(False)
        return F.embedding(token_ids_T, weight_VD), weight_VD.view_as(weight_VD)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_TD: Tensor | None, grad_VD: Tensor | None
    ) -> tuple[None, Tensor | None]:
        if grad_TD is None:
            return None, grad_VD
        (token_ids_T,) = ctx.saved_tensors
        if grad_VD is None:
            grad_VD = grad_TD.new_zeros(ctx.weight_shape)
        elif not grad_VD.is_contiguous():  # not a tensor of its own
            grad_VD = grad_VD.contiguous()
        rows_U, place_T = token_ids_T.unique(return_inverse=True)
        sums_UD = grad_VD[rows_U].float().index_add_(0, place_T, grad_TD.float())
        grad_VD[rows_U] = sums_UD.to(grad_VD.dtype)
        return None, grad_VD


class _NormLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, norm_weight: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        ctx.save_for_backward(x_TD, norm_weight, weight)
        ctx.eps = eps
        return F.linear(_normed(x_TD, norm_weight, eps), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TE: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, norm_weight, weight = ctx.saved_tensors
        needs_x, needs_norm, needs_weight, needs_bias, _ = ctx.needs_input_grad
        dx = dnorm = dweight = None
        if needs_weight:
            dweight = grad_TE.T @ _normed(x_TD, norm_weight, ctx.eps)
        if needs_x or needs_norm:
            dx, dnorm = _rms_norm_gradients(grad_TE @ weight, x_TD, norm_weight, ctx.eps)
        return dx, dnorm, dweight, grad_TE.sum(0) if needs_bias else None, None


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return _normed(x, weight, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dx, dweight = _rms_norm_gradients(grad.flatten(0, -2), x.flatten(0, -2), weight, ctx.eps)
        return dx.view(x.shape), dweight, None


def _normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if native.has_kernels(x) and weight.dtype == x.dtype:
        return native.rms_norm(x.contiguous(), weight, eps)
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def _rms_norm_gradients(grad_TD: Tensor, x_TD: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(dx, dweight). Everything goes to one wide dtype first: operations on mixed ones are not vectorised."""
    if native.has_kernels(x_TD) and weight.dtype == x_TD.dtype:
        return native.rms_norm_backward(grad_TD.contiguous(), x_TD.contiguous(), weight, eps)
    wide = torch.float64 if x_TD.dtype == torch.float64 else torch.float32
    grad_TD, unit_TD = grad_TD.to(wide), x_TD.to(wide)
    inverse_T1 = unit_TD.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    unit_TD = unit_TD * inverse_T1  # x / rms(x)
    dweight = (grad_TD * unit_TD).sum(0)
    grad_TD = grad_TD * weight.to(wide)
    mean_T1 = (grad_TD * unit_TD).mean(-1, keepdim=True)
    dx = grad_TD.addcmul_(unit_TD, mean_T1, value=-1).mul_(inverse_T1)
    return dx.to(x_TD.dtype), dweight.to(weight.dtype)


def _gated(gate_up_TI: Tensor) -> Tensor:
    """silu(gate) * up."""
    if native.has_kernels(gate_up_TI):
        return native.swiglu(gate_up_TI)
    gate, up = gate_up_TI.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def _gated_gradients_(grad_TI: Tensor, gate_up_TI: Tensor) -> tuple[Tensor, Tensor]:
    """(silu(gate) * up, the gradient of gate_up); overwrites grad_TI, the gradient of the former."""
    if native.has_kernels(gate_up_TI):
        return grad_TI, native.swiglu_backward_(grad_TI, gate_up_TI)
    gate, up = gate_up_TI.chunk(2, dim=-1)
    silu = F.silu(gate)
    gated = silu * up
    dgate_up = torch.empty_like(gate_up_TI)
    dgate, dup = dgate_up.chunk(2, dim=-1)
    torch.mul(grad_TI, silu, out=dup)
    torch.ops.aten.silu_backward.grad_input(grad_TI.mul_(up), gate, grad_input=dgate)
    return gated, dgate_up


class _SwigluLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up_TI: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(gate_up_TI, weight)
        return F.linear(_gated(gate_up_TI), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        gate_up_TI, weight = ctx.saved_tensors
        needs_gate_up, needs_weight, needs_bias = ctx.needs_input_grad
        dgate_up = dweight = None
        if needs_gate_up:
            gated_TI, dgate_up = _gated_gradients_(grad_TD @ weight, gate_up_TI)
        elif needs_weight:
            gated_TI = _gated(gate_up_TI)
        if needs_weight:
            dweight = grad_TD.T @ gated_TI
        return dgate_up, dweight, grad_TD.sum(0) if needs_bias else None
