"""The sampler against transformers' logits processors, explicit softmaxes, and the law of large numbers."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from strop.generation.naive import naive_distribution
from strop.generation.sampler import RowParams, Sampler, sample_uniforms
from strop.types import SamplingParams

VOCAB = 1000  # four blocks, the last one padded
ALMOST_ONE = 1 - 2.0**-53
COMBINATIONS = [
    SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    for temperature, top_k, top_p, min_p in itertools.product((1.0, 0.6), (0, 1, 40), (1.0, 0.9, 0.05), (0.0, 0.02))
]


def random_logits(num_rows: int, *, seed: int = 0, scale: float = 2.5) -> torch.Tensor:
    return scale * torch.randn(num_rows, VOCAB, generator=torch.Generator().manual_seed(seed))


def draw(logits_V: torch.Tensor, uniforms: np.ndarray, params: SamplingParams) -> tuple[torch.Tensor, torch.Tensor]:
    rows = RowParams([params] * len(uniforms), "cpu")
    return Sampler()(logits_V.expand(len(uniforms), -1), torch.from_numpy(uniforms), rows)


def transformers_logprobs(logits_V: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Its processors in the order of its generate(): temperature, top-k, top-p, min-p. -inf where not kept."""
    processors = LogitsProcessorList([TemperatureLogitsWarper(params.temperature)])
    if params.top_k:
        processors.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        processors.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        processors.append(MinPLogitsWarper(params.min_p))
    return processors(torch.empty(1, 0, dtype=torch.int64), logits_V[None].double())[0].log_softmax(-1)


@pytest.mark.parametrize("params", COMBINATIONS, ids=lambda p: f"T{p.temperature}-k{p.top_k}-p{p.top_p}-m{p.min_p}")
def test_tokens_and_logprobs_are_of_transformers_filtered_distribution(params: SamplingParams) -> None:
    logits_V = random_logits(1)[0]
    expected_V = transformers_logprobs(logits_V, params)
    # An even grid of uniforms inverts the distribution completely: token v must come up within one of N * p(v) times.
    num_draws = 5_000
    tokens, logprobs = draw(logits_V, (np.arange(num_draws) + 0.5) / num_draws, params)
    torch.testing.assert_close(logprobs.double(), expected_V[tokens], rtol=0, atol=5e-6)
    counts_V = torch.bincount(tokens, minlength=VOCAB)
    assert (counts_V - num_draws * expected_V.exp()).abs().max() < 1.1
    assert not counts_V[expected_V == -math.inf].any()
    assert counts_V[expected_V.exp() > 1.5 / num_draws].all()
    torch.testing.assert_close(naive_distribution(logits_V, params), expected_V.exp(), rtol=1e-9, atol=1e-12)


def test_two_hundred_thousand_draws_pass_a_chi_square_test() -> None:
    logits_V = random_logits(1, seed=1)[0]
    num_draws = 200_000
    tokens, _ = draw(logits_V, sample_uniforms(5, 0, num_draws), SamplingParams())
    expected_V = num_draws * logits_V.double().softmax(0)
    is_common_V = expected_V >= 10
    counts_V = torch.bincount(tokens, minlength=VOCAB).double()
    cells = torch.cat([counts_V[is_common_V], counts_V[~is_common_V].sum()[None]])
    expected = torch.cat([expected_V[is_common_V], expected_V[~is_common_V].sum()[None]])
    degrees = len(cells) - 1
    chi_square = float(((cells - expected) ** 2 / expected).sum())
    assert degrees > 300
    assert abs(chi_square - degrees) < 4 * math.sqrt(2 * degrees)


def test_rows_with_their_own_parameters_are_sampled_as_if_alone() -> None:
    params_S = [*COMBINATIONS, SamplingParams(temperature=0), SamplingParams(temperature=0, top_p=0.5)]
    logits_SV = random_logits(len(params_S), seed=2)
    uniforms_S = torch.from_numpy(sample_uniforms(3, 0, len(params_S)))
    tokens_S, logprobs_S = Sampler()(logits_SV, uniforms_S, RowParams(params_S, "cpu"))
    for row, params in enumerate(params_S):
        token, logprob = Sampler()(logits_SV[row : row + 1], uniforms_S[row : row + 1], RowParams([params], "cpu"))
        assert (int(token), float(logprob)) == (int(tokens_S[row]), float(logprobs_S[row]))
    assert tokens_S[-2:].tolist() == logits_SV[-2:].argmax(-1).tolist()
    assert logprobs_S[-2:].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("flatness", [0.0, 0.3, 3.0])
def test_top_p_looks_as_far_down_the_vocabulary_as_it_must(flatness: float) -> None:
    """A flat distribution keeps far more tokens than the first guess of its width."""
    logits_V = flatness * torch.randn(9000, generator=torch.Generator().manual_seed(1), dtype=torch.float64).float()
    params = SamplingParams(top_p=0.97)
    expected_V = naive_distribution(logits_V, params)
    tokens, logprobs = draw(logits_V, (np.arange(50) + 0.5) / 50, params)
    torch.testing.assert_close(logprobs.double(), expected_V[tokens].log(), rtol=0, atol=5e-6)


def test_ties_with_the_last_kept_token_are_kept() -> None:
    logits_V = torch.full((VOCAB,), -5.0)
    logits_V[[3, 700, 990]] = torch.tensor([2.0, 1.0, 1.0])
    tokens, logprobs = draw(logits_V, (np.arange(100) + 0.5) / 100, SamplingParams(top_k=2))
    assert sorted(set(tokens.tolist())) == [3, 700, 990]
    assert logprobs.exp().unique().tolist() == pytest.approx([1 / (math.e + 2), math.e / (math.e + 2)], rel=1e-6)


def test_no_uniform_reaches_a_token_of_probability_zero() -> None:
    """Float32 block sums and float64 sums inside a block differ, so that a uniform near 1 may run past both ends."""
    num_rows = 500
    logits_SV = random_logits(num_rows, seed=3, scale=30.0)
    logits_SV[:, ::3] = -math.inf
    logits_SV[: num_rows // 2, 500:] = -math.inf  # whole blocks without weight at the end
    logits_SV[num_rows // 2 :, :300] = -math.inf  # and at the beginning
    for uniform in (0.0, 1e-300, ALMOST_ONE):
        for params in (SamplingParams(), SamplingParams(top_p=0.5), SamplingParams(top_k=7)):
            uniforms_S = torch.full((num_rows,), uniform, dtype=torch.float64)
            tokens_S, logprobs_S = Sampler()(logits_SV, uniforms_S, RowParams([params] * num_rows, "cpu"))
            assert logits_SV.gather(1, tokens_S[:, None]).isfinite().all()
            assert logprobs_S.isfinite().all()


def test_a_uniform_beyond_every_block_boundary_stays_in_its_block() -> None:
    """Uniforms one rounding below and above each block's cumulative sum return tokens on its two sides."""
    logits_V = random_logits(1, seed=4)[0]
    cumulative_V = logits_V.double().softmax(0).cumsum(0)
    for block_end in (256, 512, 768):
        edge = float(cumulative_V[block_end - 1])
        tokens, _ = draw(logits_V, np.array([edge - 1e-5, edge + 1e-5]), SamplingParams())
        expected = torch.searchsorted(cumulative_V, torch.tensor([edge - 1e-5, edge + 1e-5], dtype=torch.float64))
        assert tokens.tolist() == expected.tolist()


def test_memory_is_bounded_by_chunks_of_rows() -> None:
    """Chunks of rows give what one call per row gives."""
    logits_SV = torch.randn(40, 120_000, generator=torch.Generator().manual_seed(0))
    uniforms_S = torch.from_numpy(sample_uniforms(1, 0, 40))
    tokens_S, logprobs_S = Sampler()(logits_SV, uniforms_S, RowParams([SamplingParams()] * 40, "cpu"))
    alone = RowParams([SamplingParams()], "cpu")
    rows = [Sampler()(logits_SV[i : i + 1], uniforms_S[i : i + 1], alone) for i in (0, 20, 39)]
    assert tokens_S[[0, 20, 39]].tolist() == [int(token) for token, _ in rows]
    assert logprobs_S[[0, 20, 39]].tolist() == [float(logprob) for _, logprob in rows]


def test_a_logit_that_is_not_finite_gives_a_nan_logprob() -> None:
    logits_SV = random_logits(4)
    logits_SV[1, 5] = math.nan
    logits_SV[3, 5] = math.inf
    for params in (SamplingParams(), SamplingParams(temperature=0), SamplingParams(top_p=0.5, top_k=3, min_p=0.1)):
        _, logprobs_S = Sampler()(logits_SV, torch.full((4,), 0.5, dtype=torch.float64), RowParams([params] * 4, "cpu"))
        assert logprobs_S.isnan().tolist() == [False, True, False, True]


def test_uniforms_are_streams_of_their_own() -> None:
    assert sample_uniforms(7, 2, 5).tolist() == sample_uniforms(7, 2, 50)[:5].tolist()
    streams = {tuple(sample_uniforms(seed, index, 3)) for seed in (0, 1, -1, 2**63) for index in range(4)}
    assert len(streams) == 16
