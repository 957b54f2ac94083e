"""Named sets of tasks, each with the reward that judges them: what `strop eval --suite` and `strop tasks` offer."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from strop.data.sources import Rows, load_rows
from strop.evals.humaneval import humaneval_rows
from strop.evals.metamath_tasks import metamath_rows
from strop.evals.reasoning_tasks import reasoning_rows
from strop.rewards.metamath import find_database


@dataclass(frozen=True, kw_only=True)
class Suite:
    """Tasks and their judge.

    Example: Suite(rows=..., reward={"name": "metamath", "database": "ql"})
    """

    rows: Rows
    reward: Mapping[str, Any]
    """As rewards.load.load_reward takes it."""

    def recipe_line(self) -> str:
        """The reward as a line of a recipe."""
        options = {key: value for key, value in self.reward.items() if key != "name"}
        inner = ", ".join(f"{key} = {json.dumps(value)}" for key, value in options.items())
        return f'rewards = [{{ name = "{self.reward["name"]}"' + (f", options = {{ {inner} }}" if inner else "") + " }]"


def load_suite(name: str, *, size: int | None = None, seed: int = 0) -> Suite:
    """The suite KIND:WHAT, its first `size` tasks (of a generator: so many, 100 unless told, decided by the seed).

        metamath:ql, metamath:FILE.mm      theorems with proofs of at most 100 labels, the shortest first
        metamath:set@wal                   only what stands before the label wal: set.mm's propositional part
        reasoning_gym:chain_sum            questions of a dataset, or of several, joined by "+"
        math:FILE.jsonl                    any tasks with an answer column
        humaneval, humaneval-chat          functions to complete; the latter asks a chat model

    Raises ValueError for an unknown kind, naming the nearest, and for what the kind itself refuses.
    """
    kind, _, what = name.partition(":")
    if kind not in SUITES:
        close = difflib.get_close_matches(kind, SUITES, n=1, cutoff=0.5)
        hint = f", did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"no suite {kind!r}{hint}; there are {', '.join(SUITES)} (as in metamath:ql)")
    if not what and kind in EXAMPLES:
        raise ValueError(f"suite {name!r}: say which, as {EXAMPLES[kind]}")
    if what and kind not in EXAMPLES:
        raise ValueError(f"suite {name!r}: {kind} is whole, nothing follows it")
    if size is not None and size < 1:
        raise ValueError(f"a suite needs at least one task, got {size}")
    return SUITES[kind](what, size, seed)


def _metamath(what: str, size: int | None, seed: int) -> Suite:
    database, _, before = what.partition("@")
    rows = metamath_rows(find_database(database), before=before)[:size]
    places = [f"metamath:{database}:{row['theorem']}" for row in rows]
    reward = {"name": "metamath", "database": database} | ({"before": before} if before else {})
    return Suite(rows=_rows(rows, places, f"metamath:{what}"), reward=reward)


def _reasoning_gym(what: str, size: int | None, seed: int) -> Suite:
    rows = reasoning_rows(what.split("+"), size=size or DEFAULT_SIZE, seed=seed)
    places = [f"reasoning_gym:{row['dataset']}:{seed}:{row['index']}" for row in rows]
    return Suite(rows=_rows(rows, places, f"reasoning_gym:{what}"), reward={"name": "reasoning_gym"})


def _math(what: str, size: int | None, seed: int) -> Suite:
    rows = load_rows(what)
    chosen = [rows[index] for index in range(len(rows))][:size]
    places = [rows.where(index) for index in range(len(chosen))]
    return Suite(rows=_rows(chosen, places, what), reward={"name": "math"})


def _humaneval(what: str, size: int | None, seed: int) -> Suite:
    return _code(humaneval_rows()[:size], "humaneval")


def _humaneval_chat(what: str, size: int | None, seed: int) -> Suite:
    return _code(humaneval_rows(is_chat=True)[:size], "humaneval-chat")


def _code(rows: list[dict[str, Any]], source: str) -> Suite:
    return Suite(rows=_rows(rows, [row["task_id"] for row in rows], source), reward={"name": "code"})


def _rows(rows: list[dict[str, Any]], places: list[str], source: str) -> Rows:
    digest = hashlib.sha256("\n".join(json.dumps(row, sort_keys=True) for row in rows).encode()).hexdigest()
    return Rows(rows, places=places, source=source, content_hash=digest)


DEFAULT_SIZE = 100
"""Tasks of a generator."""

SUITES: dict[str, Callable[[str, int | None, int], Suite]] = {
    "metamath": _metamath,
    "reasoning_gym": _reasoning_gym,
    "math": _math,
    "humaneval": _humaneval,
    "humaneval-chat": _humaneval_chat,
}
"""Kind -> builder(what, size, seed)."""
EXAMPLES = {"metamath": "metamath:ql", "reasoning_gym": "reasoning_gym:chain_sum", "math": "math:FILE.jsonl"}
