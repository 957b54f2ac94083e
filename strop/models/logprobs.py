"""A model and a packed batch -> log-probabilities of the labels that count: the way of every stage and every eval."""

from __future__ import annotations

from torch import Tensor

from strop.models.interface import CausalLM
from strop.models.recording import Recording
from strop.objectives.logprobs import HeadStatistics, linear_logprobs, linear_self_certainty
from strop.types import PackedBatch


def packed_logprobs(
    model: CausalLM,
    batch: PackedBatch,
    *,
    temperature: float = 1.0,
    with_entropy: bool = False,
    recording: Recording | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(logprobs_R, entropy_R or None), float32: one value per True of loss_mask_T, in packed order.

    The head runs on those positions only and holds (R, V) only where it is small (linear_logprobs).
    """
    known = None
    if recording is not None and batch.recorded_labels_R is not None:
        assert recording.temperature == temperature
        known = recording.head(batch.recorded_labels_R)
    hidden_and_head = model.hidden_and_head(batch, recording)
    return label_logprobs(
        model, hidden_and_head, batch, temperature=temperature, with_entropy=with_entropy, known=known
    )


def label_logprobs(
    model: CausalLM,
    hidden_and_head: tuple[Tensor, Tensor],
    batch: PackedBatch,
    *,
    temperature: float = 1.0,
    with_entropy: bool = False,
    known: HeadStatistics | None = None,
) -> tuple[Tensor, Tensor | None]:
    """As packed_logprobs, from hidden states that serve something else as well; known: see linear_logprobs."""
    hidden_TD, head_VD = hidden_and_head
    return linear_logprobs(
        hidden_TD[batch.loss_mask_T],
        head_VD,
        batch.labels_T[batch.loss_mask_T],
        temperature=temperature,
        bias_V=model.head_bias,
        softcap=model.logit_softcap,
        with_entropy=with_entropy,
        known=known,
    )


def packed_self_certainty(model: CausalLM, batch: PackedBatch, *, temperature: float = 1.0) -> Tensor:
    """KL(U || p) of the law at every True of loss_mask_T, float32, in packed order (linear_self_certainty)."""
    hidden_TD, head_VD = model.hidden_and_head(batch)
    return linear_self_certainty(
        hidden_TD[batch.loss_mask_T],
        head_VD,
        temperature=temperature,
        bias_V=model.head_bias,
        softcap=model.logit_softcap,
    )
