"""Memory that was freed, given back to the system."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache


def give_back_freed_memory() -> None:
    """Have the C library return what was freed but kept for the next allocation; nothing where it cannot (not glibc).

    For the border between two phases with tensors of other sizes, such as rollout and update: the holes that one leaves
    do not fit the other, so that the process would hold the sum of both. What is needed again costs page faults, so not
    between equal steps.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None
    trim.argtypes = (ctypes.c_size_t,)
    return trim
