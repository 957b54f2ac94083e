"""One box: a python process for one piece of foreign code, thrown away afterwards, and a few of them started ahead.

Around it, with the backend bubblewrap: user, pid, network, mount, ipc and uts namespaces, a list of allowed system
calls (seccomp), and limits on CPU time, memory and file size that are set before bubblewrap itself starts. Inside: a
read-only /usr, an empty /tmp of 16 MB, no /proc, no environment. A box dies with the thread that started it.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import resource
import select
import signal
import subprocess
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from strop.rewards.sandbox import guest
from strop.rewards.sandbox.python import NOBODY, bwrap_path, find_python
from strop.rewards.sandbox.seccomp import seccomp_filter
from strop.rewards.sandbox.wasm import wasm_command

TMP_BYTES = 16 << 20
_UNSPOKEN = bytes(guest.ID_BYTES)


class BoxError(Exception):
    """The box itself failed: nobody's answer is at fault."""


class DeadlineError(Exception):
    pass


class EndedError(Exception):
    """The process in the box ended, or closed its pipe."""


class MisbehavedError(Exception):
    """Bytes that were not asked for, or no message."""


@dataclass(frozen=True, kw_only=True)
class BoxSettings:
    """How boxes are made.

    Example: BoxSettings(memory_mb=512, cpu_seconds=7)
    """

    memory_mb: int = 512
    """Address space of each process. There is only one process in a box, so this bounds the box."""
    cpu_seconds: int = 7
    python: str | None = None
    """The interpreter in the box; None takes this one, or the system's where this one cannot be reached from a box."""
    start_seconds: float = 20.0
    """What a box may take to get ready before it counts as broken."""
    backend: Literal["bubblewrap", "wasm", "local"] = "bubblewrap"
    """local is no box at all: only the limits, and this user's files, network and processes in reach."""
    read_only: tuple[str, ...] = ()
    """Folders that bubblewrap's boxes see, beside the system's and the interpreter's: packages, say."""
    writable: tuple[str, ...] = ()
    """Folders that they may write to."""
    file_mb: int = TMP_BYTES >> 20
    """Largest file that can be written."""


class Launcher:
    """Starts boxes. Raises BoxError where none can be started."""

    def __init__(
        self,
        settings: BoxSettings,
        *,
        source: str | None = None,
        command: Sequence[str] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """source is the Python program that runs in the box and speaks guest's frames; None is guest itself. command is
        another program altogether, with variables of its own."""
        self._settings = settings
        self._environment = {"PYTHONHASHSEED": "0", **(environment or {})}
        source = Path(guest.__file__).read_text(encoding="utf-8") if source is None else source
        self._bwrap, self._filter, self._prefix = None, b"", ""
        self._is_foreign = command is not None
        if command is not None:
            self._command = list(command)
        elif settings.backend == "wasm":
            self._command = wasm_command(source, settings.memory_mb << 20)
        else:
            python, self._prefix = find_python(settings.python)
            self._command = [python, "-s", "-S", "-X", "utf8", "-c", source]
        if settings.backend == "bubblewrap":
            self._bwrap, self._filter = bwrap_path(), seccomp_filter()

    def start(self) -> Box:
        settings = self._settings
        # wasmtime reserves far more address space than it uses, and bounds the memory itself.
        memory_bytes = None if settings.backend == "wasm" else settings.memory_mb << 20
        read_info, write_info = os.pipe()
        read_filter, write_filter = os.pipe()
        try:
            # A pipe each: bwrap reads to the end, and a shared file would share its offset.
            os.write(write_filter, self._filter)
            os.close(write_filter)
            command = self._command
            if self._bwrap is not None:
                command = [*self._box_arguments(read_filter, write_info), *command]
            is_root = os.geteuid() == 0 and self._bwrap is not None
            # Root in the box would be root outside as far as some limits go.
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                bufsize=0,
                # Not bwrap's --clearenv: its own first process would keep ours, for everybody in the box to read.
                env=self._environment,
                cwd="/",
                pass_fds=(read_filter, write_info) if self._bwrap else (),
                start_new_session=True,
                preexec_fn=functools.partial(_limit, settings.cpu_seconds, memory_bytes, settings.file_mb << 20),
                user=NOBODY if is_root else None,
                group=NOBODY if is_root else None,
                extra_groups=[] if is_root else None,
            )
        except OSError as error:
            os.close(read_info)
            raise BoxError(f"a box could not be started: {error}") from None
        finally:
            os.close(write_info)
            os.close(read_filter)
        return Box(process, read_info, settings.start_seconds)

    def _box_arguments(self, filter_fd: int, info_fd: int) -> list[str]:
        assert self._bwrap is not None
        binds = ["--ro-bind", "/usr", "/usr"]
        for name in ("/lib", "/lib64", "/lib32", "/bin", "/sbin"):
            if os.path.islink(name):
                binds += ["--symlink", os.readlink(name), name]
            elif os.path.isdir(name):
                binds += ["--ro-bind", name, name]
        if self._prefix and not Path(self._prefix).is_relative_to("/usr"):
            binds += ["--ro-bind", self._prefix, self._prefix]
        # Before the folders below: one of them may lie under /tmp.
        binds += ["--size", str(TMP_BYTES), "--tmpfs", "/tmp"]
        for folder in self._settings.read_only:
            binds += ["--ro-bind", folder, folder]
        for folder in self._settings.writable:
            binds += ["--bind", folder, folder]
        if self._is_foreign:
            # There is no /proc, but some programs (lean) find their own folder there. They are process 1.
            binds += ["--symlink", self._command[0], "/proc/1/exe", "--symlink", "1", "/proc/self"]
        return [
            *(self._bwrap, "--unshare-all", "--die-with-parent", "--as-pid-1", "--cap-drop", "ALL"),
            *binds,
            *("--dev-bind", "/dev/null", "/dev/null", "--dev-bind", "/dev/urandom", "/dev/urandom"),
            *("--chdir", "/tmp", "--remount-ro", "/"),
            *("--seccomp", str(filter_fd), "--info-fd", str(info_fd)),
        ]


def _limit(cpu_seconds: int, memory_bytes: int | None, file_bytes: int) -> None:
    for which, value in (
        (resource.RLIMIT_CPU, cpu_seconds),
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_FSIZE, file_bytes),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        if value is None:
            continue
        _, most = resource.getrlimit(which)
        value = value if most == resource.RLIM_INFINITY else min(value, most)
        resource.setrlimit(which, (value, value))


class Box:
    """One running process and the pipes to it."""

    def __init__(self, process: subprocess.Popen[bytes], info_fd: int, start_seconds: float) -> None:
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        self._process = process
        self._info_fd = info_fd
        self._in, self._out = process.stdin.fileno(), process.stdout.fileno()
        self._pending = b""
        self._inner: int | None = None
        """A handle on the process inside, which is not our child."""
        self._deadline_to_start = time.monotonic() + start_seconds
        self._start_seconds = start_seconds
        os.set_blocking(self._in, False)

    def wait_ready(self) -> None:
        """Until the box's own first word, said before any foreign code. Raises BoxError."""
        try:
            message_id, payload = self.read_frame(self._deadline_to_start)
        except DeadlineError:
            self.close()
            raise BoxError(f"a box did not start in {self._start_seconds:g} s") from None
        except (EndedError, MisbehavedError):
            raise BoxError(f"a box ended while starting: {self.last_words()}") from None
        if (message_id, payload) != (_UNSPOKEN, b"ready"):
            self.close()
            raise BoxError("a box did not start with its greeting")
        self._find_inner()

    def send(self, message_id: bytes, payload: bytes, deadline: float, *, then_close: bytes | None = None) -> None:
        """One message; with then_close these raw bytes follow and the pipe is closed. Raises EndedError."""
        self.write(guest.frame(message_id, payload) + (then_close or b""), deadline, then_close=then_close is not None)

    def write(self, raw: bytes, deadline: float, *, then_close: bool = False) -> None:
        """Bytes as they are. Raises EndedError, unless the pipe is to be closed anyway."""
        data = memoryview(raw)
        poll = select.poll()
        poll.register(self._in, select.POLLOUT)
        try:
            while data:
                if not poll.poll(_milliseconds(deadline)):
                    raise DeadlineError
                with contextlib.suppress(BlockingIOError):
                    data = data[os.write(self._in, data) :]
        except BrokenPipeError:
            if not then_close:  # a program need not read its input
                raise EndedError from None
        if then_close:
            assert self._process.stdin is not None
            self._process.stdin.close()

    def read_frame(self, deadline: float) -> tuple[bytes, bytes]:
        """The next message's id and payload. Raises MisbehavedError when it is too long."""
        while True:
            size = int.from_bytes(self._pending[:4], "big")
            if size > guest.MAX_MESSAGE_BYTES + 1:
                raise MisbehavedError("a message of more than a megabyte, or no message at all")
            if len(self._pending) >= guest.HEADER_BYTES + size:
                break
            self._pending += self._read_chunk(deadline)
        end = guest.HEADER_BYTES + size
        header, payload = self._pending[: guest.HEADER_BYTES], self._pending[guest.HEADER_BYTES : end]
        self._pending = self._pending[end:]
        return header[4:], payload

    def read_until(self, end: bytes, deadline: float, limit: int) -> bytes:
        """What comes before these bytes, which are dropped. MisbehavedError beyond limit bytes."""
        while end not in self._pending:
            if len(self._pending) > limit:
                raise MisbehavedError(f"more than {limit} bytes without an end")
            self._pending += self._read_chunk(deadline)
        found, _, self._pending = self._pending.partition(end)
        return found

    def read_all(self, deadline: float, limit: int) -> bytes:
        """What the process writes until it ends. MisbehavedError beyond limit bytes."""
        parts, size = [self._pending], len(self._pending)
        with contextlib.suppress(EndedError):
            while size <= limit:
                parts.append(self._read_chunk(deadline))
                size += len(parts[-1])
        if size > limit:
            raise MisbehavedError(f"more than {limit} bytes of output")
        return b"".join(parts)

    def has_spoken(self) -> bool:
        """Whether there is something to read that nobody asked for. The end of the stream is no word."""
        if self._pending:
            return True
        poll = select.poll()
        poll.register(self._out, select.POLLIN)
        if not any(event & select.POLLIN for _, event in poll.poll(0)):
            return False
        self._pending = os.read(self._out, 65536)
        return bool(self._pending)

    def is_running(self) -> bool:
        return self._process.poll() is None

    def exit_status(self, deadline: float) -> int:
        """As subprocess's returncode; a signal is negative, also where bubblewrap reports it as 128 + n."""
        try:
            code = self._process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise DeadlineError from None
        return 128 - code if code > 128 else code

    def close(self) -> None:
        """Kills what is inside and waits until it is gone. Idempotent."""
        process = self._process
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        if self._info_fd >= 0:
            self._find_inner()
        if process.poll() is None:
            try:
                if self._inner is None:
                    raise ProcessLookupError
                # The inner one first: bubblewrap then reaps it and ends, and nobody is left to init.
                signal.pidfd_send_signal(self._inner, signal.SIGKILL)
                process.wait(2.0)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if self._inner is not None:
            os.close(self._inner)
            self._inner = None
        for pipe in (process.stdin, process.stdout, process.stderr):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()

    def _read_chunk(self, deadline: float) -> bytes:
        poll = select.poll()
        poll.register(self._out, select.POLLIN)
        if not poll.poll(_milliseconds(deadline)):
            raise DeadlineError
        chunk = os.read(self._out, 65536)
        if not chunk:
            raise EndedError
        return chunk

    def _find_inner(self) -> None:
        """Takes hold of the process inside by what bubblewrap says about it."""
        if self._info_fd < 0:
            return
        data = b""
        poll = select.poll()
        poll.register(self._info_fd, select.POLLIN)
        while poll.poll(0) and (chunk := os.read(self._info_fd, 4096)):
            data += chunk
        os.close(self._info_fd)
        self._info_fd = -1
        with contextlib.suppress(ValueError, KeyError, ProcessLookupError):
            self._inner = os.pidfd_open(json.loads(data)["child-pid"])

    def last_words(self) -> str:
        """Why it ended, as far as it said so; closes it."""
        assert self._process.stderr is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1.0)
        poll = select.poll()
        poll.register(self._process.stderr.fileno(), select.POLLIN)
        words = os.read(self._process.stderr.fileno(), 4096) if poll.poll(100) else b""
        self.close()
        lines = words.decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"exit status {self._process.returncode}"


class BoxPool:
    """Boxes started ahead of time, so that a verdict does not wait for a start."""

    def __init__(self, launcher: Launcher, *, size: int) -> None:
        self._launcher = launcher
        self._size = size
        self._boxes: deque[Box] = deque()

    def take(self) -> Box:
        """A box that is ready. Raises BoxError."""
        while self._boxes:
            box = self._boxes.popleft()
            with contextlib.suppress(BoxError):
                box.wait_ready()
                if box.is_running():
                    return box
            box.close()  # somebody ended it while it waited: the next one may be well
        box = self._launcher.start()
        box.wait_ready()
        return box

    def refill(self) -> None:
        """Starts what is missing; they get ready on their own."""
        while len(self._boxes) < self._size:
            self._boxes.append(self._launcher.start())

    def close(self) -> None:
        """Ends the boxes that wait. The pool can go on: it starts others."""
        while self._boxes:
            self._boxes.pop().close()


def _milliseconds(deadline: float) -> float:
    return max(0.0, 1000.0 * (deadline - time.monotonic()))
