"""What a rollout looked like: figures for metrics.jsonl, rows for samples.jsonl."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from strop.rollouts.batch import RolloutBatch
from strop.rollouts.groups import Group
from strop.tokenizer import Tokenizer


def rollout_metrics(groups: Sequence[Group], parts: Sequence[str]) -> dict[str, float]:
    """What the policy earned and how it answered, before any update, over every group that was sampled.

    Groups that dynamic sampling replaced are in it: the reward of those that it keeps says nothing of the policy.
    """
    scores = [score for group in groups for score in group.scores]
    completions = [completion for group in groups for completion in group.completions]
    valid = [score for score in scores if score.is_valid]
    rewards = torch.tensor([score.reward for score in valid] or [float("nan")])
    flat = [group for group in groups if group.is_flat]
    metrics = {
        "reward": float(rewards.mean()),
        "reward_std": float(rewards.std(correction=0)),
        "groups_sampled": len(groups),
        "groups_flat": len(flat),
        "invalid_samples": len(scores) - len(valid),
        "completion_length": sum(len(completion.token_ids) for completion in completions) / len(completions),
        "truncated": sum(completion.finish_reason == "length" for completion in completions) / len(completions),
    }
    for part in parts:
        verdicts = [score.parts[part] for score in scores if part in score.parts]
        judged = [verdict for verdict in verdicts if verdict.status != "infra_error"]
        if judged:
            metrics[f"score/{part}"] = sum(verdict.score for verdict in judged) / len(judged)
            for status in ("unparsed", "timeout", "killed"):
                metrics[f"{status}/{part}"] = sum(verdict.status == status for verdict in judged) / len(judged)
            doubted = [verdict for verdict in judged if verdict.second_opinion is not None]
            if doubted:
                differing = sum(verdict.second_opinion != (verdict.score > 0) for verdict in doubted)
                metrics[f"disagreement/{part}"] = differing / len(doubted)
    return metrics


def sample_rows(
    tokenizer: Tokenizer, groups: Sequence[Group], batch: RolloutBatch, limit: int
) -> list[dict[str, object]]:
    """What samples.jsonl keeps of a step: the first `limit` completions with everything that was said of them.

    With a critic, advantage is the mean over the completion's tokens, and value what it expected of the prompt.
    """
    assert batch.advantages_BT is not None
    rows: list[dict[str, object]] = []
    flat = [(group, index) for group in groups for index in range(len(group.completions))]
    for row, (group, index) in enumerate(flat[:limit]):
        completion, score = group.completions[index], group.scores[index]
        advantages_T = batch.advantages_BT[row, : len(completion.token_ids)]
        # Without a critic all tokens of a completion have the same.
        advantage = advantages_T[0] if batch.values_BT is None else advantages_T.mean()
        value = {} if batch.values_BT is None else {"value": float(batch.values_BT[row, 0])}
        rows.append(
            {
                "task": group.task.id,
                "prompt": tokenizer.decode(group.prompt_ids, skip_special_tokens=False),
                "completion": completion.text,
                "finish_reason": completion.finish_reason,
                "reward": score.reward if score.is_valid else None,
                "advantage": float(advantage),
                **value,
                "parts": {
                    name: {"score": verdict.score, "status": verdict.status, "detail": verdict.detail}
                    for name, verdict in score.parts.items()
                },
            }
        )
    return rows


def save_failed_rollout(run_folder: Path, tokenizer: Tokenizer, groups: Sequence[Group], batch: RolloutBatch) -> Path:
    """All rows of the rollout whose gradient was not finite, as runs/NAME/failed_batch.jsonl."""
    path = run_folder / "failed_batch.jsonl"
    rows = sample_rows(tokenizer, groups, batch, len(batch))
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path
