"""The child side of worker.WorkerPool: one JSON request per line in, one JSON reply per line out.

Imports only light parts of the standard library: this runs in every worker, and again after every kill.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

Handler = Callable[[Any], Any]

_SELF_DESTRUCT_GRACE = 1.0
"""Seconds after the parent's own deadline at which the kernel ends a worker whose parent is gone."""


def serve(
    make_handler: Callable[[], Handler],
    *,
    respawn: bool,
    memory_bytes: int | None = None,
    prepare: Callable[[Any], object] | None = None,
) -> None:
    """Answers requests from stdin until its end, with the handler that make_handler() builds once.

    With respawn this process only does the imports: it forks the one that answers, and forks another whenever that one
    is killed by a signal, so that a kill costs milliseconds instead of the imports. make_handler must then leave no
    threads behind. Prints of the handler go to stderr, so that they cannot be taken for replies.

    prepare gets each request before the handler does, and the request's deadline begins behind it: for work that is not
    the answer's, such as making its question again. The pool must have a prepare_timeout.
    """
    requests, replies = os.dup(0), os.dup(1)
    with open(os.devnull) as null:
        os.dup2(null.fileno(), 0)
    os.dup2(2, 1)
    # The default action, not a Python handler: it must also end a worker that is deep inside one C call.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    try:
        handler = make_handler()
    except BaseException as error:
        _write(replies, {"cannot_start": last_line(error)})
        raise SystemExit(1) from error
    if respawn:
        _become_child()
    if memory_bytes is not None:
        with contextlib.suppress(ValueError, OSError):  # macOS has no RLIMIT_AS; the deadline still holds there
            resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    _discard_pending(requests)
    _write(replies, {"hello": os.getpid()})
    for request in _read_requests(requests):
        # Bounds this process even when the parent was kill -9ed in the middle of the request.
        try:
            if prepare is not None:
                signal.setitimer(signal.ITIMER_REAL, request["prepare_timeout"] + _SELF_DESTRUCT_GRACE)
                prepare(request["value"])
                _write(replies, {"id": request["id"], "prepared": True})
            signal.setitimer(signal.ITIMER_REAL, request["timeout"] + _SELF_DESTRUCT_GRACE)
            reply = {"id": request["id"], "value": handler(request["value"])}
        except MemoryError:
            # Caches of earlier requests may hold the memory: the parent tries once more in a fresh process.
            os.kill(os.getpid(), signal.SIGKILL)
            raise
        except Exception as error:
            reply = {"id": request["id"], "error": last_line(error)}
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        _write(replies, reply)


def _become_child() -> None:
    """Returns in a fresh child, again and again; the calling process itself never gets out of here."""
    while True:
        pid = os.fork()
        if pid == 0:
            os.setpgid(0, 0)
            return
        _, status = os.waitpid(pid, 0)
        if os.WIFEXITED(status):
            os._exit(os.WEXITSTATUS(status))


def _discard_pending(fd: int) -> None:
    """Drops what a killed predecessor left unread: its request may be the very one that it was killed for."""
    os.set_blocking(fd, False)
    with contextlib.suppress(BlockingIOError):
        while os.read(fd, 65536):
            pass
    os.set_blocking(fd, True)


def _read_requests(fd: int) -> Iterator[Any]:
    pending = b""
    while chunk := os.read(fd, 65536):
        *lines, pending = (pending + chunk).split(b"\n")
        for line in lines:
            # Not JSON: the tail of a request whose head a killed predecessor had read. The parent sends it again.
            with contextlib.suppress(ValueError):
                yield json.loads(line)


def _write(fd: int, message: Any) -> None:
    # The newline in front ends whatever a killed predecessor had half written.
    data = b"\n" + json.dumps(message).encode() + b"\n"
    try:
        while data:
            data = data[os.write(fd, data) :]
    except BrokenPipeError:
        raise SystemExit(0) from None  # the parent is gone, and so is the reason to work


def end_with_parent() -> None:
    """From now on this process ends once the one that started it is gone, also in the middle of a long request."""
    threading.Thread(target=_watch, args=(os.getppid(),), daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.3)
    os._exit(1)


def last_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[-1]}" if text else type(error).__name__
