"""Metamath databases (.mm) as data: what each label states, under which hypotheses, and what may be cited where.

Written from the specification (Megill and Wheeler, Metamath, 2019, chapter 4 and appendix E). Nothing of a database is
ever executed, and a file inclusion ($[ ... $]) is refused: it could read any file of this machine.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

Expression = tuple[str, ...]
"""Symbols; the first is the typecode ("|-", "wff", "term", ...)."""
Pair = tuple[str, str]
"""Two variables, in sorted order."""

LABEL = re.compile(r"[A-Za-z0-9._-]+")
_SYMBOL = re.compile(r"[!-#%-~]+")  # printable ASCII without $


@dataclass(slots=True)
class Hypothesis:
    """A variable's type ($f) or an assumption ($e). Citable only inside the block that holds it.

    Example: Hypothesis(label="wva", expression=("term", "a"), is_floating=True, order=7)
    """

    label: str
    expression: Expression
    is_floating: bool
    order: int
    """Its place among all labelled statements of the file."""
    end: int | None = None
    """The first place outside its block; None while the block is open, and for ever at the outermost level."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Assertion:
    """An axiom ($a) or a theorem ($p), with its frame: what must be given to cite it.

    Example: Assertion(label="ax-a2", expression=("|-", "(", "a", "v", "b", ")", "=", ...), hypotheses=(wva, wvb), ...)
    """

    label: str
    expression: Expression
    hypotheses: tuple[Hypothesis, ...]
    """The mandatory ones, in the order of the file: those of the stack that a citation takes."""
    disjoint: frozenset[Pair]
    """Pairs of mandatory variables that a citation may not give a common variable."""
    scope_disjoint: frozenset[Pair]
    """Every pair that is disjoint where the assertion stands, its proof's dummy variables included."""
    order: int
    proof: tuple[str, ...] | None = None
    """Tokens between $= and $., normal or compressed; None for an axiom."""

    @property
    def is_axiom(self) -> bool:
        return self.proof is None

    @property
    def is_unproven(self) -> bool:
        """Whether its proof has a gap. Such a theorem can be a task, but nobody may cite it."""
        return self.proof is not None and any("?" in token for token in self.proof)


@dataclass(slots=True)
class _Block:
    variables: set[str] = field(default_factory=set)
    hypotheses: list[Hypothesis] = field(default_factory=list)
    disjoint: set[Pair] = field(default_factory=set)


class Database:
    """Every labelled statement of one .mm file, in the order of the file."""

    def __init__(self, text: str, name: str = "database") -> None:
        """Reads the text; name is for messages. Raises ValueError naming name:line for what the language forbids.

        Proofs are kept as they are: metamath_proof checks them.
        """
        self.name = name
        self.constants: set[str] = set()
        self.variables: set[str] = set()
        """Every symbol that is a variable anywhere in the file."""
        self.statements: dict[str, Hypothesis | Assertion] = {}
        self._blocks = [_Block()]
        self._active: set[str] = set()
        self._type_of: dict[str, Hypothesis] = {}
        """Variable -> its active $f."""
        self._scope_disjoint: frozenset[Pair] | None = frozenset()
        """None = to be computed anew."""
        self._place = 0
        try:
            self._read(text)
        except _SyntaxError as error:
            raise ValueError(f"{name}:{_line_of_token(text, self._place)}: {error}") from None

    @classmethod
    def load(cls, path: Path, *, before: str = "") -> Database:
        """The database in a file, up to the label `before` where that is given.

        Raises ValueError when the file is missing or broken, or has no such label.
        """
        text = read_database_text(path)
        return cls(cut_before(text, before) if before else text, path.name)

    def theorem(self, label: str) -> Assertion:
        """The theorem of that label. Raises ValueError when there is none."""
        found = self.statements.get(label)
        if not isinstance(found, Assertion) or found.is_axiom:
            kind = "no such label" if found is None else "that label is no theorem ($p)"
            raise ValueError(f"{self.name}: {label!r}: {kind}")
        return found

    def theorems(self) -> Iterator[Assertion]:
        for statement in self.statements.values():
            if isinstance(statement, Assertion) and not statement.is_axiom:
                yield statement

    def _read(self, text: str) -> None:
        tokens = text.split()
        label: str | None = None
        while self._place < len(tokens):
            token = tokens[self._place]
            if token == "$(":
                self._place = self._end_of_comment(tokens, self._place)
            elif token in ("${", "$}", "$c", "$v", "$d") or not token.startswith("$"):
                if label is not None:
                    raise _SyntaxError(f"the label {label!r} is followed by {token!r}")
                if token == "${":
                    self._blocks.append(_Block())
                elif token == "$}":
                    self._close_block()
                elif not token.startswith("$"):
                    self._check_new_label(token)
                    label = token
                else:
                    self._declare(token, self._until(tokens, "$."))
            elif token in ("$f", "$e", "$a", "$p"):
                if label is None:
                    raise _SyntaxError(f"{token} has no label")
                self._state(token, label, tokens)
                label = None
            elif token == "$[":
                raise _SyntaxError("the file includes another one ($[ ... $]), which is refused: paste it in")
            else:
                raise _SyntaxError(f"{token!r} has no place here")
            self._place += 1
        if label is not None:
            raise _SyntaxError(f"the label {label!r} is followed by nothing")
        if len(self._blocks) > 1:
            raise _SyntaxError("a block ${ is never closed")

    def _end_of_comment(self, tokens: list[str], start: int) -> int:
        try:
            end = tokens.index("$)", start)
        except ValueError:
            raise _SyntaxError("a comment $( is never closed") from None
        if any("$(" in token or "$)" in token for token in tokens[start + 1 : end]):
            raise _SyntaxError("a comment holds $( or $)")
        return end

    def _until(self, tokens: list[str], end: str) -> tuple[str, ...]:
        """The tokens up to `end`, without comments; the place is left there."""
        found: list[str] = []
        start = self._place
        self._place += 1
        while self._place < len(tokens):
            token = tokens[self._place]
            if token == end:
                return tuple(found)
            if token == "$(":
                self._place = self._end_of_comment(tokens, self._place)
            elif "$" in token:
                raise _SyntaxError(f"{tokens[start]} ends without {end}, at {token!r}")
            else:
                found.append(token)
            self._place += 1
        self._place = start
        raise _SyntaxError(f"{tokens[start]} ends without {end}")

    def _close_block(self) -> None:
        if len(self._blocks) == 1:
            raise _SyntaxError("$} without ${")
        block = self._blocks.pop()
        self._active -= block.variables
        for hypothesis in block.hypotheses:
            hypothesis.end = len(self.statements)
            if hypothesis.is_floating:
                del self._type_of[hypothesis.expression[1]]
        if block.disjoint:
            self._scope_disjoint = None

    def _declare(self, kind: str, symbols: tuple[str, ...]) -> None:
        if not symbols:
            raise _SyntaxError(f"{kind} declares nothing")
        if kind == "$d":
            self._declare_disjoint(symbols)
            return
        for symbol in symbols:
            if not _SYMBOL.fullmatch(symbol):
                raise _SyntaxError(f"{symbol!r} is no math symbol")
            if symbol in self.statements:
                raise _SyntaxError(f"{symbol!r} is a label already")
            if symbol in self.constants or symbol in self._active or (kind == "$c" and symbol in self.variables):
                raise _SyntaxError(f"the symbol {symbol!r} is declared already")
            if kind == "$c":
                if len(self._blocks) > 1:
                    raise _SyntaxError("$c stands inside a block")
                self.constants.add(symbol)
            else:
                self.variables.add(symbol)
                self._active.add(symbol)
                self._blocks[-1].variables.add(symbol)

    def _declare_disjoint(self, symbols: tuple[str, ...]) -> None:
        if len(symbols) < 2 or len(set(symbols)) < len(symbols):
            raise _SyntaxError("$d needs two or more different variables")
        for symbol in symbols:
            if symbol not in self._active:
                raise _SyntaxError(f"$d names {symbol!r}, which is no active variable")
        self._blocks[-1].disjoint |= set(combinations(sorted(symbols), 2))
        self._scope_disjoint = None

    def _check_new_label(self, label: str) -> None:
        if not LABEL.fullmatch(label):
            raise _SyntaxError(f"{label!r} is no label (letters, digits, '.', '_' and '-')")
        if label in self.statements:
            raise _SyntaxError(f"the label {label!r} is used twice")
        if label in self.constants or label in self.variables:
            raise _SyntaxError(f"the label {label!r} is a math symbol too")

    def _state(self, kind: str, label: str, tokens: list[str]) -> None:
        expression = self._until(tokens, "$=" if kind == "$p" else "$.")
        proof = self._until(tokens, "$.") if kind == "$p" else None
        if proof == ():
            raise _SyntaxError(f"{label!r} has an empty proof")
        self._check_expression(kind, label, expression)
        order = len(self.statements)
        if kind in ("$f", "$e"):
            hypothesis = Hypothesis(label, expression, kind == "$f", order)
            if kind == "$f":
                self._type_of[expression[1]] = hypothesis
            self._blocks[-1].hypotheses.append(hypothesis)
            self.statements[label] = hypothesis
            return
        active = [hypothesis for block in self._blocks for hypothesis in block.hypotheses]
        essential = [hypothesis for hypothesis in active if not hypothesis.is_floating]
        used = {symbol for hypothesis in essential for symbol in hypothesis.expression} | set(expression)
        mandatory = [h for h in active if not h.is_floating or h.expression[1] in used]
        scope_disjoint = self._scope()
        self.statements[label] = Assertion(
            label=label,
            expression=expression,
            hypotheses=tuple(mandatory),
            disjoint=frozenset(pair for pair in scope_disjoint if pair[0] in used and pair[1] in used),
            scope_disjoint=scope_disjoint,
            order=order,
            proof=proof,
        )

    def _check_expression(self, kind: str, label: str, expression: Expression) -> None:
        if not expression or expression[0] not in self.constants:
            raise _SyntaxError(f"{label!r} must begin with a constant")
        for symbol in expression:
            if symbol not in self.constants and symbol not in self._active:
                raise _SyntaxError(f"{label!r} has the symbol {symbol!r}, which is not active")
        if kind == "$f":
            if len(expression) != 2 or expression[1] not in self._active:
                raise _SyntaxError(f"$f {label!r} must be a constant and a variable")
            if expression[1] in self._type_of:
                raise _SyntaxError(f"{expression[1]!r} has a type already: {self._type_of[expression[1]].label}")
            return
        for symbol in expression:
            if symbol in self._active and symbol not in self._type_of:
                raise _SyntaxError(f"{label!r} has the variable {symbol!r}, which has no active $f")

    def _scope(self) -> frozenset[Pair]:
        if self._scope_disjoint is None:
            self._scope_disjoint = frozenset(pair for block in self._blocks for pair in block.disjoint)
        return self._scope_disjoint


class _SyntaxError(Exception):
    pass


def read_database_text(path: Path) -> str:
    """The file's text. Raises ValueError when it is missing or not ASCII."""
    try:
        return path.read_text(encoding="ascii")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a Metamath database: byte {error.start} is not ASCII") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}. {INSTALL}") from None


def cut_before(text: str, label: str) -> str:
    """The text up to the outermost statement or block that holds the label: a database of its own.

    Raises ValueError when there is no such label.
    """
    depth, end = 0, 0
    in_comment = False
    for match in re.finditer(r"\S+", text):
        token = match.group()
        if in_comment or token == "$(":
            in_comment = token != "$)"
            if not in_comment and depth == 0:
                end = match.end()
            continue
        if token == label:
            return text[:end] + "\n"
        depth += (token == "${") - (token == "$}")
        if depth == 0 and token in ("$.", "$}"):
            end = match.end()
    raise ValueError(f"there is no label {label!r} in the database")


INSTALL = "Debian's databases: apt-get install metamath-databases"


def _line_of_token(text: str, place: int) -> int:
    for index, match in enumerate(re.finditer(r"\S+", text)):
        if index == place:
            return text.count("\n", 0, match.start()) + 1
    return text.count("\n") + 1
