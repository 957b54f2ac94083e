"""reasoning-gym's scorers as a reward, in worker processes that can be killed."""

from __future__ import annotations

import importlib.util
import json
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from strop.rewards.reasoning_gym_text import RUNS_MODEL_TEXT
from strop.rewards.worker import Reply, WorkerPool
from strop.types import Completion, Task, Verdict

MAX_ANSWER_CHARS = 16_000
MAX_RUN_CHARS = 4_000
"""Where the answer is run as Python."""
SECONDS_TO_MAKE = 60.0
"""Of one question."""
SOURCE_COLUMNS = ("dataset", "seed", "size", "index")


class ReasoningGymReward:
    """1.0 when reasoning-gym's own scorer gives the answer full marks, else 0.0.

    The answer is what stands between the last <answer> and </answer>, or the whole completion where there is no
    <answer>. The task is generated again from its columns dataset, seed, size and index, so that nothing but the answer
    comes from the policy. With partial, 0 to 1: (score - floor) / (1 - floor), where the floor is what the scorer gives
    for an answer that is none: several datasets pay 0.01 or more for any text.

    Nine datasets run the answer as Python code (RUNS_MODEL_TEXT). Theirs is scored in a box that cannot reach files,
    network or processes, and only if it holds nothing but arithmetic, lists, and elementary functions, since code in
    the scorer's own process could also change the score. Without a sandbox they are refused, unless unsafe_local is
    true: then the worker still bounds time and memory, and the answer is still looked at first.

    Status: ok, wrong, unparsed (no answer, too long, or not to be run), timeout, killed, infra_error.
    """

    def __init__(
        self,
        *,
        name: str = "reasoning_gym",
        partial: bool = False,
        unsafe_local: bool = False,
        timeout: float = 2.0,
        start_timeout: float = 60.0,
        python: str | None = None,
        num_workers: int | None = None,
    ) -> None:
        """timeout in seconds per answer. start_timeout is what a box may take to import reasoning-gym, python the
        interpreter in it. Raises ImportError when reasoning-gym is not installed, ValueError for other options.
        """
        if not start_timeout > 0:
            raise ValueError(f"reward {name!r}: start_timeout must be above 0 seconds, got {start_timeout}")
        if importlib.util.find_spec("reasoning_gym") is None:
            raise ImportError("the reasoning_gym reward needs reasoning-gym: pip install 'strop[tasks]'")
        self.name = name
        self._partial = partial
        self._unsafe_local = unsafe_local
        self._pool = _pool(timeout, num_workers)
        self._box_options = {"timeout": timeout, "start_seconds": start_timeout, "python": python}
        self._num_workers = num_workers
        self._boxes: WorkerPool | None = None
        """For the datasets that run model text; None until the first of their tasks comes."""
        self._lock = threading.Lock()
        if unsafe_local:
            warnings.warn(
                "UNSAFE: unsafe_local = true gives a model's text to eval() in a process with your files and network",
                stacklevel=2,
            )

    def score(self, tasks: Sequence[Task], completions: Sequence[Completion]) -> list[Verdict]:
        """One verdict per pair tasks[i], completions[i]. Raises ValueError for a task of another source."""
        verdicts: list[Verdict | None] = []
        requests: list[dict[str, Any]] = []
        for task, completion in zip(tasks, completions, strict=True):
            request = self._request(task)
            answer = answer_of(completion.text)
            if answer is None or (reason := why_too_long(answer, str(request["dataset"]))) is not None:
                detail = "no answer" if answer is None else str(reason)
                verdicts.append(Verdict(score=0.0, status="unparsed", detail=detail))
            else:
                verdicts.append(None)
                requests.append(request | {"answer": answer})
        replies = iter(self._ask(requests))
        return [verdict or self._verdict(task, next(replies)) for task, verdict in zip(tasks, verdicts, strict=True)]

    def check_tasks(self, tasks: Sequence[Task]) -> None:
        """Raises ValueError, naming the task, when it is generated otherwise by the installed version, when its gold
        cannot be given by a completion or does not get full marks, or when any text does. RuntimeError when the worker
        itself fails.
        """
        requests = [self._request(task) | {"answer": _gold_as_given(task.columns)} for task in tasks]
        for task, reply in zip(tasks, self._ask(requests), strict=True):
            if reply.failure == "infra_error":
                raise RuntimeError(f"reward {self.name!r}: {task.id}: {reply.detail}")
            if (reason := _why_unfit(task.columns, reply)) is not None:
                raise ValueError(f"{task.id}: {reason}")

    @property
    def num_parallel(self) -> int:
        return self._pool.num_workers

    def close(self) -> None:
        self._pool.close()
        if self._boxes is not None:
            self._boxes.close()

    def _ask(self, requests: Sequence[dict[str, Any]]) -> list[Reply]:
        """Each where it may be scored. Raises ValueError when a box is needed and there is none."""
        is_boxed = [request["dataset"] in RUNS_MODEL_TEXT and not self._unsafe_local for request in requests]
        replies: dict[bool, Iterator[Reply]] = {}
        for where in (False, True):
            chosen = [request for request, boxed in zip(requests, is_boxed, strict=True) if boxed is where]
            pool = self._box_pool(str(chosen[0]["dataset"])) if where and chosen else self._pool
            replies[where] = iter([_reply_of_box(reply) if where else reply for reply in pool.map(chosen)])
        return [next(replies[boxed]) for boxed in is_boxed]

    def _box_pool(self, dataset: str) -> WorkerPool:
        with self._lock:
            if self._boxes is None:
                seconds = self._box_options["timeout"], self._box_options["start_seconds"]
                pool = WorkerPool(
                    "strop.rewards.reasoning_gym_box",
                    timeout=2 * sum(float(each or 0) for each in seconds),
                    num_workers=self._num_workers,
                    start_timeout=120.0 + float(self._box_options["start_seconds"] or 0),
                    arguments=[json.dumps(self._box_options)],
                )
                try:
                    pool.start()
                except RuntimeError as error:
                    pool.close()
                    raise ValueError(
                        f"the scorer of reasoning-gym's {dataset!r} runs the model's answer as Python code, and there "
                        f"is no sandbox for it: {error}. Use another dataset, or write unsafe_local = true in the "
                        "reward's options"
                    ) from None
                self._boxes = pool
            return self._boxes

    def _request(self, task: Task) -> dict[str, Any]:
        missing = [column for column in SOURCE_COLUMNS if column not in task.columns]
        if missing:
            raise ValueError(
                f"{task.id}: the {self.name!r} reward needs the columns {', '.join(SOURCE_COLUMNS)}; this row lacks "
                f"{', '.join(missing)}. Make the tasks with: strop tasks reasoning_gym:NAME"
            )
        source = {column: task.columns[column] for column in SOURCE_COLUMNS}
        check_dataset(str(source["dataset"]), task.id)
        return source

    def _verdict(self, task: Task, reply: Reply) -> Verdict:
        if reply.failure is not None:
            detail = f"{task.id}: {reply.detail}" if reply.failure == "infra_error" else reply.detail
            return Verdict(score=0.0, status=reply.failure, detail=detail, milliseconds=reply.milliseconds)
        found: Mapping[str, Any] = reply.value
        if "failure" in found:
            return Verdict(score=0.0, status="unparsed", detail=found["detail"], milliseconds=reply.milliseconds)
        if (reason := _why_another(task.columns, found)) is not None:
            return Verdict(score=0.0, status="infra_error", detail=f"{task.id}: {reason}")
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


def make_entries(sources: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The question and the gold (text or None) of each dataset, seed, size and index. Raises ValueError.

    In a worker, since some datasets depend on the order of Python's sets, and so on PYTHONHASHSEED: made here they
    would be other ones at every start.
    """
    pool = _pool(SECONDS_TO_MAKE, 1)
    try:
        found: list[dict[str, Any]] = []
        for source, reply in zip(sources, pool.map(sources), strict=True):
            if reply.failure is not None:
                raise ValueError(f"reasoning-gym's {source['dataset']!r}, seed {source['seed']}: {reply.detail}")
            found.append(reply.value)
        return found
    finally:
        pool.close()


def why_unfit(rows: Sequence[Mapping[str, Any]]) -> list[str | None]:
    """For each row why its own answer, given by a completion, would not score 1, or None.

    In a worker that makes the questions once more, and without a box: these answers are reasoning-gym's own.
    """
    pool = _pool(SECONDS_TO_MAKE, 1)
    try:
        sources = [{column: row[column] for column in SOURCE_COLUMNS} for row in rows]
        requests = [source | {"answer": _gold_as_given(row)} for source, row in zip(sources, rows, strict=True)]
        return [_why_unfit(row, reply) for row, reply in zip(rows, pool.map(requests), strict=True)]
    finally:
        pool.close()


def _gold_as_given(columns: Mapping[str, Any]) -> str | None:
    """A row's answer as a completion would give it; None where the row has none, for the gold that is made again."""
    gold = columns.get("answer")
    return None if gold is None else answer_of(f"<answer>{gold}</answer>") or ""


def _why_unfit(columns: Mapping[str, Any], reply: Reply) -> str | None:
    if reply.failure is not None:
        return f"scoring the gold answer failed: {reply.detail}"
    found = reply.value
    if "failure" in found:
        return f"the gold answer scores 0: {found['detail']}"
    if (reason := _why_another(columns, found)) is not None:
        return reason
    gold = str(found["gold"])
    given = answer_of(f"<answer>{gold}</answer>")
    if given is None:
        return "the gold answer is empty, and no answer scores nothing"
    if (reason := why_too_long(given, str(columns["dataset"]))) is not None:
        return f"the gold {reason}"
    if found["score"] < 1.0:
        return f"the gold answer {gold!r:.80} scores {found['score']:.2f}, not 1: {found['error']}"
    if found["floor"] >= 1.0:
        return "any text at all gets full marks from this dataset's scorer"
    return None


def _why_another(columns: Mapping[str, Any], found: Mapping[str, Any]) -> str | None:
    """Why an answer was judged by another question than the task's, or None: a few datasets draw some of their
    questions without the seed, and then nobody can judge the answer."""
    question, stated, gold = columns.get("question"), columns.get("answer"), str(found["gold"])
    if question is not None and question != found["question"]:
        return (
            "made again, the question is another one: the tasks come from another version of reasoning-gym, or the "
            "dataset is not the same in every process"
        )
    if stated is not None and str(stated) != gold:
        return f"made again, the gold answer is {gold!r:.80}, not {stated!r:.80}"
    return None


def _pool(timeout: float, num_workers: int | None) -> WorkerPool:
    return WorkerPool(
        "strop.rewards.reasoning_gym_worker",
        timeout=timeout,
        prepare_timeout=SECONDS_TO_MAKE,
        num_workers=num_workers,
        environment={"PYTHONHASHSEED": "0"},  # as in boxes
    )


def _reply_of_box(reply: Reply) -> Reply:
    """A failure inside the box as the pool would have reported it."""
    found = reply.value
    if reply.failure is None and "failure" in found:
        if found["failure"] == "unparsed":
            return reply
        return Reply(None, found["failure"], found["detail"], reply.milliseconds)
    return reply


def check_dataset(dataset: str, where: str) -> None:
    """ValueError for composite, which can hold every other dataset and so escapes what is known of each."""
    if dataset == "composite":
        raise ValueError(f"{where}: reasoning-gym's 'composite' cannot be judged: name the datasets themselves")


def why_too_long(answer: str, dataset: str) -> str | None:
    most = MAX_RUN_CHARS if dataset in RUNS_MODEL_TEXT else MAX_ANSWER_CHARS
    return f"answer is longer than {most} characters" if len(answer) > most else None


def answer_of(text: str) -> str | None:
    """What stands in the last <answer> ... </answer>; the whole text where there is no <answer>; None for nothing."""
    _, opening, rest = text.rpartition("<answer>")
    answer = (rest.partition("</answer>")[0] if opening else text).strip()
    return answer or None
