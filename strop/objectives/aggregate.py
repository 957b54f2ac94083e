"""From one value per token to one number: the only place that sums, with the denominator passed in.

The GRPO variants are choices of weights and denominator, not copies of a loss. With B sequences and N counting tokens
in the WHOLE optimiser step (all micro-batches, all ranks), and L_b counting tokens in sequence b:

    variant     aggregation           weight     denominator
    GRPO        seq_mean_token_mean   1 / L_b    B
    DAPO        token_mean            1          N
    BNPO        token_mean            1          N of the local batch (another gradient whenever batches are ragged)
    Dr. GRPO    token_sum_norm        1          B * max_tokens (the longest completion allowed, not the longest seen)
    RLOO        seq_mean_token_sum    1          B
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Aggregation = Literal["seq_mean_token_mean", "token_mean", "token_sum_norm", "seq_mean_token_sum"]


def zero_masked(values: Tensor, mask: Tensor | None) -> Tensor:
    """The values with 0 wherever the bool mask is False; unchanged when the mask is None (every position counts).

    A select, not a product: NaN * 0 is NaN, forward and backward. Do it before exp(), never after.
    """
    return values if mask is None else torch.where(mask, values, 0)


def masked_sum(
    values_BT: Tensor, mask_BT: Tensor, denominator: float | Tensor, *, weights_BT: Tensor | None = None
) -> Tensor:
    """The scalar sum(weights * values) / denominator over positions where mask is True; weights of None mean 1.

    The denominator is one number per optimiser step, the same for every micro-batch and rank: then gradients of
    micro-batches add up to the full batch's. A mean per micro-batch does not. Junk under the mask is never touched.
    Any shape: (B, T) tokens, (B,) pairs, (R,) packed rows.
    """
    values_BT = zero_masked(values_BT, mask_BT)
    if weights_BT is not None:
        values_BT = values_BT * zero_masked(weights_BT, mask_BT)
    return values_BT.sum() / denominator


def token_weights(mask_BT: Tensor, aggregation: Aggregation) -> Tensor:
    """Float32 weight of every token in masked_sum, zero where the mask is False; the table of this file.

    seq_mean_token_mean gives 1 / L_b: each sequence counts once, so a token of a long wrong answer is punished less
    than one of a short wrong answer and wrong answers grow (Liu et al. 2025, Dr. GRPO). All others give 1.
    Only the denominator depends on other rows, so weights may be computed per micro-batch.
    """
    weights_BT = mask_BT.to(torch.float32)
    if aggregation == "seq_mean_token_mean":
        weights_BT = weights_BT / weights_BT.sum(-1, keepdim=True).clamp(min=1)
    return weights_BT


def step_denominator(
    aggregation: Aggregation, *, num_sequences: int, num_tokens: int, max_tokens: int | None = None
) -> int:
    """The denominator that belongs to token_weights(..., aggregation): B, N or B * max_tokens.

    Counts are those of the whole optimiser step, over micro-batches and ranks. num_sequences counts every completion
    in the step, also one whose tokens are all masked. max_tokens is the generation limit, needed by token_sum_norm
    only: dividing by the longest completion seen would make the loss depend on the batch again.
    """
    if aggregation == "token_mean":
        return num_tokens
    if aggregation == "token_sum_norm":
        if max_tokens is None:
            raise ValueError("token_sum_norm divides by num_sequences * max_tokens: pass max_tokens (max_new_tokens)")
        return num_sequences * max_tokens
    return num_sequences


def sequence_sum(values_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Sum over each sequence's counting tokens, shape (B,); 0 for a sequence that has none."""
    return zero_masked(values_BT, mask_BT).sum(-1)


def sequence_mean(values_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Mean over each sequence's counting tokens, shape (B,); 0 (not NaN) for a sequence that has none."""
    return sequence_sum(values_BT, mask_BT) / mask_BT.sum(-1).clamp(min=1)
