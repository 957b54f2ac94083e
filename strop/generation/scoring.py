"""What the model itself thinks of given tokens: a prompt's, or those that were just sampled."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from strop.models.interface import CausalLM
from strop.types import PackedBatch, Segment, TokenLogprobs

MAX_ELEMENTS = 1 << 22
"""Float32 logits held at once."""


@torch.no_grad()
def prompt_logprobs(
    model: CausalLM, prompts: Sequence[Sequence[int]], num_top: Sequence[int]
) -> list[list[TokenLogprobs]]:
    """log p(token | all before it) for every token of each prompt but its first, which nothing comes before.

    num_top says for each prompt how many of the likeliest tokens to report as well. One forward pass over all of them,
    without a cache.
    """
    batch = _packed(prompts)
    hidden_TD = model.hidden(batch.to(model.device))[batch.loss_mask_T.to(model.device)]
    labels_R = batch.labels_T[batch.loss_mask_T].to(model.device)
    counts_R = [count for prompt, count in zip(prompts, num_top, strict=True) for _ in prompt[1:]]
    chunk = max(1, MAX_ELEMENTS // model.config.vocab_size)
    reports: list[TokenLogprobs | None] = []
    for start in range(0, len(counts_R), chunk):
        rows = slice(start, start + chunk)
        reports += token_logprobs(model.logits(hidden_TD[rows]), labels_R[rows], counts_R[rows])
    found = iter(report for report in reports if report is not None)
    return [[next(found) for _ in prompt[1:]] for prompt in prompts]


def token_logprobs(logits_RV: Tensor, tokens_R: Tensor, num_top_R: Sequence[int | None]) -> list[TokenLogprobs | None]:
    """The report of each row's token with num_top_R of the likeliest, or None where that is None."""
    rows = [row for row, count in enumerate(num_top_R) if count is not None]
    reports: list[TokenLogprobs | None] = [None] * len(num_top_R)
    if not rows:
        return reports
    logprobs_RV = logits_RV[rows].float().log_softmax(-1)
    tokens = tokens_R[rows]
    own = logprobs_RV.gather(1, tokens[:, None])[:, 0].tolist()
    top = logprobs_RV.topk(max(num_top_R[row] or 0 for row in rows), dim=-1)
    found = zip(rows, tokens.tolist(), own, top.indices.tolist(), top.values.tolist(), strict=True)
    for row, token_id, logprob, ids, values in found:
        likeliest = tuple(zip(ids, values, strict=True))[: num_top_R[row]]
        reports[row] = TokenLogprobs(token_id=token_id, logprob=logprob, top=likeliest)
    return reports


def _packed(prompts: Sequence[Sequence[int]]) -> PackedBatch:
    """The prompts as documents; each last token's label counts nowhere."""
    return PackedBatch(
        token_ids_T=torch.tensor([token for prompt in prompts for token in prompt]),
        labels_T=torch.tensor([token for prompt in prompts for token in (*prompt[1:], 0)]),
        loss_mask_T=torch.tensor([is_label for prompt in prompts for is_label in (*[True] * (len(prompt) - 1), False)]),
        segments=tuple(Segment(trunk=len(prompt)) for prompt in prompts),
    )
