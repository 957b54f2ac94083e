"""The fused layers with an adapter: float64 gradcheck, and the definition of LoRA as the second opinion."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from strop.models.fused import lora_linear, norm_linear, swiglu_linear
from strop.models.lora import Adapter, AdapterPart

EPS = 1e-2


def leaf(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()


def adapter() -> Adapter:
    """Rows [2, 5) and [7, 9) of 10 are adapted, with different ranks; the others are not."""
    parts = {
        "late": AdapterPart(leaf(1, 6, seed=10), leaf(2, 1, seed=11), start=7, scale=0.7),
        "early": AdapterPart(leaf(2, 6, seed=12), leaf(3, 2, seed=13), start=2, scale=1.5),
    }
    return Adapter(parts, out_features=10)


def change(A: Tensor, B: Tensor, late_A: Tensor, late_B: Tensor) -> Tensor:
    """The definition: what is added to the weight."""
    rows = [torch.zeros(2, 6), 1.5 * B @ A, torch.zeros(2, 6), 0.7 * late_B @ late_A, torch.zeros(1, 6)]
    return torch.cat([row.double() for row in rows])


@pytest.mark.parametrize("is_frozen", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
def test_norm_linear(is_frozen: bool, has_bias: bool) -> None:
    x, norm, weight = leaf(5, 6, seed=0), leaf(6, seed=1), leaf(10, 6, seed=2)
    bias = leaf(10, seed=3) if has_bias else None
    for tensor in (norm, weight, bias):
        if tensor is not None:
            tensor.requires_grad_(not is_frozen)
    ours = adapter()
    early, late = ours.parts()["early"], ours.parts()["late"]
    adapters = (early.A, early.B, late.A, late.B)

    def fused(x: Tensor, *_: Tensor) -> Tensor:
        return norm_linear(x, norm, weight, bias, EPS, ours.matrices(torch.float64))

    assert torch.autograd.gradcheck(fused, (x, *adapters))
    rms = (x.square().mean(-1, keepdim=True) + EPS).sqrt()
    expected = F.linear(x / rms * norm, weight + change(*adapters), bias)
    torch.testing.assert_close(fused(x), expected)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), expected)
    wanted = [tensor for tensor in (x, *adapters, norm, weight, bias) if tensor is not None and tensor.requires_grad]
    ours_now = torch.autograd.grad(fused(x).square().sum(), wanted)
    for found, gradient in zip(ours_now, torch.autograd.grad(expected.square().sum(), wanted), strict=True):
        torch.testing.assert_close(found, gradient)


@pytest.mark.parametrize("is_frozen", [False, True])
def test_swiglu_linear(is_frozen: bool) -> None:
    gate_up, weight = leaf(5, 12, seed=0), leaf(10, 6, seed=1).requires_grad_(not is_frozen)
    ours = adapter()
    early, late = ours.parts()["early"], ours.parts()["late"]
    adapters = (early.A, early.B, late.A, late.B)

    def fused(gate_up: Tensor, *_: Tensor) -> Tensor:
        return swiglu_linear(gate_up, weight, None, ours.matrices(torch.float64))

    assert torch.autograd.gradcheck(fused, (gate_up, *adapters))
    gate, up = gate_up.chunk(2, dim=-1)
    expected = F.linear(F.silu(gate) * up, weight + change(*adapters))
    torch.testing.assert_close(fused(gate_up), expected)
    wanted = [tensor for tensor in (gate_up, *adapters, weight) if tensor.requires_grad]
    ours_now = torch.autograd.grad(fused(gate_up).square().sum(), wanted)
    for found, gradient in zip(ours_now, torch.autograd.grad(expected.square().sum(), wanted), strict=True):
        torch.testing.assert_close(found, gradient)


def test_plain_linear() -> None:
    x, weight = leaf(5, 6, seed=0), leaf(10, 6, seed=1)
    ours = adapter()
    early, late = ours.parts()["early"], ours.parts()["late"]
    adapters = (early.A, early.B, late.A, late.B)
    assert torch.autograd.gradcheck(
        lambda x, weight, *_: lora_linear(x, weight, None, ours.matrices(torch.float64)), (x, weight, *adapters)
    )
    expected = F.linear(x, weight + change(*adapters))
    torch.testing.assert_close(lora_linear(x, weight, None, ours.matrices(torch.float64)), expected)
    torch.testing.assert_close(ours.merged(weight), weight.detach() + change(*adapters).detach())
