"""Worker processes that can be killed: the only bound on foreign work that always holds.

A SIGALRM handler waits for a C call that never returns, and a thread cannot be ended at all. Here every request has a
wall deadline that the parent enforces with SIGKILL. Workers are started by exec, never by forking this process, which
has torch's threads in it.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import select
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

Failure = Literal["timeout", "killed", "infra_error"]

_BOOTSTRAP = (
    "import importlib, json, sys; "
    "sys.path[:] = json.loads(sys.argv[2]); sys.argv = [sys.argv[1], *sys.argv[3:]]; "
    "importlib.import_module(sys.argv[0]).main()"
)


@dataclass(frozen=True, slots=True)
class Reply:
    """What became of one request: a value, or a failure with its reason.

    Example: Reply(value={"equal": True}, failure=None, detail="", milliseconds=0.9)
    """

    value: Any
    failure: Failure | None
    """timeout: killed at the deadline. killed: it ended its worker twice (a crash, out of memory). infra_error: the
    worker could not start, or the handler raised."""
    detail: str
    milliseconds: float


class WorkerPool:
    """A few processes running one module's main(), which calls serve.serve. Thread-safe, started at the first request.

    A request that ends its worker is tried once more in a new one: killed again, the fault is the request's; answered,
    it was somebody else's (the out-of-memory killer, an operator), and the answer counts.
    """

    def __init__(
        self,
        module: str,
        *,
        timeout: float,
        num_workers: int | None = None,
        arguments: Sequence[str] = (),
        start_timeout: float = 120.0,
        prepare_timeout: float | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """timeout and start_timeout in seconds; num_workers defaults to the cores, at most 2. Where the worker prepares
        a request before it looks at what a model wrote (serve.serve), that may take prepare_timeout seconds, which are
        not the request's. environment's variables are set in the workers beside this process's own."""
        if num_workers is None:
            num_workers = min(2, os.cpu_count() or 1)
        if num_workers < 1:
            raise ValueError(f"num_workers must be at least 1, got {num_workers}")
        if not timeout > 0:
            raise ValueError(f"timeout must be above 0 seconds, got {timeout}")
        self._workers = [
            _Worker(module, arguments, timeout, start_timeout, prepare_timeout, environment) for _ in range(num_workers)
        ]
        self._idle: queue.LifoQueue[_Worker] = queue.LifoQueue()
        for worker in reversed(self._workers):
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(num_workers, thread_name_prefix=module)
        # Also runs at interpreter exit and when the pool is garbage.
        self._finalizer = weakref.finalize(self, _close_all, self._workers, self._threads)

    @property
    def num_workers(self) -> int:
        return len(self._workers)

    def start(self) -> None:
        """Starts one worker now, so that a module that cannot be loaded shows at once. Raises RuntimeError."""
        worker = self._take()
        try:
            worker.ensure_ready()
        except _CannotStartError as error:
            raise RuntimeError(str(error)) from None
        finally:
            self._idle.put(worker)

    def map(self, requests: Sequence[Any]) -> list[Reply]:
        """One reply per request, in order. Requests must be JSON values."""
        if len(self._workers) == 1 or len(requests) <= 1:
            return [self._ask(request) for request in requests]
        futures = [self._threads.submit(self._ask, request) for request in requests]
        try:
            return [future.result() for future in futures]
        finally:
            for future in futures:  # nothing to cancel, unless Ctrl-C came
                future.cancel()

    def close(self) -> None:
        """Ends every worker and waits for it. The pool cannot be used afterwards."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        self._finalizer()

    def _ask(self, request: Any) -> Reply:
        worker = self._take()
        try:
            return worker.ask(request)
        finally:
            self._idle.put(worker)

    def _take(self) -> _Worker:
        if not self._finalizer.alive:
            raise RuntimeError("this reward was closed")
        return self._idle.get()


def _close_all(workers: list[_Worker], threads: ThreadPoolExecutor) -> None:
    threads.shutdown(wait=False)  # not waiting: the last reference may have been dropped by one of these very threads
    for worker in workers:
        worker.stop()


class _CannotStartError(Exception):
    pass


class _DeadlineError(Exception):
    pass


class _NotPreparedError(Exception):
    pass


class _DiedError(Exception):
    pass


class _Worker:
    """One process and, where it respawns, the child that answers for it. Used by one thread at a time."""

    def __init__(
        self,
        module: str,
        arguments: Sequence[str],
        timeout: float,
        start_timeout: float,
        prepare_timeout: float | None,
        environment: Mapping[str, str] | None,
    ) -> None:
        self._module = module
        self._arguments = tuple(arguments)
        self._timeout = timeout
        self._start_timeout = start_timeout
        self._prepare_timeout = prepare_timeout
        self._environment = environment
        self._process: subprocess.Popen[bytes] | None = None
        self._answering_pid: int | None = None
        """None while no child has said hello."""
        self._pending = b""
        self._messages: list[Any] = []
        self._next_id = 0

    def ask(self, request: Any) -> Reply:
        started = time.monotonic()

        def reply(value: Any, failure: Failure | None, detail: str) -> Reply:
            return Reply(value, failure, detail, 1000.0 * (time.monotonic() - started))

        try:
            for _ in range(2):
                try:
                    self.ensure_ready()
                    started = time.monotonic()
                    self._send_request(request, started + self._timeout)
                    if self._prepare_timeout is not None:
                        self._wait_until_prepared(started + self._prepare_timeout)
                        started = time.monotonic()
                    message = self._read_reply(started + self._timeout)
                except _DiedError:
                    continue
                except _CannotStartError as error:
                    return reply(None, "infra_error", str(error))
                except _NotPreparedError:
                    self._kill_answering()
                    return reply(None, "infra_error", f"not ready to judge in {self._prepare_timeout:g} s")
                except _DeadlineError:
                    self._kill_answering()
                    return reply(None, "timeout", f"no result in {self._timeout:g} s; the worker was killed")
                if "error" in message:
                    return reply(None, "infra_error", message["error"])
                return reply(message["value"], None, "")
        except BaseException:  # Ctrl-C: the worker still owes a reply that nobody will read
            self.stop()
            raise
        return reply(None, "killed", "ended its worker process twice")

    def ensure_ready(self) -> None:
        """Starts or restarts the process where needed and waits for a child's hello. Raises _CannotStartError."""
        deadline = time.monotonic() + self._start_timeout
        try:
            if self._process is not None:
                self._wait_for_successor(deadline)
            if self._process is None:
                self._launch()
            while self._answering_pid is None:
                self._read_message(deadline)
        except _DeadlineError:
            self.stop()
            raise _CannotStartError(f"{self._module} did not start in {self._start_timeout:g} s") from None
        except _DiedError:
            raise _CannotStartError(f"{self._module} ended while starting") from None

    def stop(self) -> None:
        self._kill_answering()
        if self._process is None:
            return
        _kill_group(self._process.pid)
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()
        self._process, self._pending, self._messages = None, b"", []

    def _launch(self) -> None:
        # -P: the working directory may hold a json.py. The search path is this process's own, so that the child finds
        # strop and the user's modules exactly where we do. Its own session: Ctrl-C is for us, we tell the workers.
        command = [sys.executable, "-P", "-c", _BOOTSTRAP, self._module, json.dumps(sys.path), *self._arguments]
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,
                bufsize=0,
                env={**os.environ, **self._environment} if self._environment else None,
            )
        except OSError as error:
            raise _CannotStartError(f"{self._module} could not be started: {error}") from None
        assert self._process.stdin is not None
        os.set_blocking(self._process.stdin.fileno(), False)

    def _send_request(self, request: Any, deadline: float) -> None:
        self._next_id += 1
        times = {"timeout": self._timeout, "prepare_timeout": self._prepare_timeout}
        self._send((json.dumps({"id": self._next_id, **times, "value": request}) + "\n").encode(), deadline)

    def _wait_until_prepared(self, deadline: float) -> None:
        """Until the worker says so, once. An error or a reply instead stays for _read_reply."""
        try:
            message = self._read_reply(deadline)
        except _DeadlineError:
            raise _NotPreparedError from None
        if "prepared" not in message:
            self._messages.insert(0, message)

    def _read_reply(self, deadline: float) -> Any:
        """What the worker has to say next about the request that was sent last."""
        while True:
            message = self._read_message(deadline)
            if "hello" in message:
                raise _DiedError
            if message.get("id") == self._next_id:
                return message

    def _send(self, data: bytes, deadline: float) -> None:
        assert self._process is not None and self._process.stdin is not None
        fd = self._process.stdin.fileno()
        view = memoryview(data)
        try:
            while view:
                _wait_for(fd, select.POLLOUT, deadline)
                with contextlib.suppress(BlockingIOError):
                    view = view[os.write(fd, view) :]
        except BrokenPipeError:
            self.stop()
            raise _DiedError from None

    def _read_message(self, deadline: float) -> Any:
        """The next message. A hello also updates the pid to kill; the end of the stream raises _DiedError."""
        assert self._process is not None and self._process.stdout is not None
        fd = self._process.stdout.fileno()
        while not self._messages:
            _wait_for(fd, select.POLLIN, deadline)
            chunk = os.read(fd, 65536)
            if not chunk:
                self._answering_pid = None
                self.stop()
                raise _DiedError
            *lines, self._pending = (self._pending + chunk).split(b"\n")
            for line in lines:
                # Anything else was cut short by a kill, and its request is dealt with as such.
                with contextlib.suppress(ValueError):
                    self._messages.append(json.loads(line))
        message = self._messages.pop(0)
        if "cannot_start" in message:
            self.stop()
            raise _CannotStartError(f"{self._module} could not be started: {message['cannot_start']}")
        if "hello" in message:
            self._answering_pid = message["hello"]
        return message

    def _wait_for_successor(self, deadline: float) -> None:
        """After a kill: until a new child says hello, or the process turns out to be gone and is cleared away.

        Also takes notice of a kill from outside between two requests.
        """
        with contextlib.suppress(_DiedError):
            while self._answering_pid is None:
                self._read_message(deadline)
            with contextlib.suppress(_DeadlineError):
                while True:
                    self._read_message(deadline=0.0)

    def _kill_answering(self) -> None:
        if self._answering_pid is not None:
            _kill_group(self._answering_pid)
            self._answering_pid = None


def _kill_group(leader_pid: int) -> None:
    # The group, so that processes that a reward function started go too.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader_pid, signal.SIGKILL)


def _wait_for(fd: int, event: int, deadline: float) -> None:
    poll = select.poll()
    poll.register(fd, event)
    if not poll.poll(max(0.0, 1000.0 * (deadline - time.monotonic()))):
        raise _DeadlineError
