"""Checks Metamath proofs: substitution and a stack, nothing else (Metamath, section 4.2).

A proof is a list of labels in reverse Polish order. A hypothesis pushes what it states. An assertion takes its
mandatory hypotheses off the stack, which fixes what its variables stand for, and pushes what it states under that
substitution. What remains must be the theorem, alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

from strop.rewards.metamath_database import LABEL, Assertion, Database, Expression, Hypothesis

MAX_LABELS = 10_000
MAX_SYMBOLS = 1_000_000
"""Symbols that one proof of a model may write in all. An assertion that names a variable twice doubles what it is
given, so that thirty labels could otherwise ask for gigabytes."""


class ProofError(Exception):
    """Why a text proves nothing."""


class NotAProofError(ProofError):
    """It is not even a list of labels."""


def check_labels(database: Database, theorem: Assertion, labels: Sequence[str]) -> None:
    """Returns when the labels, in normal reverse Polish order, prove the theorem from what stands before it.

    Raises ProofError with the reason, as `conclusion` does, and where the conclusion is another than the theorem's.
    """
    _check_same(conclusion(database, theorem, labels), theorem)


def conclusion(database: Database, theorem: Assertion, labels: Sequence[str]) -> Expression:
    """What the labels prove at the theorem's place in the database, be it the theorem or not.

    For lists that a model wrote: only labels, no gap, and no more work than MAX_LABELS and MAX_SYMBOLS. Citable are the
    hypotheses of the theorem's own scope and complete earlier assertions. Raises ProofError with the reason.
    """
    if not labels:
        raise NotAProofError("no label in it")
    if len(labels) > MAX_LABELS:
        raise NotAProofError(f"more than {MAX_LABELS} labels")
    for label in labels:
        if label == "?":
            raise ProofError("a gap ('?') is no proof")
        if not LABEL.fullmatch(label):
            raise NotAProofError(f"{label[:40]!r} is no label")
    return _Checker(database, theorem, MAX_SYMBOLS).run(labels)


def check_stored_proof(database: Database, theorem: Assertion) -> None:
    """Returns when the proof in the database, normal or compressed, proves its theorem. Raises ProofError."""
    checker = _Checker(database, theorem, None)
    if theorem.proof is None:
        raise ProofError(f"{theorem.label} is an axiom")
    if theorem.is_unproven:
        raise ProofError("its proof has a gap ('?')")
    is_compressed = theorem.proof[0] == "("
    _check_same(checker.run_compressed(*decompress(theorem)) if is_compressed else checker.run(theorem.proof), theorem)


def normal_labels(database: Database, theorem: Assertion, *, limit: int) -> list[str] | None:
    """The stored proof as a list of labels in normal order, shared parts written out; None where it is above the limit.

    Raises ProofError for a compressed proof that cannot be written out.
    """
    assert theorem.proof is not None
    if theorem.proof[0] != "(":
        return list(theorem.proof) if len(theorem.proof) <= limit else None
    labels, steps = decompress(theorem)
    stack: list[list[str]] = []
    saved: list[list[str]] = []
    for step in steps:
        if step == SAVE:
            saved.append(stack[-1])
            continue
        if step >= len(labels):
            if step - len(labels) >= len(saved):
                raise ProofError("goes back to a result that was not saved")
            part = saved[step - len(labels)]
        else:
            cited = database.statements.get(labels[step])
            count = len(cited.hypotheses) if isinstance(cited, Assertion) else 0
            if cited is None or count > len(stack):
                raise ProofError(f"{labels[step]!r} cannot be cited there")
            given = stack[len(stack) - count :]
            del stack[len(stack) - count :]
            part = [label for piece in given for label in piece] + [labels[step]]
        if len(part) > limit:
            return None
        stack.append(part)
    if len(stack) != 1:
        raise ProofError(f"{len(stack)} results are left at the end, not one")
    return stack[0]


def decompress(theorem: Assertion) -> tuple[list[str], list[int]]:
    """(labels, steps) of a compressed proof (Metamath, appendix B).

    A step n >= 0 cites labels[n], the mandatory hypotheses first and then those in brackets; n beyond them pushes again
    the (n - len(labels))-th saved result; SAVE saves the result of the step before it. Raises ProofError.
    """
    assert theorem.proof is not None
    if ")" not in theorem.proof:
        raise ProofError("the compressed proof has no ')'")
    end = theorem.proof.index(")")
    mandatory = [hypothesis.label for hypothesis in theorem.hypotheses]
    listed = list(theorem.proof[1:end])
    if len(set(listed)) < len(listed) or set(listed) & set(mandatory):
        raise ProofError("the compressed proof lists a label twice, or a mandatory hypothesis")
    steps: list[int] = []
    number = 0
    for letter in "".join(theorem.proof[end + 1 :]):
        if "A" <= letter <= "T":
            steps.append(20 * number + ord(letter) - ord("A"))
            number = 0
        elif "U" <= letter <= "Y":
            number = 5 * number + ord(letter) - ord("U") + 1
        elif letter == "Z" and number == 0 and steps and steps[-1] != SAVE:
            steps.append(SAVE)
        else:
            raise ProofError(f"the compressed proof has {letter!r} in the wrong place")
    if number:
        raise ProofError("the compressed proof ends inside a number")
    return mandatory + listed, steps


SAVE = -1


class _Checker:
    def __init__(self, database: Database, theorem: Assertion, max_symbols: int | None) -> None:
        self._database = database
        self._theorem = theorem
        self._symbols_left = max_symbols
        self._stack: list[Expression] = []
        self._variables = database.variables

    def run(self, labels: Sequence[str]) -> Expression:
        for number, label in enumerate(labels, start=1):
            self._cite(number, self._find(number, label))
        return self._result()

    def run_compressed(self, labels: Sequence[str], steps: Sequence[int]) -> Expression:
        cited = [self._find(number, label) for number, label in enumerate(labels, start=1)]
        saved: list[Expression] = []
        for number, step in enumerate(steps, start=1):
            if step == SAVE:
                saved.append(self._stack[-1])
            elif step < len(cited):
                self._cite(number, cited[step])
            elif step - len(cited) < len(saved):
                self._stack.append(saved[step - len(cited)])
            else:
                raise ProofError(f"step {number} goes back to a result that was not saved")
        return self._result()

    def _find(self, number: int, label: str) -> Hypothesis | Assertion:
        theorem = self._theorem
        found = self._database.statements.get(label)
        if found is None:
            raise ProofError(f"step {number}: there is no label {label!r}")
        if found is theorem:
            raise ProofError(f"step {number}: cites the theorem itself")
        if found.order > theorem.order:
            raise ProofError(f"step {number}: {label} comes after the theorem")
        if isinstance(found, Hypothesis):
            if found.end is not None and found.end <= theorem.order:
                raise ProofError(f"step {number}: {label} is a hypothesis of another statement")
        elif found.is_unproven:
            raise ProofError(f"step {number}: {label} has no complete proof itself")
        return found

    def _cite(self, number: int, cited: Hypothesis | Assertion) -> None:
        stack = self._stack
        if isinstance(cited, Hypothesis):
            stack.append(cited.expression)
            return
        count = len(cited.hypotheses)
        if count > len(stack):
            raise ProofError(f"step {number}: {cited.label} needs {count} results, there are {len(stack)}")
        given = stack[len(stack) - count :]
        del stack[len(stack) - count :]
        substitution: dict[str, Expression] = {}
        # A variable's $f comes before every $e that names it, so one pass is enough.
        for hypothesis, expression in zip(cited.hypotheses, given, strict=True):
            if hypothesis.is_floating:
                typecode, variable = hypothesis.expression
                if expression[0] != typecode:
                    raise ProofError(
                        f"step {number}: {cited.label} needs a {typecode} for {variable}, given is {_shown(expression)}"
                    )
                substitution[variable] = expression[1:]
            elif self._substituted(hypothesis.expression, substitution) != expression:
                raise ProofError(
                    f"step {number}: {hypothesis.label} of {cited.label} is "
                    f"{_shown(self._substituted(hypothesis.expression, substitution))}, given is {_shown(expression)}"
                )
        if cited.disjoint:
            self._check_disjoint(number, cited, substitution)
        stack.append(self._substituted(cited.expression, substitution))

    def _substituted(self, expression: Expression, substitution: dict[str, Expression]) -> Expression:
        result: list[str] = []
        for symbol in expression:
            replacement = substitution.get(symbol)
            if replacement is None:
                result.append(symbol)
            else:
                result += replacement
        if self._symbols_left is not None:
            self._symbols_left -= len(result)
            if self._symbols_left < 0:
                raise ProofError(f"writes more than {MAX_SYMBOLS} symbols")
        return tuple(result)

    def _check_disjoint(self, number: int, cited: Assertion, substitution: dict[str, Expression]) -> None:
        allowed = self._theorem.scope_disjoint
        for first, second in sorted(cited.disjoint):
            left, right = (
                {symbol for symbol in substitution[variable] if symbol in self._variables}
                for variable in (first, second)
            )
            if left & right:
                shared = min(left & right)
                raise ProofError(
                    f"step {number}: {cited.label} keeps {first} and {second} apart, but both contain {shared}"
                )
            missing = [pair for pair in product(left, right) if (min(pair), max(pair)) not in allowed]
            if missing:
                x, y = min(missing)
                raise ProofError(
                    f"step {number}: {cited.label} needs {x} and {y} disjoint, which the theorem does not say"
                )

    def _result(self) -> Expression:
        if len(self._stack) != 1:
            raise ProofError(f"{len(self._stack)} results are left at the end, not one")
        return self._stack[0]


def _check_same(proved: Expression, theorem: Assertion) -> None:
    if proved != theorem.expression:
        raise ProofError(f"proves {_shown(proved)}, not {_shown(theorem.expression)}")


def _shown(expression: Expression) -> str:
    text = " ".join(expression[:40])
    return repr(text if len(text) <= 120 else f"{text[:117]}...")
