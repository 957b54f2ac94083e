"""Verdicts on completions while others are still being generated."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType

from strop.rewards.base import JudgesAlone, Reward, ScoredCompletion, WeightedRewards
from strop.types import Completion, Task, Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgingTime:
    """How long a rollout waited for its verdicts. Adds up over several rollouts of one step.

    Example: JudgingTime(wait_seconds=0.1, judging_seconds=2.5, num_verdicts=64, num_open=3, num_shared=20)
    """

    wait_seconds: float = 0.0
    """From the last completion to the last verdict: all that a step loses by being judged."""
    judging_seconds: float = 0.0
    """From the first completion that was handed over to the last verdict."""
    num_verdicts: int = 0
    num_open: int = 0
    """Completions that still lacked a verdict when the last one was generated: the queue."""
    num_shared: int = 0
    """Of num_verdicts, those that another completion with the same text for the same task had got already."""

    def __add__(self, other: JudgingTime) -> JudgingTime:
        return JudgingTime(
            wait_seconds=self.wait_seconds + other.wait_seconds,
            judging_seconds=self.judging_seconds + other.judging_seconds,
            num_verdicts=self.num_verdicts + other.num_verdicts,
            num_open=self.num_open + other.num_open,
            num_shared=self.num_shared + other.num_shared,
        )

    def metrics(self, step_seconds: float) -> dict[str, float]:
        """For metrics.jsonl; the share is of the whole step."""
        return {
            "time/reward_wait_seconds": self.wait_seconds,
            "time/reward_wait_share": self.wait_seconds / step_seconds,
            "time/verdicts_per_second": self.num_verdicts / max(self.judging_seconds, 1e-9),
            "verdicts_open": self.num_open,
            "verdicts_shared": self.num_shared,
        }


class Scoring:
    """Scores the completions of one rollout as they come in: add() each as it finishes, then finish().

    Rewards that JudgesAlone are asked at once, from threads of their own, and equal texts to one task once. The others
    (reward models, which compute in this process, and functions, which see a batch) are asked in finish(). The result
    is that of WeightedRewards.score on all of them together, in the order of their places.

    A context manager: leaving it forgets what was not asked yet.
    """

    def __init__(self, rewards: WeightedRewards) -> None:
        self._rewards = rewards
        self._executors = {
            reward.name: ThreadPoolExecutor(reward.num_parallel, thread_name_prefix=f"score-{reward.name}")
            for reward, _ in rewards.parts
            if isinstance(reward, JudgesAlone) and reward.num_parallel > 0
        }
        self._asked: dict[tuple[str, int, str], Future[Verdict]] = {}
        self._tasks: dict[int, Task] = {}
        self._completions: dict[int, Completion] = {}
        self._open = 0
        self._lock = threading.Lock()
        self._started: float | None = None
        self.time = JudgingTime()
        """Known once finish() has returned."""

    def add(self, place: int, task: Task, completion: Completion) -> None:
        """Hands over the completion with this place in the batch. Returns at once."""
        if self._started is None:
            self._started = time.perf_counter()
        self._tasks[place], self._completions[place] = task, completion
        for reward, _ in self._rewards.parts:
            key = (reward.name, id(task), completion.text)
            if reward.name in self._executors and key not in self._asked:
                with self._lock:
                    self._open += 1
                future = self._executors[reward.name].submit(_judge_one, reward, task, completion)
                future.add_done_callback(self._one_less)
                self._asked[key] = future

    def finish(self) -> list[ScoredCompletion]:
        """All the scores, by place, once every completion was added. Raises what WeightedRewards.score would."""
        generated = time.perf_counter()
        num_open = self._open
        tasks = [self._tasks[place] for place in sorted(self._tasks)]
        completions = [self._completions[place] for place in sorted(self._tasks)]
        columns: list[Sequence[Verdict]] = []
        for reward, _ in self._rewards.parts:
            if reward.name in self._executors:
                columns.append(
                    [
                        self._asked[reward.name, id(task), completion.text].result()
                        for task, completion in zip(tasks, completions, strict=True)
                    ]
                )
            else:
                num_open += len(tasks)
                columns.append(reward.score(tasks, completions) if tasks else [])
        scores = self._rewards.combine(tasks, columns)
        ended = time.perf_counter()
        self.time = JudgingTime(
            wait_seconds=ended - generated,
            judging_seconds=ended - (self._started or generated),
            num_verdicts=len(tasks) * len(columns),
            num_open=num_open,
            num_shared=len(tasks) * len(self._executors) - len(self._asked),
        )
        return scores

    def __enter__(self) -> Scoring:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Waits for the verdicts that are being made, which have deadlines: a reward must not be closed under them.
        for executor in self._executors.values():
            executor.shutdown(wait=True, cancel_futures=True)

    def _one_less(self, _: Future[Verdict]) -> None:
        with self._lock:
            self._open -= 1


def _judge_one(reward: Reward, task: Task, completion: Completion) -> Verdict:
    (verdict,) = reward.score([task], [completion])
    return verdict
