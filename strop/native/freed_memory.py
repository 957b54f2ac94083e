"""Memory that was freed, given back to the system."""

from __future__ import annotations

import ctypes
import os
from functools import cache
from pathlib import Path


def give_back_freed_memory() -> None:
    """Have the C library return what was freed but kept for the next allocation; nothing where it cannot (not glibc).

    For once, where something has ended that does not come again (loading, a first step). What is needed again costs
    page faults: on a virtual machine, whose host may take back what is given back, a hundred milliseconds for 200 MB.
    """
    libc = _libc()
    if libc is not None:
        libc.malloc_trim(0)


def give_back_between_phases() -> None:
    """give_back_freed_memory, if more than half of the process is free.

    For the border between two phases that take turns with tensors of other sizes, such as rollout and update: what one
    leaves is mostly of use to the other.
    """
    libc = _libc()
    if libc is None:
        return
    free = libc.mallinfo2().fordblks
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    if 2 * free > resident:
        libc.malloc_trim(0)


class _Mallinfo2(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


@cache
def _libc() -> ctypes.CDLL | None:
    """glibc 2.33 or later, on Linux."""
    try:
        libc = ctypes.CDLL(None)
        libc.malloc_trim.argtypes = (ctypes.c_size_t,)
        libc.mallinfo2.restype = _Mallinfo2
    except (AttributeError, OSError, TypeError):
        return None
    return libc
