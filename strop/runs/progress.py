"""How far a run is: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Literal, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

Mode = Literal["bar", "lines", "off"]

_LINE_SECONDS = 10.0


class Progress:
    """Shows steps, the given figures and the time left, on standard error.

        with Progress("grpo", total_steps=200, start_step=checkpoint_step) as progress:
            progress.update(step, {"reward": 0.41, "tokens/s": 5300})

    A bar when standard error is a terminal, else a plain line for the first step, the last, and one at most every ten
    seconds between. The environment variable STROP_PROGRESS (bar, lines, off) decides otherwise, as does `mode`.
    """

    def __init__(
        self,
        title: str,
        *,
        total_steps: int,
        start_step: int = 0,
        mode: Mode | None = None,
        console: Console | None = None,
    ) -> None:
        self._title = title
        self._total = total_steps
        self._start = start_step
        self._console = console or Console(stderr=True)
        self._mode = mode or _mode_from_environment(self._console)
        self._started = time.monotonic()
        self._last_line = -_LINE_SECONDS
        self._bar: RichProgress | None = None

    def __enter__(self) -> Self:
        self._started = time.monotonic()
        if self._mode == "bar":
            self._bar = RichProgress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._bar.add_task(self._title, total=self._total, completed=self._start, figures="")
            self._bar.start()
        return self

    def update(self, step: int, figures: Mapping[str, float]) -> None:
        """After `step` finished updates; figures are shown in their order."""
        if self._mode == "off":
            return
        text = "  ".join(f"{name} {_short(value)}" for name, value in figures.items())
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step, figures=text)
            return
        now = time.monotonic()
        if step < self._total and now - self._last_line < _LINE_SECONDS:
            return
        self._last_line = now
        seconds_left = (now - self._started) / max(1, step - self._start) * (self._total - step)
        self._console.print(
            f"{self._title}  step {step}/{self._total}  {text}  {_clock(seconds_left)} left",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _mode_from_environment(console: Console) -> Mode:
    mode = os.environ.get("STROP_PROGRESS", "")
    if mode == "":
        return "bar" if console.is_terminal else "lines"
    if mode in ("bar", "lines", "off"):
        return mode
    raise ValueError(f"STROP_PROGRESS={mode}: use bar, lines or off")


def _short(value: float) -> str:
    """Four significant digits, large numbers whole."""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _clock(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
