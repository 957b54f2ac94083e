"""The two logs of a run, metrics.jsonl and samples.jsonl: one JSON object a line, cut back to a step on resume."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

CLOCK_PREFIX = "time/"
"""Metrics with this prefix (time/seconds, time/tokens_per_second) depend on the clock. All others are the same, bit for
bit, whenever the run is repeated or resumed."""


class LineLog:
    """Appends lines {"step": ..., ...} to one file. Every line is with the kernel before `append` returns, so killing
    the process loses at most the line being written; `sync` also survives a power cut."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("ab", buffering=0)

    def append(self, step: int, row: Mapping[str, Any]) -> None:
        assert "step" not in row, "the step is given apart"
        line = json.dumps(plain({"step": step, **row}), ensure_ascii=False, allow_nan=False) + "\n"
        # A lone surrogate, which UTF-8 lacks, becomes the escape that JSON has for it.
        rest = memoryview(line.encode("utf-8", "backslashreplace"))
        while rest:
            rest = rest[self._file.write(rest) :]

    def keep_until(self, step: int | None) -> None:
        """Cut off every line after `step` (all of them if None) and a half-written last one.

        The steps never decrease, so that what is kept is the beginning of the file: one truncation, whole or not at
        all. ValueError naming file:line for a broken line before the cut.
        """
        end = 0
        for line_step, line_end in _steps(self._path):
            if step is None or line_step > step:
                break
            end = line_end
        os.ftruncate(self._file.fileno(), end)
        self.sync()

    def sync(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def read_lines(path: Path, *, with_clock: bool = True) -> Iterator[dict[str, Any]]:
    """The lines of metrics.jsonl or samples.jsonl as dicts, without a half-written last one.

    with_clock=False leaves out the "time/" keys: what remains must be equal in two runs of the same config.
    ValueError naming file:line for a broken line.
    """
    for row, _ in _rows(path):
        yield row if with_clock else {key: value for key, value in row.items() if not key.startswith(CLOCK_PREFIX)}


def _steps(path: Path) -> Iterator[tuple[int, int]]:
    for row, end in _rows(path):
        yield row["step"], end


def _rows(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """Each line's object and the offset of the line's end."""
    end = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            end += len(line)
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}:{number} is damaged: {error}") from None
            if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                raise ValueError(f"{path}:{number} is damaged: not an object with a step")
            yield row, end


def plain(value: Any) -> Any:
    """For JSON: tensors and numpy scalars as numbers, and null where a number is inf or nan, for which it has none."""
    if isinstance(value, torch.Tensor | np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Path):
        return str(value)
    return value
