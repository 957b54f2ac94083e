"""Does every task's own answer score 1.0? Every row of every task set that Strop ships or reads as a suite.

    python -m benchmarks.gold list                       the names of the sets
    python -m benchmarks.gold measure                    all that are not in results/gold.json yet; can be stopped
    python -m benchmarks.gold measure humaneval --again  one of them anew
    python -m benchmarks.gold table                      results/gold.md

The gold is given to the reward as a completion, in the form that a policy would give it, through the reward's own
worker processes and boxes. The control: another row's gold, where it is another text.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmarks.__main__ import ROOT, heading, origin
from benchmarks.ttrl_tasks import write_tasks
from strop.data.sources import load_rows
from strop.data.tasks import tasks_from_rows
from strop.evals.suites import load_suite
from strop.rewards.base import ChecksTasks
from strop.rewards.load import load_reward
from strop.types import Completion, Task

RESULTS = ROOT / "benchmarks" / "results" / "gold.json"
ROWS_PER_DATASET = 50
"""Of each dataset of reasoning-gym, whose questions are generated."""
ROWS_OF_SLOW = {"knight_swap": 10}
"""Fewer where a question takes many seconds to make."""
SEED = 0

GOLDS: dict[str, tuple[str, str]] = {
    "math": ("answer", "So the answer is \\boxed{{{}}}."),
    "code": ("solution", "{}"),
    "metamath": ("proof", "{}"),
    "reasoning_gym": ("answer", "I think so.\n<answer>{}</answer>"),
}
"""Reward -> the column of the gold, and the completion that gives it."""
SUITES = ("humaneval", "humaneval-chat", "metamath:ql", "metamath:hol", "metamath:set@wal")

Row = dict[str, Any]


def recipe_module(path: str) -> ModuleType:
    """A recipe's data.py, which is a script and in no package."""
    spec = importlib.util.spec_from_file_location("gold_recipe", ROOT / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


RECIPES: dict[str, tuple[Callable[[Path], object], tuple[str, ...], str]] = {
    "recipes/demo": (
        lambda folder: recipe_module("recipes/demo/data.py").write_demo_data(folder),
        ("tasks", "held_out", "smollm2_tasks", "smollm2_held_out"),
        "math",
    ),
    "recipes/ttrl": (
        lambda folder: write_tasks("slips", folder, random.Random("slips 0")),
        ("tasks", "test"),
        "math",
    ),
    "recipes/code": (
        lambda folder: recipe_module("recipes/code/data.py").write_code_data(folder),
        ("tasks", "held_out"),
        "code",
    ),
    "recipes/proofs": (
        lambda folder: recipe_module("recipes/proofs/data.py").write_proof_data(folder),
        ("tasks", "held_out"),
        "metamath",
    ),
}
"""Recipe -> what writes its data, its task files, its reward. The files *_shuffled hold wrong golds on purpose."""


def set_names() -> list[str]:
    from reasoning_gym.factory import DATASETS

    return [*RECIPES, *SUITES, *(f"reasoning_gym:{name}" for name in sorted(DATASETS))]


def measure(name: str) -> Row:
    """Rows, how many golds score 1.0, what the others got, and how many score with another row's gold."""
    if name in RECIPES:
        write, files, kind = RECIPES[name]
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder))
            tasks = [task for file in files for task in tasks_from_rows(load_rows(f"{folder}/{file}.jsonl"))]
            options = {"database": f"{folder}/logic.mm"} if kind == "metamath" else {}
            return scored(tasks, {"name": kind, **options})
    kind, _, dataset = name.partition(":")
    size = ROWS_OF_SLOW.get(dataset, ROWS_PER_DATASET) if kind == "reasoning_gym" else None
    with warnings.catch_warnings(record=True) as left_out:
        warnings.simplefilter("always")
        try:
            suite = load_suite(name, size=size, seed=SEED)
        except ValueError as error:
            return {"refused": str(error)}
    row = scored(tasks_from_rows(suite.rows), suite.reward)
    return row | {"left_out": [str(warning.message) for warning in left_out]}


def scored(tasks: Sequence[Task], spec: Mapping[str, Any]) -> Row:
    """The figures of one set. A set that check_tasks refuses, as a stage would, says why."""
    column, form = GOLDS[spec["name"]]
    golds = [str(task.columns[column]) for task in tasks]
    started = time.perf_counter()
    reward = load_reward(spec)
    try:
        verdicts = reward.score(tasks, [completion(form.format(gold)) for gold in golds])
        others = [(task, other) for task, own, other in zip(tasks, golds, rotated(golds), strict=True) if own != other]
        crossed = reward.score([task for task, _ in others], [completion(form.format(other)) for _, other in others])
        bad = [(task, verdict) for task, verdict in zip(tasks, verdicts, strict=True) if verdict.score != 1.0]
        row: Row = {
            "reward": spec["name"],
            "rows": len(tasks),
            "score_one": len(tasks) - len(bad),
            "not_one": [f"{task.id}: {verdict.status}, {verdict.detail}"[:200] for task, verdict in bad[:5]],
            "other_golds": len(others),
            "other_golds_score_one": sum(verdict.score == 1.0 for verdict in crossed),
            "seconds": round(time.perf_counter() - started, 1),
        }
        if bad and isinstance(reward, ChecksTasks):
            try:
                reward.check_tasks([task for task, _ in bad])
            except ValueError as error:
                row["refused"] = str(error)
        return row
    finally:
        reward.close()


def rotated(golds: Sequence[str]) -> list[str]:
    return [*golds[1:], *golds[:1]]


def completion(text: str) -> Completion:
    return Completion(token_ids=(), sampling_logprobs=(), finish_reason="stop", text=text)


def read_results() -> dict[str, Row]:
    return json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}


def table(results: Mapping[str, Row]) -> str:
    """Markdown: the sets, reasoning-gym's datasets in one line, and every exception."""
    lines = [
        "| task set | reward | rows | gold scores 1.0 | another row's gold scores 1.0 |",
        "|---|---|---|---|---|",
    ]
    generated = {name: row for name, row in results.items() if name.startswith("reasoning_gym:")}
    accepted = {name: row for name, row in generated.items() if "refused" not in row}
    for name, row in results.items():
        if name not in generated:
            lines.append(_line(name, row["reward"], [row]))
    if accepted:
        lines.append(_line(f"reasoning_gym: {len(accepted)} datasets", "reasoning_gym", list(accepted.values())))
    refused = {name: row for name, row in results.items() if "refused" in row}
    if refused:
        lines += ["", "Refused before training:", "", "| task set | why |", "|---|---|"]
        lines += [f"| {name} | {row['refused'].replace('|', '/')} |" for name, row in refused.items()]
    if left_out := [(name, row["left_out"][0]) for name, row in accepted.items() if row["left_out"]]:
        lines += ["", "Left out of the suite when it is made:", "", "| task set | |", "|---|---|"]
        lines += [f"| {name} | {said.replace('|', '/')} |" for name, said in left_out]
    odd = [(name, row) for name, row in results.items() if "refused" not in row and row["score_one"] < row["rows"]]
    if odd:
        lines += ["", "Rows whose gold does not score 1.0:", ""]
        lines += [
            f"- {name}, {row['rows'] - row['score_one']} of {row['rows']}: {row['not_one'][0]}" for name, row in odd
        ]
    loose = [(name, row) for name, row in accepted.items() if row["other_golds_score_one"]]
    if loose:
        said = ", ".join(
            f"{name.partition(':')[2]} {row['other_golds_score_one']} of {row['other_golds']}" for name, row in loose
        )
        lines += ["", f"Datasets of reasoning-gym in which another row's gold is sometimes right too: {said}."]
    return "\n".join(lines) + "\n"


def _line(name: str, reward: str, rows: Sequence[Row]) -> str:
    count, one, others, crossed = (
        sum(row[key] for row in rows) for key in ("rows", "score_one", "other_golds", "other_golds_score_one")
    )
    return f"| {name} | {reward} | {count} | {one} | {crossed} of {others} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list")
    of_measure = commands.add_parser("measure")
    of_measure.add_argument("sets", nargs="*", metavar="SET")
    of_measure.add_argument("--again", action="store_true", help="also those that are measured already")
    commands.add_parser("table")
    options = parser.parse_args()
    names = set_names()
    if options.command == "list":
        print("\n".join(names))
        return 0
    results = read_results()
    if options.command == "measure":
        if unknown := [name for name in options.sets if name not in names]:
            parser.error(f"no set {unknown[0]!r}: `list` names them")
        for name in options.sets or names:
            if name in results and not options.again:
                continue
            row = measure(name) | {"about": origin() | {"command": f"python -m benchmarks.gold measure {name}"}}
            print(name, {key: value for key, value in row.items() if key != "about"}, flush=True)
            results[name] = row
            ordered = {each: results[each] for each in names if each in results}
            RESULTS.write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")
    else:
        path = RESULTS.with_suffix(".md")
        about = next(iter(results.values()))["about"] | {"command": "python -m benchmarks.gold measure"}
        notes = path.read_text(encoding="utf-8").partition("\n## ")[1:] if path.is_file() else ()
        path.write_text(f"{heading(about)}\n\n{table(results)}" + "".join(notes), encoding="utf-8")
        print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
