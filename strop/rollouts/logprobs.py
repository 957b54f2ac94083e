"""Log-probabilities of a rollout batch, as rectangles that the losses read."""

from __future__ import annotations

import torch
from torch import Tensor

from strop.models.interface import CausalLM
from strop.models.logprobs import packed_logprobs
from strop.models.recording import Recording
from strop.rollouts.batch import RolloutBatch


def token_logprobs(
    model: CausalLM,
    batch: RolloutBatch,
    *,
    temperature: float = 1.0,
    with_entropy: bool = False,
    recording: Recording | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(logprobs_BT, entropy_BT or None), float32, of every sampled token; 0 where response_mask_BT is False.

    Taken at the sampling temperature: otherwise new and sampled logprobs differ before the first update.
    recording: of the rollout that the batch is from, if the weights are still the same; it is used up.
    """
    logprobs_R, entropy_R = packed_logprobs(
        model, batch.packed(), temperature=temperature, with_entropy=with_entropy, recording=recording
    )
    return rectangular(logprobs_R, batch), None if entropy_R is None else rectangular(entropy_R, batch)


@torch.no_grad()
def frozen_logprobs(model: CausalLM, batch: RolloutBatch, *, temperature: float, max_tokens: int) -> Tensor:
    """logprobs_BT without gradient, in micro-batches of max_tokens: for old and reference logprobs."""
    logprobs_BT = torch.zeros_like(batch.sampling_logprobs_BT)
    start = 0
    for micro in batch.split(max_tokens):
        micro_BT, _ = token_logprobs(model, micro, temperature=temperature)
        logprobs_BT[start : start + len(micro), : micro_BT.shape[1]] = micro_BT
        start += len(micro)
    return logprobs_BT


def rectangular(values_R: Tensor, batch: RolloutBatch) -> Tensor:
    """One value per counting label of batch.packed(), in its order -> (B, T), 0 where response_mask_BT is False."""
    values_BT = values_R.new_zeros(batch.response_mask_BT.shape)
    return values_BT.masked_scatter(batch.response_mask_BT, values_R)
