"""Early stop without labels: how a policy in training answers prompts that it is not trained on.

A majority vote as reward can be won by answering every prompt alike. The policy's agreement with itself then goes to 1,
as it does when all is well, so that it cannot tell the two apart. What can:

    base_agreement    share of the answers that are the base's own majority answer, counted once before the first step
    distinct_answers  exp of the entropy of the majority answers over the prompts: how many different ones there are

Learning raises the first up to where the base's vote is right and leaves the second about where it was; a collapse
lowers both. Neither knows whether the base's majority is right.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from strop.evals.intervals import mean_interval
from strop.rewards.answers import answer_key
from strop.rewards.vote import Vote, count_votes
from strop.stages.ttrl_config import HeldOut
from strop.types import Completion


def votes_of(groups: Sequence[Sequence[Completion]], answer_pattern: str) -> list[Vote]:
    """The majority vote of each prompt's completions."""
    return [count_votes([answer_key(completion.text, answer_pattern) for completion in group]) for group in groups]


def agreement_metrics(
    groups: Sequence[Sequence[Completion]], base_answers: Sequence[str | None], answer_pattern: str
) -> dict[str, float]:
    """How the policy answers the held-out prompts, without a label, as eval/NAME; shares have their 95 % interval.

    base_agreement is over the prompts on which the base had an answer; self_agreement is the majority's share.
    entropy is minus the mean logprob of the sampled tokens: what the policy's next-token laws have, in expectation.
    """
    votes = votes_of(groups, answer_pattern)
    with_base = [
        vote.tally.get(base, 0.0) / len(group)
        for vote, base, group in zip(votes, base_answers, groups, strict=True)
        if base is not None
    ]
    shares = [vote.share for vote in votes]
    completions = [completion for group in groups for completion in group]
    answered = sum(sum(vote.tally.values()) for vote in votes)
    logprobs = [logprob for completion in completions for logprob in completion.sampling_logprobs]
    metrics = {
        "base_agreement": sum(with_base) / len(with_base),
        "self_agreement": sum(shares) / len(shares),
        "distinct_answers": effective_number([vote.winner for vote in votes if vote.winner is not None]),
        "unreadable": 1 - answered / len(completions),
        "entropy": -sum(logprobs) / len(logprobs),
        "mean_length": len(logprobs) / len(completions),
    }
    metrics["base_agreement_low"], metrics["base_agreement_high"] = mean_interval(with_base)
    metrics["self_agreement_low"], metrics["self_agreement_high"] = mean_interval(shares)
    return {f"eval/{name}": value for name, value in metrics.items()}


def effective_number(answers: Sequence[str]) -> float:
    """exp of the entropy of their frequencies: n for n answers that are equally frequent, 1 for one; 0 for none."""
    counts = Counter(answers).values()
    total = sum(counts)
    return math.exp(-sum(count / total * math.log(count / total) for count in counts)) if total else 0.0


@dataclass(kw_only=True)
class Watch:
    """What a run has seen on its held-out prompts so far, and whether it must stop. Saved with every checkpoint."""

    base_answers: list[str | None]
    """The base's majority answer to each prompt."""
    base_distinct: float = 0.0
    """distinct_answers before the first step."""
    best_step: int = 0
    best_metrics: dict[str, float] = field(default_factory=dict)
    """What was measured at best_step."""
    alarms: int = 0
    """Measurements in a row with an alarm."""
    reason: str = ""
    """Why the run was stopped; empty while it was not."""

    def look(self, step: int, metrics: Mapping[str, float], config: HeldOut) -> bool:
        """Take a measurement in. Returns whether the step is the best so far; `reason` says when to stop."""
        agreement, distinct = metrics["eval/base_agreement"], metrics["eval/distinct_answers"]
        if not self.best_metrics:
            self.base_distinct = distinct
        problems: list[str] = []
        if self.best_metrics and agreement < self.best_metrics["eval/base_agreement"] - config.max_drop:
            best = self.best_metrics["eval/base_agreement"]
            problems.append(f"agreement with the base's answers fell from {best:.2f} to {agreement:.2f}")
        if distinct < config.min_answers * self.base_distinct:
            problems.append(f"different majority answers fell from {self.base_distinct:.1f} to {distinct:.1f}")
        self.alarms = self.alarms + 1 if problems else 0
        if self.alarms >= config.patience:
            self.reason = "; ".join(problems)
        is_best = not problems and (not self.best_metrics or agreement > self.best_metrics["eval/base_agreement"])
        if is_best:
            self.best_step, self.best_metrics = step, dict(metrics)
        return is_best

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)


def check_answers(votes: Sequence[Vote], answer_pattern: str, num_answers: int) -> None:
    """ValueError where a vote would have nothing to count."""
    if all(vote.winner is None for vote in votes):
        raise ValueError(
            f"none of the {num_answers} answers of the base to {len(votes)} held-out prompts can be read by "
            f'answer_pattern = "{answer_pattern}", so that nobody votes: look at what it writes (strop generate), name '
            "another pattern, raise sampling.max_new_tokens, or teach it the form of an answer first (strop sft)"
        )
