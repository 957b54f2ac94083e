"""Next tokens from logits: one uniform number per row and a search in two levels, without sorting the vocabulary.

Filters apply in the order of transformers: temperature, top-k, top-p, min-p, each on the renormalised survivors of the
one before. (vLLM applies min-p first, which differs only where top_p and min_p are both set.) A filter is a threshold
on the probability, so that tokens tied with the last one kept are kept too, whatever order a sort would put them in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from strop.native import kernels as native
from strop.types import SamplingParams

BLOCK = 256
"""Tokens per block of the first level; near the square root of usual vocabularies."""
MAX_ELEMENTS = 1 << 20
"""Float32 probabilities held at once, in elements: rows are worked off in chunks of this size."""
TOP_WIDTH = 256
"""Largest probabilities first looked at for top-p; trained models rarely need more."""


def sample_uniforms(seed: int, sample_index: int, count: int) -> np.ndarray:
    """The numbers in [0, 1) that decide a sample, float64, shape (count,); number t belongs to its t-th token.

    Philox keyed by (seed, sample_index): streams are independent of each other, and a longer one starts like a shorter.
    """
    key = np.array([seed % 2**64, sample_index], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).random(count)


class RowParams:
    """The sampling parameters of a batch's rows as tensors, to be made once per change of the batch, not per step."""

    def __init__(self, params_S: Sequence[SamplingParams], device: torch.device | str) -> None:
        def column(values: list[float], dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)[:, None]

        self.is_greedy_S = column([params.temperature == 0 for params in params_S], torch.bool)[:, 0]
        self.temperature_or_0_S = column([params.temperature for params in params_S], torch.float32)[:, 0]
        self.temperature_S1 = column([params.temperature or 1.0 for params in params_S], torch.float32)
        self.top_k_S1 = column([params.top_k for params in params_S], torch.int64)
        self.top_p_S1 = column([params.top_p for params in params_S], torch.float64)
        self.min_p_S1 = column([params.min_p for params in params_S], torch.float32)
        self.has_greedy = any(params.temperature == 0 for params in params_S)
        self.has_sampled = any(params.temperature > 0 for params in params_S)
        self.has_temperature = any(params.temperature not in (0, 1) for params in params_S)
        self.max_top_k = max((params.top_k for params in params_S), default=0)
        self.has_top_p = any(params.top_p < 1 for params in params_S)
        self.has_min_p = any(params.min_p > 0 for params in params_S)
        self.has_filters = self.max_top_k > 0 or self.has_top_p or self.has_min_p
        self.has_reports = any(params.top_logprobs is not None for params in params_S)
        self.adjusted = [
            (row, params)
            for row, params in enumerate(params_S)
            if params.presence_penalty or params.frequency_penalty or params.logit_bias
        ]
        """(row, its parameters) of the rows whose logits are changed before anything else."""


def adjusted_logits(logits_SV: Tensor, params: RowParams, sampled: Callable[[int], np.ndarray]) -> Tensor:
    """A float32 copy of the logits with penalties and bias in the rows that have some; sampled(row) are its tokens.

        logit -= presence_penalty * (count > 0) + frequency_penalty * count,    logit += bias

    count is how often the completion has the token so far, without the prompt (as OpenAI and vLLM count).
    """
    logits_SV = logits_SV.to(torch.float32, copy=True)
    device = logits_SV.device
    for row, one in params.adjusted:
        ids, counts = np.unique(sampled(row), return_counts=True)
        if len(ids) and (one.presence_penalty or one.frequency_penalty):
            penalties = one.presence_penalty + one.frequency_penalty * counts
            logits_SV[row, torch.from_numpy(ids).to(device)] -= torch.from_numpy(penalties).float().to(device)
        if one.logit_bias:
            biased, values = zip(*dict(one.logit_bias).items(), strict=True)
            logits_SV[row, torch.tensor(biased, device=device)] += torch.tensor(values, device=device)
    return logits_SV


class Sampler:
    """Draws next tokens; keeps its float32 buffers, since memory fresh from the system costs more than the arithmetic.

    Example: token_ids_S, logprobs_S = Sampler()(logits_SV, uniforms_S, RowParams(params_S, "cpu"))
    """

    def __init__(self) -> None:
        self._buffers = torch.empty(2, 0)

    def __call__(self, logits_SV: Tensor, uniforms_S: Tensor, params: RowParams) -> tuple[Tensor, Tensor]:
        """(token_ids_S int64, logprobs_S float32): the inverse of each row's cumulative distribution at its uniform.

        uniforms_S is float64 in [0, 1). Logprobs are of the distribution that was really sampled from: after
        temperature and filters, renormalised. A greedy row (temperature 0) takes the largest logit, the first of
        equals, with logprob 0. A token of probability 0 is never returned, however close to 1 its uniform is. A row
        whose logits are not finite gets the logprob NaN.
        """
        if native.has_kernels(logits_SV) and not params.has_filters:
            return native.sample(logits_SV.contiguous(), params.temperature_or_0_S, uniforms_S.contiguous())
        num_rows, vocab_size = logits_SV.shape
        chunk = max(1, min(num_rows, MAX_ELEMENTS // vocab_size))
        if self._buffers.shape[1] < chunk * vocab_size or self._buffers.device != logits_SV.device:
            self._buffers = torch.empty(2, chunk * vocab_size, device=logits_SV.device)
        chunks = [slice(start, min(start + chunk, num_rows)) for start in range(0, num_rows, chunk)]
        drawn = [self._sample_rows(logits_SV[rows], uniforms_S, params, rows) for rows in chunks]
        return torch.cat([tokens for tokens, _ in drawn]), torch.cat([logprobs for _, logprobs in drawn])

    def _sample_rows(
        self, logits_RV: Tensor, uniforms_S: Tensor, params: RowParams, rows: slice
    ) -> tuple[Tensor, Tensor]:
        scaled_RV, weights_RV = (buffer[: logits_RV.numel()].view(logits_RV.shape) for buffer in self._buffers)
        scaled_RV.copy_(logits_RV)
        if params.has_temperature:
            scaled_RV.div_(params.temperature_S1[rows])
        if not params.has_greedy:
            return _draw(scaled_RV, weights_RV, uniforms_S, params, rows)
        greedy_R = scaled_RV.argmax(-1)  # in float32: bfloat16's kernel is several times slower
        largest_R = scaled_RV.gather(1, greedy_R[:, None])[:, 0]
        logprobs_R = largest_R - largest_R  # 0, but NaN where it is not finite
        if not params.has_sampled:
            return greedy_R, logprobs_R
        drawn_R, drawn_logprobs_R = _draw(scaled_RV, weights_RV, uniforms_S, params, rows)
        is_greedy_R = params.is_greedy_S[rows]
        return torch.where(is_greedy_R, greedy_R, drawn_R), torch.where(is_greedy_R, logprobs_R, drawn_logprobs_R)


def _draw(
    scaled_RV: Tensor, weights_RV: Tensor, uniforms_S: Tensor, params: RowParams, rows: slice
) -> tuple[Tensor, Tensor]:
    torch.softmax(scaled_RV, -1, out=weights_RV)
    _filter(weights_RV, params, rows)
    return _invert(weights_RV, uniforms_S[rows])


def _filter(weights_RV: Tensor, params: RowParams, rows: slice) -> None:
    """Set the weights of filtered tokens to 0, in place."""
    if params.max_top_k or params.has_top_p:
        top_k_R1 = params.top_k_S1[rows]
        width = max(params.max_top_k, TOP_WIDTH if params.has_top_p else 0)
        while True:
            width = min(width, weights_RV.shape[1])
            top_RW = weights_RV.topk(width, dim=-1).values
            # The k-th largest, and 0 for rows that keep all.
            kth_R1 = top_RW.gather(1, (top_k_R1 - 1).clamp(0, width - 1)) * (top_k_R1 > 0)
            cut_R1, is_settled = _top_p_cut(weights_RV, top_RW, kth_R1, params, rows)
            if is_settled:
                break
            width *= 16
        weights_RV.mul_(weights_RV >= cut_R1)
    if params.has_min_p:
        weights_RV.mul_(weights_RV >= params.min_p_S1[rows] * weights_RV.amax(-1, keepdim=True))


def _top_p_cut(
    weights_RV: Tensor, top_RW: Tensor, kth_R1: Tensor, params: RowParams, rows: slice
) -> tuple[Tensor, bool]:
    """The smallest weight that top-k and top-p keep, (R, 1), and whether top_RW (descending) is wide enough to tell.

    A token is kept while the tokens above it hold less than top_p of the mass that top-k left.
    """
    if not params.has_top_p:
        return kth_R1, True
    top_p_R1 = params.top_p_S1[rows]
    total_R1 = (weights_RV * (weights_RV >= kth_R1)).sum(-1, keepdim=True, dtype=torch.float64)
    above_RW = top_RW.double().cumsum(-1) - top_RW
    num_kept_R1 = (above_RW < top_p_R1 * total_R1).sum(-1, keepdim=True)
    cut_R1 = torch.where(top_p_R1 < 1, top_RW.gather(1, num_kept_R1.clamp(min=1) - 1), 0).maximum(kth_R1)
    is_open = (top_p_R1 < 1) & (num_kept_R1 == top_RW.shape[1]) & (cut_R1 > kth_R1)
    return cut_R1, top_RW.shape[1] == weights_RV.shape[1] or not bool(is_open.any())


def _invert(weights_RV: Tensor, uniforms_R: Tensor) -> tuple[Tensor, Tensor]:
    """(tokens_R, logprobs_R): the first token whose cumulative weight exceeds uniform * total.

    The search runs over block sums and then inside one block; sums across a level are float64, so that tokens far in
    the tail keep their share of the uniforms.
    """
    num_rows, vocab_size = weights_RV.shape
    if vocab_size % BLOCK:
        weights_RV = F.pad(weights_RV, (0, -vocab_size % BLOCK))
    weights_RMB = weights_RV.view(num_rows, -1, BLOCK)
    cumulative_RM = weights_RMB.sum(-1).double().cumsum(-1)
    total_R1 = cumulative_RM[:, -1:]
    target_R1 = uniforms_R[:, None] * total_R1
    block_R1 = _first_above(cumulative_RM, target_R1)
    before_R1 = F.pad(cumulative_RM, (1, 0)).gather(1, block_R1)
    weights_RB = weights_RMB.gather(1, block_R1[:, :, None].expand(-1, 1, BLOCK))[:, 0]
    inside_R1 = _first_above(weights_RB.double().cumsum(-1), target_R1 - before_R1)
    logprobs_R1 = weights_RB.gather(1, inside_R1).double().log() - total_R1.log()
    return (block_R1 * BLOCK + inside_R1)[:, 0], logprobs_R1[:, 0].float()


def _first_above(cumulative_RN: Tensor, target_R1: Tensor) -> Tensor:
    """Index (R, 1) of the first entry that exceeds the target and adds weight of its own.

    Rounding may carry the target to the total or beyond it; it is brought back just below, so that the search ends on
    the last entry with any weight instead of running past it.
    """
    total_R1 = cumulative_RN[:, -1:]
    target_R1 = target_R1.minimum(torch.nextafter(total_R1, torch.zeros_like(total_R1)))
    return (cumulative_RN > target_R1).byte().argmax(-1, keepdim=True)
