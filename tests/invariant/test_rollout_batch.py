"""The rollout batch: packing, cutting and skipping must leave every gradient as it was."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from strop.models.config import ModelConfig
from strop.models.decoder import Decoder, init_model
from strop.objectives.aggregate import masked_sum, step_denominator, token_weights
from strop.objectives.policy_gradient import reinforce_loss
from strop.rollouts.batch import RolloutBatch, collate_rollouts
from strop.rollouts.logprobs import frozen_logprobs, token_logprobs
from strop.types import Completion

CONFIG = ModelConfig(
    vocab_size=31, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4
)
PROMPTS = [(3, 4, 5), (7,), (9, 8, 7, 6, 5)]
GROUPS = [[(1, 2), (5, 6, 7), (2,)], [(11, 12, 13, 2), (4, 2), (9, 9, 9, 9, 9)], [(2,), (8, 2), (8, 8, 2)]]


def _model() -> Decoder:
    model = init_model(CONFIG, seed=1, dtype=torch.float64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)  # far enough from uniform that a wrong position shows
    return model


def _batch() -> RolloutBatch:
    groups = [
        [
            Completion(token_ids=ids, sampling_logprobs=tuple(-0.1 * t for t in ids), finish_reason="stop", text="")
            for ids in group
        ]
        for group in GROUPS
    ]
    batch = collate_rollouts(PROMPTS, groups)
    advantages_B = torch.tensor([1.0, -0.5, -0.5, 0.0, 0.0, 0.0, 2.0, -1.0, -1.0], dtype=torch.float64)
    return batch.replace(advantages_BT=advantages_B[:, None].expand(batch.response_mask_BT.shape))


def _definition(model: Decoder, batch: RolloutBatch) -> list[torch.Tensor]:
    """log p of every completion token from one plain forward of prompt + completion per row, without any packing."""
    from strop.types import PackedBatch, Segment

    rows = []
    for row, completion in enumerate(batch.completions):
        ids = torch.tensor([*batch.prompts[batch.prompt_of_row[row]], *completion])
        packed = PackedBatch(
            token_ids_T=ids[:-1], labels_T=ids[1:], loss_mask_T=ids[1:] >= 0, segments=(Segment(trunk=len(ids) - 1),)
        )
        logits_TV = F.linear(model.hidden(packed), model.lm_head_weight) / 0.7
        logprobs_T = logits_TV.log_softmax(-1).gather(1, ids[1:, None]).squeeze(1)
        rows.append(logprobs_T[-len(completion) :])
    return rows


def test_shared_prompt_gives_every_token_its_own_logprob() -> None:
    model, batch = _model(), _batch()
    logprobs_BT, _ = token_logprobs(model, batch, temperature=0.7)
    for row, expected in enumerate(_definition(model, batch)):
        torch.testing.assert_close(logprobs_BT[row, : len(expected)], expected, rtol=1e-9, atol=1e-9)
        assert (logprobs_BT[row, len(expected) :] == 0).all()


def test_frozen_logprobs_do_not_depend_on_the_micro_batch() -> None:
    model, batch = _model(), _batch()
    whole = frozen_logprobs(model, batch, temperature=1.0, max_tokens=10_000)
    cut = frozen_logprobs(model, batch, temperature=1.0, max_tokens=4)
    assert whole.abs().sum() > 1
    torch.testing.assert_close(whole, cut, rtol=1e-5, atol=1e-6)


def test_split_keeps_every_row_once_and_in_order_within_the_budget() -> None:
    batch = _batch()
    parts = list(batch.split(9))
    assert [row for part in parts for row in part.completions] == list(batch.completions)
    for part in parts:
        assert len(part) == 1 or len(part.packed().token_ids_T) <= 9
    assert len(parts) > 2


def _gradient(model: Decoder, batch: RolloutBatch, rows: list[int], max_tokens: int, aggregation: str) -> torch.Tensor:
    denominator = step_denominator(
        aggregation,  # type: ignore[arg-type]
        num_sequences=len(batch),
        num_tokens=int(batch.response_mask_BT.sum()),
        max_tokens=8,
    )
    model.zero_grad()
    for micro in batch.select(rows).split(max_tokens):
        logprobs_BT, _ = token_logprobs(model, micro)
        loss_BT = reinforce_loss(logprobs_BT, micro.advantages_BT, micro.response_mask_BT)
        weights_BT = token_weights(micro.response_mask_BT, aggregation)  # type: ignore[arg-type]
        masked_sum(loss_BT, micro.response_mask_BT, denominator, weights_BT=weights_BT).backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])


def test_micro_batches_and_skipped_rows_leave_the_gradient_alone() -> None:
    model, batch = _model(), _batch()
    everything, learning = list(range(9)), [0, 1, 2, 6, 7, 8]
    for aggregation in ("token_mean", "seq_mean_token_mean", "token_sum_norm", "seq_mean_token_sum"):
        whole = _gradient(model, batch, everything, 10_000, aggregation)
        assert whole.norm() > 1e-3
        for rows, max_tokens in ((everything, 6), (learning, 10_000), (learning, 1)):
            torch.testing.assert_close(
                _gradient(model, batch, rows, max_tokens, aggregation), whole, rtol=1e-6, atol=1e-9
            )
