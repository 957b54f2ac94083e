"""Rewards code that passes its tests, run in boxes that it can neither leave nor talk over."""

from __future__ import annotations

import ast
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from strop.rewards.code_text import program
from strop.rewards.worker import WorkerPool
from strop.types import Completion, Task, Verdict

MAX_CODE_CHARS = 100_000
_STARTS_TO_WAIT_FOR = 10
"""Boxes that the judge may have to wait for beyond its own deadline, on a busy machine."""


class CodeReward:
    """1.0 when the program in the completion passes the task's tests, all of them, else 0.0.

    A task has either `tests` (Python source) and `entry_point`, the name of the function that they call; or `cases`, a
    list of {"input": text, "output": text} for a program that reads standard input. `prelude` is source that comes
    before the solution and before the tests. code_text.program says which part of an answer is the program.

    Solution and tests run in two boxes that exchange plain data. So a test sees copies: it cannot check that an
    argument was changed in place, nor pass a function, and a solution that returns a generator or an object of a class
    of its own is wrong.

    Status: ok, wrong, unparsed (no program, or a syntax error), timeout, killed (by a signal, or its result crashed the
    tests twice), infra_error (no box, or tests that fail before they call anything).
    """

    def __init__(
        self,
        *,
        name: str = "code",
        timeout: float = 6.0,
        memory_mb: int = 512,
        start_timeout: float = 20.0,
        python: str | None = None,
        backend: Literal["bubblewrap", "wasm"] = "bubblewrap",
        unsafe_local: bool = False,
        check_solutions: bool = True,
        num_workers: int | None = None,
    ) -> None:
        """timeout in seconds of wall time per verdict; memory_mb bounds each process; a box that is not ready after
        start_timeout seconds is an infra_error; python is the interpreter in bubblewrap's boxes.
        unsafe_local runs the programs of the model as this user, with all its files and the network. check_solutions
        judges the column `solution`, where there is one, before training.

        Raises ValueError when there is no sandbox or an attack on it succeeds.
        """
        if memory_mb < 64:
            raise ValueError(f"memory_mb must be at least 64, got {memory_mb}: python alone needs 20")
        if not (timeout > 0 and start_timeout > 0):
            raise ValueError(f"timeout and start_timeout must be above 0 seconds, got {timeout} and {start_timeout}")
        if backend not in ("bubblewrap", "wasm"):
            raise ValueError(f"backend must be 'bubblewrap' or 'wasm', got {backend!r}")
        if backend == "wasm" and (python is not None or unsafe_local):
            raise ValueError("the backend wasm brings its own python and a sandbox: leave python and unsafe_local out")
        self.name = name
        self._check_solutions = check_solutions
        options = {
            "timeout": timeout,
            "memory_mb": memory_mb,
            "cpu_seconds": math.ceil(timeout) + 1,
            "start_seconds": start_timeout,
            "python": python,
            "backend": "local" if unsafe_local else backend,
        }
        self._pool = WorkerPool(
            "strop.rewards.code_worker",
            timeout=timeout + _STARTS_TO_WAIT_FOR * start_timeout,
            num_workers=num_workers,
            arguments=[json.dumps(options)],
        )
        if unsafe_local:
            warnings.warn(
                "UNSAFE: unsafe_local = true runs programs that a model wrote as you, with your files and your network",
                stacklevel=2,
            )
        try:
            self._pool.start()
        except RuntimeError as error:
            self._pool.close()
            raise ValueError(
                f"reward {name!r}: {error}. Where user namespaces are blocked, backend = 'wasm' may do. "
                "Code of a model does not run without a sandbox, unless the options say unsafe_local = true"
            ) from None

    def score(self, tasks: Sequence[Task], completions: Sequence[Completion]) -> list[Verdict]:
        """One verdict per pair tasks[i], completions[i]; equal programs for equal tests are run once.

        Raises ValueError when a task has no tests.
        """
        programs = [
            program(_prompt(task), completion.text) for task, completion in zip(tasks, completions, strict=True)
        ]
        return self._judge(tasks, programs)

    def check_tasks(self, tasks: Sequence[Task]) -> None:
        """Raises ValueError, naming the first task, when its tests cannot be used or its own solution fails them."""
        for task in tasks:
            _check(task)
        if not self._check_solutions:
            return
        solved = [task for task in tasks if isinstance(task.columns.get("solution"), str)]
        verdicts = self._judge(solved, [program(_prompt(task), task.columns["solution"]) for task in solved])
        bad = [(task, verdict) for task, verdict in zip(solved, verdicts, strict=True) if verdict.status != "ok"]
        if bad:
            task, verdict = bad[0]
            more = f" (and {len(bad) - 1} more tasks like it)" if len(bad) > 1 else ""
            raise ValueError(
                f"{task.id}: the task's own solution scores 0: {verdict.status}, {verdict.detail}{more}. Correct or "
                "remove the row, raise timeout or memory_mb, or set check_solutions = false"
            )

    @property
    def num_parallel(self) -> int:
        return self._pool.num_workers

    def close(self) -> None:
        self._pool.close()

    def _judge(self, tasks: Sequence[Task], programs: Sequence[str | None]) -> list[Verdict]:
        requests: dict[str, int] = {}
        places: list[int | Verdict] = []
        for task, code in zip(tasks, programs, strict=True):
            refusal = _refusal(code)
            if refusal is not None:
                places.append(Verdict(score=0.0, status="unparsed", detail=refusal))
                continue
            key = json.dumps({"code": code, **_test_columns(task)}, sort_keys=True)
            places.append(requests.setdefault(key, len(requests)))
        replies = self._pool.map([json.loads(key) for key in requests])
        verdicts: list[Verdict] = []
        for task, place in zip(tasks, places, strict=True):
            if isinstance(place, Verdict):
                verdicts.append(place)
                continue
            reply = replies[place]
            status, detail = (reply.failure, reply.detail) if reply.failure else reply.value
            verdicts.append(
                Verdict(
                    score=1.0 if status == "ok" else 0.0,
                    status=status,
                    detail=f"{task.id}: {detail}" if status == "infra_error" else detail,
                    milliseconds=reply.milliseconds,
                )
            )
        return verdicts


def _prompt(task: Task) -> str | None:
    return task.prompt if isinstance(task.prompt, str) else None


def _refusal(code: str | None) -> str | None:
    """Why a program need not be run, or None."""
    if code is None:
        return "no program found"
    if len(code) > MAX_CODE_CHARS:
        return f"a program longer than {MAX_CODE_CHARS} characters"
    return None


def _test_columns(task: Task) -> dict[str, Any]:
    """What the judge needs of a task: prelude, and tests with entry_point or cases. ValueError naming the task."""
    columns = task.columns
    prelude = columns.get("prelude") or ""
    tests, cases = columns.get("tests"), columns.get("cases")
    if (tests is None) == (cases is None):
        raise ValueError(
            f"{task.id}: the 'code' reward needs the column 'tests' (Python source) with 'entry_point', or 'cases' "
            f"(a list of inputs and outputs), one of the two; this row has {', '.join(map(repr, columns)) or 'none'}"
        )
    if not isinstance(prelude, str):
        raise ValueError(f"{task.id}: the prelude must be Python source, got {prelude!r:.80}")
    if cases is not None:
        return {"prelude": prelude, "cases": _cases(task, cases)}
    if isinstance(tests, list) and all(isinstance(line, str) for line in tests):
        tests = "\n".join(tests)
    if not isinstance(tests, str):
        raise ValueError(f"{task.id}: the tests must be Python source or a list of it, got {tests!r:.80}")
    entry_point = columns.get("entry_point")
    if not isinstance(entry_point, str) or not entry_point.isidentifier():
        raise ValueError(f"{task.id}: entry_point must be the name of the function under test, got {entry_point!r:.80}")
    return {"prelude": prelude, "tests": tests, "entry_point": entry_point}


def _cases(task: Task, cases: Any) -> list[tuple[str, str]]:
    if not isinstance(cases, list) or not cases:
        raise ValueError(f"{task.id}: cases must be a list with at least one input and output, got {cases!r:.80}")
    found: list[tuple[str, str]] = []
    for case in cases:
        if not isinstance(case, Mapping) or not all(isinstance(case.get(part), str) for part in ("input", "output")):
            raise ValueError(f'{task.id}: a case must be {{"input": text, "output": text}}, got {case!r:.80}')
        found.append((case["input"], case["output"]))
    return found


def _check(task: Task) -> None:
    wanted = _test_columns(task)
    for column in ("prelude", "tests"):
        try:
            tree = ast.parse(wanted.get(column, ""))
        except (SyntaxError, ValueError) as error:
            raise ValueError(f"{task.id}: the {column} do not compile: {error}") from None
        if column == "tests" and "tests" in wanted:
            names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
            if not names & {"candidate", wanted["entry_point"]}:
                raise ValueError(
                    f"{task.id}: the tests never mention {wanted['entry_point']!r} or candidate: any answer would pass"
                )
