"""strop.optim.AdamW against torch.optim.AdamW, which it must equal in fp32 and follow in bf16."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from torch import Tensor, nn

from strop.optim import AdamW, optimizer_step


def make_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 24), nn.LayerNorm(24), nn.GELU(), nn.Linear(24, 5))


def make_inputs(step: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(step)
    inputs = torch.randn(16, 12, generator=random).to(dtype)
    return inputs, torch.randint(0, 5, (16,), generator=random)


def backward(model: nn.Module, step: int) -> None:
    dtype = next(model.parameters()).dtype
    inputs, labels = make_inputs(step, dtype)
    nn.functional.cross_entropy(model(inputs).float(), labels).backward()


def torch_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


@pytest.mark.parametrize("is_fused", [True, False])
def test_fp32_equals_torch(is_fused):
    ours = make_model()
    theirs = copy.deepcopy(ours)
    optimizer = AdamW(ours.named_parameters(), betas=(0.9, 0.95), eps=1e-7, weight_decay=0.1)
    oracle = torch.optim.AdamW(
        torch_groups(theirs, 0.1), lr=0.0, betas=(0.9, 0.95), eps=1e-7, fused=is_fused, foreach=False
    )
    for step in range(30):
        lr = 1e-2 / (1 + step)
        backward(ours, step)
        optimizer.step(lr=lr)
        optimizer.zero_grad()
        backward(theirs, step)
        for group in oracle.param_groups:
            group["lr"] = lr
        oracle.step()
        oracle.zero_grad()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        if is_fused:
            assert torch.equal(mine, other)
        else:  # the unfused kernel rounds in another order
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


def test_weight_decay_spares_norms_and_biases():
    model = make_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = AdamW(model.named_parameters(), weight_decay=0.5)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step(lr=0.1)
    for name, parameter in model.named_parameters():
        expected = before[name] * (1 - 0.1 * 0.5) if parameter.ndim == 2 else before[name]
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-6, atol=0)


def test_bf16_with_masters_follows_fp32_and_without_does_not():
    """At lr 1e-6 an update is far below a bf16 ulp of most weights. Fixed gradients: only the optimizer differs."""
    torch.manual_seed(1)
    start = (torch.randn(64, 64) * 0.5).bfloat16()
    gradients = [torch.randn(64, 64).mul(0.1).add(0.05).bfloat16() for _ in range(200)]

    def train(parameter: nn.Parameter, step_once, take_gradient) -> None:
        for gradient in gradients:
            take_gradient(parameter, gradient)
            step_once()

    exact = nn.Parameter(start.float())
    oracle = torch.optim.AdamW([exact], lr=1e-6, weight_decay=0.0)
    train(exact, oracle.step, lambda p, g: setattr(p, "grad", g.float()))

    ours = nn.Parameter(start.clone())
    optimizer = AdamW([("w", ours)])
    train(
        ours,
        lambda: optimizer_step(optimizer, lr=1e-6, max_grad_norm=float("inf")),
        lambda p, g: (p * g).sum().backward(),
    )

    naive = nn.Parameter(start.clone())
    naive_optimizer = torch.optim.AdamW([naive], lr=1e-6, weight_decay=0.0)
    train(naive, naive_optimizer.step, lambda p, g: setattr(p, "grad", g.clone()))

    moved = exact.detach() - start.float()
    master = optimizer.state_dict()["master.w"]
    torch.testing.assert_close(master, exact.detach(), rtol=0, atol=1e-8)
    assert torch.equal(ours.detach(), exact.detach().bfloat16())
    is_lost = naive.detach() == start
    assert moved.abs().min() > 1e-6, "every weight has moved in fp32"
    assert is_lost.float().mean() > 0.9, "the control: without masters the updates are rounded away"


def test_norm_of_a_large_tensor_is_exact():
    """torch's own norm of a CPU tensor of this size is 0.1 % off; the oracle is a float64 sum."""
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.zeros(20_000_000))
    parameter.grad = torch.randn(20_000_000).mul_(1e-3).add_(5e-4)
    exact = parameter.grad.double().square().sum().sqrt().item()
    assert AdamW([("w", parameter)]).grad_norm() == pytest.approx(exact, rel=1e-6)


def test_clipping_equals_torch():
    ours = make_model()
    theirs = copy.deepcopy(ours)
    optimizer = AdamW(ours.named_parameters(), eps=1e-3)
    oracle = torch.optim.AdamW(theirs.parameters(), lr=1e-2, weight_decay=0.0, eps=1e-3)
    backward(ours, 0)
    report = optimizer_step(optimizer, lr=1e-2, max_grad_norm=0.1)
    backward(theirs, 0)
    norm = nn.utils.clip_grad_norm_(theirs.parameters(), 0.1).item()
    oracle.step()
    assert norm > 0.2 and report.grad_norm == pytest.approx(norm, rel=1e-6) and not report.is_skipped
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)


def test_tied_parameters_count_once():
    embedding = nn.Embedding(7, 4)
    head = nn.Linear(4, 7, bias=False)
    head.weight = embedding.weight
    named = [("embedding.weight", embedding.weight), ("head.weight", head.weight)]
    optimizer = AdamW(named)
    head(embedding(torch.tensor([1, 2]))).square().sum().backward()
    gradient = embedding.weight.grad
    assert gradient is not None
    assert optimizer.grad_norm() == pytest.approx(gradient.norm().item(), rel=1e-6)
    optimizer.step(lr=0.1)
    assert {key for key in optimizer.state_dict() if "head" in key} == set()


def test_low_precision_gradients_are_freed_by_backward_and_the_buffers_by_the_step():
    model = make_model().bfloat16()
    optimizer = AdamW(model.named_parameters())
    backward(model, 0)
    assert all(p.grad is None for p in model.parameters())
    assert [g.dtype for g in optimizer.gradients()] == [torch.float32] * 6
    optimizer_step(optimizer, lr=1e-3, max_grad_norm=1.0)
    assert optimizer.gradients() == []


def test_a_dropped_optimizer_no_longer_takes_gradients():
    model = make_model().bfloat16()
    first = AdamW(model.named_parameters())
    del first
    gc.collect()
    second = AdamW(model.named_parameters())
    backward(model, 0)
    assert len(second.gradients()) == 6
