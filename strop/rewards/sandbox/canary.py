"""Attacks on a box of ours, tried before any code of a model runs in one."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from strop.rewards.sandbox.box import Box, BoxError, BoxSettings, DeadlineError, Launcher, MisbehavedError
from strop.rewards.sandbox.guest import encode

SECONDS = 20.0

ATTACKS = """
import os, sys
def attempt(name, attack):
    try: result = attack()
    except BaseException as error: result = None
    if result: print(name, flush=True)
def read(path):
    with open(path, "rb") as file: return SECRET in file.read()
def write(path):
    with open(path, "w") as file: file.write("x")
    return True
def connect():
    import socket
    connection = socket.create_connection(("127.0.0.1", PORT), 2)
    return True
def fork():
    pid = os.fork()
    if pid == 0: os._exit(0)
    return True
def allocate():
    held = bytearray(MEMORY + (64 << 20))
    return True
def fill():
    with open("/tmp/full", "wb") as file:
        for _ in range(64): file.write(bytes(1 << 20))
    os.remove("/tmp/full")
    return True
attempt("read a planted secret", lambda: read(PLANTED + "/secret"))
attempt("read a process's environment", lambda: any(
    open(f"/proc/{pid}/environ", "rb").read(1) for pid in ["self", 1, os.getppid()]))
attempt("find a secret in its own environment", lambda: SECRET.decode() in str(os.environ))
attempt("reach a loopback listener", connect)
attempt("fork", fork)
for place in (PLANTED, "/usr", "/etc", "/root", "/dev", "/"):
    attempt("write outside", lambda: write(place + "/strop-canary"))
attempt("become root", lambda: os.setuid(0) is None)
attempt("make a namespace of its own", lambda: __import__("ctypes").CDLL(None).unshare(0x10000000) == 0)
attempt("take more memory than allowed", allocate)
attempt("fill the disk", fill)
print("done", flush=True)
"""

NAMES = tuple(dict.fromkeys(line.split('"')[1] for line in ATTACKS.splitlines() if line.strip().startswith("attempt(")))


@dataclass(frozen=True, slots=True)
class CanaryRow:
    """One attack and what came of it.

    Example: CanaryRow(name="fork", ok=True, detail="refused")
    """

    name: str
    ok: bool
    """True when the attack failed, as it should."""
    detail: str


def canary(settings: BoxSettings | None = None) -> list[CanaryRow]:
    """Starts a box and attacks it from inside: one row per attack, or a single row "sandbox" when there is none.

    Starts processes that die with the calling thread: call it from one that lives on.
    """
    settings = settings or BoxSettings()
    try:
        launcher = Launcher(settings)
        box = launcher.start()
        try:
            return _attack(box, settings)
        finally:
            box.close()
    except (BoxError, OSError, ImportError, RuntimeError) as error:
        return [CanaryRow("sandbox", False, str(error))]


def check_canary(settings: BoxSettings) -> None:
    """Raises RuntimeError naming every attack that succeeded, or why there is no sandbox."""
    failed = [row for row in canary(settings) if not row.ok]
    if failed:
        raise RuntimeError("the sandbox does not hold: " + "; ".join(f"{row.name}: {row.detail}" for row in failed))


def _attack(box: Box, settings: BoxSettings) -> list[CanaryRow]:
    secret = secrets.token_hex(16)
    with (
        tempfile.TemporaryDirectory(prefix="strop-canary-") as folder,
        socket.create_server(("127.0.0.1", 0)) as listener,
    ):
        planted = Path(folder)
        planted.chmod(0o777)
        (planted / "secret").write_text(secret)
        (planted / "secret").chmod(0o644)
        os.environ["STROP_CANARY"] = secret
        try:
            box.wait_ready()
            names = _run(box, planted, secret, listener.getsockname()[1], settings)
        finally:
            del os.environ["STROP_CANARY"]
        if "done" not in names:
            return [CanaryRow("sandbox", False, f"the attacks did not come to their end ({', '.join(names)})")]
        # What is seen from outside counts as well as what the box says.
        listener.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            listener.accept()[0].close()
            names.append("reach a loopback listener")
        if (planted / "strop-canary").exists():
            names.append("write outside")
    return [CanaryRow(name, name not in names, "SUCCEEDED" if name in names else "refused") for name in NAMES]


def _run(box: Box, planted: Path, secret: str, port: int, settings: BoxSettings) -> list[str]:
    values = {"PLANTED": str(planted), "SECRET": secret.encode(), "PORT": port, "MEMORY": settings.memory_mb << 20}
    code = "".join(f"{name} = {value!r}\n" for name, value in values.items()) + ATTACKS
    deadline = time.monotonic() + SECONDS
    job = {"role": "program", "prelude": "", "code": code}
    try:
        box.send(bytes(8), encode(job), deadline, then_close=b"")
        return box.read_all(deadline, 1 << 16).decode(errors="replace").splitlines()
    except (DeadlineError, MisbehavedError) as error:
        return [f"{type(error).__name__} {error}"]


def main() -> None:
    """Prints the rows as JSON: for a caller with threads, who runs this as a process of its own."""
    print(json.dumps([[row.name, row.ok, row.detail] for row in canary()]))
