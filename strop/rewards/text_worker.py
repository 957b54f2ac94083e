"""The process that matches a format pattern. Started by text.FormatReward with the pattern as its argument."""

from __future__ import annotations

import re
import sys

from strop.rewards.serve import Handler, serve

MEMORY_BYTES = 1 << 30


def main() -> None:
    serve(_make_handler, respawn=True, memory_bytes=MEMORY_BYTES)


def _make_handler() -> Handler:
    pattern = re.compile(sys.argv[1], re.DOTALL)

    def handle(text: str) -> bool:
        return pattern.fullmatch(text) is not None

    return handle
