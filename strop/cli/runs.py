"""`strop runs list | show RUN | tree | report RUN ...`: what was trained, how it went, and from what."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

PIPE_WIDTH = 200
"""Columns where there is no terminal: a table cut to 80 columns would lose names that a script looks for."""


@dataclass(frozen=True, kw_only=True)
class List:
    """Every run with its stage, parent, status, step and checkpoints."""

    runs_dir: Path = Path("runs")
    """Folder of all runs."""


@dataclass(frozen=True, kw_only=True)
class Show:
    """One run: origin, config, data, last metrics."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """Name of the run."""
    runs_dir: Path = Path("runs")
    """Folder of all runs."""


@dataclass(frozen=True, kw_only=True)
class Tree:
    """Which run started from which."""

    runs_dir: Path = Path("runs")
    """Folder of all runs."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """One HTML file about one run or a row of them: held-out figures, curves, samples, configuration."""

    runs: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="RUN [RUN ...]")]
    """Names of the runs, in the order of the page."""
    output: Path | None = None
    """The file; report.html in the last run's folder unless given."""
    runs_dir: Path = Path("runs")
    """Folder of all runs."""


def run(command: str, args: Sequence[str]) -> int:
    arguments = tyro.extras.subcommand_cli_from_dict(
        {"list": List, "show": Show, "tree": Tree, "report": Report}, args=list(args), prog=f"strop {command}"
    )
    if isinstance(arguments, Report):
        return report(arguments)
    from rich.console import Console

    from strop.runs import list_runs, render_list, render_run, render_tree, show, tree

    if isinstance(arguments, Show):
        drawn = render_run(show(arguments.runs_dir, arguments.run))
    else:
        runs = list_runs(arguments.runs_dir)
        if not runs:
            print(f"no runs in {arguments.runs_dir}")
            return 0
        drawn = render_list(runs) if isinstance(arguments, List) else render_tree(tree(arguments.runs_dir))
    Console(width=None if sys.stdout.isatty() else PIPE_WIDTH).print(drawn)
    return 0


def report(arguments: Report) -> int:
    from strop.runs import RunFolder
    from strop.runs.report import write_report

    if not arguments.runs:
        raise ValueError("name at least one run: strop runs report RUN [RUN ...]; strop runs list shows them")
    runs = [RunFolder.open(arguments.runs_dir, name) for name in arguments.runs]
    print(write_report(runs, arguments.output or runs[-1].path / "report.html"))
    return 0
