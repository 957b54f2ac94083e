"""Which text is the answer, which text is a number, and what must not even be parsed."""

from __future__ import annotations

import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from strop.rewards.answers import (
    Number,
    check_answer_pattern,
    extract_answer,
    numbers_equal,
    read_number,
    unwrap,
    why_explosive,
)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{12}.", "12"),
        (r"\boxed{11} no \boxed{12}", "12"),
        (r"\boxed{12} then the final answer is 13", "12"),
        (r"\boxed{\frac{1}{2}} and \boxed{\frac{3}{\sqrt{4}}} done {", r"\frac{3}{\sqrt{4}}"),
        (r"\boxed{\left\{ 1, 2 \right.}", r"\left\{ 1, 2 \right."),
        (r"\boxed {7}", "7"),
        (r"\fbox{8}", "8"),
        (r"\boxed{\boxed{9}}", "9"),
        (r"\boxed{$\text{12}$}", "12"),
        (r"\boxed{12} wait \boxed{13", None),  # cut off: it was not done
        (r"\boxed{}", None),
        (r"\boxed{ }", None),
        ("12", None),
    ],
)
def test_boxed_takes_the_last_box(text, answer):
    assert extract_answer(text, "boxed") == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("the answer is 12", "12"),
        ("12 apples and 3 pears", "3"),
        ("It costs $1,517.50.", "1,517.50"),
        ("first 1,2,3", "3"),
        ("x = -4", "-4"),
        ("x = −4", "-4"),
        ("10-4", "4"),
        ("(a)-4", "4"),
        ("from 3 - 5", "5"),
        ("about 1e-7 m", "1e-7"),
        ("that is 3/4 of it", "3/4"),
        ("or 50%", "50%"),
        (r"or 50\%", r"50\%"),
        ("take .5", ".5"),
        ("in 1999, 2.", "2"),
        ("version 1.2.3", "3"),
        ("none", None),
        ("", None),
    ],
)
def test_last_number(text, answer):
    assert extract_answer(text, "last_number") == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Answer: 12", "12"),
        ("Answer: 12 Answer: 13\nand more", "13"),
        ("**Answer:** $x^2$.", "x^2"),
        ("Answer:\n\n 12 cm\nbye", "12 cm"),
        ("answer: 12", None),
        ("Answer:", None),
    ],
)
def test_after_marker_takes_the_rest_of_the_line_after_the_last(text, answer):
    assert extract_answer(text, "after:Answer:") == answer


def test_auto_is_boxed_where_there_is_a_box_and_else_the_last_number():
    assert extract_answer(r"\boxed{x+1} 7", "auto") == "x+1"
    assert extract_answer("5 then 7", "auto") == "7"
    assert extract_answer(r"7 \boxed{5", "auto") is None


def test_gsm8k_gold():
    assert extract_answer("48/2 = <<48/2=24>>24 clips\n#### 1,072", "after:####") == "1,072"


@pytest.mark.parametrize("pattern", ["box", "after:", "", "last"])
def test_unknown_patterns_are_refused(pattern):
    with pytest.raises(ValueError, match="last_number"):
        check_answer_pattern(pattern)


@pytest.mark.parametrize(
    "text", ["$12$", "$$12$$", r"\(12\)", r"\[12\]", r"\text{12}", "**12**", "12.", r" $\mathbf{12}$. "]
)
def test_unwrap(text):
    assert unwrap(text) == "12"


def test_unwrap_keeps_what_is_not_around_everything():
    assert unwrap(r"\text{a} + \text{b}") == r"\text{a} + \text{b}"
    assert unwrap("$1$ and $2$") == "$1$ and $2$"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("12", 12),
        ("-12", -12),
        ("+12", 12),
        ("−12", -12),
        ("007", 7),
        ("1,517", 1517),
        ("1{,}517{,}000", 1517000),
        (r"1\,517", 1517),
        ("1 517", 1517),
        ("1517.0", 1517),
        ("0.1", Fraction(1, 10)),
        (".5", Fraction(1, 2)),
        ("1e-7", Fraction(1, 10**7)),
        (r"6\times 10^2", 600),
        (r"6.02 \cdot 10^{23}", 602 * 10**21),
        ("3034/2", 1517),
        (r"-\frac{1}{2}", Fraction(-1, 2)),
        (r"\dfrac12", Fraction(1, 2)),
        (r"\frac{-1}{2}", Fraction(-1, 2)),
        ("1 1/2", Fraction(3, 2)),
        (r"1\frac{1}{2}", Fraction(3, 2)),
        (r"\$18", 18),
        ("(5)", 5),
        ("x = 2", 2),
        (r"\theta_1=2", 2),
        (r"50\%", 50),
    ],
)
def test_numbers_are_read_exactly(text, value):
    number = read_number(text)
    assert number is not None
    assert number.value == value


@pytest.mark.parametrize(
    "text",
    ["37*41", r"37\times 41", "1+1", "2^3", "5!", "12 or 13", "1,2", "(1,517)", "1/0", r"\frac{1}{0}", "12x", "x", "",
     "-", "5=12", "1/2/3", r"\sqrt{4}", "1e9999", "٣", "12 = 12", "--5", r"\binom{5}{2}", "10^{3}"],
)  # fmt: skip
def test_operations_and_other_texts_are_no_numbers(text):
    assert read_number(text) is None


@given(st.integers(-(10**12), 10**12), st.integers(0, 6))
def test_every_rendering_of_a_decimal_reads_back_to_it(digits, places):
    value = Fraction(digits, 10**places)
    plain = f"{'-' if digits < 0 else ''}{abs(digits) // 10**places}"
    tail = f".{abs(digits) % 10**places:0{places}d}" if places else ""
    grouped = f"{'-' if digits < 0 else ''}{abs(digits) // 10**places:,}"
    texts = [plain + tail, grouped + tail, grouped.replace(",", "{,}") + tail, grouped.replace(",", " ") + tail]
    texts += [
        f"{digits}e-{places}",
        f"{digits}/{10**places}",
        rf"\frac{{{digits}}}{{{10**places}}}",
        f"y = {plain}{tail}",
    ]
    numbers = [read_number(text) for text in texts]
    assert [number and number.value for number in numbers] == [value] * len(texts)


def number(text: str) -> Number:
    found = read_number(text)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("gold", "answer", "equal"),
    [
        ("1e-7", "2e-7", False),
        ("1e-7", "0.0000001", True),
        ("0.001", "0.0010004", False),
        ("3.14159265", "3.14159266", True),
        ("0.5", "1/2", True),
        ("1/3", "0.333333", False),
        ("1/3", "0.3333333333333333", False),
        ("0.0", "1e-9", False),
        ("1/2", r"50\%", True),
        ("50", r"50\%", True),
        (r"50\%", "50", True),
        (r"50\%", "0.5", True),
        (r"50\%", r"5000\%", False),
        (r"50\%", r"0.5\%", False),
        ("1/2", r"5\%", False),
        ("x=12", "12", True),
        ("x=12", "y=12", False),
        ("12", "y=12", True),
        ("600", r"6\times 10^2", False),  # the question copied
        (r"6.0\times 10^2", "600", True),
        ("6e2", r"6\times 10^{2}", True),
    ],
)
def test_comparison(gold, answer, equal):
    assert numbers_equal(number(gold), number(answer), 1e-6) is equal


@pytest.mark.parametrize(
    "text",
    [r"9^{9^{9}}", "9^9^9", "9^(9^9)", r"\dfrac{5^{(5^{(5^{(5^5)})}-4)}-5}{16}", r"\sin(\sin(e^{e^{e^3}}+3))",
     "1000000!", "(1000000)!", "2^{10000000}", "2^99999999", "1+x^{2^{9^{9}}}"],
)  # fmt: skip
def test_explosive_texts_are_named(text):
    assert why_explosive(text) is not None


@pytest.mark.parametrize(
    "text", ["2^{3^4}", "x^{2^{3}}", "e^{x^2}", "100!", "2^{100}", "x^2+y^2+z^2", r"\frac{x^{2}}{y^{3}}", ""]
)
def test_ordinary_texts_are_not_explosive(text):
    assert why_explosive(text) is None


@pytest.mark.parametrize(
    "text", ["^" * 300, "^{" * 150, "9" * 300, "1," * 150, "1 " * 150, "(" * 300, "$" * 300, r"\frac" * 60, "1/" * 150,
             r"\text{" * 50 + "}" * 50, "1" + ",111" * 74 + "!"]
)  # fmt: skip
def test_no_short_text_takes_long_to_look_at(text):
    started = time.process_time()
    why_explosive(text)
    read_number(text)
    unwrap(text)
    assert time.process_time() - started < 0.1


@pytest.mark.parametrize(
    "text",
    [
        r"\boxed{" * 5000,
        "1," * 20000,
        "1 " * 20000,
        "{" * 40000,
        "-." * 20000,
        "1/" * 20000,
        "\\boxed{" + "$" * 40000 + "}",
    ],
)
@pytest.mark.parametrize("pattern", ["auto", "boxed", "last_number", "after:,"])
def test_no_completion_takes_long_to_cut(text, pattern):
    started = time.process_time()
    extract_answer(text, pattern)
    assert time.process_time() - started < 0.5
