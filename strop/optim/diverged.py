"""When refused updates pile up, a run stops instead of burning time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path


class DivergedError(RuntimeError):
    """Non-finite gradients, again and again. The message names the saved batch and what to try."""


class SkippedSteps:
    """Counts updates that were refused for a non-finite gradient, and stops the run after `limit` in a row."""

    def __init__(self, limit: int) -> None:
        if limit < 1:
            raise ValueError(f"max_skipped_steps must be at least 1, got {limit}")
        self.limit = limit
        self.total = 0
        self.in_a_row = 0

    def record(self, is_skipped: bool, save_batch: Callable[[], Path]) -> None:
        """Raises DivergedError at the limit, after save_batch() has kept the batch that did it."""
        self.total += is_skipped
        self.in_a_row = self.in_a_row + 1 if is_skipped else 0
        if self.in_a_row >= self.limit:
            raise DivergedError(
                f"{self.in_a_row} steps in a row had a non-finite gradient and changed nothing; the last batch is in "
                f'{save_batch()}. Lower optimizer.lr, lengthen the warm-up, or set dtype = "float32"'
            )

    def state_dict(self) -> dict[str, int]:
        return {"total": self.total, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.total, self.in_a_row = state["total"], state["in_a_row"]
