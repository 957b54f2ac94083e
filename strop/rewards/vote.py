"""A majority vote as a reward: the answer that most of a prompt's completions give counts as right. No labels.

Test-time RL (Zuo et al. 2025, TTRL) is this reward with GRPO or PPO behind it. A vote rewards agreement and nothing
else: where most answers are wrong it teaches the wrong one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from strop.rewards.answers import answer_key, check_answer_pattern
from strop.types import Completion, Task, Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class Vote:
    """What the completions of one prompt say.

    Example, of "4", "4.0", "5" and "dunno": Vote(winner="4", share=0.5, tally={"4": 2.0, "5": 1.0})
    """

    winner: str | None
    """The answer with most votes; of tied ones that which was sampled first. None where no completion has an answer."""
    share: float
    """The winner's votes over all votes, those of completions without an answer included: they elect nobody, but they
    do not agree either. 0 without a winner."""
    tally: Mapping[str, float]
    """Answer -> its votes, in the order in which the answers were first given."""


def count_votes(keys: Sequence[str | None], weights: Sequence[float] | None = None) -> Vote:
    """The vote of completions whose answers are `keys`, None for one that gives none; each has one vote, or its weight.

    maj@k, `strop generate --vote` and the vote reward all count with this, so that they agree on ties.
    """
    weights = [1.0] * len(keys) if weights is None else weights
    tally: dict[str, float] = {}
    for key, weight in zip(keys, weights, strict=True):
        if key is not None:
            tally[key] = tally.get(key, 0.0) + weight
    winner = max(tally, key=lambda answer: tally[answer], default=None)  # the first of equals
    total = sum(weights)
    return Vote(winner=winner, share=0.0 if winner is None or total == 0 else tally[winner] / total, tally=tally)


def token_probability(completion: Completion) -> float:
    """exp of the mean logprob of its tokens: the weight of a weighted vote (Wang et al. 2022, eq. 1).

    Per token, since the product over all tokens would let the shortest completion outvote all others.
    """
    logprobs = completion.sampling_logprobs
    return math.exp(sum(logprobs) / len(logprobs)) if logprobs else 0.0


class VoteReward:
    """1.0 for a completion that gives its prompt's majority answer, else 0.0. Reads no column of the task.

    Everything of one task in a call to score() votes together, so that a group must come in one call, as roll_out does
    it. Answers are cut out and compared as `math` does for maj@k (answers.answer_key). A completion without an answer
    has no vote and scores 0 ("unparsed"); where no completion of a group has one, all score 0 and there is nothing to
    learn.
    """

    def __init__(self, *, name: str = "vote", weighted: bool = False, answer_pattern: str = "auto") -> None:
        """weighted counts each vote by token_probability; answer_pattern is that of answers.extract_answer.

        Raises ValueError for an unknown pattern.
        """
        check_answer_pattern(answer_pattern)
        self.name = name
        self._weighted = weighted
        self._answer_pattern = answer_pattern

    def score(self, tasks: Sequence[Task], completions: Sequence[Completion]) -> list[Verdict]:
        """One verdict per pair. ValueError where a task has a single completion, which always agrees with itself."""
        groups: dict[str, list[int]] = {}
        for index, task in enumerate(tasks):
            groups.setdefault(task.id, []).append(index)
        verdicts: list[Verdict | None] = [None] * len(tasks)
        for task_id, indices in groups.items():
            if len(indices) < 2:
                raise ValueError(
                    f"{task_id}: reward {self.name!r} needs several completions of a prompt, not one: raise group_size "
                    "(and eval.num_samples, where it is the first reward)"
                )
            keys = [self.answer_key(completions[index]) for index in indices]
            weights = [token_probability(completions[index]) for index in indices] if self._weighted else None
            vote = count_votes(keys, weights)
            for index, key in zip(indices, keys, strict=True):
                verdicts[index] = _verdict(key, vote)
        return [verdict for verdict in verdicts if verdict is not None]

    def answer_key(self, completion: Completion) -> str | None:
        return answer_key(completion.text, self._answer_pattern)

    def close(self) -> None:
        """Holds nothing."""


def _verdict(key: str | None, vote: Vote) -> Verdict:
    if key is None:
        return Verdict(score=0.0, status="unparsed", detail="no answer found, so no vote")
    if key == vote.winner:
        return Verdict(score=1.0, detail=f"{key:.80} has {vote.share:.0%} of the votes")
    return Verdict(score=0.0, status="wrong", detail=f"{key:.80} against {vote.winner:.80} with {vote.share:.0%}")
