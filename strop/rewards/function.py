"""Any Python function as a reward, with TRL's signature."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from strop.rewards.base import NO_VERDICT
from strop.rewards.function_worker import call_reward_function
from strop.rewards.serve import last_line
from strop.rewards.worker import WorkerPool
from strop.types import Completion, Task, Verdict

_PASSED_ALREADY = ("prompt", "prompts", "completion", "completions", "completion_ids")


class FunctionReward:
    """Calls f(prompts, completions, completion_ids=..., **columns) -> list[float | None] once per batch.

    Every other column of the tasks comes as a list, one element per completion, None where a row lacks it. A prompt
    that is a list of messages gives its completion as [{"role": "assistant", "content": text}], a text prompt gives
    text. None in the result means that the function has nothing to say on this task.

    Named by text ("package.module:function" or "path/file.py:function") it runs in its own process, which is killed
    when a batch takes longer than timeout; its globals do not survive that. Given as an object from Python it runs
    right here, without any such protection.

    A function that raises, hangs, crashes or returns NaN gives infra_errors, never zeros: the answer is not at fault.
    """

    def __init__(
        self, function: str | Callable[..., Any], *, name: str | None = None, timeout: float | None = None
    ) -> None:
        """timeout in seconds per batch, 60 unless told, and only for a function named by text. Raises ValueError."""
        self._pool: WorkerPool | None = None
        if isinstance(function, str):
            place, _, function_name = function.rpartition(":")
            if not place or not function_name.isidentifier():
                raise ValueError(f"reward {function!r}: expected 'package.module:function' or 'path/file.py:function'")
            self.name = name or function_name
            self._pool = WorkerPool(
                "strop.rewards.function_worker",
                timeout=60.0 if timeout is None else timeout,
                num_workers=1,
                arguments=[function],
            )
        else:
            if timeout is not None:
                raise ValueError(
                    "a function object runs in this process and cannot be timed out: leave timeout out, or name the "
                    "function by text, as 'module:function'"
                )
            self.name = name or getattr(function, "__name__", type(function).__name__)
            self._function = function

    def start(self) -> None:
        """Loads the function now, so that a wrong name or a failing import shows before training. Raises ValueError."""
        if self._pool is not None:
            try:
                self._pool.start()
            except RuntimeError as error:
                raise ValueError(f"reward {self.name!r}: {error}") from None

    def score(self, tasks: Sequence[Task], completions: Sequence[Completion]) -> list[Verdict]:
        """One verdict per pair tasks[i], completions[i], NO_VERDICT where the function gave None.

        Raises ValueError when the function returns the wrong number of rewards.
        """
        arguments = _arguments(tasks, completions)
        values, detail, milliseconds = self._call(arguments)
        if values is None:
            failed = Verdict(score=0.0, status="infra_error", detail=detail, milliseconds=milliseconds)
            return [failed] * len(tasks)
        if len(values) != len(tasks):
            raise ValueError(f"reward {self.name!r} returned {len(values)} rewards for {len(tasks)} completions")
        return [NO_VERDICT if value is None else _verdict(value, milliseconds / len(tasks)) for value in values]

    def close(self) -> None:
        if self._pool is not None:
            self._pool.close()

    def _call(self, arguments: Mapping[str, Any]) -> tuple[list[float | None] | None, str, float]:
        """Values or None, the reason for None, and milliseconds."""
        if self._pool is not None:
            try:
                (reply,) = self._pool.map([arguments])
            except TypeError as error:
                raise ValueError(
                    f"reward {self.name!r}: a column cannot be sent to the function's process ({error}); "
                    "pass the function as an object from Python instead"
                ) from None
            return reply.value, reply.detail, reply.milliseconds
        started = time.monotonic()
        values, detail = None, ""
        try:
            values = call_reward_function(self._function, arguments)
        except Exception as error:  # the user's own code: whatever it raises is reported as its failure
            detail = last_line(error)
        return values, detail, 1000.0 * (time.monotonic() - started)


def _arguments(tasks: Sequence[Task], completions: Sequence[Completion]) -> dict[str, Any]:
    prompts: list[Any] = []
    texts: list[Any] = []
    for task, completion in zip(tasks, completions, strict=True):
        if isinstance(task.prompt, str):
            prompts.append(task.prompt)
            texts.append(completion.text)
        else:
            prompts.append([dict(message) for message in task.prompt])
            texts.append([{"role": "assistant", "content": completion.text}])
    names = dict.fromkeys(name for task in tasks for name in task.columns if name not in _PASSED_ALREADY)
    return {
        "prompts": prompts,
        "completions": texts,
        "completion_ids": [list(completion.token_ids) for completion in completions],
        **{name: [task.columns.get(name) for task in tasks] for name in names},
    }


def _verdict(value: float, milliseconds: float) -> Verdict:
    if not math.isfinite(value):
        return Verdict(score=0.0, status="infra_error", detail=f"returned {value}", milliseconds=milliseconds)
    return Verdict(score=value, milliseconds=milliseconds)
