"""What a reward is, and the weighted sum of several."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from strop.types import Completion, Task, Verdict

if TYPE_CHECKING:
    from strop.tokenizer import Tokenizer

NO_VERDICT = Verdict(score=0.0, status="infra_error", detail="the reward has no verdict on this task")
"""Stands for TRL's None. Known by identity; to whoever does not know it, a sample to mask."""


class Reward(Protocol):
    """Judges completions. Safe to call from several threads; may hold worker processes until close()."""

    name: str
    """Names its part in metrics and samples."""

    def score(self, tasks: Sequence[Task], completions: Sequence[Completion]) -> list[Verdict]:
        """One verdict per pair tasks[i], completions[i], in order; NO_VERDICT where it has nothing to say."""
        ...

    def close(self) -> None: ...


@runtime_checkable
class HasAnswers(Protocol):
    """A reward that can tell which answer a completion gives, so that a majority vote can count it."""

    def answer_key(self, completion: Completion) -> str | None:
        """Equal for completions that give the same answer; None for one that gives none."""
        ...


@runtime_checkable
class ChecksTasks(Protocol):
    """A reward that can tell before training that it could never judge a task."""

    def check_tasks(self, tasks: Sequence[Task]) -> None:
        """Raises ValueError naming the task's id and what is wrong with it."""
        ...


@runtime_checkable
class ReadsTokens(Protocol):
    """A reward that reads sampled tokens, not text, and gives degrees instead of right or wrong: a reward model."""

    def bind(self, tokenizer: Tokenizer, max_length: int) -> None:
        """Before the first score: the policy's tokenizer, and the most tokens of prompt and completion together.

        Raises ValueError where the reward could not read them.
        """
        ...


@runtime_checkable
class JudgesAlone(Protocol):
    """A reward whose verdict depends on one task and one text alone, and that judges in other processes: it may be
    asked about a completion while others are still being generated (overlap.Scoring)."""

    @property
    def num_parallel(self) -> int:
        """How many threads can usefully ask at the same time; 0 = ask for the whole batch at the end."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredCompletion:
    """A completion's reward and where it came from.

    Example, with the weights 1.0 and 0.2:
    ScoredCompletion(reward=1.2, parts={"math": Verdict(score=1.0), "format": Verdict(score=1.0)}, is_valid=True)
    """

    reward: float
    """Weighted sum of the parts. Meaningless when not is_valid."""
    parts: dict[str, Verdict]
    """By the reward's name. A reward that gave NO_VERDICT is left out."""
    is_valid: bool
    """False when a part is an infra_error, or no part gave a verdict: mask this sample and count it."""


class WeightedRewards:
    """sum_i weight_i * score_i over several rewards.

    An infra_error is never a zero: the sample becomes invalid, so that a dead verifier does not look like a bad policy.
    A part without a verdict on a task (TRL's way to mix rewards for different kinds of tasks) adds nothing.
    """

    def __init__(self, parts: Sequence[tuple[Reward, float]], *, max_infra_error_share: float = 0.25) -> None:
        """Raises ValueError for no parts, two parts of the same name, or a weight that is not finite."""
        if not parts:
            raise ValueError("no reward given: name at least one, for example rewards = ['math']")
        names = [reward.name for reward, _ in parts]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two rewards are called {name!r}: give one of them another label")
        for reward, weight in parts:
            if not math.isfinite(weight):
                raise ValueError(f"reward {reward.name!r}: weight must be a finite number, got {weight}")
        if not 0 <= max_infra_error_share <= 1:
            raise ValueError(f"max_infra_error_share must be between 0 and 1, got {max_infra_error_share}")
        self.names = tuple(names)
        self.first = parts[0][0]
        self.parts = tuple(parts)
        self._max_infra_error_share = max_infra_error_share

    def check_tasks(self, tasks: Sequence[Task]) -> None:
        """Lets every part that can look at the tasks before training. Raises ValueError naming a task's id."""
        for reward, _ in self.parts:
            if isinstance(reward, ChecksTasks):
                reward.check_tasks(tasks)

    def bind(self, tokenizer: Tokenizer, max_length: int) -> None:
        """Tells every part that reads tokens whose they are (ReadsTokens.bind)."""
        for reward, _ in self.parts:
            if isinstance(reward, ReadsTokens):
                reward.bind(tokenizer, max_length)

    def score(self, tasks: Sequence[Task], completions: Sequence[Completion]) -> list[ScoredCompletion]:
        """One ScoredCompletion per pair tasks[i], completions[i].

        Raises RuntimeError when more than max_infra_error_share of the batch are infra_errors of one reward, and
        ValueError when a reward returns the wrong number of verdicts or a score that is not finite.
        """
        if len(tasks) != len(completions):
            raise ValueError(f"{len(tasks)} tasks for {len(completions)} completions")
        if not tasks:
            return []
        return self.combine(tasks, [reward.score(tasks, completions) for reward, _ in self.parts])

    def combine(self, tasks: Sequence[Task], columns: Sequence[Sequence[Verdict]]) -> list[ScoredCompletion]:
        """As score, from the verdicts of each part on all tasks, in the order of the parts."""
        for (reward, _), verdicts in zip(self.parts, columns, strict=True):
            self._check(reward, tasks, verdicts)
        return [self._sum([column[i] for column in columns]) for i in range(len(tasks))]

    def close(self) -> None:
        for reward, _ in self.parts:
            reward.close()

    def __enter__(self) -> WeightedRewards:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _check(self, reward: Reward, tasks: Sequence[Task], verdicts: Sequence[Verdict]) -> None:
        if len(verdicts) != len(tasks):
            raise ValueError(f"reward {reward.name!r} returned {len(verdicts)} verdicts for {len(tasks)} completions")
        errors = [verdict for verdict in verdicts if verdict.status == "infra_error" and verdict is not NO_VERDICT]
        if len(errors) > self._max_infra_error_share * len(tasks):
            raise RuntimeError(
                f"reward {reward.name!r} failed on {len(errors)} of {len(tasks)} completions; "
                f"the first: {errors[0].detail}"
            )
        for task, verdict in zip(tasks, verdicts, strict=True):
            if verdict.status != "infra_error" and not math.isfinite(verdict.score):
                raise ValueError(f"reward {reward.name!r} gave {verdict.score} on task {task.id}")

    def _sum(self, row: Sequence[Verdict]) -> ScoredCompletion:
        parts: dict[str, Verdict] = {}
        total, is_valid = 0.0, True
        for (reward, weight), verdict in zip(self.parts, row, strict=True):
            if verdict is NO_VERDICT:
                continue
            parts[reward.name] = verdict
            if verdict.status == "infra_error":
                is_valid = False
            else:
                total += weight * verdict.score
        return ScoredCompletion(reward=total, parts=parts, is_valid=is_valid and bool(parts))
