"""Files of the code recipe: arithmetic in words, to be written as a Python function, and tests that judge it.

    python recipes/code/data.py        writes runs/code-data

"# add 3, then times 2" wants "return (x + 3) * 2": the steps are applied one after the other, so that an answer needs
the right operators, the right numbers, and brackets in the right place. No task is in two files.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

OUTPUT = Path("runs/code-data")

SIZES = {"sft": 2000, "tasks": 400, "held_out": 120}
WRONG_EXAMPLES = 0.5
"""Share of the SFT's programs with a slip, so that the policy is right now and then."""
PROGRAMS_IN_TEXT = 6_000
"""Programs of the pre-training text, without a word of what they are to do."""
ARGUMENTS = (-7, -1, 0, 2, 5, 13)

Step = tuple[str, Callable[[str, bool], tuple[str, bool]], Callable[[int], int]]
"""In words; (expression so far, whether it is a sum) -> the same after the step; what the step does to a number."""


def product(sign: str, number: str) -> Callable[[str, bool], tuple[str, bool]]:
    return lambda so_far, is_sum: (f"{f'({so_far})' if is_sum else so_far} {sign} {number}", False)


def draw_step(rng: random.Random) -> Step:
    n = rng.randrange(2, 10)
    return rng.choice(
        [
            (f"add {n}", lambda so_far, _: (f"{so_far} + {n}", True), lambda value: value + n),
            (f"take away {n}", lambda so_far, _: (f"{so_far} - {n}", True), lambda value: value - n),
            (f"times {n}", product("*", str(n)), lambda value: value * n),
            (f"remainder by {n}", product("%", str(n)), lambda value: value % n),
            ("without sign", lambda so_far, _: (f"abs({so_far})", False), abs),
            ("doubled", product("*", "2"), lambda value: 2 * value),
        ]
    )


def draw_task(rng: random.Random) -> dict[str, Any]:
    """A task with two or three steps, its own solution, and tests made by computing, not by that solution.

    Example: {"prompt": "# add 3, then times 2\\ndef f(x):\\n    return", "solution": " (x + 3) * 2", ...}
    """
    steps = [draw_step(rng) for _ in range(rng.choice([2, 2, 3]))]
    expression, is_sum = "x", False
    for _, write, _ in steps:
        expression, is_sum = write(expression, is_sum)
    tests: list[str] = []
    for argument in ARGUMENTS:
        value = argument
        for _, _, compute in steps:
            value = compute(value)
        tests.append(f"assert candidate({argument}) == {value}")
    words = ", then ".join(step[0] for step in steps)
    prompt = f"# {words}\ndef f(x):\n    return"
    return {"prompt": prompt, "entry_point": "f", "tests": tests, "solution": f" {expression}"}


def slip(expression: str, rng: random.Random) -> str:
    """A number or an operator changed, or the brackets of a product left out: most likely wrong."""
    kinds = [place for place, sign in enumerate(expression) if sign in "23456789+-*%"]
    if "(x" in expression and rng.random() < 0.3:
        return expression.replace("(x", "x", 1).replace(")", "", 1)
    place = rng.choice(kinds) if kinds else 0
    signs = "+-*%" if expression[place] in "+-*%" else "23456789"
    return expression[:place] + rng.choice(signs) + expression[place + 1 :]


def write_code_data(folder: Path, *, seed: int = 0) -> None:
    """programs.txt (pre-training), sft.jsonl, tasks.jsonl (RL), tasks_shuffled.jsonl (the control, where each task has
    another one's tests), held_out.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    programs = [f"def f(x):\n    return{draw_task(rng)['solution']}" for _ in range(PROGRAMS_IN_TEXT)]
    documents = ["\n".join(programs[start : start + 6]) for start in range(0, len(programs), 6)]
    (folder / "programs.txt").write_text("\n<|endoftext|>\n".join(documents) + "\n", encoding="utf-8")
    tasks: dict[str, dict[str, Any]] = {}
    while len(tasks) < sum(SIZES.values()):
        task = draw_task(rng)
        tasks.setdefault(task["prompt"], task)
    rows, start = list(tasks.values()), 0
    rng.shuffle(rows)  # the tasks of two steps run out of new ones first
    for name, size in SIZES.items():
        chosen = rows[start : start + size]
        start += size
        if name == "sft":
            chosen = [example(row, rng) for row in chosen]
        write_rows(folder / f"{name}.jsonl", chosen)
        if name == "tasks":
            tests = [row["tests"] for row in chosen]
            rng.shuffle(tests)
            write_rows(
                folder / "tasks_shuffled.jsonl",
                [{**row, "tests": other} for row, other in zip(chosen, tests, strict=True)],
            )


def example(row: dict[str, Any], rng: random.Random) -> dict[str, str]:
    """A task with its program, in WRONG_EXAMPLES of them with a slip."""
    expression = row["solution"].strip()
    if rng.random() < WRONG_EXAMPLES:
        expression = slip(expression, rng)
    return {"prompt": row["prompt"], "completion": f" {expression}"}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    write_code_data(OUTPUT)
    print(f"{OUTPUT}: {', '.join(f'{size} {name}' for name, size in SIZES.items())}")
