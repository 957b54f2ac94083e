"""reasoning-gym's scorers as a reward, in worker processes that can be killed."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

from strop.rewards.worker import Reply, WorkerPool
from strop.types import Completion, Task, Verdict

MAX_ANSWER_CHARS = 4000
SOURCE_COLUMNS = ("dataset", "seed", "size", "index")

RUNS_MODEL_TEXT = (
    *("binary_matrix", "countdown", "intermediate_integration", "n_queens", "polynomial_multiplication", "puzzle24"),
    *("simple_integration", "spiral_matrix", "string_insertion"),
    "composite",
)
"""Datasets whose scorer gives the answer to eval() or to sympy.parse_expr(), which calls eval(); read in the source of
0.1.25. composite can hold any of them."""


class ReasoningGymReward:
    """1.0 when reasoning-gym's own scorer gives the answer full marks, else 0.0.

    The answer is what stands between the last <answer> and </answer>, or the whole completion where there is no
    <answer>. The task is generated again from its columns dataset, seed, size and index, so that nothing but the answer
    comes from the policy. With partial, 0 to 1: (score - floor) / (1 - floor), where the floor is what the scorer gives
    for an answer that is none: several datasets pay 0.01 or more for any text.

    Nine datasets run the answer as Python code (RUNS_MODEL_TEXT). They are refused, unless unsafe_local is true: then
    the worker still bounds time and memory, but what a model writes there can read and delete this user's files.

    Status: ok, wrong, unparsed (no answer, or too long), timeout, killed, infra_error.
    """

    def __init__(
        self,
        *,
        name: str = "reasoning_gym",
        partial: bool = False,
        unsafe_local: bool = False,
        timeout: float = 2.0,
        num_workers: int | None = None,
    ) -> None:
        """timeout in seconds per answer. Raises ImportError when reasoning-gym is not installed."""
        if importlib.util.find_spec("reasoning_gym") is None:
            raise ImportError("the reasoning_gym reward needs reasoning-gym: pip install 'strop[tasks]'")
        self.name = name
        self._partial = partial
        self._unsafe_local = unsafe_local
        self._pool = WorkerPool("strop.rewards.reasoning_gym_worker", timeout=timeout, num_workers=num_workers)

    def score(self, tasks: Sequence[Task], completions: Sequence[Completion]) -> list[Verdict]:
        """One verdict per pair tasks[i], completions[i]. Raises ValueError for a task of another source."""
        verdicts: list[Verdict | None] = []
        requests: list[dict[str, Any]] = []
        for task, completion in zip(tasks, completions, strict=True):
            request = self._request(task)
            answer = answer_of(completion.text)
            if answer is None or len(answer) > MAX_ANSWER_CHARS:
                detail = "no answer" if answer is None else f"answer longer than {MAX_ANSWER_CHARS} characters"
                verdicts.append(Verdict(score=0.0, status="unparsed", detail=detail))
            else:
                verdicts.append(None)
                requests.append(request | {"answer": answer})
        replies = iter(self._pool.map(requests))
        return [verdict or self._verdict(task, next(replies)) for task, verdict in zip(tasks, verdicts, strict=True)]

    def check_tasks(self, tasks: Sequence[Task]) -> None:
        """Raises ValueError, naming the task, when it is generated otherwise by the installed version, when its gold
        does not get full marks, or when any text does. RuntimeError when the worker itself fails.
        """
        requests = [self._request(task) | {"answer": None} for task in tasks]
        for task, reply in zip(tasks, self._pool.map(requests), strict=True):
            if reply.failure == "infra_error":
                raise RuntimeError(f"reward {self.name!r}: {task.id}: {reply.detail}")
            if reply.failure is not None:
                raise ValueError(f"{task.id}: scoring the gold answer failed: {reply.detail}")
            found = reply.value
            question = task.columns.get("question")
            if question is not None and question != found["question"]:
                raise ValueError(
                    f"{task.id}: made again, the question is another one: the tasks come from another version of "
                    "reasoning-gym, or the dataset is not the same in every process"
                )
            if found["score"] < 1.0:
                raise ValueError(f"{task.id}: the gold answer {found['gold']!r:.80} scores {found['score']:.2f}, not 1")
            if found["floor"] >= 1.0:
                raise ValueError(f"{task.id}: any text at all gets full marks from this dataset's scorer")

    @property
    def num_parallel(self) -> int:
        return self._pool.num_workers

    def close(self) -> None:
        self._pool.close()

    def _request(self, task: Task) -> dict[str, Any]:
        missing = [column for column in SOURCE_COLUMNS if column not in task.columns]
        if missing:
            raise ValueError(
                f"{task.id}: the {self.name!r} reward needs the columns {', '.join(SOURCE_COLUMNS)}; this row lacks "
                f"{', '.join(missing)}. Make the tasks with: strop tasks reasoning_gym:NAME"
            )
        source = {column: task.columns[column] for column in SOURCE_COLUMNS}
        check_dataset(str(source["dataset"]), task.id, unsafe_local=self._unsafe_local)
        return source

    def _verdict(self, task: Task, reply: Reply) -> Verdict:
        if reply.failure is not None:
            detail = f"{task.id}: {reply.detail}" if reply.failure == "infra_error" else reply.detail
            return Verdict(score=0.0, status=reply.failure, detail=detail, milliseconds=reply.milliseconds)
        found: Mapping[str, Any] = reply.value
        score, floor = found["score"], found["floor"]
        above = max(0.0, (score - floor) / (1.0 - floor)) if floor < 1.0 else 0.0
        is_right = above >= 1.0
        detail = found["error"] or f"reasoning-gym's score {score:.3f}, of nothing {floor:.3f}"
        return Verdict(
            score=above if self._partial or is_right else 0.0,
            status="ok" if is_right or (self._partial and above > 0) else "wrong",
            detail="" if is_right else detail,
            milliseconds=reply.milliseconds,
        )


def check_dataset(dataset: str, where: str, *, unsafe_local: bool) -> None:
    """ValueError for a dataset whose scorer runs the answer, unless the user takes that on himself."""
    if dataset in RUNS_MODEL_TEXT and not unsafe_local:
        raise ValueError(
            f"{where}: the scorer of reasoning-gym's {dataset!r} runs the model's answer as Python code, and there is "
            "no sandbox for it: use another dataset, or write unsafe_local = true in the reward's options"
        )


def answer_of(text: str) -> str | None:
    """What stands in the last <answer> ... </answer>; the whole text where there is no <answer>; None for nothing."""
    _, opening, rest = text.rpartition("<answer>")
    answer = (rest.partition("</answer>")[0] if opening else text).strip()
    return answer or None
