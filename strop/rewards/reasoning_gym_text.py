"""What an answer may say to those scorers of reasoning-gym that run it as Python code.

A box keeps such code from the machine, but the scorer's verdict is made in the same process, and code could change it:
an answer that patches the scorer would be right for ever. So only expressions without names to reach, calls to make or
objects to write to are passed on. Imported in the worker and in the box: the standard library only.
"""

from __future__ import annotations

import ast
import re

EVALUATED = ("binary_matrix", "n_queens", "spiral_matrix", "string_insertion")
"""Their scorers give eval() what is not the gold's own text, to pay a little for a Python list."""
PARSED = (*("countdown", "intermediate_integration", "polynomial_multiplication", "puzzle24", "simple_integration"),)
"""Their scorers give it to sympy.parse_expr(), which calls eval()."""
RUNS_MODEL_TEXT = EVALUATED + PARSED
"""Read in the source of 0.1.25."""

MAX_EXPONENT = 1000
_PLAIN = (
    *(ast.Expression, ast.Constant, ast.List, ast.Tuple, ast.Name, ast.Load, ast.UnaryOp, ast.UAdd, ast.USub),
    *(ast.BinOp, ast.Add, ast.Sub, ast.Mult, ast.Div, ast.Pow),
)
_FUNCTION = re.compile("a?(sin|cos|tan)h?|sec|csc|cot|exp|log|ln|sqrt|[Aa]bs|erf")
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9]{0,7}")


def why_not_run(dataset: str, answer: str) -> str | None:
    """Why an answer must not be given to this dataset's scorer, or None.

    For scorers that call eval(): numbers, texts, names alone, lists and arithmetic of them, or what is no Python
    expression at all, like a matrix in rows. For those that call parse_expr(): arithmetic, names of up to eight letters
    and digits, and calls of elementary functions. Nowhere an attribute, a subscript, a comprehension, a lambda or any
    other call. The other scorers only compare text, and get anything.
    """
    if dataset not in RUNS_MODEL_TEXT:
        return None
    try:
        tree = ast.parse(answer.strip(), mode="eval")
    except SyntaxError:
        return None if dataset in EVALUATED else "no expression"
    except (ValueError, MemoryError, RecursionError) as error:  # a NUL; brackets by the thousand
        return f"not to be parsed: {type(error).__name__}"
    allowed = _PLAIN if dataset in EVALUATED else (*_PLAIN, ast.Call)
    for node in ast.walk(tree):
        if not isinstance(node, allowed):
            return f"{type(node).__name__} is not allowed in an answer"
        if isinstance(node, ast.Call) and not _is_elementary(node):
            return "only elementary functions may be called in an answer"
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow) and _is_explosive(node.right):
            return "a power tower, or an exponent that is too large"
        if dataset in PARSED and (reason := _why_no_symbol(node)) is not None:
            return reason
    return None


def _is_elementary(call: ast.Call) -> bool:
    is_known = isinstance(call.func, ast.Name) and _FUNCTION.fullmatch(call.func.id) is not None
    return is_known and not call.keywords and len(call.args) <= 2


def _is_explosive(exponent: ast.expr) -> bool:
    """Numbers only: x**(2**n) stays a symbol, but 9**9**9 is computed."""
    nodes = list(ast.walk(exponent))
    if any(isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow) for node in nodes):
        return not any(isinstance(node, ast.Name) for node in nodes)
    numbers = [node.value for node in nodes if isinstance(node, ast.Constant)]
    return any(isinstance(value, int | float) and abs(value) > MAX_EXPONENT for value in numbers)


def _why_no_symbol(node: ast.AST) -> str | None:
    if isinstance(node, ast.Constant) and type(node.value) not in (int, float):
        return "only numbers, names and functions are allowed in an answer"
    if isinstance(node, ast.Name) and not _NAME.fullmatch(node.id):
        return "a name that is no symbol"
    if isinstance(node, ast.List | ast.Tuple):
        return "a list where an expression is asked for"
    return None
