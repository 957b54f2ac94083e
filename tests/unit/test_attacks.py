"""docs/attacks.md names a test for every attack: each of them is there."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
NAMED = re.compile(r"`(?:(test_\w+\.py)::(test_\w+))?(?:\[([^`]+)\])?`")
TABLES = {"reward hacks": 13, "escapes and floods": 32}
"""Attacks of the research that the table must at least have."""


def named_in(text: str) -> list[tuple[str, str, str]]:
    """(file, test, case) of every mention; `[case]` alone is of the test named before it, "" is no case."""
    found: list[tuple[str, str, str]] = []
    for file, test, case in NAMED.findall(text):
        if file or (case and found):
            found.append((file or found[-1][0], test or found[-1][1], case))
    return found


def functions_and_keys(path: Path) -> tuple[set[str], set[str]]:
    """The tests of a file, and the keys of its dictionaries: what a parametrised case is named by."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    dictionaries = [node for node in ast.walk(tree) if isinstance(node, ast.Dict)]
    keys = {key.value for each in dictionaries for key in each.keys if isinstance(key, ast.Constant)}
    return functions, {key for key in keys if isinstance(key, str)}


@functools.cache
def all_tests() -> dict[str, tuple[set[str], set[str]]]:
    return {path.name: functions_and_keys(path) for path in (ROOT / "tests").rglob("test_*.py")}


def missing(text: str) -> list[str]:
    """What a text names and nothing in tests/ has."""
    found = all_tests()
    bad: list[str] = []
    for file, test, case in named_in(text):
        functions, keys = found.get(file, (set(), set()))
        if test not in functions or (case and case not in keys):
            bad.append(f"{file}::{test}" + (f"[{case}]" if case else ""))
    return bad


def test_every_test_and_case_of_the_table_exists():
    text = (ROOT / "docs" / "attacks.md").read_text(encoding="utf-8")
    assert len(named_in(text)) > 100
    assert missing(text) == []


def test_every_attack_has_a_test_or_a_reason():
    text = (ROOT / "docs" / "attacks.md").read_text(encoding="utf-8")
    for section in text.split("\n## ")[1:]:
        rows = re.findall(r"^\| (?!attack|fault|-)(.*) \| (.*) \|$", section, re.MULTILINE)
        for attack, cell in rows:
            assert named_in(cell) or "cannot apply" in cell, attack
        for title, least in TABLES.items():
            assert title not in section.partition("\n")[0] or len(rows) >= least


def test_what_is_not_there_is_found_out():
    text = "`test_sandbox.py::test_an_escape_does_not_come_off[fork]`, `[mount]`, `test_no_file.py`, "
    text += "`test_metamath.py::test_mutated_proofs_get_the_same_verdict`"
    assert missing(text) == [] and len(named_in(text)) == 3
    assert missing("`test_sandbox.py::test_an_escape_does_not_come_off[a sixth finger]`") != []
    assert missing("`test_sandbox.py::test_an_escape_does_not_come_off[fork]`, `[a sixth finger]`") != []
    assert missing("`test_sandbox.py::test_nothing_of_the_kind`") != []
    assert missing("`test_no_file.py::test_nothing_of_the_kind`") != []
