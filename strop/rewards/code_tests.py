"""Tests in which there is nothing to run: `assert f(1) == 2`, a line each."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from strop.rewards.sandbox.guest import MAX_MESSAGE_BYTES, WireError, decode, encode

MAX_EXPECTED_BYTES = 1024
MAX_WORD_BYTES = 4096
"""What a solution may say about an error. It is read in the judge's own process, and long data can be slow to read: a
megabyte of keys with one hash takes half a minute."""
_GROWTH = 64
"""Equal values have as many items; none is written in more than this many times the bytes of another (True, 1+0j)."""


@dataclass(frozen=True, kw_only=True)
class PlainAssertion:
    """assert f(ARGUMENTS) == EXPECTED, with nothing but plain data in it.

    Example: of "assert f(1) == 2", PlainAssertion(arguments=encode([[1], {}]), expected=2, max_reply_bytes=4096)
    """

    arguments: bytes
    """As the solution gets them."""
    expected: Any
    max_reply_bytes: int
    """A longer reply cannot be equal."""

    def why_wrong(self, reply: bytes) -> str | None:
        """What is wrong with a solution's reply, or None. Equality is Python's, of plain data of the exact types that
        cross between boxes: no __eq__ of the solution's takes part."""
        if len(reply) > self.max_reply_bytes:
            return "AssertionError"
        try:
            said = decode(reply)
        except WireError as error:
            return str(error)
        if isinstance(said, list) and len(said) == 2 and said[0] == "value":
            return None if said[1] == self.expected else "AssertionError"
        if isinstance(said, list) and len(said) == 3 and all(isinstance(part, str) for part in said):
            return f"{said[1]}: {said[2]}"[:300]
        return "broken reply"


def plain_assertions(tests: str, entry_point: str) -> Sequence[PlainAssertion] | None:
    """Every assertion of such tests, in order; None where they hold anything else, or values too large to be compared
    outside a box."""
    found: list[PlainAssertion] = []
    try:
        for statement in ast.parse(tests).body:
            assertion = _assertion(statement, {entry_point, "candidate"})
            if assertion is None:
                return None
            found.append(assertion)
    except (SyntaxError, ValueError, MemoryError, RecursionError):  # ValueError also of literal_eval, and WireError
        return None
    return found or None


def _assertion(statement: ast.stmt, names: set[str]) -> PlainAssertion | None:
    """Raises ValueError where an argument or the expected value is no literal."""
    match statement:
        case ast.Assert(
            test=ast.Compare(
                left=ast.Call(func=ast.Name(id=name), args=args, keywords=keywords), ops=[ast.Eq()], comparators=[right]
            ),
            msg=None,
        ) if name in names and all(keyword.arg is not None for keyword in keywords):
            named = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in keywords}
            arguments = encode([[ast.literal_eval(arg) for arg in args], named])
            expected = ast.literal_eval(right)
            size = len(encode(expected))
            if len(arguments) > MAX_MESSAGE_BYTES or size > MAX_EXPECTED_BYTES or len(named) < len(keywords):
                return None
            return PlainAssertion(
                arguments=arguments, expected=expected, max_reply_bytes=max(MAX_WORD_BYTES, _GROWTH * (size + 16))
            )
        case _:
            return None
