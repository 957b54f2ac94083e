"""Text rules for math answers: which part of a completion is the answer, and which answers are plain numbers.

Pure text and exact fractions, no sympy: the parent process and the math worker both use it.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

MAX_NESTING = 30
"""Brackets inside one another. The grammar's time grows steeply with them, and no answer needs ten."""
MAX_ANSWER_CHARS = 300
"""A longer answer is unparsed: no gold needs it, and it is where hedges and parser bombs live."""

NumberForm = Literal["integer", "fraction", "decimal", "power_of_ten"]

_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_PLAIN_INTEGER = re.compile(r"-?[0-9]+")  # the common case, ten times faster than the general one
_WORDS = re.compile(r"[A-Za-z]{3,}(?: [A-Za-z]+)*")
_WRAPPERS = (
    re.compile(r"\$\$(.*)\$\$", re.DOTALL),
    re.compile(r"\$([^$]*)\$"),
    re.compile(r"\\\((.*)\\\)", re.DOTALL),
    re.compile(r"\\\[(.*)\\\]", re.DOTALL),
    re.compile(r"\\(?:boxed|fbox|text|textbf|textrm|mathbf|mathrm|mbox)\s*\{([^{}]*)\}"),
)

_UNSIGNED = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]{1,3}(?: [0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
_GROUP = r"\{\s*([+-]?[0-9]+(?:\.[0-9]+)?)\s*\}"
_DECIMAL = re.compile(rf"({_UNSIGNED})(?:[eE]([+-]?[0-9]{{1,3}}))?", re.ASCII)
_POWER_OF_TEN = re.compile(
    rf"({_UNSIGNED})\s*(?:\\times|\\cdot|×|\*)\s*10\s*\^\s*(\{{\s*[+-]?[0-9]{{1,3}}\s*\}}|[+-]?[0-9]{{1,3}})"
)
_SLASH = re.compile(rf"(?:([0-9]+) )?({_UNSIGNED})\s*/\s*({_UNSIGNED})")
_FRAC = re.compile(rf"([0-9]+)?\s*\\frac\s*(?:{_GROUP}|([0-9]))\s*(?:{_GROUP}|([0-9]))")
_BRACKETS = re.compile(r"[({]([^(){},]*)[)}]")  # no comma: (1,517) may be a pair
_ASSIGNMENT = re.compile(r"(\\?[A-Za-z]+(?:_(?:[A-Za-z0-9]|\{[A-Za-z0-9]+\}))?)\s*=\s*([^=]+)")
_LAST_NUMBER = re.compile(
    r"(?:(?<![\w)}\]])[-−])?"  # a minus after a digit, a letter or a bracket subtracts
    r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<![0-9])\.[0-9]+)"
    r"(?:[eE][+-]?[0-9]{1,3}(?![0-9]))?(?:\s?/\s?[0-9]+)?(?:\s?\\?%)?"
)


def check_answer_pattern(pattern: str) -> None:
    """Raises ValueError when extract_answer does not know the pattern."""
    if pattern in ("auto", "boxed", "last_number", "whole") or pattern.removeprefix("after:") not in (pattern, ""):
        return
    raise ValueError(
        f"answer pattern {pattern!r} is unknown: use 'auto', 'boxed', 'last_number', 'whole' or 'after:MARKER', "
        "for example 'after:Answer:'"
    )


def extract_answer(text: str, pattern: str) -> str | None:
    r"""The answer inside a completion, without wrapping, or None.

    - "boxed": the content of the last \boxed{}; None if there is none or the last one is not closed.
    - "last_number": the last number in the text (3, -3, 1,517, 2.5, 1/2, 50%, 1e-7).
    - "after:MARKER": the rest of the line after the last MARKER. It must be the answer alone, a unit may follow.
    - "auto": as "boxed" when the text has a \boxed{, else as "last_number".
    - "whole": all of the text (for golds).

    Only ever one candidate: a completion with two boxes is judged by the last, so hedging earns nothing.
    """
    if pattern == "whole":
        found: str | None = text
    elif pattern == "boxed":
        found = _last_box(text)
    elif pattern == "last_number":
        found = _last_number(text)
    elif pattern == "auto":
        found = _last_box(text) if _BOX.search(text) else _last_number(text)
    else:
        _, marker, rest = text.rpartition(pattern.removeprefix("after:"))
        found = rest.strip().partition("\n")[0] if marker else None
    if found is None:
        return None
    found = found.strip()
    # Far too long to become an answer: not worth looking into, and unwrapping takes quadratic time.
    return (unwrap(found) if len(found) <= 4 * MAX_ANSWER_CHARS else found) or None


def _last_box(text: str) -> str | None:
    start = None
    for match in _BOX.finditer(text):
        start = match.end()
    if start is None:
        return None
    depth, position = 1, start
    while position < len(text):
        character = text[position]
        if character == "\\":
            position += 1
        elif character == "{":
            depth += 1
        elif character == "}":
            depth -= 1
            if depth == 0:
                return text[start:position]
        position += 1
    return None


def _last_number(text: str) -> str | None:
    last_digit = max(text.rfind(digit) for digit in "0123456789")
    last = None
    # From twice the longest answer before the last digit: a long completion must not cost more than a short one.
    for match in _LAST_NUMBER.finditer(text, max(0, last_digit - 2 * MAX_ANSWER_CHARS)):
        last = match.group()
    return last


def unwrap(answer: str) -> str:
    r"""The answer without math delimiters, \text{} and the like around all of it, markdown stars and a final full stop.

    >>> unwrap("**$\\text{12}$.**")
    '12'
    """
    while True:
        before = answer
        answer = answer.strip().strip("*")
        if not answer.endswith("\\right."):
            answer = answer.removesuffix(".").strip()
        for wrapper in _WRAPPERS:
            if match := wrapper.fullmatch(answer):
                answer = match.group(1)
        if answer == before:
            return answer.replace("−", "-")


@dataclass(frozen=True, slots=True)
class Number:
    r"""A number written out, exactly: nothing to compute.

    Example: "x = 1{,}517\%" is Number(Fraction(1517), "integer", is_percent=True, variable="x")
    """

    value: Fraction
    """As written: 50% has the value 50."""
    form: NumberForm
    is_percent: bool = False
    variable: str | None = None


def is_words(text: str) -> bool:
    """True for three letters or more: a name to compare as text, not a product of variables ("Paris" = "pairs")."""
    return _WORDS.fullmatch(text) is not None


def split_assignment(text: str) -> tuple[str | None, str]:
    """("x", "12") for "x = 12", (None, text) for anything else."""
    match = _ASSIGNMENT.fullmatch(text.strip())
    return (match.group(1), match.group(2).strip()) if match else (None, text.strip())


def read_number(text: str) -> Number | None:
    r"""The number that the text literally is, or None.

    Read are 12, -3.50, 1,517, 1e-7, 6\times10^2, 3/4, \frac{3}{4}, 1 1/2, 50\%, also in brackets, behind "x =" or "$".
    No operation is carried out beyond one division and one power of ten, so a copied question ("37\times 41") is None.
    Always exact: 0.1 is 1/10.
    """
    if len(text) > MAX_ANSWER_CHARS:
        return None
    if _PLAIN_INTEGER.fullmatch(text):
        return Number(Fraction(int(text)), "integer")
    variable, rest = split_assignment(text)
    for old, new in _SPELLINGS:
        rest = rest.replace(old, new)
    rest = rest.strip()
    if match := _BRACKETS.fullmatch(rest):
        rest = match.group(1).strip()
    is_percent = rest.endswith("%")
    rest = rest.removesuffix("%").strip()
    sign = -1 if rest.startswith("-") else 1
    rest = rest.removeprefix("-" if sign < 0 else "+").strip().removeprefix("$").strip()
    parsed = _read_unsigned(rest)
    if parsed is None:
        return None
    return Number(sign * parsed[0], parsed[1], is_percent, variable)


_SPELLINGS = (
    ("−", "-"),
    ("{,}", ","),
    (",\\!", ","),
    ("\\!", ""),
    ("\\,", " "),
    ("~", " "),
    ("\\left", ""),
    ("\\right", ""),
    ("\\dfrac", "\\frac"),
    ("\\tfrac", "\\frac"),
    ("\\cfrac", "\\frac"),
    ("\\$", "$"),
    ("\\%", "%"),
)


def _read_unsigned(text: str) -> tuple[Fraction, NumberForm] | None:
    if match := _DECIMAL.fullmatch(text):
        mantissa, exponent = match.groups()
        form: NumberForm = "decimal" if exponent or "." in mantissa else "integer"
        return _fraction(mantissa) * Fraction(10) ** int(exponent or 0), form
    if match := _POWER_OF_TEN.fullmatch(text):
        return _fraction(match.group(1)) * Fraction(10) ** int(match.group(2).strip("{} ")), "power_of_ten"
    if match := _SLASH.fullmatch(text):
        whole, numerator, denominator = match.groups()
    elif match := _FRAC.fullmatch(text):
        whole = match.group(1)
        numerator, denominator = match.group(2) or match.group(3), match.group(4) or match.group(5)
    else:
        return None
    if _fraction(denominator) == 0:
        return None
    return Fraction(whole or 0) + _fraction(numerator) / _fraction(denominator), "fraction"


def _fraction(digits: str) -> Fraction:
    return Fraction(digits.replace(",", "").replace(" ", ""))


def numbers_equal(gold: Number, answer: Number, relative_tolerance: float) -> bool:
    r"""Exact equality, unless the gold is a decimal or has a power of ten: then |a - g| <= relative_tolerance * |g|.

    A percent sign on one side only may be read both ways: 50\% equals 1/2 and, as the answer to "what percentage?", 50.
    An answer in the form 6\times10^2 counts only for a gold that is no plain integer or fraction, where it could be the
    question copied.
    """
    if gold.variable is not None and answer.variable not in (None, gold.variable):
        return False
    is_measured = gold.form in ("decimal", "power_of_ten")
    if answer.form == "power_of_ten" and not is_measured:
        return False
    tolerance = Fraction(relative_tolerance) if is_measured else Fraction(0)

    def close(g: Fraction, a: Fraction) -> bool:
        return abs(a - g) <= tolerance * abs(g)

    if gold.is_percent == answer.is_percent:
        return close(gold.value, answer.value)
    if gold.is_percent:
        return close(gold.value, answer.value) or close(gold.value, 100 * answer.value)
    return close(gold.value, answer.value) or close(100 * gold.value, answer.value)


def answer_key(text: str, pattern: str) -> str | None:
    """What a majority vote counts: equal for completions with the same answer, None for one without a readable answer.

    Numbers count by their value (1/2 agrees with 0.50), anything else as text without spaces: forms that only algebra
    knows to be equal (x+1 and 1+x) are two answers to a vote, though the math reward calls both right.

    >>> answer_key("so 0.50", "auto"), answer_key("it is 1/2", "auto"), answer_key("who knows", "auto")
    ('1/2', '1/2', None)
    """
    answer = extract_answer(text, pattern)
    if answer is None or len(answer) > MAX_ANSWER_CHARS:
        return None
    number = read_number(answer)
    return "".join(answer.split()) if number is None else f"{number.value}{'%' if number.is_percent else ''}"


def why_explosive(text: str) -> str | None:
    """Why an expression must not even be parsed (sympy would compute it for minutes), or None.

    Catches the cheap cases only, to save a deadline each; the killable worker is what makes the rest safe.
    """
    if re.search(r"[0-9]{6,}\s*\)?\s*\}?\s*!", text):
        return "factorial of a number with six digits or more"
    if re.search(r"\^[\s{(+-]*[0-9]{7,}", text):
        return "exponent with seven digits or more"
    if _tower_height(text) > 2:
        return "power tower"
    depth = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if depth > MAX_NESTING:
            return f"brackets nested deeper than {MAX_NESTING}"
    return None


def _tower_height(text: str) -> int:
    """How deep exponents nest: 2 for 2^{3^4}. A numeric exponent above 10^5 counts as 3."""
    height = 0
    position = text.find("^")
    while position >= 0 and height < 3:
        exponent = _exponent_after(text, position + 1)
        power = re.fullmatch(r"[\s{(]*([0-9]+)\s*\^[\s{(]*([0-9]+)[\s})]*", exponent)
        if power and int(power[1]) > 1 and int(power[2]) * math.log10(int(power[1])) > 5:
            return 3
        height = max(height, 1 + _tower_height(exponent))
        position = text.find("^", position + 1)
    return height


def _exponent_after(text: str, start: int) -> str:
    while start < len(text) and text[start].isspace():
        start += 1
    if start == len(text):
        return ""
    pairs = {"{": "}", "(": ")"}
    if text[start] not in pairs:
        match = re.compile(r"\\?[\w^{}]+").match(text, start)
        return match.group() if match else ""
    opening, closing, depth = text[start], pairs[text[start]], 0
    for position in range(start, len(text)):
        depth += (text[position] == opening) - (text[position] == closing)
        if depth == 0:
            return text[start + 1 : position]
    return text[start + 1 :]
