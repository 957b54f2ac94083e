"""Ctrl-C and SIGTERM as a wish that the training loop grants at its next step boundary."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType, TracebackType
from typing import Self

_FIRST = b"\nStopping after this step, with a checkpoint. Once more to exit at once, without one.\n"
_SHOW_CURSOR = b"\x1b[?25h"


class Interrupt:
    """While it is entered, SIGINT and SIGTERM set `is_requested`; a second one ends the process at once.

        with Interrupt() as interrupt:
            for step in ...:
                ...
                if interrupt.is_requested:
                    run.save_checkpoint(...)
                    interrupt.exit()

    Main thread only. Worker processes get a terminal's Ctrl-C too and must ignore it, or the step cannot finish.
    """

    def __init__(self) -> None:
        self._signal: int | None = None
        self._previous: dict[int, signal.Handlers | int | None] = {}

    @property
    def is_requested(self) -> bool:
        return self._signal is not None

    @property
    def exit_code(self) -> int:
        """128 + the signal, as a shell reports it: 130 for Ctrl-C, 143 for SIGTERM; 0 if none came."""
        return 0 if self._signal is None else 128 + self._signal

    def exit(self) -> None:
        """Raise SystemExit with `exit_code`."""
        sys.exit(self.exit_code)

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)  # type: ignore[assignment]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            # None: set by C code, which Python can neither call nor put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._signal is not None:
            if sys.stderr.isatty():
                os.write(2, _SHOW_CURSOR)
            os._exit(128 + number)
        self._signal = number
        # Not print: a handler may run in the middle of another print.
        os.write(2, _FIRST)
