"""AdamW's two moments in one byte each: block-wise dynamic quantisation (Dettmers et al. 2022, arXiv 2110.02861)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor

from strop.native import kernels as native

BLOCK = 256
"""Entries that share one scale, the largest magnitude among them."""
MIN_ENTRIES = 4096
"""Smaller parameters (norms, biases) keep fp32 moments: there is nothing to gain."""

Moments = dict[str, Tensor]
"""step (); exp_avg and exp_avg_sq, uint8 in the parameter's shape; their _scale, fp32 (blocks,)."""


@cache
def code_values(*, is_signed: bool) -> Tensor:
    """The 256 numbers that the codes 0 to 255 stand for, ascending, as fractions of the block's largest magnitude.

    0, 1, and in every decade (10^(i-7), 10^(i-6)] for i in 0..6 the midpoints of 2^i equal intervals (section 1.3);
    negated as well where signed, twice as many where not. So relative precision is kept over seven decades.
    """
    decades = []
    for i in range(7):
        count = 2**i if is_signed else 2 ** (i + 1)
        middles = 0.1 + 0.9 * (torch.arange(count, dtype=torch.float64) + 0.5) / count
        decades.append(middles * 10.0 ** (i - 6))
    positive = torch.cat(decades)
    parts = [positive, torch.tensor([0.0, 1.0], dtype=torch.float64)]
    return torch.cat([-positive, *parts] if is_signed else parts).sort().values.float()


@cache
def code_bounds(*, is_signed: bool) -> Tensor:
    """(255,): x has the code `how many bounds are below x`, which is that of the nearest value.

    One exception: an unsigned number above 0 is never rounded down to 0. A second moment of 0 beside a first one that
    is not would make a step of m / eps.
    """
    values = code_values(is_signed=is_signed)
    bounds = (values[1:] + values[:-1]) / 2
    if not is_signed:
        bounds[0] = 0.0
    return bounds


def quantise(values: Tensor, *, is_signed: bool) -> tuple[Tensor, Tensor]:
    """(codes uint8 in the values' shape, scales fp32 (blocks,)); blocks run over the flattened values."""
    flat = values.reshape(-1)
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    scales = blocks.abs().amax(1)
    fractions = blocks / torch.where(scales == 0, 1.0, scales)[:, None]
    codes = torch.bucketize(fractions, code_bounds(is_signed=is_signed).to(values.device), out_int32=True)
    return codes.to(torch.uint8).view(-1)[: len(flat)].view(values.shape), scales


def dequantise(codes: Tensor, scales: Tensor, *, is_signed: bool) -> Tensor:
    """fp32, in the codes' shape."""
    fractions = code_values(is_signed=is_signed).to(codes.device)[codes.reshape(-1).int()]
    return fractions.mul_(scales.repeat_interleave(BLOCK)[: len(fractions)]).view(codes.shape)


def layout(parameter: Tensor) -> Moments:
    """Shapes and dtypes of a parameter's moments, on the meta device."""
    blocks = -(-parameter.numel() // BLOCK)
    return {
        "step": torch.empty((), device="meta"),
        "exp_avg": torch.empty(parameter.shape, dtype=torch.uint8, device="meta"),
        "exp_avg_sq": torch.empty(parameter.shape, dtype=torch.uint8, device="meta"),
        "exp_avg_scale": torch.empty(blocks, device="meta"),
        "exp_avg_sq_scale": torch.empty(blocks, device="meta"),
    }


def zeros(parameter: Tensor) -> Moments:
    """Moments before the first step. (With a scale of 0 every code is 0.)"""
    return {key: torch.zeros_like(tensor, device=parameter.device) for key, tensor in layout(parameter).items()} | {
        "step": torch.zeros(())
    }


@torch.no_grad()
def step_(
    master: Tensor,
    gradient: Tensor,
    moments: Mapping[str, Tensor],
    *,
    lr: float,
    grad_scale: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """One AdamW update of an fp32 master in torch: the moments are widened, updated, used, and only then rounded."""
    moments["step"].add_(1)
    step = int(moments["step"])
    gradient = gradient.float() * grad_scale
    mean = dequantise(moments["exp_avg"], moments["exp_avg_scale"], is_signed=True).lerp_(gradient, 1 - betas[0])
    square = dequantise(moments["exp_avg_sq"], moments["exp_avg_sq_scale"], is_signed=False)
    square.mul_(betas[1]).addcmul_(gradient, gradient, value=1 - betas[1])
    master.mul_(1 - lr * weight_decay)
    root = square.sqrt().div_((1 - betas[1] ** step) ** 0.5).add_(eps)
    master.addcdiv_(mean, root, value=-lr / (1 - betas[0] ** step))
    for key, values in (("exp_avg", mean), ("exp_avg_sq", square)):
        codes, scales = quantise(values, is_signed=key == "exp_avg")
        moments[key].copy_(codes)
        moments[f"{key}_scale"].copy_(scales)


def split_step_(
    parameter: Tensor,
    rest: Tensor,
    gradient: Tensor,
    moments: Mapping[str, Tensor],
    *,
    lr: float,
    grad_scale: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """step_ by the kernel, for a master that is a bf16 parameter and its int16 rest (SplitMaster)."""
    moments["step"].add_(1)
    native.adamw8_(
        parameter,
        rest,
        gradient,
        moments,
        _tables(),
        step=int(moments["step"]),
        grad_scale=grad_scale,
        lr=lr,
        betas=betas,
        eps=eps,
        weight_decay=weight_decay,
    )


@cache
def _tables() -> tuple[Tensor, ...]:
    """(values, bounds, first code) of the signed and then of the unsigned codes, for the kernel.

    first code: for the upper 16 bits of a float, the code of the smallest float that has them. No two bounds lie
    between floats with the same upper half, so that the code is this one or the next.
    """
    tables = []
    for is_signed in (True, False):
        bounds = code_bounds(is_signed=is_signed)
        upper = torch.arange(1 << 16, dtype=torch.int64)
        upper[(upper & 0x7F80) == 0x7F80] = 0  # inf and NaN do not occur
        ends = [((upper << 16) + low).to(torch.int32).view(torch.float32) for low in (0, 0xFFFF)]
        first = torch.bucketize(torch.minimum(*ends), bounds, out_int32=True)
        last = torch.bucketize(torch.maximum(*ends), bounds, out_int32=True)
        assert int((last - first).max()) <= 1
        padded = torch.cat([first.to(torch.uint8), torch.zeros(4, dtype=torch.uint8)])  # gathers read four bytes
        tables += [code_values(is_signed=is_signed), torch.cat([bounds, torch.tensor([torch.inf])]), padded]
    return tuple(tables)
