"""`strop pipeline RECIPE.toml`: stages in a row. Run again, it skips what is finished and resumes what is not.

[[stage]]
stage = "sft"                       # the command
recipe = "recipes/demo/sft.toml"
name = "demo-sft"                   # the run
from = "previous"                   # the run before; or RUN[/STEP], or a folder
overrides = { num_steps = 200 }     # over the recipe
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from strop.cli.config import build, did_you_mean, merge_tables, read_toml, read_values, to_toml
from strop.cli.stages import STAGES, load_stage

PREVIOUS = "previous"


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Stages in a row, each a run of its own. Run it again to continue where it stopped."""

    recipe: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RECIPE.toml")]
    """A TOML file with one [[stage]] table per stage: stage, recipe, name, from, overrides."""
    runs_dir: Path = Path("runs")
    """Folder of all runs."""
    print_config: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print the resolved recipe of every stage and stop."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One [[stage]] table."""

    stage: str
    recipe: str
    name: str
    init_from: str | None = None
    overrides: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A stage that can be started: its entry, its checked Config, and what is already there."""

    entry: Entry
    config: Any
    state: Literal["missing", "unfinished", "finished"]


def run(command: str, args: Sequence[str]) -> int:
    arguments = tyro.cli(Arguments, args=list(args), prog=f"strop {command}")
    plans = read_plans(arguments.recipe, arguments.runs_dir)
    if arguments.print_config:
        print("\n".join(f"# strop {plan.entry.stage}, run {plan.entry.name}\n{to_toml(plan.config)}" for plan in plans))
        return 0
    for number, plan in enumerate(plans, start=1):
        name = plan.entry.name
        title = f"[{number}/{len(plans)}] {plan.entry.stage} {name}"
        if plan.state == "finished":
            print(f"{title}: finished before")
            continue
        print(f"{title}: {'resumed' if plan.state == 'unfinished' else 'started'}", flush=True)
        stage = load_stage(plan.entry.stage)
        try:
            stage.train(plan.config, name=name, runs_dir=arguments.runs_dir, resume=plan.state == "unfinished")
        except SystemExit:
            print(f"{title}: stopped; the same command continues here")
            raise
    return 0


def read_plans(recipe: Path, runs_dir: Path) -> list[Plan]:
    """Every stage of a pipeline recipe, checked before the first one starts."""
    table = read_toml(recipe)
    if set(table) != {"stage"} or not isinstance(table["stage"], list):
        raise ValueError(f"{recipe}: a pipeline is a list of [[stage]] tables and nothing else")
    plans: list[Plan] = []
    for number, entry_table in enumerate(table["stage"], start=1):
        where = f"{recipe} [[stage]] {number}"
        entry = build(Entry, read_values(entry_table, Entry, where), where)
        if entry.stage not in STAGES:
            raise ValueError(f"{where}: no stage '{entry.stage}'{did_you_mean(entry.stage, STAGES)}")
        if entry.name in {plan.entry.name for plan in plans}:
            raise ValueError(f"{where}: an earlier stage is also named '{entry.name}'")
        config = _resolve_config(entry, plans, where)
        plans.append(Plan(entry=entry, config=config, state=run_state(runs_dir / entry.name)))
        _check_state(plans, runs_dir, where)
    return plans


def run_state(folder: Path) -> Literal["missing", "unfinished", "finished"]:
    if not (folder / "run.json").is_file():
        return "missing"
    return "finished" if _read_run(folder)["status"] == "finished" else "unfinished"


def _resolve_config(entry: Entry, earlier: Sequence[Plan], where: str) -> Any:
    settings = merge_tables(read_toml(Path(entry.recipe)), entry.overrides)
    if entry.init_from == PREVIOUS:
        if not earlier:
            raise ValueError(f"{where}: from = '{PREVIOUS}', but no stage comes before it")
        settings["from"] = earlier[-1].entry.name
    elif entry.init_from is not None:
        settings["from"] = entry.init_from
    config_class = load_stage(entry.stage).Config
    inner = f"{entry.recipe} (for {where})"
    return build(config_class, read_values(settings, config_class, inner), inner)


def _check_state(plans: Sequence[Plan], runs_dir: Path, where: str) -> None:
    """Refuse to take a run for this pipeline's when it was made by other settings or from other weights."""
    plan = plans[-1]
    if plan.state == "missing":
        return
    remedy = f"delete {runs_dir / plan.entry.name} or choose another name"
    from strop.runs.origin import recordable

    recorded, wanted = _read_run(runs_dir / plan.entry.name)["config"], recordable(plan.config)
    different = sorted(key for key in recorded.keys() | wanted.keys() if recorded.get(key) != wanted.get(key))
    if different:
        raise ValueError(f"{where}: run '{plan.entry.name}' exists with another {', '.join(different)}; {remedy}")
    if plan.entry.init_from == PREVIOUS and plans[-2].state != "finished":
        raise ValueError(
            f"{where}: run '{plan.entry.name}' exists, but '{plans[-2].entry.name}' before it is not finished, so it "
            f"started from other weights; {remedy}"
        )


def _read_run(folder: Path) -> dict[str, Any]:
    path = folder / "run.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
