"""8-bit moments against a plain definition: every code tried for every number, AdamW entry by entry in float64."""

import math

import pytest
import torch
from torch import nn

from strop.native import kernels as native
from strop.optim import AdamW, OptimizerConfig, eight_bit, optimizer_step

has_kernels = pytest.mark.skipif(not native.has_kernels(torch.zeros(1, dtype=torch.bfloat16)), reason="no kernels here")


def random(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def plain_values(is_signed):
    """The definition, number by number."""
    values = [0.0, 1.0]
    for exponent in range(7):
        intervals = 2**exponent * (1 if is_signed else 2)
        for i in range(intervals):
            value = 10.0 ** (exponent - 6) * (0.1 + 0.9 * (i + 0.5) / intervals)
            values += [value, -value] if is_signed else [value]
    return sorted(values)


@pytest.mark.parametrize("is_signed", [True, False])
def test_codes_are_those_of_the_nearest_value(is_signed):
    numbers = random(5, 123, seed=0).double() * torch.logspace(-9, 2, 123, dtype=torch.float64)
    numbers = (numbers if is_signed else numbers.square()).float()
    codes, scales = eight_bit.quantise(numbers, is_signed=is_signed)
    back = eight_bit.dequantise(codes, scales, is_signed=is_signed)
    values = torch.tensor(plain_values(is_signed), dtype=torch.float64)
    assert len(values) == 256 and codes.shape == numbers.shape and len(scales) == math.ceil(615 / 256)
    for block, ours in zip(numbers.flatten().split(256), back.flatten().split(256), strict=True):
        fractions = block.double() / block.abs().max().double()
        nearest = (fractions[:, None] - values).abs().argmin(1)
        expected = values[nearest]
        if not is_signed:
            expected[(nearest == 0) & (block > 0)] = values[1]
        error = (ours.double() / block.abs().max().double() - expected).abs()
        assert torch.all(error <= 1e-6 * expected.abs() + 1e-12)
    assert codes.unique().numel() > 60


def test_a_second_moment_above_zero_stays_above_zero():
    numbers = torch.full((256,), 1e-30)
    numbers[0] = 1.0
    numbers[1] = 0.0
    back = eight_bit.dequantise(*eight_bit.quantise(numbers, is_signed=False), is_signed=False)
    assert back[1] == 0 and back[0] == 1 and (back[2:] > 0).all()


def test_zeros_stay_zero():
    for is_signed in (True, False):
        codes, scales = eight_bit.quantise(torch.zeros(300), is_signed=is_signed)
        assert not eight_bit.dequantise(codes, scales, is_signed=is_signed).any()


def run(parameter, steps, **options):
    optimizer = AdamW([("w", parameter)], betas=(0.9, 0.95), is_8bit=True, **options)
    for step in range(steps):
        (parameter * random(*parameter.shape, seed=step + 1).to(parameter.dtype)).sum().backward()
        optimizer.step(lr=1e-3, grad_scale=0.5)
        optimizer.zero_grad()
    return optimizer.state_dict()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_updates_are_adamw_on_rounded_moments(dtype):
    start = random(130, 37, seed=0).to(dtype)
    parameter = nn.Parameter(start.clone())
    state = run(parameter, 12, weight_decay=0.1)
    master, mean, square = start.double(), torch.zeros(130, 37).double(), torch.zeros(130, 37).double()
    for step in range(12):
        gradient = random(130, 37, seed=step + 1).to(dtype).double() * 0.5
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.95 * square + 0.05 * gradient**2
        master = master * (1 - 1e-3 * 0.1)
        unbiased = (square / (1 - 0.95 ** (step + 1))).sqrt()
        master = master - 1e-3 * mean / (1 - 0.9 ** (step + 1)) / (unbiased + 1e-8)
        mean = eight_bit.dequantise(*eight_bit.quantise(mean.float(), is_signed=True), is_signed=True).double()
        square = eight_bit.dequantise(*eight_bit.quantise(square.float(), is_signed=False), is_signed=False).double()
    ours = (state["master.w"] if dtype != torch.float32 else parameter.detach()).double()
    # A number between two codes may fall to either side; that moves few entries, and those a little.
    error = (ours - master).abs()
    assert error.median() < 1e-6 and error.max() < 1e-3 and (error > 1e-5).float().mean() < 0.01
    assert state["exp_avg.w"].dtype == torch.uint8 and state["exp_avg_sq_scale.w"].shape == (19,)
    assert sum(t.nbytes for key, t in state.items() if "exp" in key) < 2.05 * parameter.numel()


@has_kernels
@pytest.mark.parametrize("shape", [(64, 64), (130, 37), (4097,)])
def test_the_kernel_equals_torchs_path(shape, monkeypatch):
    fast = nn.Parameter(random(*shape, seed=0).to(torch.bfloat16))
    slow = nn.Parameter(fast.detach().clone())
    with_kernel = run(fast, 5)
    monkeypatch.setattr(native, "has_kernels", lambda tensor: False)
    without = run(slow, 5)
    assert with_kernel.keys() == without.keys()
    for key in ("exp_avg", "exp_avg_sq"):
        difference = (with_kernel[f"{key}.w"].int() - without[f"{key}.w"].int()).abs()
        assert (difference > 0).float().mean() < 0.01 and difference.max() <= 1
        torch.testing.assert_close(with_kernel[f"{key}_scale.w"], without[f"{key}_scale.w"], rtol=2e-2, atol=0)
    error = (with_kernel["master.w"] - without["master.w"]).abs()
    assert error.median() < 1e-6 and (error > 1e-5).float().mean() < 0.01


@has_kernels
def test_the_kernels_codes_are_torchs_to_the_bit():
    """One step from zero with beta 0: the moments are the gradient and its square, whatever the code path."""
    parameter = nn.Parameter(torch.zeros(70_001, dtype=torch.bfloat16))
    optimizer = AdamW([("w", parameter)], betas=(0.0, 0.0), is_8bit=True)
    gradient = (random(70_001, seed=3).double() * 10.0 ** (random(70_001, seed=4).double() * 3)).to(torch.bfloat16)
    (parameter * gradient).sum().backward()
    optimizer.step(lr=1e-3)
    state = optimizer.state_dict()
    for key, values in (("exp_avg", gradient.float()), ("exp_avg_sq", gradient.float().square())):
        codes, scales = eight_bit.quantise(values, is_signed=key == "exp_avg")
        assert torch.equal(state[f"{key}.w"], codes) and torch.equal(state[f"{key}_scale.w"], scales)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resuming_is_bit_for_bit(dtype):
    def after(steps, optimizer, parameters, first):
        for step in range(first, first + steps):
            for parameter in parameters.values():
                (parameter * random(*parameter.shape, seed=step).to(dtype)).sum().backward()
            optimizer_step(optimizer, lr=1e-3, max_grad_norm=1.0)

    def fresh():
        parameters = {
            "w": nn.Parameter(random(80, 70, seed=9).to(dtype)),
            "norm": nn.Parameter(torch.ones(70, dtype=dtype)),
        }
        return parameters, OptimizerConfig(lr=1e-3, state="8bit").build(parameters.items())

    parameters, optimizer = fresh()
    after(3, optimizer, parameters, 0)
    saved = {key: value.clone() for key, value in optimizer.state_dict().items()}
    weights = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    after(3, optimizer, parameters, 3)
    again, resumed = fresh()
    for name, parameter in again.items():
        parameter.data.copy_(weights[name])
    resumed.load_state_dict(saved)
    after(3, resumed, again, 3)
    assert saved["exp_avg.norm"].dtype == torch.float32  # small ones stay wide
    end, end_resumed = optimizer.state_dict(), resumed.state_dict()
    assert end.keys() == end_resumed.keys() and all(torch.equal(end[key], end_resumed[key]) for key in end)
    assert all(torch.equal(parameters[name], again[name]) for name in again)


def test_wide_moments_are_refused_by_an_8bit_optimizer():
    wide, narrow = nn.Parameter(random(80, 70, seed=0)), nn.Parameter(random(80, 70, seed=0))
    optimizer = AdamW([("w", wide)])
    wide.sum().backward()
    optimizer.step(lr=1e-3)
    with pytest.raises(ValueError, match="optimizer state"):
        AdamW([("w", narrow)], is_8bit=True).load_state_dict(optimizer.state_dict())


def learn(seed, *, learns=True, **options):
    """Final loss of a two-layer network on a fixed teacher; every weight matrix has 8-bit moments where asked."""
    torch.manual_seed(seed)
    teacher = torch.randn(64, 8, generator=torch.Generator().manual_seed(0)) / 8
    model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64), nn.Tanh(), nn.Linear(64, 8))
    optimizer = AdamW(model.named_parameters(), **options)
    losses = []
    for step in range(300):
        x = random(64, 64, seed=1000 * seed + step)
        loss = (model(x) - torch.tanh(x @ teacher)).square().mean()
        loss.backward()
        optimizer_step(optimizer, lr=2e-3 if learns else 0.0, max_grad_norm=1.0)
        losses.append(loss.item())
    return sum(losses[-30:]) / 30


def test_8bit_moments_learn_as_well_as_wide_ones_within_seed_noise():
    wide = torch.tensor([learn(seed) for seed in range(3)])
    narrow = torch.tensor([learn(seed, is_8bit=True) for seed in range(3)])
    untrained = learn(0, is_8bit=True, learns=False)
    assert not torch.equal(wide, narrow)
    assert (narrow.mean() - wide.mean()).abs() <= 2 * wide.std()
    assert narrow.max() < 0.05 * untrained
