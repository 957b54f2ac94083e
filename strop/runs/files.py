"""Files that are there whole or not at all, also after a kill or a power cut."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import weakref
from pathlib import Path
from typing import IO, Any

_LOCKED_HERE: set[Path] = set()
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Replace path in one step: a reader sees the old file or the new one, never a part."""
    partial = path.with_name(path.name + ".partial")
    try:
        text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
        partial.write_bytes(text.encode("utf-8", "backslashreplace"))
        sync(partial)
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    sync(path.parent)


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in path; ValueError naming the file when it is missing, cut short or something else."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} is damaged: not a JSON object")
    return value


class Lock:
    """Held by the one writer of a folder; the kernel frees it however that process ends.

    A POSIX record lock, because a forked worker that outlives its killed parent must not go on holding it. Closing any
    other handle of the file would give it up, hence the register of what this process holds. On a file system without
    locks it guards nothing. BlockingIOError when somebody else is the writer.
    """

    def __init__(self, path: Path) -> None:
        path = path.absolute()
        if path in _LOCKED_HERE:
            raise BlockingIOError(errno.EAGAIN, "locked by this process", str(path))
        file = path.open("ab")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                file.close()
                raise BlockingIOError(errno.EAGAIN, "locked by another process", str(path)) from None
        _LOCKED_HERE.add(path)
        self.release = weakref.finalize(self, _release, path, file)
        """Give the lock up; again is harmless."""


def _release(path: Path, file: IO[bytes]) -> None:
    _LOCKED_HERE.discard(path)
    file.close()


def is_locked(path: Path) -> bool:
    """Whether a living process of this machine holds the Lock of this path."""
    if path.absolute() in _LOCKED_HERE:
        return True
    try:
        file = path.open("rb")
    except (FileNotFoundError, PermissionError):
        return False
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            return error.errno not in _NO_LOCKS
    return False
