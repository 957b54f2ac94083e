"""The code reward: what passes, what does not, and every known way to get a reward without earning it."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from strop.rewards import load_reward, load_rewards
from strop.rewards.code import CodeReward
from strop.rewards.code_tests import plain_assertions
from strop.rewards.code_text import program
from strop.rewards.code_worker import CodeJudge
from strop.rewards.sandbox.box import Box, BoxPool, BoxSettings, Launcher
from strop.rewards.sandbox.canary import canary
from strop.rewards.sandbox.guest import encode
from strop.types import Completion, Task, Verdict

pytestmark = pytest.mark.usefixtures("sandbox_works")

TRUNCATE = {
    "entry_point": "truncate_number",
    "tests": """
METADATA = {'author': 'jt', 'dataset': 'test'}

def check(candidate):
    assert candidate(3.5) == 0.5
    assert abs(candidate(1.33) - 0.33) < 1e-6
    assert abs(candidate(123.456) - 0.456) < 1e-6
""",
}
PLAIN_TRUNCATE = {
    "entry_point": "truncate_number",
    "tests": """
assert truncate_number(3.5) == 0.5
assert candidate(1.33) == 0.33000000000000007
assert truncate_number(123.456) == 0.45600000000000307
""",
}
"""The same without code, so that the judge itself compares."""
INCREMENT = {"entry_point": "f", "tests": "assert f(1) == 2\nassert f(-5) == -4"}
BOXED_INCREMENT = {"entry_point": "f", "tests": INCREMENT["tests"] + "\npass"}
"""The same with a line of code, so that the tests have a box."""


@pytest.fixture(scope="module")
def reward() -> Iterator[CodeReward]:
    made = CodeReward(timeout=3.0, num_workers=2)
    yield made
    made.close()


def answer(text: str) -> Completion:
    return Completion(token_ids=(1,), sampling_logprobs=(0.0,), finish_reason="stop", text=text)


def task(columns: dict[str, Any], prompt: Any = ({"role": "user", "content": "Write it."},)) -> Task:
    return Task(id="tasks.jsonl:1", prompt=prompt, columns=columns)


def judge(reward: CodeReward, columns: dict[str, Any], code: str) -> Verdict:
    (verdict,) = reward.score([task(columns)], [answer(f"```python\n{textwrap.dedent(code)}\n```")])
    assert verdict.status != "infra_error", verdict.detail
    assert verdict.score == (1.0 if verdict.status == "ok" else 0.0)
    return verdict


# --------------------------------------------------------------------------------------------------------- what passes


def test_a_right_function_scores_one_and_near_misses_zero(reward):
    assert judge(reward, TRUNCATE, "def truncate_number(number):\n    return number % 1.0").score == 1.0
    for wrong in ("number", "number % 1.1", "int(number)", "None", "[0.5]", "'0.5'"):
        assert judge(reward, TRUNCATE, f"def truncate_number(number):\n    return {wrong}").status == "wrong"
    assert (
        judge(reward, TRUNCATE, "def other(number):\n    return number % 1.0").detail == "KeyError: 'truncate_number'"
    )
    assert judge(reward, TRUNCATE, "def truncate_number(number:").status == "unparsed"


PLAIN = [
    "None", "True", "-1", "0", "10**4000", "-(2**63)", "0.1", "float('inf')", "1e-320", "3+4j", "'é\\ud800\\0'",
    "b'\\xff\\0'",     "[]", "[1, [2, (3,)]]", "(1,)", "{1, 2}", "frozenset({1})", "{'a': [1], 2: None, (1, 2): {}}",
]  # fmt: skip


def test_plain_values_cross_in_both_directions_with_their_types(reward):
    tests = "\n".join(f"x = {value}\ny = echo(x)\nassert y == x and type(y) is type(x)" for value in PLAIN)
    tests += "\nimport math\nassert math.isnan(echo(float('nan')))\nassert math.copysign(1, echo(-0.0)) == -1"
    columns = {"entry_point": "echo", "tests": tests}
    assert judge(reward, columns, "def echo(x): return x").status == "ok"
    for changed in ("list(x) if type(x) is tuple else x", "abs(x) if type(x) is float else x"):
        assert judge(reward, columns, f"def echo(x): return {changed}").status == "wrong"


def test_keyword_arguments_exceptions_and_threads_work(reward):
    tests = """
    assert f(3, b=4) == 7
    try:
        f(0, b=0)
        assert False
    except ValueError as error:
        assert str(error) == "zero"
    """
    code = """
    import threading, asyncio, dataclasses, tempfile
    @dataclasses.dataclass
    class Pair:
        a: int
    async def add(a, b): return a + b
    def f(a, b):
        if not a: raise ValueError("zero")
        found = []
        thread = threading.Thread(target=lambda: found.append(asyncio.run(add(a, b))))
        thread.start(); thread.join()
        with tempfile.TemporaryFile() as file: file.write(b"x")
        return found[0]
    """
    verdict = judge(reward, {"entry_point": "f", "tests": textwrap.dedent(tests)}, code)
    assert verdict.status == "ok", verdict.detail


CASES = {"cases": [{"input": "1 2\n", "output": "3\n"}, {"input": "10 -4", "output": "6"}]}


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("a, b = map(int, input().split())\nprint(a + b)", "ok"),
        ("import sys\na, b = map(int, sys.stdin.read().split())\nsys.stdout.write(f'{a + b}  \\n\\n')\nexit()", "ok"),
        ("a, b = map(int, input().split())\nprint(a - b)", "wrong"),
        ("a, b = map(int, input().split())\nprint(a + b)\nprint('more')", "wrong"),
        ("print(3)", "wrong"),
        ("print('')", "wrong"),
        ("pass", "wrong"),
        ("a, b = map(int, input().split())\nprint(' ', a + b)", "wrong"),
        ("a, b = map(int, input().split())\nprint(a + b)\nraise SystemExit(1)", "wrong"),
        ("print(3); print(6)", "wrong"),
        ("while True: print('x' * 1000)", "wrong"),
        ("while True: pass", "timeout"),
        ("import ctypes; ctypes.string_at(0)", "killed"),
    ],
)
def test_a_program_is_judged_by_its_whole_output_on_every_case(reward, code, status):
    assert judge(reward, CASES, code).status == status


def test_output_that_is_only_the_beginning_of_what_is_expected_does_not_pass(reward):
    expected = {"cases": [{"input": "", "output": "1\n2\n3\n"}]}
    assert judge(reward, expected, "print(1)\nprint(2)").status == "wrong"
    assert judge(reward, expected, "for i in (1, 2, 3): print(i)").status == "ok"


def test_input_that_is_not_read_and_input_of_a_megabyte_are_no_trouble(reward):
    text = "7 " * 500_000
    columns = {"cases": [{"input": text, "output": str(7 * 500_000)}]}
    assert judge(reward, columns, "print(sum(map(int, input().split())))").status == "ok"
    assert judge(reward, columns, "print(3500000)").status == "ok"


# ------------------------------------------------------------------------------------------------------- reward hacks

ALWAYS_EQUAL = """
class Yes:
    def __eq__(self, other): return True
    def __sub__(self, other): return self
    def __abs__(self): return self
    def __lt__(self, other): return True
"""
FORGE = """
import os, struct
def forge():
    for fd in range(0, 64):
        for message in (b"E", b"C"):
            try: os.write(fd, struct.pack(">I", 40) + bytes(8) + message + {passed!r})
            except OSError: pass
"""
# What the tests send at the end when all is well: a list of "passed", two empty texts, a count and a text.
PASSED = (
    b"l\x00\x00\x00\x05s\x00\x00\x00\x06passeds\x00\x00\x00\x00s\x00\x00\x00\x00i\x00\x00\x00\x01\x03s\x00\x00\x00\x00"
)

HACKS = {
    "always-equal object": ALWAYS_EQUAL + "def truncate_number(number): return Yes()",
    "always-equal subclass of float": """
        class Yes(float):
            def __eq__(self, other): return True
            def __sub__(self, other): return 0.0
        def truncate_number(number): return Yes(0.5)
    """,
    "sys.exit(0) at import": "import sys\ndef truncate_number(n): return n\nsys.exit(0)",
    "os._exit(0) at import": "import os\ndef truncate_number(n): return n\nos._exit(0)",
    "os._exit(0) in the call": "import os\ndef truncate_number(n): os._exit(0)",
    "atexit": "import atexit, os\natexit.register(lambda: os._exit(0))\ndef truncate_number(n): return n",
    "sys.excepthook": "import sys, os\nsys.excepthook = lambda *a: os._exit(0)\ndef truncate_number(n): return 1/0",
    "walk the frames, append to results": """
        import sys
        def truncate_number(n):
            frame = sys._getframe()
            while frame:
                for value in list(frame.f_locals.values()):
                    if isinstance(value, list): value.append("passed")
                    if isinstance(value, dict) and "calls" in value: value["calls"] = 99
                frame = frame.f_back
            return n
    """,
    "read the own source and print a nonce": """
        import sys
        def truncate_number(n):
            for place in (sys.argv, sys.orig_argv): print(place, flush=True)
            for path in ("/proc/self/cmdline", "/proc/self/environ", "solution.py", "tests.py"):
                try: print(open(path).read(), flush=True)
                except OSError: pass
            return n
    """,
    "replace check in every frame": """
        import sys, gc
        def truncate_number(n):
            frame = sys._getframe()
            while frame:
                frame.f_globals["check"] = lambda candidate: None
                frame = frame.f_back
            for thing in gc.get_objects():
                if isinstance(thing, dict) and "check" in thing: thing["check"] = lambda candidate: None
            return n
    """,
    "replace AssertionError": """
        import builtins
        class Quiet(Exception): pass
        builtins.AssertionError = Quiet
        def truncate_number(n): return n
    """,
    "replace abs and len": """
        import builtins
        builtins.abs = lambda x: 0
        builtins.len = lambda x: 0
        def truncate_number(n): return 0.5
    """,
    "forge the verdict in the pipe": FORGE.format(passed=PASSED) + "def truncate_number(n):\n    forge()\n    return n",
    "forge the verdict at import": FORGE.format(passed=PASSED) + "forge()\ndef truncate_number(n): return n",
}
GUEST = "import sys\nguest = sys._getframe()\nwhile guest.f_back: guest = guest.f_back\nguest = guest.f_globals\n"
HACKS |= {
    "results written before they are asked for": GUEST
    + """
import os
for fd in range(3, 10):
    for value in (0.5, 0.33, 0.456):
        try: guest["write_frame"](fd, bytes(8), guest["encode"](["value", value]))
        except OSError: pass
def truncate_number(n): return n
""",
    "a result written after the answer, for the next call": GUEST
    + """
import threading, time
def truncate_number(n):
    def later():
        time.sleep(0.1)
        frame_locals = {}
        for fd in range(3, 10):
            try: guest["write_frame"](fd, bytes(8), guest["encode"](["value", 0.33]))
            except OSError: pass
    if n == 3.5: threading.Thread(target=later).start()
    if n == 1.33: time.sleep(0.5)
    return n % 1.0
""",
    "the answer to another call": GUEST
    + """
import sys
original = guest["write_frame"]
seen = []
def late(fd, message_id, payload):
    seen.append(message_id)
    original(fd, seen[-2] if len(seen) > 1 else message_id, payload)
guest["write_frame"] = late
def truncate_number(n): return n % 1.0
""",
    "a result written after the last call": GUEST
    + """
original = guest["write_frame"]
def twice(fd, message_id, payload):
    original(fd, message_id, payload)
    if last: original(fd, message_id, payload)
last = []
guest["write_frame"] = twice
def truncate_number(n):
    if n == 123.456: last.append(n)
    return n % 1.0
""",
    "a result written long after the last call": GUEST
    + """
import time
original = guest["write_frame"]
def twice(fd, message_id, payload):
    original(fd, message_id, payload)
    if last:
        time.sleep(0.3)
        original(fd, message_id, payload)
last = []
guest["write_frame"] = twice
def truncate_number(n):
    if n == 123.456: last.append(n)
    return n % 1.0
""",
    "a fake greeting of the tests' box": GUEST
    + """
def truncate_number(n):
    raise SystemExit("passed")
""",
    "a message of four gigabytes": """
        import os
        for fd in range(3, 10):
            try: os.write(fd, b"\\xff" * 64)
            except OSError: pass
        def truncate_number(n): return n % 1.0
    """,
    "a word on loading that is slow to read": GUEST
    + """
job = sys._getframe().f_back.f_locals
count = 60000
items = b"".join(b"i" + (11).to_bytes(4, "big") + (n * (2 ** 61 - 1)).to_bytes(11, "big") + b"N" for n in range(count))
guest["write_frame"](job["replies"], job["message_id"], b"d" + count.to_bytes(4, "big") + items)
def truncate_number(n): return n % 1.0
""",
    "no result at all": "def truncate_number(n): pass",
    "an exception named like the verdict": "class passed(Exception): pass\ndef truncate_number(n): raise passed(0)",
}


def test_there_are_the_thirteen_hacks_and_more():
    assert len(HACKS) >= 13


@pytest.mark.parametrize("name", HACKS)
@pytest.mark.parametrize("columns", [TRUNCATE, PLAIN_TRUNCATE], ids=["boxed", "plain"])
def test_a_reward_hack_earns_nothing(reward, columns, name):
    assert (plain_assertions(columns["tests"], columns["entry_point"]) is None) == (columns is TRUNCATE)
    verdict = judge(reward, columns, HACKS[name])
    assert verdict.score == 0.0, name
    assert verdict.status in ("wrong", "killed")
    assert verdict.milliseconds < 8_000  # also the judge's own process reads nothing that holds it up


def test_the_hack_with_precomputed_answers_would_pass_without_the_ids(reward):
    """The frame forgery above is well formed: an answer with the right id and nothing odd about it does pass."""
    code = (
        GUEST
        + """
original = guest["write_frame"]
guest["write_frame"] = lambda fd, message_id, payload: original(fd, message_id, payload)
def truncate_number(n): return n % 1.0
"""
    )
    assert judge(reward, TRUNCATE, code).status == "ok"


@pytest.mark.parametrize(
    "code",
    [
        "print(open('/tmp/expected').read())",
        "import sys\nprint(sys.argv, sys.orig_argv)",
        "import os\nos.write(1, b'')\nos._exit(0)",
        "import sys\nprint(sys._getframe().f_back.f_locals)",
    ],
)
def test_a_program_cannot_find_the_expected_output(reward, code):
    assert judge(reward, {"cases": [{"input": "", "output": "38917463"}]}, code).status == "wrong"


SAME_VERDICT = {
    "right": "return x + 1",
    "wrong": "return x",
    "an equal float": "return float(x + 1)",
    "an equal bool": "return True if x == 0 else x + 1",
    "not a number": "return float('nan')",
    "an exception": "raise KeyError(x)",
    "an exception of its own": "class Odd(Exception): pass\n    raise Odd",
    "an end in the call": "import os; os._exit(0)",
    "a crash": "import ctypes; ctypes.string_at(0)",
    "no end": "while True: pass",
    "an object": "return object()",
    "a generator": "yield x + 1",
    "a long text": "return 'x' * 500_000",
    "deep lists": "v = []\n    for _ in range(200): v = [v]\n    return v",
    "right once": "f.calls = getattr(f, 'calls', 0) + 1; return x + 1 if f.calls < 3 else None",
}


@pytest.mark.parametrize("name", SAME_VERDICT)
def test_tests_without_code_are_compared_as_their_box_would(reward, name):
    tests = "assert f(0) == 1\nassert f(-1) == 0\nassert f(x=7) == 8"
    code = f"def f(x):\n    {SAME_VERDICT[name]}"
    plain = judge(reward, {"entry_point": "f", "tests": tests}, code)
    boxed = judge(reward, {"entry_point": "f", "tests": tests + "\npass"}, code)
    assert (plain.status, plain.score) == (boxed.status, boxed.score), (plain, boxed)
    assert (plain.status == "ok") == (name in ("right", "an equal float", "an equal bool"))


@pytest.mark.parametrize(
    ("tests", "count"),
    [
        ("assert f(1) == 2", 1),
        ("assert f(1) == 2\n\n# a comment\nassert candidate([1, {'a': (2,)}], b=-1.5) == {1: {2}}", 2),
        ("assert f() == None", 1),
        ("", None),
        ("pass", None),
        ("assert f(1) == 2; x = 1", None),
        ("assert f(1) == 2, 'message'", None),
        ("assert f(1) != 2", None),
        ("assert 2 == f(1)", None),
        ("assert f(1) == 2 == 2", None),
        ("assert g(1) == 2", None),
        ("assert f(1) == g(1)", None),
        ("assert f(1 + 1) == 2", None),
        ("assert f(*[1]) == 2", None),
        ("assert f(**{'x': 1}) == 2", None),
        ("assert f(f(1)) == 3", None),
        ("assert f(1).x == 2", None),
        ("assert f(1)[0] == 2", None),
        ("assert not f(1) == 2", None),
        ("if True: assert f(1) == 2", None),
        (f"assert f(1) == '{'x' * 2000}'", None),
        ("assert f(1) == ...", None),
        (f"assert f({'[' * 70}{']' * 70}) == 2", None),
        ("assert f(1) ==", None),
    ],
)
def test_which_tests_hold_no_code(tests, count):
    found = plain_assertions(tests, "f")
    assert (None if found is None else len(found)) == count


def test_a_reply_that_could_not_be_equal_is_not_read():
    """At a size at which an equal value, written as wastefully as it can be, is still read."""
    wasteful = [complex(1)] * 300
    found = plain_assertions(f"assert f() == {[True] * 300}", "f")
    assert found is not None
    (assertion,) = found
    assert assertion.why_wrong(encode(["value", wasteful])) is None
    assert assertion.why_wrong(b"l" + bytes(100_000)) == "AssertionError"  # not even that it is no message
    assert assertion.why_wrong(b"l\xff") is not None and assertion.why_wrong(encode(["value"])) == "broken reply"


def test_boxes_are_only_taken_where_there_is_code_to_run():
    class Counting(BoxPool):
        taken = 0

        def take(self) -> Box:
            self.taken += 1
            return super().take()

    pool = Counting(Launcher(BoxSettings()), size=0)
    judged = CodeJudge(pool, timeout=5.0)
    try:
        for tests, code, boxes, status in (
            (INCREMENT, "def f(x): return x + 1", 1, "ok"),
            (BOXED_INCREMENT, "def f(x): return x + 1", 2, "ok"),
            (BOXED_INCREMENT, "def f(x:", 1, "unparsed"),
            (BOXED_INCREMENT, "import nothing_of_the_kind", 1, "wrong"),
            ({**INCREMENT, "prelude": "import math"}, "def f(x): return x + 1", 2, "ok"),
        ):
            pool.taken = 0
            assert judged.judge({"prelude": "", "code": code, **tests})[0] == status
            assert pool.taken == boxes, code
    finally:
        pool.close()


# ---------------------------------------------------------------------------------------------- faults that are not its


def infra(reward: CodeReward, columns: dict[str, Any], code: str) -> Verdict:
    (verdict,) = reward.score([task(columns)], [answer(f"```python\n{code}\n```")])
    return verdict


def test_tests_that_crash_by_themselves_are_an_infra_error(reward):
    for tests, reason in (
        ("import os\nos._exit(3)\nf(1)", "ended their own process"),
        ("1 / 0\nf(1)", "ZeroDivisionError"),
        ("candidate", "never call"),
        ("f(lambda: 1)", "only plain data"),
        ("f(bytes(2 << 20))", "more than"),
    ):
        verdict = infra(reward, {"entry_point": "f", "tests": tests}, "def f(x): return x")
        assert (verdict.status, verdict.score) == ("infra_error", 0.0)
        assert reason in verdict.detail and verdict.detail.startswith("tasks.jsonl:1: ")


def test_a_result_that_crashes_the_tests_is_killed_and_not_masked(reward):
    tests = "import os\nif f(1) == 'boom': os._exit(3)\nassert f(1) == 2"
    assert judge(reward, {"entry_point": "f", "tests": tests}, "def f(x): return 'boom'").status == "killed"
    assert judge(reward, {"entry_point": "f", "tests": tests}, "def f(x): return x + 1").status == "ok"


@pytest.fixture
def fake_bwrap(monkeypatch) -> Iterator[Any]:
    """Puts a shell script before bubblewrap on the PATH, in a folder that the user of the boxes can read."""
    with tempfile.TemporaryDirectory(prefix="strop-test-") as folder:
        Path(folder).chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

        def write(script: str) -> Path:
            fake = Path(folder) / "bwrap"
            fake.write_text(f"#!/bin/sh\n{script}\n")
            fake.chmod(0o755)
            return Path(folder)

        yield write


def test_stop_iteration_does_not_end_the_tests_early(reward):
    tests = "xs = [1, 2, 3]\nfor x, y in zip(xs, map(f, xs)): assert y == x + 1"
    columns = {"entry_point": "f", "tests": tests}
    assert judge(reward, columns, "def f(x): raise StopIteration").status == "wrong"
    assert judge(reward, columns, "def f(x): return x + 1").status == "ok"


def end_all(pids: list[int], oldest_first: bool) -> None:
    for pid in sorted(pids, reverse=not oldest_first):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("oldest_first", [False, True])
@pytest.mark.parametrize("columns", [INCREMENT, BOXED_INCREMENT], ids=["plain", "boxed"])
def test_boxes_that_somebody_ends_cost_nobody_a_verdict(columns, oldest_first):
    """Those that wait and those that work, in either order: a second try must not get one that is about to end."""
    made = CodeReward(num_workers=1, timeout=30.0)
    try:
        worker = made._pool._workers[0]._process
        assert worker is not None
        right = answer("```\nimport time\ndef f(x):\n    time.sleep(0.5)\n    return x + 1\n```")
        for delay in (0.0, 0.5):  # while they wait, and while one of them works
            assert wait_until(lambda: len(boxes_of(worker.pid)) >= 4)
            killer = threading.Timer(delay, end_all, (descendants(worker.pid), oldest_first))
            killer.start()
            if not delay:
                killer.join()
            (verdict,) = made.score([task(columns)], [right])
            assert verdict.status == "ok", verdict
            killer.join()
    finally:
        made.close()


@pytest.mark.parametrize("how", ["sleep 60", "exit 1", "echo no namespaces here >&2; exit 1"])
def test_a_box_that_never_starts_is_an_infra_error_and_stops_the_run_above_the_share(fake_bwrap, how):
    real = shutil.which("bwrap")
    folder = fake_bwrap("")
    fake_bwrap(f'test -e {folder}/broken && {{ {how}; }}\nexec {real} "$@"')
    rewards = load_rewards({"name": "code", "num_workers": 1, "start_timeout": 2.0})
    try:
        (folder / "broken").touch()
        tasks = [task({**INCREMENT, "prelude": f"# {number}"}) for number in range(4)]
        reason = "did not start in 2 s" if "sleep" in how else "ended while starting: "
        reason += "no namespaces here" if "echo" in how else ""
        with pytest.raises(RuntimeError, match=f"'code' failed on . of 4 .* a box {reason}"):
            for _ in range(3):  # the boxes that were started ahead may still work
                rewards.score(tasks, [answer("```python\ndef f(x): return x + 1\n```")] * 4)
        (folder / "broken").unlink()
        (score,) = rewards.score(tasks[:1], [answer("```python\ndef f(x): return x + 1\n```")])
        assert score.is_valid and score.reward == 1.0
    finally:
        rewards.close()


def test_without_bubblewrap_it_refuses_and_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=r"apt-get install bubblewrap.*unsafe_local = true"):
        load_reward("code")


def test_a_sandbox_that_an_attack_gets_out_of_is_refused(fake_bwrap):
    """A bwrap that only runs the command: everything is in reach, and the canary says so."""
    fake_bwrap('while [ "$1" != "--info-fd" ]; do shift; done\nshift 2\nexec "$@"')
    rows = {row.name: row.ok for row in canary()}
    assert not rows["read a planted secret"] and not rows["reach a loopback listener"] and not rows["fork"]
    assert not rows["write outside"] and not rows["read a process's environment"]
    with pytest.raises(ValueError, match="does not hold: read a planted secret: SUCCEEDED"):
        load_reward("code")


def test_every_attack_of_the_canary_fails_here():
    assert [row for row in canary() if not row.ok] == []
    assert len(canary()) >= 9


def test_unsafe_local_warns_and_judges():
    with pytest.warns(UserWarning, match="UNSAFE"):
        made = load_reward({"name": "code", "unsafe_local": True, "num_workers": 1})
    try:
        right, wrong = made.score(
            [task(INCREMENT)] * 2, [answer("```\ndef f(x): return x + 1\n```"), answer("```\ndef f(x): return 2\n```")]
        )
        assert (right.status, wrong.status) == ("ok", "wrong")
    finally:
        made.close()


# ---------------------------------------------------------------------------------------------------- many, and the end


def test_eight_judges_at_once_each_give_their_own_verdicts(reward):
    results: dict[int, list[float]] = {}

    def work(number: int) -> None:
        tasks = [task({"entry_point": "f", "tests": f"assert f({i}) == {i + number}"}) for i in range(3)]
        # Right for the middle task only.
        code = f"```\ndef f(x): return x + {number} if x == 1 else None\n```"
        results[number] = [verdict.score for verdict in reward.score(tasks, [answer(code)] * 3)]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {number: [0.0, 1.0, 0.0] for number in range(8)}


def test_equal_programs_for_equal_tests_run_once(reward):
    code = "import time\ndef f(x):\n    time.sleep(0.2)\n    return x + 1"
    started = time.monotonic()
    verdicts = reward.score([task(INCREMENT)] * 40, [answer(f"```\n{code}\n```")] * 40)
    assert [verdict.score for verdict in verdicts] == [1.0] * 40
    assert time.monotonic() - started < 40 * 0.4 / 2


def orphans() -> dict[int, str]:
    """Boxes with none of the test run's processes above them: whoever started them is gone, or they have left it.

    Boxes of tests in other workers hang below those, whatever judge they belong to.
    """
    suite = os.getppid() if "PYTEST_XDIST_WORKER" in os.environ else os.getpid()
    table: dict[int, tuple[int, str, int]] = {}
    for place in Path("/proc").iterdir():
        if place.name.isdigit():
            try:
                stat = (place / "stat").read_text().rpartition(")")[2].split()
                command = (place / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                table[int(place.name)] = (int(stat[1]), command, place.stat().st_uid)
            except OSError:
                continue
    found: dict[int, str] = {}
    for pid, (above, command, uid) in table.items():
        if "serve_solution" in command or uid == 65534:
            while above in table and above != suite:
                above = table[above][0]
            if above != suite:
                found[pid] = command[:80]
    return found


@pytest.fixture
def before() -> dict[int, str]:
    """What runs as nobody on this machine and is none of ours."""
    return orphans()


def new_orphans(before: dict[int, str], seconds: float = 5.0) -> dict[int, str]:
    """Those that are still there after a while."""
    wait_until(lambda: orphans().keys() <= before.keys(), seconds)
    return {pid: command for pid, command in orphans().items() if pid not in before}


def test_close_leaves_no_process(before: dict[int, str]):
    made = CodeReward(timeout=1.0, num_workers=2)
    hang = answer("```\ndef f(x):\n    while True: pass\n```")
    assert [v.status for v in made.score([task(INCREMENT)] * 2, [hang, answer("```\ndef f(x): return 2\n```")])] == [
        "timeout",
        "wrong",
    ]
    made.close()
    assert new_orphans(before) == {}


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("whom", ["run", "judge"])
def test_a_verifier_ended_in_the_middle_leaves_no_process(how, whom, before: dict[int, str]):
    timeout = 20.0 if whom == "run" else 4.0  # the judge's death is followed by a second try, which must time out
    script = f"""
        import sys
        sys.path[:0] = {sys.path!r}
        from strop.rewards.code import CodeReward
        from strop.types import Completion, Task
        made = CodeReward(timeout={timeout}, num_workers=1)
        print(made._pool._workers[0]._process.pid, flush=True)
        task = Task(id="x", prompt=(), columns={INCREMENT!r})
        text = "```\\ndef f(x):\\n    while True: pass\\n```"
        made.score([task], [Completion(token_ids=(), sampling_logprobs=(), finish_reason="stop", text=text)])
    """
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True)
    with parent:
        try:
            assert parent.stdout is not None
            worker = int(parent.stdout.readline())
            assert wait_until(lambda: len(boxes_of(worker)) >= 4)
            time.sleep(0.5)
            inside = descendants(worker)
            assert len(inside) >= 8  # each box is a bubblewrap and a python
            os.kill(parent.pid if whom == "run" else worker, how)
            assert wait_until(lambda: not any(is_running(pid) for pid in inside), 3.0)
            if whom == "judge":
                # The request is tried once more in a new judge, and is then that one's timeout.
                assert parent.wait(40) == 0
        finally:
            parent.kill()
    assert new_orphans(before) == {}


def boxes_of(worker: int) -> list[int]:
    try:
        return [int(pid) for pid in Path(f"/proc/{worker}/task/{worker}/children").read_text().split()]
    except OSError:
        return []


def descendants(pid: int) -> list[int]:
    children = boxes_of(pid)
    return children + [below for child in children for below in descendants(child)]


def is_running(pid: int) -> bool:
    """False for a zombie that init has not collected yet: no longer in our hands."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition: Any, seconds: float = 5.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return False


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({}, "needs the column 'tests'"),
        ({"tests": "f(1)", "cases": []}, "one of the two"),
        ({"tests": "f(1)"}, "entry_point must be"),
        ({"tests": "f(1)", "entry_point": "f g"}, "entry_point must be"),
        ({"tests": 3, "entry_point": "f"}, "tests must be Python source"),
        ({"tests": "def (", "entry_point": "f"}, "tests do not compile"),
        ({"tests": "assert True", "entry_point": "f"}, "never mention 'f'"),
        ({"cases": []}, "at least one"),
        ({"cases": [{"input": "x"}]}, "a case must be"),
        ({**INCREMENT, "prelude": "import ("}, "prelude do not compile"),
        ({**INCREMENT, "solution": "def f(x): return x"}, "own solution scores 0: wrong, AssertionError"),
    ],
)
def test_a_task_that_cannot_be_judged_is_named_before_training(reward, columns, message):
    with pytest.raises(ValueError, match=message) as caught:
        reward.check_tasks([task({**INCREMENT, "solution": "def f(x): return x + 1"}), task(columns)])
    assert str(caught.value).startswith("tasks.jsonl:1: ")


def test_a_text_prompt_is_continued_up_to_where_something_else_begins(reward):
    texts = [" x + 1", " x", " x + 1\n\nprint(f(", " x + 1\n```\nThe function:\n```python\ndef f(x): return 3\n```"]
    verdicts = reward.score([task(INCREMENT, "def f(x):\n    return")] * 4, [answer(text) for text in texts])
    assert [verdict.score for verdict in verdicts] == [1.0, 0.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a = 1", "a = 1"),
        ("Sure:\n```python\na = 1\n```\nDone.", "a = 1\n"),
        ("```python\na = 1\n```\nBetter:\n```py\na = 2\n```", "a = 2\n"),
        ("```python\na = 1\n```\nOutput:\n```\n1\n```", "a = 1\n"),
        ("```\na = 1\n```\nRun it:\n```bash\npython a.py\n```", "a = 1\n"),
        ("```python\na = 1", "a = 1"),
        ("~~~python\na = '```'\n~~~", "a = '```'\n"),
        ("````python\n```\n````", "```\n"),
        ("```python\n```", None),
        ("  \n", None),
    ],
)
def test_the_program_in_a_chat_is_the_last_python_block(text, expected):
    assert program(None, text) == expected


def test_options_are_checked():
    with pytest.raises(ValueError, match="memory_mb must be at least 64"):
        load_reward({"name": "code", "memory_mb": 8})
    with pytest.raises(ValueError, match="timeout"):
        load_reward({"name": "code", "timeout": 0})
    with pytest.raises(ValueError, match="python '/no/such/python' does not run"):
        load_reward({"name": "code", "python": "/no/such/python"})
