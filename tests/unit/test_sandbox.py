"""What code in a box may try: escapes and floods. None scores, reads a secret, reaches anybody, or leaves a trace."""

from __future__ import annotations

import os
import platform
import socket
import tempfile
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from strop.rewards.code import CodeReward
from strop.rewards.sandbox import canary
from strop.rewards.sandbox.guest import WireError, decode, encode
from strop.types import Completion, Task, Verdict

pytestmark = pytest.mark.usefixtures("sandbox_works")

HELPERS = """
import ctypes, errno, os, signal, socket, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
def call(number, *arguments):
    return libc.syscall(ctypes.c_long(number), *(ctypes.c_long(a) for a in arguments)) != -1
def read(path):
    with open(path, "rb") as file: return len(file.read()) > 0
def write(path):
    with open(path, "w") as file: file.write("x")
    return True
def connect(family, address):
    with socket.socket(family, socket.SOCK_STREAM) as it:
        it.settimeout(2)
        it.connect(address)
    return True
"""

ESCAPES = {
    "write /": "return write('/strop-test')",
    "write /dev": "return write('/dev/strop-test')",
    "write /usr": "return write('/usr/strop-test')",
    "write a folder that is open to all": "return write(PLANTED + '/strop-test')",
    "read /root": "return bool(os.listdir('/root'))",
    "read the home folders": "return bool(os.listdir('/home'))",
    "read /etc/passwd": "return read('/etc/passwd')",
    "read a planted file": "return read(PLANTED + '/secret')",
    "read the environment": "return any(SECRET in value for value in os.environ.values()) or len(os.environ) > 3",
    "read the environment of pid 1": "return read('/proc/1/environ')",
    "open the memory of pid 1": "return os.open('/proc/1/mem', os.O_RDWR) >= 0",
    "ptrace pid 1": "return libc.ptrace(16, 1, 0, 0) == 0",
    "connect to loopback": "return connect(socket.AF_INET, ('127.0.0.1', PORT))",
    "connect outside": "return connect(socket.AF_INET, ('192.0.2.1', 80))",
    "ask a name server": "return bool(socket.getaddrinfo('example.org', 80))",
    "connect to an abstract socket": "return connect(socket.AF_UNIX, '\\0' + ABSTRACT)",
    "connect to a socket file": "return connect(socket.AF_UNIX, PLANTED + '/socket')",
    "listen": "it = socket.socket()\nit.bind(('127.0.0.1', 0))\nit.listen()\nreturn True",
    "kill everything": "os.kill(-1, 9)\nreturn True",
    "kill the process that judges": "os.kill(os.getppid() or JUDGE, 9)\nreturn True",
    "become root": "os.setuid(0)\nreturn True",
    "mount": "return libc.mount(b'none', b'/tmp', b'tmpfs', 0, None) == 0",
    "chroot": "os.chroot('/tmp')\nreturn True",
    "a user namespace": "return libc.unshare(0x10000000) == 0",
    "a child in a user namespace": "return call(56, 0x10000000 | 17, 0, 0, 0, 0)",
    "clone3": "return call(435, 0, 0)",
    "io_uring": "return call(425, 1, 0)",
    "the key ring": "return call(250, 0, -3, 1)",
    "bpf": "return call(321, 0, 0, 0)",
    "memory outside the limit": "return call(319, 0, 0)",
    "System V shared memory": "return call(29, 0, 1 << 20, 0o1600)",
    "userfaultfd": "return call(323, 0)",
    "the kernel's log": "return libc.klogctl(3, ctypes.create_string_buffer(64), 64) > 0",
    "raise its own limits": "import resource\nresource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40))\nreturn True",
    "fork": "pid = os.fork()\nif pid == 0: os._exit(0)\nreturn True",
    "a daemon": "import subprocess\nsubprocess.Popen(['/bin/sleep', '1000'], start_new_session=True)\nreturn True",
    "a process through multiprocessing": "import multiprocessing as m\nm.Process(target=id).start()\nreturn True",
    "posix_spawn": "return os.posix_spawn('/bin/true', ['true'], {}) > 0",
    "2 GB": "return len(bytearray(2 << 30)) > 0",
    "fill /tmp": "for n in range(20):\n    with open(f'/tmp/{n}', 'wb') as it: it.write(bytes(1 << 20))\nreturn True",
    "one file above the limit": "with open('/tmp/a', 'wb') as it: return it.write(bytes(17 << 20)) > 0",
    "fill /dev/shm": "return write('/dev/shm/x')",
    "write to the disk through /proc": "return write('/proc/self/cwd/../usr/strop-test')",
}
"""What must not come off: the function gives the right answer if, and only if, the attack succeeded."""

FLOODS = {
    "infinite loop": ("while True: pass", "timeout"),
    "sleep": ("import time\ntime.sleep(1000)", "timeout"),
    "a loop in C": ("return 7 ** 10 ** 9", "timeout"),
    "signals ignored": ("for n in range(1, 64):\n    try: signal.signal(n, signal.SIG_IGN)\n"
                        "    except (OSError, ValueError): pass\nwhile True: pass", "timeout"),
    "100 forks": ("for _ in range(100): os.fork()", "wrong"),
    "threads without end": ("import threading\nwhile True: threading.Thread(target=signal.pause).start()", "wrong"),
    "flood stdout": ("while True: print('x' * 100000)", "timeout"),
    "flood stderr": ("while True: print('x' * 100000, file=sys.stderr)", "timeout"),
    "flood the protocol": ("while True:\n    for fd in range(3, 10):\n        try: os.write(fd, bytes(1000))\n"
                           "        except OSError: pass", "wrong"),
    "return 32 MB": ("return 'x' * (32 << 20)", "wrong"),
    "return 10**2000000": ("return 10 ** 2000000", "wrong"),
    "return a list nested 100000 deep": ("x = []\nfor _ in range(100000): x = [x]\nreturn x", "wrong"),
    "return itself": ("x = []\nx.append(x)\nreturn x", "wrong"),
    "recursion": ("sys.setrecursionlimit(10 ** 9)\ndef down(): return [down()]\nreturn down()", "any"),
    "a crash": ("ctypes.string_at(0)", "killed"),
    "abort": ("os.abort()", "killed"),
    "a million colliding keys": ("return {n * (2 ** 61 - 1): 0 for n in range(30000)}", "timeout"),
    "close every file": ("os.closerange(0, 100)\nreturn 2", "wrong"),
}  # fmt: skip


@dataclass(frozen=True)
class Bait:
    """What an attack would find, were it to get out."""

    folder: Path
    listeners: tuple[socket.socket, ...]
    reward: CodeReward
    header: str


@pytest.fixture(scope="module")
def bait() -> Iterator[Bait]:
    secret, abstract = "s3cr3t-of-the-judge", f"strop-test-{os.getpid()}"
    os.environ["STROP_TEST_SECRET"] = secret
    with (
        tempfile.TemporaryDirectory(prefix="strop-test-") as folder,
        socket.create_server(("127.0.0.1", 0)) as internet,
        socket.socket(socket.AF_UNIX) as by_name,
        socket.socket(socket.AF_UNIX) as by_file,
    ):
        planted = Path(folder)
        planted.chmod(0o777)
        (planted / "secret").write_text(secret)
        by_name.bind("\0" + abstract)
        by_file.bind(str(planted / "socket"))
        (planted / "socket").chmod(0o777)
        for listener in (internet, by_name, by_file):
            listener.listen()
            listener.setblocking(False)
        reward = CodeReward(timeout=2.0, num_workers=2)
        values = {"PLANTED": folder, "SECRET": secret, "PORT": internet.getsockname()[1], "ABSTRACT": abstract}
        header = "".join(f"{name} = {value!r}\n" for name, value in {**values, "JUDGE": os.getpid()}.items())
        yield Bait(planted, (internet, by_name, by_file), reward, header + HELPERS)
        reward.close()
    del os.environ["STROP_TEST_SECRET"]


def judge(bait: Bait, body: str, *, is_flood: bool = False, is_plain: bool = True) -> Verdict:
    """Runs the body inside f, or inside attack, whose success f rewards."""
    tests = "assert f(1) == 2" if is_plain else "assert f(1) == 2\npass"  # compared by the judge, or in a box
    columns = {"entry_point": "f", "tests": tests}
    code = f"{bait.header}\ndef {'f(x)' if is_flood else 'attack()'}:\n{textwrap.indent(body, '    ')}\n"
    code += "" if is_flood else "def f(x): return x + 1 if attack() else None"
    text = f"```python\n{code}\n```"
    completion = Completion(token_ids=(), sampling_logprobs=(), finish_reason="stop", text=text)
    (verdict,) = bait.reward.score([Task(id="x", prompt=(), columns=columns)], [completion])
    return verdict


def test_there_are_32_attacks_and_more_and_the_wrapper_would_pay_for_one_that_succeeds(bait):
    assert len(ESCAPES) + len(FLOODS) >= 32
    assert judge(bait, "return True").status == "ok"
    assert judge(bait, "return write('/tmp/mine') and read('/tmp/mine')").status == "ok"
    assert judge(bait, "return call(39)").status == "ok"  # getpid, which is allowed


@pytest.mark.parametrize("name", ESCAPES)
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the numbers of the system calls are those of x86_64")
def test_an_escape_does_not_come_off(bait, name):
    verdict = judge(bait, ESCAPES[name])
    assert verdict.score == 0.0 and verdict.status in ("wrong", "killed"), verdict
    assert "NameError" not in verdict.detail, verdict
    assert sorted(place.name for place in bait.folder.iterdir()) == ["secret", "socket"]
    for listener in bait.listeners:
        with pytest.raises(BlockingIOError):
            listener.accept()
    assert not list(Path("/").glob("strop-test*")) + list(Path("/usr").glob("strop-test*"))


@pytest.mark.parametrize("name", FLOODS)
@pytest.mark.parametrize("is_plain", [False, True], ids=["boxed", "plain"])
def test_a_flood_is_ended_and_scores_nothing(bait, is_plain, name):
    body, status = FLOODS[name]
    verdict = judge(bait, body, is_flood=True, is_plain=is_plain)
    assert verdict.score == 0.0 and verdict.status != "infra_error", verdict
    assert status in (verdict.status, "any"), verdict
    assert verdict.milliseconds < 30_000


def test_the_box_after_all_that_is_as_good_as_the_first(bait):
    assert judge(bait, "return True").status == "ok"


def test_every_attack_of_the_canary_is_reported_by_name():
    rows = canary()
    assert {"read a planted secret", "reach a loopback listener", "fork", "write outside"} <= {row.name for row in rows}
    assert all(row.ok for row in rows), rows


def test_bytes_that_are_no_message_are_refused():
    whole = encode(["value", {"a": (1, 2.5, b"x"), 2: {3}}])
    assert decode(whole) == ["value", {"a": (1, 2.5, b"x"), 2: {3}}]
    for end in range(len(whole)):
        with pytest.raises(WireError):
            decode(whole[:end])
    for junk in (b"", b"X", b"NN", b"l\xff\xff\xff\xff", b"d\x00\x00\x00\x01l\x00\x00\x00\x00N", b"f\x00\x00\x00\x01x"):
        with pytest.raises(WireError):
            decode(junk)
    with pytest.raises(WireError):
        decode(b"l\x00\x00\x00\x01" * 100 + b"N")


def test_a_subclass_of_a_plain_type_cannot_be_sent():
    class Yes(int):
        pass

    for value in (Yes(3), [Yes(3)], object(), range(3), iter([]), print):
        with pytest.raises(WireError, match="only plain data"):
            encode(value)
