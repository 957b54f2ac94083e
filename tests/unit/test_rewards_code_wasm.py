"""The second backend: the same verdicts from a box that is a WebAssembly machine. Skipped without strop[wasm]."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from strop.data.tasks import tasks_from_rows
from strop.evals.suites import load_suite
from strop.rewards.code import CodeReward
from strop.rewards.sandbox.box import BoxSettings
from strop.rewards.sandbox.canary import canary
from strop.types import Completion, Task

TASK = Task(id="x", prompt=(), columns={"entry_point": "f", "tests": "assert f(1) == 2\nassert f(-5) == -4"})
PROGRAM = Task(id="x", prompt=(), columns={"cases": [{"input": "1 2\n", "output": "3\n"}]})


@pytest.fixture(scope="module")
def reward() -> Iterator[CodeReward]:
    made = CodeReward(backend="wasm", timeout=5.0, num_workers=2, memory_mb=256)
    yield made
    made.close()


def answer(code: str) -> Completion:
    return Completion(token_ids=(), sampling_logprobs=(), finish_reason="stop", text=f"```python\n{code}\n```")


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("def f(x): return x + 1", "ok"),
        ("def f(x):\n    print('noise')\n    return x + 1", "ok"),
        ("import json, re, math, collections\ndef f(x): return json.loads(str(x + 1))", "ok"),
        ("def f(x): return x", "wrong"),
        ("def f(x:", "unparsed"),
        ("class Yes:\n    def __eq__(self, other): return True\ndef f(x): return Yes()", "wrong"),
        ("import os\ndef f(x): os._exit(0)", "wrong"),
        ("import os\ndef f(x):\n    os.write(1, bytes(40))\n    return x + 1", "wrong"),
        ("def f(x): return len(bytearray(1 << 30)) and x + 1", "wrong"),
        ("import os\ndef f(x): return x + 1 if os.listdir('/') else 0", "wrong"),
        ("def f(x): return x + 1 if open('/etc/passwd').read() else 0", "wrong"),
        ("import socket\ndef f(x): return x + 1 if socket.create_connection(('127.0.0.1', 1)) else 0", "wrong"),
        ("def f(x):\n    while True: pass", "timeout"),
    ],
)
def test_verdicts_are_those_of_the_other_backend(reward, code, status):
    (verdict,) = reward.score([TASK], [answer(code)])
    assert (verdict.status, verdict.score) == (status, float(status == "ok")), verdict


def test_programs(reward):
    right = "a, b = map(int, input().split())\nprint(a + b)"
    codes = [right, right.replace("+", "-"), right + "\nraise SystemExit(1)", "print('x' * (5 << 20))"]
    verdicts = reward.score([PROGRAM] * 4, [answer(code) for code in codes])
    assert [verdict.status for verdict in verdicts] == ["ok", "wrong", "wrong", "wrong"], verdicts


def test_some_of_humaneval(reward):
    tasks = tasks_from_rows(load_suite("humaneval").rows)[::24]
    solutions = [
        Completion(token_ids=(), sampling_logprobs=(), finish_reason="stop", text=task.columns["solution"])
        for task in tasks
    ]
    assert [verdict.score for verdict in reward.score(tasks, solutions)] == [1.0] * len(tasks)


def test_the_canary_holds():
    assert [row for row in canary(BoxSettings(backend="wasm")) if not row.ok] == []


def test_it_takes_no_python_of_ones_own():
    with pytest.raises(ValueError, match="brings its own python"):
        CodeReward(backend="wasm", python="/usr/bin/python3")
