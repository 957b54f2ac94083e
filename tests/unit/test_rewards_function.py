"""Functions of users as rewards: TRL's signature, and everything that can go wrong in them."""

from __future__ import annotations

import datetime
import os
import time
from pathlib import Path
from typing import Any

import pytest

from strop.rewards.base import NO_VERDICT
from strop.rewards.function import FunctionReward
from strop.types import Completion, Task

CODE = """
import asyncio, os, time
from helper_of_the_user import ANSWER

def right(prompts, completions, answer, **kwargs):
    return [float(c == a) for c, a in zip(completions, answer)]
def echo(prompts, completions, completion_ids, level, **kwargs):
    assert sorted(kwargs) == ["answer"], kwargs
    seen = [prompts, completions, completion_ids, level, kwargs["answer"]]
    with open(os.environ["SEEN"], "w") as file: file.write(repr(seen))
    return [1] * len(prompts)
def few_arguments(completions, answer):
    return [float(ANSWER == a) for a in answer]
def wants_more(completions, solution):
    return [1.0]
async def later(completions, **kwargs):
    await asyncio.sleep(0)
    return [0.25] * len(completions)
def skips(completions, answer, **kwargs):
    return [None if a == "?" else 1.0 for a in answer]
def raises(completions, **kwargs):
    raise RuntimeError("first line\\nlast line")
def hangs_once(completions, **kwargs):
    if os.path.exists(os.environ["SEEN"]): return [1.0] * len(completions)
    open(os.environ["SEEN"], "w").close()
    time.sleep(60)
def not_finite(completions, **kwargs): return [1.0, float("nan"), float("inf")]
def too_few(completions, **kwargs): return [1.0]
def a_number(completions, **kwargs): return 1.0
def nothing(completions, **kwargs): return None
def exits(completions, **kwargs): os._exit(3)
def prints(completions, **kwargs):
    print("{}")
    return [len(input("?")) for _ in completions]
def pid(completions, **kwargs): return [float(os.getpid())] * len(completions)
not_callable = 3
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "my_rewards.py").write_text(CODE)
    (tmp_path / "helper_of_the_user.py").write_text("ANSWER = '4'\n")
    monkeypatch.setenv("SEEN", str(tmp_path / "seen"))
    return tmp_path


@pytest.fixture
def load(folder: Path):
    rewards = []

    def load(function: str, **options) -> FunctionReward:
        rewards.append(FunctionReward(f"{folder / 'my_rewards.py'}:{function}", **options))
        return rewards[-1]

    yield load
    for reward in rewards:
        reward.close()


def task(answer: object = "4", prompt: Any = "2 + 2 = ?", **columns) -> Task:
    return Task(id="train.jsonl:7", prompt=prompt, columns={"answer": answer, **columns})


def completion(text: str = "4") -> Completion:
    return Completion(token_ids=(5, 2), sampling_logprobs=(0.0, 0.0), finish_reason="stop", text=text)


def results(reward: FunctionReward, tasks: list[Task] | None = None) -> list:
    tasks = tasks if tasks is not None else [task()] * 3
    found = reward.score(tasks, [completion()] * len(tasks))
    return [(verdict.score, verdict.status) if verdict.status == "ok" else verdict for verdict in found]


def test_a_function_of_a_file_runs_in_another_process(load):
    reward = load("pid")
    assert reward.name == "pid"
    ((first, _), (second, _)) = results(reward, [task()] * 2)
    assert first == second != os.getpid()


def test_the_score_is_the_functions(load):
    reward = load("right", name="mine")
    assert reward.name == "mine"
    verdicts = reward.score([task("4"), task("5")], [completion("4"), completion("4")])
    assert [(verdict.score, verdict.status) for verdict in verdicts] == [(1.0, "ok"), (0.0, "ok")]


def test_it_gets_what_trl_would_give_it(load, folder):
    chat = ({"role": "user", "content": "2 + 2 = ?"},)
    tasks = [task("4", level=3, prompt_ids="kept out?"), task("5", prompt=chat)]
    tasks = [
        Task(id=t.id, prompt=t.prompt, columns={k: v for k, v in t.columns.items() if k != "prompt_ids"}) for t in tasks
    ]
    load("echo").score(tasks, [completion("a"), completion("b")])
    prompts, completions, completion_ids, level, answer = eval((folder / "seen").read_text())
    assert prompts == ["2 + 2 = ?", [{"role": "user", "content": "2 + 2 = ?"}]]
    assert completions == ["a", [{"role": "assistant", "content": "b"}]]
    assert completion_ids == [[5, 2], [5, 2]]
    assert level == [3, None]
    assert answer == ["4", "5"]


def test_a_function_without_kwargs_gets_only_what_it_names(load):
    assert results(load("few_arguments"), [task("4"), task("5")]) == [(1.0, "ok"), (0.0, "ok")]


def test_a_column_that_is_missing_is_named(load):
    (verdict,) = results(load("wants_more"), [task()])
    assert verdict.status == "infra_error"
    assert "'solution'" in verdict.detail
    assert "'answer'" in verdict.detail


def test_async_functions_are_awaited(load):
    assert results(load("later")) == [(0.25, "ok")] * 3


def test_none_is_no_verdict(load):
    assert results(load("skips"), [task("?"), task("4")]) == [NO_VERDICT, (1.0, "ok")]


@pytest.mark.parametrize(
    ("name", "detail"),
    [
        ("raises", "RuntimeError: last line"),
        ("a_number", "returned float"),
        ("nothing", "returned NoneType"),
        ("exits", "ended its worker process twice"),
    ],
)
def test_a_failing_function_is_an_infra_error_not_a_zero(load, name, detail):
    reward = load(name)
    for verdict in results(reward):
        assert verdict.status == "infra_error"
        assert detail in verdict.detail


def test_a_hang_is_killed_and_the_next_batch_is_scored(load):
    reward = load("hangs_once", timeout=0.5)
    reward.start()
    started = time.monotonic()
    verdicts = results(reward)
    assert time.monotonic() - started < 2.0
    assert [verdict.status for verdict in verdicts] == ["infra_error"] * 3
    assert "0.5 s" in verdicts[0].detail
    assert results(reward) == [(1.0, "ok")] * 3


def test_nan_and_infinity_are_infra_errors(load):
    good, nan, inf = results(load("not_finite"))
    assert good == (1.0, "ok")
    assert (nan.status, inf.status) == ("infra_error", "infra_error")
    assert (nan.detail, inf.detail) == ("returned nan", "returned inf")


def test_the_wrong_number_of_rewards_names_function_expected_and_got(load):
    with pytest.raises(ValueError, match=r"'too_few' returned 1 rewards for 3 completions"):
        results(load("too_few"))


def test_prints_do_not_disturb_and_standard_input_is_empty(load):
    for verdict in results(load("prints")):
        assert "EOFError" in verdict.detail


def test_a_column_that_is_no_json_is_named(load):
    with pytest.raises(ValueError, match=r"'right'.*datetime"):
        results(load("right"), [task(datetime.datetime(2026, 1, 1))])


@pytest.mark.parametrize(
    ("name", "reason"), [("no_such", "no function 'no_such'"), ("not_callable", "no function 'not_callable'")]
)
def test_a_function_that_is_not_there_is_named_at_once(load, name, reason):
    with pytest.raises(ValueError, match=reason):
        load(name).start()


def test_a_file_that_is_not_there_or_does_not_import_is_named_at_once(folder):
    (folder / "broken.py").write_text("import no_such_module_anywhere\n")
    for file, reason in [("absent.py", "no file"), ("broken.py", "no_such_module_anywhere")]:
        reward = FunctionReward(f"{folder / file}:f")
        with pytest.raises(ValueError, match=reason):
            reward.start()
        reward.close()


def test_a_function_of_a_module(folder, monkeypatch):
    monkeypatch.syspath_prepend(str(folder))
    reward = FunctionReward("my_rewards:right")
    assert results(reward) == [(1.0, "ok")] * 3
    reward.close()


@pytest.mark.parametrize("spec", ["math", ":f", "module:", "module:f()", "a b:"])
def test_other_texts_are_refused(spec):
    with pytest.raises(ValueError, match="module:function"):
        FunctionReward(spec)


def test_a_function_object_runs_here():
    calls = []

    def half(prompts, completions, **kwargs):
        calls.append(kwargs["answer"])
        return [0.5] * len(completions)

    reward = FunctionReward(half)
    assert reward.name == "half"
    assert results(reward, [task(datetime.date(2026, 1, 1))]) == [(0.5, "ok")]
    assert calls == [[datetime.date(2026, 1, 1)]]
    assert FunctionReward(lambda completions: [1.0], name="mine").name == "mine"


def test_a_failing_function_object_is_an_infra_error_too():
    def fails(completions):
        raise KeyError("x")

    (verdict,) = results(FunctionReward(fails), [task()])
    assert (verdict.status, verdict.detail) == ("infra_error", "KeyError: 'x'")
    with pytest.raises(ValueError, match="timeout"):
        FunctionReward(fails, timeout=1.0)
