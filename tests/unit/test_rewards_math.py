"""The math reward, through its real worker processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import math_verify
import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st
from latex2sympy2_extended import latex2sympy2

from strop.rewards.math import MathReward
from strop.rewards.math_worker import MathJudge
from strop.types import Completion, Task


def task(gold: object, name: str = "train.jsonl:7", column: str = "answer") -> Task:
    return Task(id=name, prompt="?", columns={column: gold})


def completion(text: str) -> Completion:
    return Completion(token_ids=(1,), sampling_logprobs=(0.0,), finish_reason="stop", text=text)


@pytest.fixture(scope="module")
def reward():
    reward = MathReward(timeout=1.0)
    yield reward
    reward.close()


def verdicts(reward: MathReward, pairs: Sequence[tuple[object, str]]) -> list[tuple[float, str]]:
    found = reward.score([task(gold) for gold, _ in pairs], [completion(text) for _, text in pairs])
    return [(verdict.score, verdict.status) for verdict in found]


def boxed(pairs: Sequence[tuple[str, str]]) -> list[tuple[object, str]]:
    return [(gold, rf"So it is \boxed{{{answer}}}.") for gold, answer in pairs]


RIGHT = [
    ("1517", "1517"), ("1517", "1,517"), ("1517", "1517.0"), ("1517", "3034/2"), ("1517", r"\frac{3034}{2}"),
    ("1517", "x=1517"), ("1517", "1517 cm"), ("1517", r"1517 \text{ cm}"), ("1517", r"1517 \text{ cm}^2"),
    ("90", r"90^\circ"), ("18", r"\$18"), ("12", r"\text{12}"), ("5", "(5)"), ("0", "0.0"), ("-3", "−3"),
    ("1/2", r"50\%"), ("1/2", "0.5"), ("0.5", r"\frac12"), ("50", r"50\%"), ("1/2", "50 percent"),
    (r"\frac{\sqrt3}{2}", r"\frac{\sqrt{3}}{2}"), (r"2\sqrt{3}", r"\sqrt{12}"), ("x^2+2x+1", "(x+1)^2"),
    ("x=12", "12"), ("12", "x = 12"), ("(1,2)", "(1, 2)"), (r"\{1,2\}", "2, 1"), (r"(3,\infty)", "x>3"),
    ("1.5x", r"\frac{3}{2}x"),
    ("2+3i", "3i+2"), ("A", r"\text{A}"), ("Paris", "paris"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    ("3*x-1*y+13=0", "3x - y + 13 = 0"),
]  # fmt: skip

WRONG = [
    # Near misses.
    ("1517", "1518"), ("1517", "-1517"), ("1517", "15170"), ("1517", "1517.5"), ("1/2", "1/3"), ("12", "12:1"),
    ("x^2+2x+1", "(x+2)^2"), ("(1,2)", "[1,2]"), ("(1,2)", "(2,1)"), (r"\sqrt{2}", "1.414214"), ("x=12", "y=12"),
    (r"(3,\infty)", "x>2"), ("A", "B"), (r"\infty", r"-\infty"),
    ("1e-7", "2e-7"), ("0.001", "0.0010004"), ("1/3", "0.333333"), ("3*x-1*y+13=0", "3x + 4y + 14=0"),
    # The question copied into the box.
    ("1517", r"37\times 41"), ("1517", "37*41=1517"), ("5050", r"\sum_{k=1}^{100} k"),
    ("2", r"\lim_{x\to 0} \frac{\sin 2x}{x}"),
    ("120", "5!"), ("6", r"\gcd(12,18)"), ("10", r"\binom{5}{2}"), ("4", "2+2"), ("4", "x=2+2"),
    ("600", r"6\times 10^2"),
    (r"\frac{x^3}{3}", r"\int x^2 dx"),
    # Hedges, and what math-verify alone reads as an equal number.
    ("12", r"12 \text{ or } 13"), ("12", "12 or 13"), ("12", "12, 13"), ("518", "1 517"), ("1", "1 1/2"),
    ("12", "12_8"),
    ("12", "12x"), ("Paris", "pairs"),
]  # fmt: skip


def test_right_answers_score_one(reward):
    assert list(zip(RIGHT, verdicts(reward, boxed(RIGHT)), strict=True)) == [(pair, (1.0, "ok")) for pair in RIGHT]


def test_near_misses_and_hacks_score_zero(reward):
    assert list(zip(WRONG, verdicts(reward, boxed(WRONG)), strict=True)) == [(pair, (0.0, "wrong")) for pair in WRONG]


def test_the_last_box_counts_and_two_boxes_do_not_help(reward):
    pairs = [
        ("12", r"\boxed{11} no \boxed{12}"),
        ("12", r"\boxed{12} no \boxed{11}"),
        ("12", r"\boxed{12} final: \boxed{13}"),
    ]
    assert [score for score, _ in verdicts(reward, pairs)] == [1.0, 0.0, 0.0]


def test_no_answer_is_unparsed_not_wrong(reward):
    pairs = [("12", "no idea"), ("12", ""), ("12", r"\boxed{12"), ("12", r"\boxed{}"), ("x", r"\boxed{\frac{}")]
    pairs += [("12", r"\boxed{" + "1" * 301 + "}"), ("x+1", r"\boxed{" + "(" * 120 + "x+1" + ")" * 220 + "}")]
    assert verdicts(reward, pairs) == [(0.0, "unparsed")] * len(pairs)


def test_an_answer_that_drags_the_gold_along_in_an_equation_is_judged_by_what_it_says(reward):
    # math-verify alone takes any chain of equations that holds the gold.
    pairs = boxed([("x^2+2x+1", "x^2+2x+1=(x+2)^2"), ("12", "12 = 13"), ("12", "13 = 12")])
    assert [score for score, _ in verdicts(reward, pairs)] == [0.0, 0.0, 0.0]


def test_the_second_opinion_changes_no_score_and_is_logged(reward):
    golds, answers = ["1/2", "1/2", "1/2", "1/2", "Paris"], ["0.5", "1/2", "1/3", "no idea", r"\boxed{Paris.}"]
    found = reward.score([task(gold) for gold in golds], [completion(answer) for answer in answers])
    assert [(verdict.score, verdict.second_opinion) for verdict in found] == [
        (1.0, False), (1.0, True), (0.0, False), (0.0, None), (1.0, True)
    ]  # fmt: skip
    assert "plain text" in found[0].detail and not found[1].detail


def test_a_pair_that_comes_again_is_judged_once(reward):
    asked: list[int] = []
    pool_map = reward._pool.map
    reward._pool.map = lambda requests: asked.append(len(requests)) or pool_map(requests)
    try:
        found = verdicts(reward, boxed([("x+1", "1+x"), ("x+1", "2+x")] * 20 + [("x+1", "x + 1")]))
    finally:
        del reward._pool.map
    assert found == [(1.0, "ok"), (0.0, "wrong")] * 20 + [(1.0, "ok")]
    assert asked == [2]


def test_numbers_from_parsed_columns_are_golds(reward):
    assert verdicts(reward, [(12, "12"), (12, "13"), (0.5, r"\boxed{1/2}"), (1e-7, "2e-7")]) == [
        (1.0, "ok"), (0.0, "wrong"), (1.0, "ok"), (0.0, "wrong")
    ]  # fmt: skip


HANGS = [
    ("x+1", r"((9^{99999})^{99999})^{999}"),
    ("x+1", r"((9^{99998})^{99999})^{999}"),
    (r"\sqrt{2}", r"\sqrt{2}^{(9^{9})^{9}}"),
]


def test_hangs_are_killed_and_the_answers_around_them_are_right(reward):
    pairs = boxed([pair for hang in HANGS for pair in (hang, ("x+1", "1+x"))])
    started = time.monotonic()
    found = verdicts(reward, pairs)
    assert found[0::2] == [(0.0, "timeout")] * 3
    assert found[1::2] == [(1.0, "ok")] * 3
    assert time.monotonic() - started < 6.0


def test_the_string_that_defeats_math_verifys_own_alarm(reward):
    bomb = r"\dfrac{5^{(5^{(5^{(5^5)})}-4)}-5}{16}"
    # The filter sees these without spending a deadline on them.
    pairs = boxed(
        [("x+1", bomb), ("x+1", r"9^{9^{9}}"), ("120", "99999999!"), ("x+1", r"\sin(\sin(e^{e^{e^3}}+3))")]
        + [("x+1", "(" * depth + "x+1" + ")" * depth) for depth in (31, 148, 3000)]
    )
    started = time.monotonic()
    assert verdicts(reward, pairs) == [(0.0, "unparsed")] * 7
    assert time.monotonic() - started < 0.5
    # Past the filter too: the worker itself is what keeps us safe.
    request = {"gold": "x+1", "answer": bomb, "float_tolerance": 0.0}
    after = {"gold": "x+1", "answer": "1+x", "float_tolerance": 0.0}
    replies = reward._pool.map([request, after])
    assert [(reply.failure, reply.value) for reply in replies] == [("timeout", None), (None, ["ok", ""])]


def test_text_is_never_executed(reward, tmp_path, monkeypatch):
    flag = tmp_path / "executed"
    code = f"__import__('os').system('touch {flag}')"
    answers = [code, rf"\text{{{code}}}", f"${code}$", f"x = {code}", rf"\operatorname{{{code}}}", f"1; {code}",
               f"1/{code}", f"sympify(\"{code}\")", f"{code} + 1", f"f({code})", f"{{{code}}}",
               f"[{code}]"]  # fmt: skip
    golds = ["12", "x+1", "Paris"]
    found = verdicts(reward, boxed([(gold, answer) for gold in golds for answer in answers]))
    found += verdicts(reward, [(gold, answer) for gold in golds for answer in answers])
    with pytest.raises(ValueError):
        reward.check_tasks([task(code)])
    assert {score for score, _ in found} == {0.0}
    assert not flag.exists()


def test_a_worker_killed_from_outside_changes_no_verdict():
    with_one_worker = MathReward(num_workers=1)
    stop = threading.Event()

    def kill_often():
        worker = with_one_worker._pool._workers[0]
        while not stop.wait(0.2):
            if worker._answering_pid is not None:
                os.kill(worker._answering_pid, signal.SIGKILL)

    killer = threading.Thread(target=kill_often)
    killer.start()
    try:
        found = [verdicts(with_one_worker, boxed([("x+1", "1+x"), ("x+1", "2+x")])) for _ in range(60)]
    finally:
        stop.set()
        killer.join()
        with_one_worker.close()
    assert found == [[(1.0, "ok"), (0.0, "wrong")]] * 60


def test_eight_threads_at_once(reward):
    results = {}

    def work(i: int):
        results[i] = verdicts(reward, boxed([(f"x+{i}", f"{j}+x") for j in range(8)]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {i: [(1.0, "ok") if j == i else (0.0, "wrong") for j in range(8)] for i in range(8)}


def test_other_patterns_and_columns():
    reward = MathReward(
        answer_column="solution", answer_pattern="after:Answer:", gold_pattern="after:####", num_workers=1
    )
    tasks = [task("2 + 2 = 4\n#### 4", column="solution")] * 3
    found = reward.score(tasks, [completion(text) for text in ["Answer: 4", "Answer: 5", r"\boxed{4}"]])
    assert [verdict.status for verdict in found] == ["ok", "wrong", "unparsed"]
    reward.check_tasks(tasks)
    reward.close()


def test_good_golds_pass_the_check(reward):
    golds = ["4", "1,517", "1e-7", r"\frac{1}{2}", "x+1", "(1,2)", r"\{1,2\}", "A", "Paris", r"\text{no solution}", 12,
             0.5, r"\begin{pmatrix}1\\2\end{pmatrix}", r"x \in (-\infty, 3]", r"3\pi"]  # fmt: skip
    reward.check_tasks([task(gold, name=f"train.jsonl:{i}") for i, gold in enumerate(golds)])


@pytest.mark.parametrize(
    ("gold", "reason"),
    [
        (r"\frac{", "does not parse"),
        ("2 + 2 = 4\n#### 4 }", "gold_pattern"),
        ("x" + "+x" * 200, "longer than 300"),
        ("9" * 5000, "longer than 300"),
        (r"9^{9^{9}}", "power tower"),
        ("(" * 140 + "x" + ")" * 140, "nested deeper"),
    ],
)
def test_a_gold_that_cannot_be_verified_names_its_task(reward, gold, reason):
    tasks = [task("4"), task("x+1"), task(gold, name="train.jsonl:9"), task(gold, name="train.jsonl:10")]
    with pytest.raises(ValueError, match=r"train\.jsonl:9: ") as caught:
        reward.check_tasks(tasks)
    assert reason in str(caught.value)


@pytest.mark.parametrize("gold", [None, True, ["4"], "", "  "])
def test_a_gold_of_the_wrong_type_names_its_task(reward, gold):
    with pytest.raises(ValueError, match=r"train\.jsonl:7"):
        reward.score([task(gold)], [completion("4")])


def test_a_missing_column_names_the_task_and_the_columns_there_are(reward):
    with pytest.raises(ValueError, match=r"train\.jsonl:7.*'answer'.*'solution'.*answer_column"):
        reward.score([task("4", column="solution")], [completion("4")])


def test_a_gold_that_was_never_checked_is_an_infra_error_with_its_task(reward):
    (verdict,) = reward.score([task(r"\frac{")], [completion(r"\boxed{4}")])
    assert verdict.status == "infra_error"
    assert verdict.detail.startswith("train.jsonl:7: ")


def test_a_worker_that_cannot_start_is_an_infra_error_and_no_zero(tmp_path, monkeypatch):
    (tmp_path / "sympy").mkdir()
    (tmp_path / "sympy" / "__init__.py").write_text("raise RuntimeError('no sympy here')")
    reward = MathReward(num_workers=1)
    monkeypatch.syspath_prepend(str(tmp_path))
    (verdict,) = reward.score([task("x+1")], [completion(r"\boxed{1+x}")])
    assert verdict.status == "infra_error"
    assert "no sympy here" in verdict.detail
    with pytest.raises(RuntimeError, match="no sympy here"):
        reward.check_tasks([task("x+1")])
    reward.close()


integers = st.builds(
    lambda sign, zeros, value: f"{sign}{'0' * zeros}{value}",
    st.sampled_from(["", "-"]),
    st.integers(0, 2),
    st.one_of(st.integers(0, 30), st.integers(0, 10**25)),
)
JUDGE = MathJudge()


def is_equal_to_math_verify(gold: str, answer: str) -> bool:
    no_timeout: Any = None
    parsed = [math_verify.parse(rf"\boxed{{{text}}}", parsing_timeout=no_timeout) for text in (gold, answer)]
    return math_verify.verify(parsed[0], parsed[1], timeout_seconds=None)


@given(integers, st.one_of(st.none(), integers))
@settings(max_examples=150, deadline=None)
def test_the_fast_path_for_integers_agrees_with_math_verify(gold, answer):
    answer = f"0{gold}" if answer is None and gold[0] != "-" else answer or gold
    reward = MathReward(num_workers=1)
    (verdict,) = reward.score([task(gold)], [completion(rf"\boxed{{{answer}}}")])
    assert all(worker._process is None for worker in reward._pool._workers), "took the slow path"
    reward.close()

    expected = is_equal_to_math_verify(gold, answer)
    assert (verdict.status == "ok") is expected
    assert (JUDGE.verify(gold, answer, 1e-6)[0] == "ok") is expected


@given(st.integers(-999, 999), st.integers(1, 60), st.integers(-999, 999), st.integers(1, 60))
@settings(max_examples=60, deadline=None)
def test_the_number_rule_agrees_with_math_verify_on_fractions(a, b, c, d):
    gold, answer = rf"\frac{{{a}}}{{{b}}}", rf"\frac{{{c * b}}}{{{d * b}}}"

    for g, h in [(gold, answer), (gold, rf"\frac{{{a * d}}}{{{b * d}}}")]:
        expected = is_equal_to_math_verify(g, h)
        assert (JUDGE.verify(g, h, 1e-6)[0] == "ok") is expected


@pytest.mark.parametrize(
    "options", [{"answer_pattern": "box"}, {"gold_pattern": "x"}, {"timeout": 0}, {"float_tolerance": -1}]
)
def test_impossible_options_are_refused(options):
    with pytest.raises(ValueError):
        MathReward(**options)


def test_the_package_and_the_worker_import_no_torch():
    code = (
        "import sys, strop.rewards.math_worker, strop.rewards.worker; "
        "print('torch' in sys.modules, 'sympy' in sys.modules)"
    )
    root = Path(__file__).parents[2]
    out = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["False", "False"]


@pytest.mark.parametrize(
    ("text", "is_quick"),
    [
        ("12x+7", True),
        (r"\sqrt{3}-\frac{2\pi}{5}", True),
        (r"(-\infty, 3] \cup [4, 5)", True),
        ("1,2,3", True),
        ("(1,2),(3,4)", True),
        (r"x \leq 3", True),
        (r"2\sin^2 x + 5!", True),
        (r"\frac{1}{2}x^2-3", False),
        ("x_1+x_2", False),
        (r"\int_0^1 x dx", False),
        (r"\sum_{k=1}^{n} k^2", False),
        ("f(x)=x^2", True),
    ],
)
def test_the_quick_parser_reads_what_the_thorough_one_reads(text: str, is_quick: bool):
    MathJudge()
    kind: Any = latex2sympy2._Latex2Sympy  # pyright: ignore[reportPrivateUsage]
    quick, thorough = kind(), kind()
    thorough.is_first_stage = False
    assert sympy.srepr(quick.parse(text)) == sympy.srepr(kind.parse.__wrapped__(thorough, text))
    assert quick.is_first_stage is is_quick
