"""What an optimiser step must not depend on, and must not touch."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from strop.optim import AdamW, optimizer_step


def make_model(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)).to(dtype)


def loss_sum(model: nn.Module, rows: Tensor) -> Tensor:
    return (model(rows[:, :6]) - rows[:, 6:]).float().square().sum()


def snapshot(model: nn.Module, optimizer: AdamW) -> dict[str, Tensor]:
    return {key: value.detach().clone() for key, value in {**model.state_dict(), **optimizer.state_dict()}.items()}


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for key, value in left.items():
        assert torch.equal(value, right[key]), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eight_micro_batches_equal_one_batch(dtype):
    rows = torch.randn(8, 9, generator=torch.Generator().manual_seed(0)).to(dtype)
    gradients = []
    for num_micro in (1, 8):
        model = make_model(dtype)
        optimizer = AdamW(model.named_parameters())
        for micro in rows.chunk(num_micro):
            (loss_sum(model, micro) / 8).backward()
        gradients.append(torch.cat([g.flatten() for g in optimizer.gradients()]))
    # One bf16 gradient is rounded to 8 bits by autograd itself before anyone can add it up in fp32.
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2
    scale = gradients[0].abs().max().item()
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=tolerance * scale)


def test_low_precision_gradients_add_up_in_fp32():
    """4096 gradients of 1/256: in bf16 the sum stops growing at 1, since 1 + 1/256 rounds back to 1."""
    parameter = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    optimizer = AdamW([("w", parameter)])
    for _ in range(4096):
        (parameter * (1 / 256)).sum().backward()
    assert torch.equal(optimizer.gradients()[0], torch.full((2,), 16.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_non_finite_gradient_changes_nothing(dtype, poison):
    model = make_model(dtype)
    optimizer = AdamW(model.named_parameters(), weight_decay=0.1)
    rows = torch.randn(4, 9, generator=torch.Generator().manual_seed(1)).to(dtype)
    loss_sum(model, rows).backward()
    assert not optimizer_step(optimizer, lr=1e-2, max_grad_norm=1.0).is_skipped
    before = snapshot(model, optimizer)
    loss_sum(model, rows).backward()
    optimizer.gradients()[-1][0] = poison
    report = optimizer_step(optimizer, lr=1e-2, max_grad_norm=1.0)
    assert report.is_skipped and not math.isfinite(report.grad_norm)
    assert_same(snapshot(model, optimizer), before)
    # The poison is gone with its step: the next one is as if it had never been.
    other = make_model(dtype)
    other_optimizer = AdamW(other.named_parameters(), weight_decay=0.1)
    for _ in range(2):
        loss_sum(other, rows).backward()
        optimizer_step(other_optimizer, lr=1e-2, max_grad_norm=1.0)
    loss_sum(model, rows).backward()
    assert not optimizer_step(optimizer, lr=1e-2, max_grad_norm=1.0).is_skipped
    assert_same(snapshot(model, optimizer), snapshot(other, other_optimizer))


def test_a_step_without_gradients_is_skipped():
    model = make_model(torch.float32)
    optimizer = AdamW(model.named_parameters(), weight_decay=0.1)
    before = snapshot(model, optimizer)
    report = optimizer_step(optimizer, lr=1e-2, max_grad_norm=1.0)
    assert report.is_skipped and report.grad_norm == 0.0
    assert_same(snapshot(model, optimizer), before)


def test_max_grad_norm_zero_is_refused():
    with pytest.raises(ValueError, match="max_grad_norm"):
        optimizer_step(AdamW(make_model(torch.float32).named_parameters()), lr=1.0, max_grad_norm=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_survives_safetensors_bit_for_bit(dtype):
    """Half the steps, state to bytes and into fresh objects, the other half: the same as all steps in one go."""

    def run(model: nn.Module, optimizer: AdamW, steps: range) -> None:
        for step in steps:
            rows = torch.randn(4, 9, generator=torch.Generator().manual_seed(step)).to(dtype)
            loss_sum(model, rows).backward()
            optimizer_step(optimizer, lr=1e-2 / (1 + step), max_grad_norm=1.0)

    whole = make_model(dtype)
    whole_optimizer = AdamW(whole.named_parameters(), weight_decay=0.1)
    run(whole, whole_optimizer, range(10))

    first = make_model(dtype)
    first_optimizer = AdamW(first.named_parameters(), weight_decay=0.1)
    run(first, first_optimizer, range(5))
    weights, state = save(first.state_dict()), save(dict(first_optimizer.state_dict()))
    second = make_model(dtype)
    second_optimizer = AdamW(second.named_parameters(), weight_decay=0.1)
    second.load_state_dict(load(weights))
    second_optimizer.load_state_dict(load(state))
    run(second, second_optimizer, range(5, 10))
    assert_same(snapshot(second, second_optimizer), snapshot(whole, whole_optimizer))


def test_loading_copies():
    model = make_model(torch.bfloat16)
    optimizer = AdamW(model.named_parameters())
    loss_sum(model, torch.ones(2, 9, dtype=torch.bfloat16)).backward()
    optimizer_step(optimizer, lr=1e-2, max_grad_norm=1.0)
    twin = copy.deepcopy(model)
    state = {key: value.clone() for key, value in optimizer.state_dict().items()}
    twin_optimizer = AdamW(twin.named_parameters())
    twin_optimizer.load_state_dict(state)
    for tensor in state.values():
        tensor.fill_(7)
    assert_same(snapshot(twin, twin_optimizer), snapshot(model, optimizer))


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("exp_avg_sq.0.weight", "remove", "exp_avg_sq.0.weight is missing"),
        ("master.2.bias", "remove", "master.2.bias is missing"),
        ("exp_avg.9.weight", "add", "exp_avg.9.weight is not known"),
        ("exp_avg.0.weight", "shape", r"exp_avg.0.weight is torch.float32 \[1\]"),
        ("master.0.weight", "dtype", "master.0.weight is torch.float64"),
    ],
)
def test_a_state_of_another_model_is_refused_whole(key, change, message):
    model = make_model(torch.bfloat16)
    optimizer = AdamW(model.named_parameters())
    loss_sum(model, torch.ones(2, 9, dtype=torch.bfloat16)).backward()
    optimizer_step(optimizer, lr=1e-2, max_grad_norm=1.0)
    state = {name: value.clone() + 1 for name, value in optimizer.state_dict().items()}
    if change == "remove":
        del state[key]
    elif change == "dtype":
        state[key] = state[key].double()
    else:
        state[key] = torch.zeros(1)
    before = snapshot(model, optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    assert_same(snapshot(model, optimizer), before)


def test_frozen_parameters_are_left_alone():
    model = make_model(torch.float32)
    model[0].requires_grad_(False)  # type: ignore[union-attr]
    before = copy.deepcopy(model[0].state_dict())  # type: ignore[union-attr]
    optimizer = AdamW(model.named_parameters(), weight_decay=0.5)
    loss_sum(model, torch.ones(2, 9)).backward()
    optimizer_step(optimizer, lr=0.1, max_grad_norm=1.0)
    assert_same(before, model[0].state_dict())  # type: ignore[union-attr]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"):
        AdamW(model.named_parameters())
