"""Rewards right answers to math tasks, by math-verify in worker processes that can be killed."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Sequence

from strop.rewards.answers import (
    MAX_ANSWER_CHARS,
    answer_key,
    check_answer_pattern,
    extract_answer,
    numbers_equal,
    read_number,
    why_explosive,
)
from strop.rewards.math_text import loosely_equal, same_text
from strop.rewards.worker import Reply, WorkerPool
from strop.types import Completion, Task, Verdict


class MathReward:
    r"""1.0 when the completion's answer equals the task's, else 0.0.

    One answer is cut out of the completion (answers.extract_answer) and compared exactly (math_worker.MathJudge).
    When the gold is a number, an equal answer is not enough: "37\times 41" for 1517 is the question copied into the
    box, and scores 0. Two numbers without units are compared right here, which is a hundred times faster than in the
    worker and gives the same result; so are two texts that differ in nothing that LaTeX shows, and a pair that comes
    several times in a batch goes to the worker once.

    Every answer is also compared as plain text (math_text.loosely_equal). That second opinion scores nothing; the share
    of answers on which it differs is the metric disagreement/math, and the detail of such a verdict says so.

    Status: ok, wrong, unparsed (no answer, or not math), timeout (killed at the deadline), killed (crashed its worker),
    infra_error (the worker could not start, or a gold that check_tasks would have refused).
    """

    def __init__(
        self,
        *,
        name: str = "math",
        answer_column: str = "answer",
        answer_pattern: str = "auto",
        gold_pattern: str = "whole",
        float_tolerance: float = 1e-6,
        timeout: float = 2.0,
        num_workers: int | None = None,
    ) -> None:
        """answer_column names the gold's column; the patterns are those of answers.extract_answer ("after:####" reads
        GSM8K's golds, "boxed" MATH's solutions). float_tolerance is relative and only for golds with a decimal point.
        timeout is in seconds per answer.

        Raises ValueError for an unknown pattern and ImportError when math-verify is not installed.
        """
        check_answer_pattern(answer_pattern)
        check_answer_pattern(gold_pattern)
        if not 0 <= float_tolerance < 1:
            raise ValueError(f"float_tolerance must be at least 0 and below 1, got {float_tolerance}")
        if importlib.util.find_spec("math_verify") is None:
            raise ImportError("the math reward needs math-verify: pip install 'strop[math]'")
        self.name = name
        self._answer_column = answer_column
        self._answer_pattern = answer_pattern
        self._gold_pattern = gold_pattern
        self._float_tolerance = float_tolerance
        self._pool = WorkerPool("strop.rewards.math_worker", timeout=timeout, num_workers=num_workers)

    def score(self, tasks: Sequence[Task], completions: Sequence[Completion]) -> list[Verdict]:
        """One verdict per pair tasks[i], completions[i]. Raises ValueError when a task has no gold."""
        golds = [self._gold(task) for task in tasks]
        answers = [extract_answer(completion.text, self._answer_pattern) for completion in completions]
        verdicts = self._judge(golds, answers, trust_same_text=True)
        return [
            _naming(task, verdict) if verdict.status == "infra_error" else _with_opinion(gold, answer, verdict)
            for task, gold, answer, verdict in zip(tasks, golds, answers, verdicts, strict=True)
        ]

    def check_tasks(self, tasks: Sequence[Task]) -> None:
        """Raises ValueError, naming the first task, when a gold does not parse or is not equal to itself.

        Such a task would score 0 whatever the policy answers. RuntimeError when the worker itself fails.
        """
        first_task: dict[str, Task] = {}
        for task in tasks:
            first_task.setdefault(self._gold(task), task)
        golds = list(first_task)
        bad: list[tuple[Task, str]] = []
        for gold, verdict in zip(golds, self._judge(golds, golds, trust_same_text=False), strict=True):
            if verdict.status == "infra_error" and not verdict.detail.startswith(_BAD_GOLD):
                raise RuntimeError(f"reward {self.name!r} cannot check the tasks: {verdict.detail}")
            if verdict.status != "ok":
                bad.append((first_task[gold], verdict.detail))
        if bad:
            task, detail = bad[0]
            more = f" (and {len(bad) - 1} more golds like it)" if len(bad) > 1 else ""
            raise ValueError(
                f"{task.id}: the {self._answer_column} {self._gold(task)!r:.120} is not equal to itself under the "
                f"{self.name!r} reward: {detail}{more}. Correct or remove the row, or cut the answer out of a longer "
                "text with gold_pattern, for example 'after:####' or 'boxed'"
            )

    def answer_key(self, completion: Completion) -> str | None:
        """What a majority vote counts: the answer, numbers by their value (1/2 agrees with 0.50); None = unreadable."""
        return answer_key(completion.text, self._answer_pattern)

    @property
    def num_parallel(self) -> int:
        return self._pool.num_workers

    def close(self) -> None:
        self._pool.close()

    def _gold(self, task: Task) -> str:
        if self._answer_column not in task.columns:
            raise ValueError(
                f"{task.id}: the {self.name!r} reward needs the column {self._answer_column!r}; this row has "
                f"{', '.join(map(repr, task.columns)) or 'no columns'}. Name the right one with answer_column"
            )
        value = task.columns[self._answer_column]
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise ValueError(f"{task.id}: the {self._answer_column} must be text or a number, got {value!r:.120}")
        gold = extract_answer(str(value), self._gold_pattern)
        if gold is None:
            raise ValueError(f"{task.id}: no gold found in {value!r:.120} by the pattern {self._gold_pattern!r}")
        return gold

    def _judge(self, golds: Sequence[str], answers: Sequence[str | None], *, trust_same_text: bool) -> list[Verdict]:
        pairs = list(zip(golds, answers, strict=True))
        judged = {pair: self._judge_by_text(*pair, trust_same_text=trust_same_text) for pair in dict.fromkeys(pairs)}
        open_pairs = [pair for pair, verdict in judged.items() if verdict is None]
        requests = [
            {"gold": gold, "answer": answer, "float_tolerance": self._float_tolerance} for gold, answer in open_pairs
        ]
        for (gold, answer), reply in zip(open_pairs, self._pool.map(requests), strict=True):
            judged[gold, answer] = _verdict(gold, answer or "", reply)
        verdicts = [judged[pair] for pair in pairs]
        return [verdict for verdict in verdicts if verdict is not None]

    def _judge_by_text(self, gold: str, answer: str | None, *, trust_same_text: bool) -> Verdict | None:
        """The verdict where no parser is needed, else None. The gold's own text is right only if the gold was checked:
        trust_same_text."""
        if answer is None:
            return Verdict(score=0.0, status="unparsed", detail="no answer found")
        if len(answer) > MAX_ANSWER_CHARS:
            return Verdict(score=0.0, status="unparsed", detail=f"answer longer than {MAX_ANSWER_CHARS} characters")
        gold_number, answer_number = read_number(gold), read_number(answer)
        if gold_number is not None and answer_number is not None:
            is_equal = numbers_equal(gold_number, answer_number, self._float_tolerance)
            return Verdict(score=1.0) if is_equal else _wrong(gold, answer, "not equal")
        if trust_same_text and gold_number is None and same_text(gold, answer):
            return Verdict(score=1.0)
        reason = why_explosive(answer)
        if reason is not None:
            return Verdict(score=0.0, status="unparsed", detail=reason)
        return None


_BAD_GOLD = "gold "


def _verdict(gold: str, answer: str, reply: Reply) -> Verdict:
    if reply.failure is not None:
        return Verdict(score=0.0, status=reply.failure, detail=reply.detail, milliseconds=reply.milliseconds)
    outcome, detail = reply.value
    if outcome == "ok":
        return Verdict(score=1.0, milliseconds=reply.milliseconds)
    if outcome == "unparsed":
        return Verdict(score=0.0, status="unparsed", detail=detail, milliseconds=reply.milliseconds)
    if outcome == "bad_gold":
        return Verdict(
            score=0.0, status="infra_error", detail=f"{_BAD_GOLD}{gold!r:.80} {detail}", milliseconds=reply.milliseconds
        )
    return _wrong(gold, answer, detail, reply.milliseconds)


def _wrong(gold: str, answer: str, detail: str, milliseconds: float = 0.0) -> Verdict:
    return Verdict(
        score=0.0, status="wrong", detail=f"{answer:.80} for {gold:.80}: {detail}", milliseconds=milliseconds
    )


def _with_opinion(gold: str, answer: str | None, verdict: Verdict) -> Verdict:
    if answer is None or len(answer) > MAX_ANSWER_CHARS:
        return verdict
    opinion = loosely_equal(gold, answer)
    detail = verdict.detail
    if opinion != (verdict.score > 0):
        said = "as plain text they are equal" if opinion else f"as plain text {answer!r:.60} is not {gold!r:.60}"
        detail = f"{detail}; {said}" if detail else said
    return dataclasses.replace(verdict, detail=detail, second_opinion=opinion)


def _naming(task: Task, verdict: Verdict) -> Verdict:
    return Verdict(
        score=0.0, status="infra_error", detail=f"{task.id}: {verdict.detail}", milliseconds=verdict.milliseconds
    )
