"""The C library's allocator, set up for large blocks of a few sizes that come and go."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

_SETTINGS = {
    "glibc.malloc.tcache_count": "0",
    "glibc.malloc.hugetlb": "1",
    "glibc.malloc.mmap_max": "0",
    "glibc.malloc.trim_threshold": str(1 << 44),
}


def for_large_blocks(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment for a process whose malloc suits tensors; what is settled in it already stays.

    glibc 2.26 and later keep small freed blocks in a cache of each thread, where they count as used. They lie beside
    the large ones (torch asks for aligned memory, and what is cut off at its ends is such a block), and keep what is
    freed there from becoming one block again that the next tensor fits into. A training step of SmolLM2-135M then needs
    a tenth more memory, and the time to fill pages that were never used before.

    glibc 2.35 and later can ask the system for large pages, where it gives them on request (madvise). A training step
    then has a few hundred page faults instead of tens of thousands.

    Blocks of a step are given back when they are freed, unless they come from one heap that keeps its end: mmap_max and
    trim_threshold. The next step has them again without asking the system (SmolLM2-135M learns a tenth faster).

    The settings are read at the start of a process only.
    """
    if not _is_glibc():
        return dict(environment)
    tunables = environment.get("GLIBC_TUNABLES", "")
    new = [f"{name}={value}" for name, value in _SETTINGS.items() if name not in tunables]
    return {**environment, "GLIBC_TUNABLES": ":".join(filter(None, (tunables, *new)))}


def restart_for_large_blocks() -> None:
    """Start this process again, same arguments, same process id, unless its malloc is set up already.

    For the first lines of a program: nothing is carried over. Comes back where there is nothing to do.
    """
    environment = for_large_blocks(os.environ)
    if environment != dict(os.environ) and sys.executable:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def _is_glibc() -> bool:
    try:
        return str(os.confstr("CS_GNU_LIBC_VERSION")).startswith("glibc")
    except (AttributeError, ValueError, OSError):
        return False
