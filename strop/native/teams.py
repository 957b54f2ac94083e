"""OpenMP teams: the thread that computes should be the only one that has one."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def in_own_thread(work: Callable[[], T]) -> T:
    """What the work returns or raises, done by a thread that ends with it and takes its OpenMP team along.

    libgomp counts the threads of all teams that there are. Where they are more than the cores, threads that wait for
    one another go to sleep instead of spinning: a server whose main thread had only loaded the model needed 14 instead
    of 8 ms per token in its worker's thread.
    """
    with ThreadPoolExecutor(max_workers=1) as executor:
        return executor.submit(work).result()
