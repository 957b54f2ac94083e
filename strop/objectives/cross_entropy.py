"""Next-token cross entropy: pre-training and supervised fine-tuning differ only in which rows they pass in."""

from __future__ import annotations

from torch import Tensor

from strop.objectives.logprobs import linear_logprobs


def linear_cross_entropy(
    hidden_RD: Tensor,
    weight_VD: Tensor,
    labels_R: Tensor,
    *,
    bias_V: Tensor | None = None,
    softcap: float | None = None,
    chunk_size: int = 256,
) -> Tensor:
    """Negative log-likelihood (nats) of each label, one value per row, without holding (R, V) logits.

        -log softmax(hidden @ weight.T + bias)[label]

    An untrained model starts near log V. The trap is the mean: divide by the number of counting labels of the whole
    optimiser step (aggregate.masked_sum), never by each micro-batch's own; means of means over-weight short batches.
    R label positions, D width, V vocabulary; memory as linear_logprobs.
    """
    logprobs_R, _ = linear_logprobs(
        hidden_RD, weight_VD, labels_R, bias_V=bias_V, softcap=softcap, chunk_size=chunk_size
    )
    return -logprobs_R
