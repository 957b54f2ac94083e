"""The process that compares math answers with math-verify. Started by math.MathReward; imports no torch.

Model text only ever goes through math-verify's LaTeX grammar, never through eval, sympify or parse_expr.
"""

from __future__ import annotations

import functools
import logging
import re
from typing import Any, Literal

from strop.rewards.answers import Number, is_words, numbers_equal, read_number, split_assignment, unwrap
from strop.rewards.serve import Handler, serve

MEMORY_BYTES = 1 << 30

Outcome = tuple[Literal["ok", "wrong", "unparsed", "bad_gold"], str]

_UNIT_POWER = re.compile(r"(?<=[A-Za-z}])\s*\^\s*(?:\{\s*-?[0-9]\s*\}|-?[0-9])")
_UP_TO_THE_LAST_DIGIT = re.compile(r".*[0-9]\s*[})]*", re.DOTALL)


def main() -> None:
    serve(_make_handler, respawn=True, memory_bytes=MEMORY_BYTES)


def _make_handler() -> Handler:
    logging.disable(logging.CRITICAL)  # math-verify warns about the timeouts that we turn off, and logs bad answers
    judge = MathJudge()
    judge.verify("x+1", "1+x", 0.0)  # fills sympy's caches once, before the fork

    def handle(request: dict[str, Any]) -> Outcome:
        return judge.verify(request["gold"], request["answer"], request["float_tolerance"])

    return handle


class MathJudge:
    """math-verify under strict rules. May hang or explode on what a model writes: only for use inside the worker."""

    def __init__(self) -> None:
        import math_verify
        import sympy

        _predict_in_two_stages()
        self._sympy = sympy
        self._one_percent = sympy.UnevaluatedExpr(sympy.Rational(1, 100))
        self._verify = math_verify.verify
        # The texts are already cut to the answer, so there is one candidate and nothing to search for.
        extraction = [math_verify.LatexExtractionConfig(boxed_match_priority=0)]

        def parse(text: str) -> Any:
            found = math_verify.parse(
                rf"\boxed{{{text}}}",
                extraction,
                fallback_mode="no_fallback",
                extraction_mode="first_match",
                parsing_timeout=None,  # pyright: ignore[reportArgumentType]  # None is its documented "no timeout"
            )
            return found[0] if found else None

        self._parse = parse
        # A gold comes back for every completion of its group. Answers are not cached: they may be huge.
        self._parse_gold = functools.lru_cache(maxsize=1024)(parse)

    def verify(self, gold_text: str, answer_text: str, float_tolerance: float) -> Outcome:
        r"""The verdict on an answer, and why.

        If the gold is a number, the answer must literally be one too (units and "x =" aside): \sum_{k=1}^{100} k is
        equal to 5050, but is the question copied. Comparison is exact, except to a gold with a decimal point. A gold
        of three letters or more is a name. Other golds are compared by math-verify, and the answer may not leave a sum,
        limit, integral or derivative undone that the gold has done.

        An equal expression in another form still passes: for "factor x^2 - 1" this is the wrong reward.
        """
        gold_number = self.read_number(gold_text)
        if gold_number is not None:
            answer_number = self.read_number(answer_text)
            if answer_number is None:
                is_parsed = self._parse(answer_text) is not None
                return ("wrong", "not written as a number") if is_parsed else ("unparsed", "no math in it")
            return _outcome(numbers_equal(gold_number, answer_number, float_tolerance))
        if is_words(gold_text):
            return _outcome(gold_text.casefold() == answer_text.casefold())
        gold = self._parse_gold(gold_text)
        if gold is None:
            return "bad_gold", "does not parse"
        answer = self._parse(answer_text)
        if answer is None:
            return "unparsed", "no math in it"
        undone = self._undone(answer) - self._undone(gold)
        if undone:
            return "wrong", f"leaves undone: {', '.join(sorted(undone))}"
        is_equal = self._verify(
            self._exact(gold),
            self._exact(answer),
            strict=True,
            allow_set_relation_comp=True,  # x > 3 for (3, \infty)
            timeout_seconds=None,
        )
        return _outcome(is_equal)

    def read_number(self, text: str) -> Number | None:
        """As answers.read_number, and also with a unit behind the number or brackets around it.

        The text must be a number and then no more digits, and math-verify must agree that all of it is a number, since
        only it knows that "12 cm" is one and "12x" is not. Alone it would not do: it reads "1 517" as 1 + 517.
        """
        number = read_number(text)
        if number is not None:
            return number
        variable, rest = split_assignment(text)
        match = _UP_TO_THE_LAST_DIGIT.match(_UNIT_POWER.sub("", rest))
        if match is None:
            return None
        number = read_number(unwrap(match.group()))
        if number is None:
            return None
        parsed = self._parse(rest)
        is_percent = isinstance(parsed, self._sympy.Mul) and parsed.args[1:] == (self._one_percent,)
        if not is_percent and not getattr(parsed, "is_Number", False):
            return None
        return Number(number.value, number.form, is_percent, variable)

    def _undone(self, parsed: Any) -> set[str]:
        sympy = self._sympy
        kinds = (sympy.Sum, sympy.Product, sympy.Integral, sympy.Limit, sympy.Derivative)
        return {kind.__name__ for kind in kinds if parsed.has(kind)}

    def _exact(self, parsed: Any) -> Any:
        """Decimals as fractions: math-verify compares floats rounded to six decimals, where 1e-7 equals 2e-7."""
        floats = parsed.atoms(self._sympy.Float)
        if not floats:
            return parsed
        return parsed.xreplace({number: self._sympy.Rational(str(number)) for number in floats})


@functools.cache
def _predict_in_two_stages() -> None:
    """Lets latex2sympy's parser look at the next tokens alone (ANTLR's SLL). All of the context (LL), which takes ten
    times as long and is never remembered, is only for a text that does not parse so.

    A text that parses with SLL parses with LL, to the same tree (Parr, Harwell, Fisher, Adaptive LL(*) Parsing, 2014).
    """
    from antlr4.atn.PredictionMode import PredictionMode
    from latex2sympy2_extended import latex2sympy2

    converter: Any = latex2sympy2._Latex2Sympy  # pyright: ignore[reportPrivateUsage]
    create_parser, parse = converter.create_parser, converter.parse

    def create(self: Any, text: str) -> Any:
        parser = create_parser(self, text)
        if self.is_first_stage:
            parser._interp.predictionMode = PredictionMode.SLL
        return parser

    @functools.wraps(parse)
    def parse_in_two_stages(self: Any, text: str) -> Any:
        self.is_first_stage = True
        try:
            return parse(self, text)
        except MemoryError:
            raise
        except Exception:
            self.is_first_stage = False
            return parse(self, text)

    converter.create_parser, converter.parse = create, parse_in_two_stages


def _outcome(is_equal: bool) -> Outcome:
    return ("ok", "") if is_equal else ("wrong", "not equal")
