"""`strop tasks`: a suite's tasks written to a file, for a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from strop.cli.evaluate import write_json_lines


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Tasks of a suite as JSONL, for the tasks and eval.tasks of a recipe; the reward to go with them is printed."""

    suite: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="KIND:WHAT")]
    """metamath:ql, metamath:set@wal (what stands before wal), reasoning_gym:chain_sum, math:FILE.jsonl ..."""
    output: Path
    """The JSONL file to write."""
    num_tasks: int | None = None
    """So many tasks: the first ones, or of a generator so many (100)."""
    seed: int = 0
    """Decides the tasks of a generator."""
    held_out: Path | None = None
    """A second JSONL file, for every K-th task instead."""
    held_out_every: int = 5
    """K."""


def run(command: str, args: Sequence[str]) -> int:
    arguments = tyro.cli(Arguments, args=list(args), prog=f"strop {command}")
    from strop.evals.suites import load_suite

    if arguments.held_out_every < 2:
        raise ValueError(f"--held-out-every {arguments.held_out_every} must be at least 2")
    suite = load_suite(arguments.suite, size=arguments.num_tasks, seed=arguments.seed)
    rows = [suite.rows[index] for index in range(len(suite.rows))]
    files = {arguments.output: rows}
    if arguments.held_out is not None:
        every = arguments.held_out_every
        if len(rows) < every:
            raise ValueError(f"{len(rows)} tasks are too few to hold every {every}-th of them out")
        files = {
            arguments.output: [row for index, row in enumerate(rows) if index % every != every - 1],
            arguments.held_out: rows[every - 1 :: every],
        }
    for path, chosen in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json_lines(path, chosen)
        print(f"{path}: {len(chosen)} tasks")
    print(suite.recipe_line())
    return 0
