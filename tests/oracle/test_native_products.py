"""The matrix products of training against float64, and the sampler's kernel against torch on the same logits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from strop.generation.sampler import RowParams, Sampler
from strop.native import build, kernels, products
from strop.types import SamplingParams

HALF_ULP = 2.0**-8
"""Of bfloat16, relative: what rounding once may change."""
FLOAT_SUM = 1e-5
"""What the order of float32 sums may change, relative to the largest entry."""
SHAPES = [(32, 32, 32), (33, 64, 96), (45, 576, 32), (129, 96, 1536), (333, 1536, 576), (1000, 32, 64)]
"""(T, I, O): tokens, inputs, outputs."""


@pytest.fixture(autouse=True)
def needs_kernels() -> None:
    reason = build.why_unavailable()
    if reason is not None and not reason.startswith("there is no C++ compiler"):
        pytest.skip(reason)  # another processor; a missing compiler is a failure
    assert build.library() is not None, reason


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def assert_rounded_once(actual: torch.Tensor, exact: torch.Tensor) -> None:
    error = (actual.double() - exact).abs()
    allowed = HALF_ULP * exact.abs() + FLOAT_SUM * exact.abs().max()
    assert (error <= allowed).all(), f"off by {(error / allowed).max():.2f} times what rounding may do"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_are_those_of_float64_rounded_once(shape: tuple[int, int, int], monkeypatch) -> None:
    num_tokens, num_inputs, num_outputs = shape
    x, weight = random(num_tokens, num_inputs, seed=1), random(num_outputs, num_inputs, seed=2)
    grad = random(num_tokens, num_outputs, seed=3)
    calls: list[int] = []
    gemm = kernels.gemm
    monkeypatch.setattr(kernels, "gemm", lambda *args, **options: (calls.append(1), gemm(*args, **options)))
    assert_rounded_once(products.linear(x, weight), x.double() @ weight.double().T)
    assert_rounded_once(products.input_gradient(grad, weight), grad.double() @ weight.double())
    assert_rounded_once(products.weight_gradient(grad, x), grad.double().T @ x.double())
    assert len(calls) == 3, "torch was asked instead of the kernel"


def test_a_product_is_written_where_it_is_wanted() -> None:
    x, weight, grad = random(64, 96, seed=1), random(128, 96, seed=2), random(64, 128, seed=3)
    whole = torch.zeros(256, 96, dtype=torch.bfloat16)
    products.weight_gradient(grad, x, out=whole[64:192])
    assert torch.equal(whole[64:192], products.weight_gradient(grad, x))
    assert not whole[:64].any() and not whole[192:].any()
    logits = torch.zeros(64 * 128, dtype=torch.bfloat16).view(64, 128)
    assert products.linear(x, weight, out=logits) is logits and torch.equal(logits, products.linear(x, weight))


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    x, grad = random(500, 576, seed=1), random(500, 960, seed=2)
    before = torch.get_num_threads()
    try:
        results = []
        for num_threads in (1, 2, 5):
            torch.set_num_threads(num_threads)
            results.append(products.weight_gradient(grad, x))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_what_the_kernel_does_not_take_goes_to_torch() -> None:
    for x, weight in (
        (random(64, 48, seed=1), random(96, 48, seed=2)),  # widths that fill no panel
        (random(64, 64, seed=1), random(40, 64, seed=2)),
        (random(8, 64, seed=1), random(96, 64, seed=2)),  # few tokens
        (random(64, 128, seed=1)[:, :64], random(96, 64, seed=2)),  # not contiguous
        (random(64, 64, seed=1).float(), random(96, 64, seed=2).float()),
    ):
        torch.testing.assert_close(products.linear(x, weight), x @ weight.T)


def rows(*params: SamplingParams) -> RowParams:
    return RowParams(list(params), "cpu")


@pytest.mark.parametrize("vocab_size", [7, 256, 1000, 49152])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_sampler_draws_what_torch_draws_from_the_same_logits(vocab_size: int, temperature: float) -> None:
    num_rows = 400
    logits = (3 * torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(5))).bfloat16()
    uniforms = torch.from_numpy(np.random.default_rng(6).random(num_rows))
    params = rows(*[SamplingParams(temperature=temperature)] * num_rows)
    tokens, logprobs = Sampler()(logits, uniforms, params)
    expected_tokens, expected_logprobs = Sampler()(logits.float(), uniforms, params)  # float32 has no kernel
    is_same = tokens == expected_tokens
    assert is_same.float().mean() > 0.99, "only a uniform on the edge between two tokens may fall differently"
    torch.testing.assert_close(logprobs[is_same], expected_logprobs[is_same], rtol=0, atol=2e-6)


def test_a_greedy_row_takes_the_first_of_the_largest_logits_beside_rows_that_are_drawn() -> None:
    logits = torch.zeros(3, 600, dtype=torch.bfloat16)
    logits[:, [300, 599]] = 5.0
    tokens, logprobs = Sampler()(
        logits,
        torch.full((3,), 1 - 2.0**-53, dtype=torch.float64),
        rows(SamplingParams(temperature=0.0), SamplingParams(), SamplingParams(temperature=0.0)),
    )
    assert tokens.tolist() == [300, 599, 300]
    assert logprobs[0] == logprobs[2] == 0 and logprobs[1] < 0


def test_a_token_without_weight_is_never_drawn() -> None:
    logits = torch.full((3, 600), float("-inf"), dtype=torch.bfloat16)
    logits[:, [3, 290]] = 0.0
    uniforms = torch.tensor([0.0, 0.4999999999, 1 - 2.0**-53], dtype=torch.float64)
    tokens, logprobs = Sampler()(logits, uniforms, rows(*[SamplingParams()] * 3))
    assert tokens.tolist() == [3, 3, 290]
    torch.testing.assert_close(logprobs, torch.full((3,), -float(np.log(2))))


def test_rows_that_are_not_finite_say_so_and_spoil_no_other() -> None:
    logits = torch.zeros(5, 300, dtype=torch.bfloat16)
    logits[0, 299] = float("nan")
    logits[1, 7] = float("inf")
    logits[2] = float("-inf")
    logits[3, 4] = float("nan")
    params = [SamplingParams(), SamplingParams(), SamplingParams(), SamplingParams(temperature=0.0), SamplingParams()]
    _, logprobs = Sampler()(logits, torch.full((5,), 0.5, dtype=torch.float64), rows(*params))
    assert logprobs.isnan().tolist() == [True, True, True, True, False]
