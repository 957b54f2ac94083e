"""Which run came from which: the data behind `strop runs list | show | tree`, and how each is drawn."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from strop.runs.checkpoints import list_steps
from strop.runs.files import is_locked
from strop.runs.folder import RunFolder
from strop.runs.metrics import read_lines


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary:
    """One row of `strop runs list`.

    Example: RunSummary(name="grpo", stage="grpo", status="finished", created="2026-01-31T09:00:00+00:00", parent="sft",
    parent_step=120, last_step=200, checkpoint_steps=(100, 200))
    """

    name: str
    stage: str
    status: str
    """As in run.json, but "killed" for a running one without a living writer, and "damaged" for a folder whose
    run.json or metrics.jsonl cannot be read."""
    created: str
    """ISO 8601, UTC."""
    parent: str | None
    """A run's name, or the folder of a model that no run made."""
    parent_step: int | None
    last_step: int | None
    """Of the last line of metrics.jsonl."""
    checkpoint_steps: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunNode:
    """A run and the runs that were started from it."""

    run: RunSummary
    children: tuple[RunNode, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunDetails:
    """All that `strop runs show` prints."""

    summary: RunSummary
    info: dict[str, Any]
    """The content of run.json."""
    last_metrics: dict[str, Any] | None


def list_runs(runs_dir: str | Path) -> list[RunSummary]:
    """Every run, the oldest first. A damaged folder is listed as such and hides no other."""
    runs = [_summary(path.parent) for path in Path(runs_dir).glob("*/run.json")]
    return sorted(runs, key=lambda run: (run.created, run.name))


def tree(runs_dir: str | Path) -> list[RunNode]:
    """The runs as a forest. A run whose parent is not here, or is younger than it (another run that took over a
    deleted one's name), is a root."""
    runs = list_runs(runs_dir)
    older = {run.name: run for run in runs}
    children: dict[str | None, list[RunSummary]] = {}
    for run in runs:
        parent = older.get(run.parent) if run.parent else None
        is_child = parent is not None and (parent.created, parent.name) < (run.created, run.name)
        children.setdefault(run.parent if is_child else None, []).append(run)

    def node(run: RunSummary) -> RunNode:
        return RunNode(run=run, children=tuple(map(node, children.get(run.name, []))))

    return [node(run) for run in children.get(None, [])]


def show(runs_dir: str | Path, name: str) -> RunDetails:
    """One run. ValueError when there is none of that name or its run.json or metrics.jsonl is damaged."""
    run = RunFolder.open(runs_dir, name)
    return RunDetails(summary=_summary(run.path), info=run.info, last_metrics=_last_line(run.path))


def render_list(runs: Iterable[RunSummary]) -> Table:
    """For rich's console."""
    table = Table("run", "stage", "from", "status", "step", "checkpoints", "created (UTC)", box=None, pad_edge=False)
    for run in runs:
        steps = ", ".join(map(str, run.checkpoint_steps))
        created = run.created[:16].replace("T", " ")
        table.add_row(run.name, run.stage, _origin(run), run.status, _number(run.last_step), steps, created)
    return table


def render_tree(nodes: Sequence[RunNode]) -> Group:
    """For rich's console: one tree per root."""
    return Group(*(_branch(node, None) for node in nodes))


def render_run(details: RunDetails) -> Group:
    """For rich's console: summary, origin, configuration, last metrics."""
    run, info = details.summary, details.info
    facts = {
        "run": f"{run.name} ({run.stage}, {run.status})",
        "from": _origin(run) or "nothing",
        "created": run.created,
        "checkpoints": ", ".join(map(str, run.checkpoint_steps)) or "none",
        "seed": info["seed"],
        "git": "none" if info["git"] is None else info["git"]["revision"] + (" + diff" if info["git"]["diff"] else ""),
        "versions": ", ".join(f"{name} {version}" for name, version in info["versions"].items()),
        "machine": ", ".join(f"{key} {_cell(value)}" for key, value in info["machine"].items() if value != []),
    }
    if "error" in info:
        facts["error"] = info["error"]
    tables = {"": facts, "config": info["config"], "data (SHA-256)": info["data_hashes"]}
    tables["last metrics"] = details.last_metrics or {}
    parts: list[RenderableType] = []
    for title, rows in tables.items():
        if rows:
            parts += [Text(f"\n{title}", style="bold"), _table(rows)] if title else [_table(rows)]
    return Group(*parts)


def _summary(path: Path) -> RunSummary:
    try:
        info = RunFolder(path).info
        last = _last_line(path)
        parent = info["parent"] or {}
        status = info["status"]
        return RunSummary(
            name=path.name,
            stage=info["stage"],
            status="killed" if status == "running" and not is_locked(path / ".lock") else status,
            created=info["created"],
            parent=parent.get("run") or parent.get("folder"),
            parent_step=parent.get("step"),
            last_step=last["step"] if last else None,
            checkpoint_steps=tuple(list_steps(path / "checkpoints")),
        )
    except (ValueError, KeyError):
        return RunSummary(
            name=path.name,
            stage="?",
            status="damaged",
            created="",
            parent=None,
            parent_step=None,
            last_step=None,
            checkpoint_steps=tuple(list_steps(path / "checkpoints")),
        )


def _last_line(path: Path) -> dict[str, Any] | None:
    last = None
    for line in read_lines(path / "metrics.jsonl"):
        last = line
    return last


def _branch(node: RunNode, parent: str | None) -> Tree:
    run = node.run
    label = Text(run.name, style="bold")
    label.append(f"  {run.stage}, {run.status}, step {_number(run.last_step)}", style="dim")
    if parent is not None:
        label.append(f", from step {_number(run.parent_step)}", style="dim")
    elif run.parent is not None:
        label.append(f", from {_origin(run)}, not in this folder", style="dim")
    drawn = Tree(label)
    for child in node.children:
        drawn.children.append(_branch(child, run.name))
    return drawn


def _origin(run: RunSummary) -> str:
    if run.parent is None:
        return ""
    return run.parent if run.parent_step is None else f"{run.parent}/{run.parent_step}"


def _number(value: int | None) -> str:
    return "-" if value is None else str(value)


def _table(rows: dict[str, Any]) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    for key, value in rows.items():
        table.add_row(Text(key, style="dim"), Text(_cell(value)))
    return table


def _cell(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
