"""A synthetic judge in the place of a person: for runs without people, and for tests of everything behind the page."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from strop.ranking.answers import Answer, submit
from strop.ranking.queue import next_item
from strop.ranking.store import PreferenceStore

if TYPE_CHECKING:
    from strop.types import Message

Judge = Callable[["str | Sequence[Message]", Sequence[str]], Sequence[float]]
"""(prompt, completions) -> one score per completion, higher is better."""


def rank_with_judge(
    store: PreferenceStore, judge: Judge, *, name: str, tie_margin: float = 0.0, limit: int | None = None
) -> int:
    """Let a judge answer items as a person would, through next_item and submit; returns how many it answered.

    The scores are sorted into ranks; a completion within tie_margin of the best of its tier ties with it. `name` stands
    as "judge:NAME" where people's names stand, so that a synthetic ranking is always known for one. The judge sees the
    completions in the order shown. Goes on where an earlier call stopped. Raises ValueError for scores that are not
    one finite number per completion.
    """
    if not tie_margin >= 0:
        raise ValueError(f"tie_margin={tie_margin} must be 0 or more")
    annotator = f"judge:{name}"
    num_answered = 0
    while limit is None or num_answered < limit:
        item = next_item(store, annotator)
        if item is None:
            break
        scores = [float(score) for score in judge(item.prompt, item.completions)]
        if len(scores) != len(item.completions) or not all(map(math.isfinite, scores)):
            raise ValueError(f"judge {name} must give {len(item.completions)} finite scores, it gave {scores}")
        uuid = hashlib.sha256(f"{annotator}\0{item.id}".encode()).hexdigest()
        submit(store, item.id, annotator, Answer(uuid=uuid, ranks=ranks_from_scores(scores, tie_margin)))
        num_answered += 1
    return num_answered


def ranks_from_scores(scores: Sequence[float], tie_margin: float = 0.0) -> list[int]:
    """Ranks from 1 = the highest score; within tie_margin of the best of a tier is the same tier.

    [0.9, 0.2, 0.85] -> [1, 3, 2], with tie_margin 0.1 -> [1, 2, 1].
    """
    ranks = [0] * len(scores)
    tier, tier_best = 0, math.inf
    for index in sorted(range(len(scores)), key=lambda index: -scores[index]):
        if tier == 0 or tier_best - scores[index] > tie_margin:
            tier, tier_best = tier + 1, scores[index]
        ranks[index] = tier
    return ranks
