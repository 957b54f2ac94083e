"""Layers that keep less for their backward pass: what is cheap to compute again is computed again.

Per token and layer they leave the block's input, the rotated queries, keys and values, the attention's output and the
MLP's gate and up: about half of what autograd would keep. Values are those of the plain operations; in bf16 on a CPU
that has them, the kernels of strop.native round once where torch rounds after every operation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from strop.native import kernels as native
from strop.native.products import input_gradient, linear, weight_gradient

if TYPE_CHECKING:
    from strop.models.lora import Adapter


@dataclass(slots=True)
class Known:
    """A result that is there already: the operation that it is given to only prepares its backward pass."""

    value: Tensor


Lora = tuple[Tensor, Tensor]
"""(down_RD, up_ER): a low-rank addition to a product, x down^T up^T (lora.py)."""


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


def lora_linear(x_TD: Tensor, weight: Tensor, bias: Tensor | None, lora: Lora | None) -> Tensor:
    """x W^T + bias, and (x down^T) up^T on top where there is an adapter; shape (T, E). Keeps x, and x down^T."""
    down_RD, up_ER = lora or (None, None)
    if not torch.is_grad_enabled():
        return _lora_forward(x_TD, weight, bias, down_RD, up_ER)[0]
    return _Linear.apply(x_TD, weight, bias, down_RD, up_ER)


def norm_linear(
    x_TD: Tensor,
    norm_weight: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    lora: Lora | None = None,
    known: Known | None = None,
) -> Tensor:
    """lora_linear(rms_norm(x)), shape (T, E). Of its activations only x is kept, and x down^T."""
    assert known is None or lora is None
    if not torch.is_grad_enabled():
        return lora_linear(_normed(x_TD, norm_weight, eps), weight, bias, lora) if known is None else known.value
    return _NormLinear.apply(x_TD, norm_weight, weight, bias, eps, *(lora or (None, None)), known)


class Linear(nn.Linear):
    """nn.Linear that can lay its weight out once for many products with few rows (decoding).

    oneDNN arranges a bf16 weight for its kernel at every call; for a handful of rows that costs as much as the product.
    Values are the same to the bit.

    It can carry a LoRA adapter (lora.py). Products with many rows add it to the base's product; the packed copy, made
    anew for every rollout, has it merged in.
    """

    packed: Tensor | None = None
    arranged: Callable[[Tensor], Tensor] | None = None
    """The product from the copy that the C++ decode step has of the weight, while there is one (models/native.py)."""

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

    def infer(self, x_TD: Tensor) -> Tensor:
        """The product without gradient, the same to the bit; from an arranged weight where there is one."""
        return self.forward(x_TD) if self.arranged is None else self.arranged(x_TD)

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


def swiglu_linear(
    gate_up_TI: Tensor, weight: Tensor, bias: Tensor | None, lora: Lora | None = None, known: Known | None = None
) -> Tensor:
    """lora_linear(silu(gate) * up), shape (T, D). Of its activations only gate_up is kept (Shazeer 2020, SwiGLU)."""
    assert known is None or lora is None
    if not torch.is_grad_enabled():
        return lora_linear(gated(gate_up_TI), weight, bias, lora) if known is None else known.value
    return _SwigluLinear.apply(gate_up_TI, weight, bias, *(lora or (None, None)), known)


def recomputed_mlp(
    x_TD: Tensor,
    norm_weight: Tensor,
    gate_up_weight: Tensor,
    gate_up_bias: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
    eps: float,
    known: Known | None = None,
) -> Tensor:
    """swiglu_linear(norm_linear(x)), shape (T, D), to the bit. Of its activations only x is kept; gate and up, several
    times as large, cost one product more in the backward pass."""
    if not torch.is_grad_enabled():
        if known is not None:
            return known.value
        return lora_linear(
            gated(lora_linear(_normed(x_TD, norm_weight, eps), gate_up_weight, gate_up_bias, None)),
            down_weight, down_bias, None,
        )  # fmt: skip
    return _RecomputedMLP.apply(x_TD, norm_weight, gate_up_weight, gate_up_bias, down_weight, down_bias, eps, known)


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
    def forward(
        ctx: Any,
        x_TD: Tensor,
        norm_weight: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        eps: float,
        down_RD: Tensor | None,
        up_ER: Tensor | None,
        known: Known | None,
    ) -> Tensor:
        if known is None:
            y_TE = _room_for_product(x_TD, weight)
            normed_TD = _normed(x_TD, norm_weight, eps)
            y_TE, inner_TR = _lora_forward(normed_TD, weight, bias, down_RD, up_ER, out=y_TE)
        else:
            y_TE, inner_TR = known.value, None
        ctx.save_for_backward(x_TD, norm_weight, weight, down_RD, up_ER, inner_TR)
        ctx.eps = eps
        return y_TE

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TE: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, norm_weight, weight, down_RD, up_ER, inner_TR = ctx.saved_tensors
        needs_x, needs_norm, needs_weight, needs_bias, _, needs_down, *_ = ctx.needs_input_grad
        dx = dnorm = normed_TD = None
        dweight = torch.empty_like(weight) if needs_weight else None  # first, as in _room_for_product
        if needs_weight or needs_down:
            normed_TD = _normed(x_TD, norm_weight, ctx.eps)
        if dweight is not None and normed_TD is not None:
            weight_gradient(grad_TE, normed_TD, out=dweight)
        dinner, ddown, dup = _lora_backward(grad_TE, normed_TD, down_RD, up_ER, inner_TR)
        if needs_x or needs_norm:
            dnormed = input_gradient(grad_TE, weight)
            if dinner is not None:
                dnormed.addmm_(dinner, down_RD)
            dx, dnorm = _rms_norm_gradients(dnormed, x_TD, norm_weight, ctx.eps)
        return dx, dnorm, dweight, grad_TE.sum(0) if needs_bias else None, None, ddown, dup, None


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, weight: Tensor, bias: Tensor | None, down_RD: Tensor | None, up_ER: Tensor | None
    ) -> Tensor:
        y_TE, inner_TR = _lora_forward(x_TD, weight, bias, down_RD, up_ER)
        ctx.save_for_backward(x_TD, weight, down_RD, up_ER, inner_TR)
        return y_TE

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TE: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, weight, down_RD, up_ER, inner_TR = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, needs_down, _ = ctx.needs_input_grad
        dinner, ddown, dup = _lora_backward(grad_TE, x_TD if needs_down else None, down_RD, up_ER, inner_TR)
        dx = None
        if needs_x:
            dx = input_gradient(grad_TE, weight)
            if dinner is not None and down_RD is not None:
                dx.addmm_(dinner, down_RD)
        dweight = weight_gradient(grad_TE, x_TD) if needs_weight else None
        return dx, dweight, grad_TE.sum(0) if needs_bias else None, ddown, dup


def _room_for_product(x_TD: Tensor, weight: Tensor) -> Tensor:
    """Where x W^T will go. Taken from the heap before what is let go sooner, so that no hole is left below it."""
    return x_TD.new_empty(x_TD.shape[0], weight.shape[0])


def _product(x_TD: Tensor, weight: Tensor, bias: Tensor | None, *, out: Tensor | None = None) -> Tensor:
    """x W^T + bias, into `out` where it is given."""
    if out is None:
        out = _room_for_product(x_TD, weight)
    return linear(x_TD, weight, bias, out=out)


def _lora_forward(
    x_TD: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down_RD: Tensor | None,
    up_ER: Tensor | None,
    *,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(lora_linear, in `out` where it is given; x down^T)."""
    y_TE = _product(x_TD, weight, bias, out=out)
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


def gated(gate_up_TI: Tensor) -> Tensor:
    """silu(gate) * up."""
    if native.has_kernels(gate_up_TI):
        return native.swiglu(gate_up_TI)
    gate, up = gate_up_TI.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def _gated_gradients_(grad_TI: Tensor, gate_up_TI: Tensor, *, is_last_use: bool = False) -> tuple[Tensor, Tensor]:
    """(silu(gate) * up, the gradient of gate_up); overwrites grad_TI, the gradient of the former.

    is_last_use: gate_up may be overwritten as well.
    """
    if native.has_kernels(gate_up_TI):
        return grad_TI, native.swiglu_backward_(grad_TI, gate_up_TI, in_place=is_last_use)
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
    def forward(
        ctx: Any,
        gate_up_TI: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        down_RI: Tensor | None,
        up_DR: Tensor | None,
        known: Known | None,
    ) -> Tensor:
        if known is None:
            y_TD = _room_for_product(gate_up_TI, weight)
            y_TD, inner_TR = _lora_forward(gated(gate_up_TI), weight, bias, down_RI, up_DR, out=y_TD)
        else:
            y_TD, inner_TR = known.value, None
        ctx.save_for_backward(gate_up_TI, weight, down_RI, up_DR, inner_TR)
        return y_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        gate_up_TI, weight, down_RI, up_DR, inner_TR = ctx.saved_tensors
        needs_gate_up, needs_weight, needs_bias, needs_down, *_ = ctx.needs_input_grad
        dgate_up = gated_TI = None
        dweight = torch.empty_like(weight) if needs_weight else None  # first, as in _room_for_product
        if needs_gate_up:
            grad_TI = input_gradient(grad_TD, weight)
            if up_DR is not None:
                grad_TI.addmm_(grad_TD @ up_DR, down_RI)
            gated_TI, dgate_up = _gated_gradients_(grad_TI, gate_up_TI)
        elif needs_weight or needs_down:
            gated_TI = gated(gate_up_TI)
        if dweight is not None and gated_TI is not None:
            weight_gradient(grad_TD, gated_TI, out=dweight)
        _, ddown, dup = _lora_backward(grad_TD, gated_TI if needs_down else None, down_RI, up_DR, inner_TR)
        return dgate_up, dweight, grad_TD.sum(0) if needs_bias else None, ddown, dup, None


class _RecomputedMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        norm_weight: Tensor,
        gate_up_weight: Tensor,
        gate_up_bias: Tensor | None,
        down_weight: Tensor,
        down_bias: Tensor | None,
        eps: float,
        known: Known | None,
    ) -> Tensor:
        ctx.save_for_backward(x_TD, norm_weight, gate_up_weight, gate_up_bias, down_weight)
        ctx.eps = eps
        if known is not None:
            return known.value
        y_TD = _room_for_product(x_TD, down_weight)
        gate_up_TI = _product(_normed(x_TD, norm_weight, eps), gate_up_weight, gate_up_bias)
        return _product(gated(gate_up_TI), down_weight, down_bias, out=y_TD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, norm_weight, gate_up_weight, gate_up_bias, down_weight = ctx.saved_tensors
        _, _, needs_gate_up, needs_gate_up_bias, needs_down, needs_down_bias, *_ = ctx.needs_input_grad
        ddown = torch.empty_like(down_weight) if needs_down else None
        dgate_up = torch.empty_like(gate_up_weight) if needs_gate_up else None
        normed_TD = _normed(x_TD, norm_weight, ctx.eps)
        gate_up_TI = _product(normed_TD, gate_up_weight, gate_up_bias)
        gated_TI, dgate_up_TI = _gated_gradients_(input_gradient(grad_TD, down_weight), gate_up_TI, is_last_use=True)
        del gate_up_TI
        if ddown is not None:
            weight_gradient(grad_TD, gated_TI, out=ddown)
        del gated_TI
        if dgate_up is not None:
            weight_gradient(dgate_up_TI, normed_TD, out=dgate_up)
        dx, dnorm = _rms_norm_gradients(input_gradient(dgate_up_TI, gate_up_weight), x_TD, norm_weight, ctx.eps)
        return (
            dx,
            dnorm,
            dgate_up,
            dgate_up_TI.sum(0) if needs_gate_up_bias else None,
            ddown,
            grad_TD.sum(0) if needs_down_bias else None,
            None,
            None,
        )
