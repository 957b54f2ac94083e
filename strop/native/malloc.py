"""The C library's allocator, set up for large blocks of a few sizes that come and go."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

_NAME = "glibc.malloc.tcache_count"


def without_thread_cache(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment for a process whose malloc keeps no freed blocks per thread; as it was where that is settled.

    glibc 2.26 and later keep small freed blocks in a cache of each thread, where they count as used. They lie beside
    the large ones (torch asks for aligned memory, and what is cut off at its ends is such a block), and keep what is
    freed there from becoming one block again that the next tensor fits into. A training step of SmolLM2-135M then needs
    a tenth more memory, and the time to fill pages that were never used before. The setting is read at the start of a
    process only.
    """
    tunables = environment.get("GLIBC_TUNABLES", "")
    if not _is_glibc() or _NAME in tunables:
        return dict(environment)
    return {**environment, "GLIBC_TUNABLES": ":".join(filter(None, (tunables, f"{_NAME}=0")))}


def restart_without_thread_cache() -> None:
    """Start this process again, same arguments, same process id, unless its malloc is set up already.

    For the first lines of a program: nothing is carried over. Comes back where there is nothing to do.
    """
    environment = without_thread_cache(os.environ)
    if environment != dict(os.environ) and sys.executable:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def _is_glibc() -> bool:
    try:
        return str(os.confstr("CS_GNU_LIBC_VERSION")).startswith("glibc")
    except (AttributeError, ValueError, OSError):
        return False
