"""Online DPO's data: what the policy answers now, ranked by the rewards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from strop.data import Comparison
from strop.data.comparisons import Answer
from strop.generation import Engine
from strop.rewards.base import WeightedRewards
from strop.rewards.overlap import JudgingTime
from strop.rollouts.groups import Group, roll_out
from strop.stages.dpo_config import Config
from strop.tokenizer import Tokenizer
from strop.types import SamplingParams, Task


def sample_comparisons(
    engine: Engine,
    reward: WeightedRewards,
    tasks: Sequence[Task],
    prompts: Sequence[tuple[int, ...]],
    config: Config,
    *,
    sampling: SamplingParams,
    seed: int,
) -> tuple[list[Comparison], list[Group], JudgingTime]:
    """The policy answers, the rewards rank; a prompt whose answers all tie makes no comparison."""
    groups, judging = roll_out(
        engine, reward, tasks, prompts, group_size=config.online.group_size, sampling=sampling, seed=seed
    )
    engine.release()
    found = [comparison for group in groups if (comparison := ranked(group, config)) is not None]
    return found, groups, judging


def ranked(group: Group, config: Config) -> Comparison | None:
    """The group's judged answers from best to worst; None where they all tie, or fewer than two were judged."""
    valid = [place for place, score in enumerate(group.scores) if score.is_valid]
    order = sorted(valid, key=lambda place: -group.rewards[place])
    if not order or group.rewards[order[0]] == group.rewards[order[-1]]:
        return None
    if config.online.pairs == "best_worst":
        order = [order[0], order[-1]]
    levels = sorted({group.rewards[place] for place in order}, reverse=True)
    tokens = [group.completions[place].token_ids for place in order]
    return Comparison(
        where=group.task.id,
        prompt_ids=group.prompt_ids,
        answers=tuple(Answer(token_ids=ids, mask=(True,) * len(ids)) for ids in tokens),
        ranks=tuple(levels.index(group.rewards[place]) for place in order),
    )


def sample_rows(tokenizer: Tokenizer, groups: Sequence[Group], limit: int) -> list[dict[str, Any]]:
    """The first answers of an online step, with what the rewards said of them."""
    rows = [
        {
            "task": group.task.id,
            "prompt": tokenizer.decode(group.prompt_ids, skip_special_tokens=False),
            "completion": completion.text,
            "finish_reason": completion.finish_reason,
            "reward": score.reward if score.is_valid else None,
            "parts": {
                name: {"score": verdict.score, "status": verdict.status, "detail": verdict.detail}
                for name, verdict in score.parts.items()
            },
        }
        for group in groups
        for completion, score in zip(group.completions, group.scores, strict=True)
    ]
    return rows[:limit]
