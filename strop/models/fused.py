"""Layers that keep less for their backward pass: what is cheap to compute again is computed again.

Per token and layer they leave the block's input, the rotated queries, keys and values, the attention's output and the
MLP's gate and up: about half of what autograd would keep. Values are those of the plain operations.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from strop.models.lora import Adapter

Lora = tuple[Tensor, Tensor]
"""(down_RD, up_ER): a low-rank addition to a product, x down^T up^T (lora.py)."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension, the mean of squares in float32 (Zhang and Sennrich 2019, eq. 4).

    Only x is kept.
    """
    if not torch.is_grad_enabled():
        return F.rms_norm(x, (x.shape[-1],), weight, eps)
    return _RMSNorm.apply(x, weight, eps)


def lora_linear(x_TD: Tensor, weight: Tensor, bias: Tensor | None, lora: Lora | None) -> Tensor:
    """x W^T + bias, and (x down^T) up^T on top where there is an adapter; shape (T, E)."""
    y_TE = F.linear(x_TD, weight, bias)
    return y_TE if lora is None else y_TE.addmm_(x_TD @ lora[0].T, lora[1].T)


def norm_linear(
    x_TD: Tensor, norm_weight: Tensor, weight: Tensor, bias: Tensor | None, eps: float, lora: Lora | None = None
) -> Tensor:
    """lora_linear(rms_norm(x)), shape (T, E). Of its activations only x is kept, and x down^T."""
    if not torch.is_grad_enabled():
        return lora_linear(F.rms_norm(x_TD, (x_TD.shape[-1],), norm_weight, eps), weight, bias, lora)
    return _NormLinear.apply(x_TD, norm_weight, weight, bias, eps, *(lora or (None, None)))


class Linear(nn.Linear):
    """nn.Linear that can lay its weight out once for many products with few rows (decoding).

    oneDNN arranges a bf16 weight for its kernel at every call; for a handful of rows that costs as much as the product.
    Values are the same to the bit.

    It can carry a LoRA adapter (lora.py). Products with many rows add it to the base's product; the packed copy, made
    anew for every rollout, has it merged in.
    """

    packed: Tensor | None = None

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias)
        self.adapter: Adapter | None = None

    def lora(self) -> Lora | None:
        """The adapter's matrices for one forward pass, in the weight's dtype."""
        return None if self.adapter is None else self.adapter.matrices(self.weight.dtype)

    def merged_weight(self) -> Tensor:
        """The weight with the adapter in it, a new tensor; without an adapter the weight itself."""
        return self.weight.detach() if self.adapter is None else self.adapter.merged(self.weight)

    def forward(self, input: Tensor) -> Tensor:
        return lora_linear(input, self.weight, self.bias, self.lora())

    def pack(self, num_rows: int) -> None:
        """Keep a second copy of the weight, arranged for about num_rows rows. It does not follow updates.

        Where oneDNN has no arrangement for it, the copy is as plain as the weight, and of use for an adapter only.
        """
        weight = self.merged_weight()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, num_rows) if can_pack(weight) else weight

    def unpack(self) -> None:
        self.packed = None

    def decode(self, x_SD: Tensor) -> Tensor:
        """The product for a few rows, without gradient; from the packed weight where there is one."""
        if self.packed is None:
            return lora_linear(x_SD, self.weight, self.bias, self.lora())
        if not self.packed.is_mkldnn:
            return F.linear(x_SD, self.packed, self.bias)
        return torch.ops.mkldnn._linear_pointwise(x_SD, self.packed, self.bias, "none", [], "")


def can_pack(weight: Tensor) -> bool:
    """Whether oneDNN has kernels for packed weights of this dtype on this machine."""
    is_bf16_on_cpu = weight.dtype == torch.bfloat16 and weight.device.type == "cpu"
    return is_bf16_on_cpu and torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def swiglu_linear(gate_up_TI: Tensor, weight: Tensor, bias: Tensor | None, lora: Lora | None = None) -> Tensor:
    """lora_linear(silu(gate) * up), shape (T, D). Of its activations only gate_up is kept (Shazeer 2020, SwiGLU)."""
    if not torch.is_grad_enabled():
        gate, up = gate_up_TI.chunk(2, dim=-1)
        return lora_linear(F.silu(gate) * up, weight, bias, lora)
    return _SwigluLinear.apply(gate_up_TI, weight, bias, *(lora or (None, None)))


class _NormLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        norm_weight: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        eps: float,
        down_RD: Tensor | None,
        up_ER: Tensor | None,
    ) -> Tensor:
        normed_TD = F.rms_norm(x_TD, (x_TD.shape[-1],), norm_weight, eps)
        y_TE, inner_TR = _lora_forward(normed_TD, weight, bias, down_RD, up_ER)
        ctx.save_for_backward(x_TD, norm_weight, weight, down_RD, up_ER, inner_TR)
        ctx.eps = eps
        return y_TE

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TE: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, norm_weight, weight, down_RD, up_ER, inner_TR = ctx.saved_tensors
        needs_x, needs_norm, needs_weight, needs_bias, _, needs_down, _ = ctx.needs_input_grad
        dx = dnorm = dweight = normed_TD = None
        if needs_weight or needs_down:
            normed_TD = F.rms_norm(x_TD, (x_TD.shape[-1],), norm_weight, ctx.eps)
            dweight = grad_TE.T @ normed_TD if needs_weight else None
        dinner, ddown, dup = _lora_backward(grad_TE, normed_TD, down_RD, up_ER, inner_TR)
        if needs_x or needs_norm:
            dnormed = grad_TE @ weight
            if dinner is not None:
                dnormed.addmm_(dinner, down_RD)
            dx, dnorm = _rms_norm_gradients(dnormed, x_TD, norm_weight, ctx.eps)
        return dx, dnorm, dweight, grad_TE.sum(0) if needs_bias else None, None, ddown, dup


def _lora_forward(
    x_TD: Tensor, weight: Tensor, bias: Tensor | None, down_RD: Tensor | None, up_ER: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """(lora_linear, x down^T)."""
    y_TE = F.linear(x_TD, weight, bias)
    if down_RD is None or up_ER is None:
        return y_TE, None
    inner_TR = x_TD @ down_RD.T
    return y_TE.addmm_(inner_TR, up_ER.T), inner_TR


def _lora_backward(
    grad_TE: Tensor, x_TD: Tensor | None, down_RD: Tensor | None, up_ER: Tensor | None, inner_TR: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(d inner, d down, d up); d x gains d inner @ down. x is None where down takes no gradient."""
    if down_RD is None or up_ER is None or inner_TR is None:
        return None, None, None
    dinner_TR = grad_TE @ up_ER
    return dinner_TR, None if x_TD is None else dinner_TR.T @ x_TD, grad_TE.T @ inner_TR


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return F.rms_norm(x, (x.shape[-1],), weight, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dx, dweight = _rms_norm_gradients(grad.flatten(0, -2), x.flatten(0, -2), weight, ctx.eps)
        return dx.view(x.shape), dweight, None


def _rms_norm_gradients(grad_TD: Tensor, x_TD: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(dx, dweight). Everything goes to one wide dtype first: operations on mixed ones are not vectorised."""
    wide = torch.float64 if x_TD.dtype == torch.float64 else torch.float32
    grad_TD, unit_TD = grad_TD.to(wide), x_TD.to(wide)
    inverse_T1 = unit_TD.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    unit_TD = unit_TD * inverse_T1  # x / rms(x)
    dweight = (grad_TD * unit_TD).sum(0)
    grad_TD = grad_TD * weight.to(wide)
    mean_T1 = (grad_TD * unit_TD).mean(-1, keepdim=True)
    dx = grad_TD.addcmul_(unit_TD, mean_T1, value=-1).mul_(inverse_T1)
    return dx.to(x_TD.dtype), dweight.to(weight.dtype)


class _SwigluLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        gate_up_TI: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        down_RI: Tensor | None,
        up_DR: Tensor | None,
    ) -> Tensor:
        gate, up = gate_up_TI.chunk(2, dim=-1)
        y_TD, inner_TR = _lora_forward(F.silu(gate).mul_(up), weight, bias, down_RI, up_DR)
        ctx.save_for_backward(gate_up_TI, weight, down_RI, up_DR, inner_TR)
        return y_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        gate_up_TI, weight, down_RI, up_DR, inner_TR = ctx.saved_tensors
        needs_gate_up, needs_weight, needs_bias, needs_down, _ = ctx.needs_input_grad
        gate, up = gate_up_TI.chunk(2, dim=-1)
        silu = F.silu(gate)
        dgate_up = dweight = product_TI = None
        if needs_weight or needs_down:
            product_TI = silu * up
            dweight = grad_TD.T @ product_TI if needs_weight else None
        dinner, ddown, dup = _lora_backward(grad_TD, product_TI, down_RI, up_DR, inner_TR)
        if needs_gate_up:
            grad_TI = grad_TD @ weight
            if dinner is not None:
                grad_TI.addmm_(dinner, down_RI)
            dgate_up = torch.empty_like(gate_up_TI)
            dgate, dup_half = dgate_up.chunk(2, dim=-1)
            torch.mul(grad_TI, silu, out=dup_half)
            torch.ops.aten.silu_backward.grad_input(grad_TI.mul_(up), gate, grad_input=dgate)
        return dgate_up, dweight, grad_TD.sum(0) if needs_bias else None, ddown, dup
