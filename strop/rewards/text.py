"""Rewards on the form of a completion: a pattern for its text, and its length in tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence

from strop.rewards.worker import WorkerPool
from strop.types import Completion, Task, Verdict


class FormatReward:
    """1.0 when the regular expression matches the whole completion, else 0.0.

    The whole of it (re.fullmatch with DOTALL): a pattern that matched somewhere would pay for junk around the match. A
    pattern can backtrack for years on an unlucky text, so it runs in a worker process that is killed at the deadline
    (status "timeout", score 0.0).
    """

    def __init__(
        self, *, pattern: str, name: str = "format", timeout: float = 1.0, num_workers: int | None = None
    ) -> None:
        """pattern is Python's re syntax, "." also matches a newline; timeout in seconds. Raises ValueError."""
        try:
            re.compile(pattern, re.DOTALL)
        except re.error as error:
            raise ValueError(f"reward {name!r}: pattern {pattern!r} is no regular expression: {error}") from None
        self.name = name
        self._pool = WorkerPool(
            "strop.rewards.text_worker", timeout=timeout, num_workers=num_workers, arguments=[pattern]
        )

    def score(self, tasks: Sequence[Task], completions: Sequence[Completion]) -> list[Verdict]:
        verdicts = []
        for reply in self._pool.map([completion.text for completion in completions]):
            if reply.failure is not None:
                verdict = Verdict(score=0.0, status=reply.failure, detail=reply.detail, milliseconds=reply.milliseconds)
            elif reply.value:
                verdict = Verdict(score=1.0, milliseconds=reply.milliseconds)
            else:
                verdict = Verdict(
                    score=0.0, status="wrong", detail="pattern does not match", milliseconds=reply.milliseconds
                )
            verdicts.append(verdict)
        return verdicts

    @property
    def num_parallel(self) -> int:
        return self._pool.num_workers

    def close(self) -> None:
        self._pool.close()


class OverlongPenalty:
    """DAPO's soft overlong punishment (Yu et al. 2025, eq. 13), between -1 and 0.

        0                               L <= max_new_tokens - buffer
        (max_new_tokens - buffer - L) / buffer     up to max_new_tokens
        -1                              beyond

    L counts sampled tokens, the stop token included. DAPO adds it to rewards of +1 and -1: beside a reward of 0 and 1
    give it the weight 0.5.
    """

    def __init__(self, *, max_new_tokens: int, buffer: int, name: str = "overlong") -> None:
        """Both in tokens. Raises ValueError unless 0 < buffer <= max_new_tokens."""
        if not 0 < buffer <= max_new_tokens:
            raise ValueError(
                f"reward {name!r}: buffer must be above 0 and at most max_new_tokens, "
                f"got buffer {buffer} and max_new_tokens {max_new_tokens}"
            )
        self.name = name
        self._max_new_tokens = max_new_tokens
        self._buffer = buffer

    def score(self, tasks: Sequence[Task], completions: Sequence[Completion]) -> list[Verdict]:
        return [Verdict(score=self._penalty(len(completion.token_ids))) for completion in completions]

    def close(self) -> None:
        """Holds nothing."""

    def _penalty(self, length: int) -> float:
        return max(-1.0, min(0.0, (self._max_new_tokens - self._buffer - length) / self._buffer))


class TargetLength:
    """max(0, 1 - |L - target_tokens| / width): 1 at the target, falling in a straight line to 0 at a distance of width.

    L counts sampled tokens, the stop token included.
    """

    def __init__(self, *, target_tokens: int, width: int, name: str = "length") -> None:
        """Both in tokens. Raises ValueError unless both are above 0."""
        if target_tokens < 1 or width < 1:
            raise ValueError(
                f"reward {name!r}: target_tokens and width must be above 0, got {target_tokens} and {width}"
            )
        self.name = name
        self._target_tokens = target_tokens
        self._width = width

    def score(self, tasks: Sequence[Task], completions: Sequence[Completion]) -> list[Verdict]:
        return [
            Verdict(score=max(0.0, 1.0 - abs(len(completion.token_ids) - self._target_tokens) / self._width))
            for completion in completions
        ]

    def close(self) -> None:
        """Holds nothing."""
