r"""Math answers compared as text: a strict form that settles a verdict, and a loose one that only gives an opinion.

The loose one is what graders without a parser do (Lewkowycz et al. 2022, appendix D.1, is the model): it knows no
algebra and misses equal answers, but what it calls equal and the parser does not, or the other way round, is where a
grader's mistakes are found. Its word never changes a score; it is logged.
"""

from __future__ import annotations

import re

_STRICT = (
    (re.compile(r"\\[dtc]frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\\(?:left|right)(?![A-Za-z])"), ""),
    (re.compile(r"\\[,;!:]"), " "),
    (re.compile(r"\s+"), " "),
    # A space may part two words or two numbers ("1 1/2", "\pi x"); anywhere else it says nothing.
    (re.compile(r"(?<![A-Za-z0-9]) | (?![A-Za-z0-9])"), ""),
)
_LOOSE = (
    (re.compile(r"\\(?:text|mbox|mathrm|textbf)\s*\{[^{}]*\}\s*$"), ""),
    (re.compile(r"\\(?:text|mbox|mathrm|textbf|boxed)\s*\{([^{}]*)\}"), r"\1"),
    (re.compile(r"\^\s*\{?\s*\\circ\s*\}?"), ""),
    (re.compile(r"\\?[$%]|\\ |[{}]|\\!"), ""),
    (re.compile(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))"), ""),
    (re.compile(r"\s+"), ""),
)
_FRACTION = re.compile(r"\\frac\s*(?:\{([^{}]*)\}|([0-9]))\s*(?:\{([^{}]*)\}|([0-9]))")
_ASSIGNED = re.compile(r"^[a-z]\s*(?:=|\\in)\s*(?=[^=]*$)")
_TRAILING_ZEROS = re.compile(r"(?<=[0-9])\.0+$")


def same_text(gold: str, answer: str) -> bool:
    r"""Whether the two differ only in what LaTeX does not show: spaces, \left and \right, \dfrac for \frac.

    >>> same_text(r"\left( 1, \dfrac{1}{2} \right)", r"(1,\frac{1}{2})"), same_text("1 1/2", "11/2")
    (True, False)
    """
    return gold == answer or _replaced(gold, _STRICT).strip() == _replaced(answer, _STRICT).strip()


def loosely_equal(gold: str, answer: str) -> bool:
    r"""Whether a grader without a parser would call them equal: without units, signs of money, "x =", braces and case.

    >>> loosely_equal("1517", r"x = 1{,}517 \text{ cm}"), loosely_equal(r"\frac{1}{2}", "1/2")
    (True, True)
    """
    return _loose(gold) == _loose(answer)


def _loose(text: str) -> str:
    text = _ASSIGNED.sub("", _replaced(text, _STRICT).strip())
    text = text.replace("{,}", ",")
    text = _FRACTION.sub(lambda match: f"{match[1] or match[2]}/{match[3] or match[4]}", text)
    return _TRAILING_ZEROS.sub("", _replaced(text, _LOOSE).rstrip(".")).casefold()


def _replaced(text: str, rules: tuple[tuple[re.Pattern[str], str], ...]) -> str:
    for pattern, replacement in rules:
        text = pattern.sub(replacement, text)
    return text
