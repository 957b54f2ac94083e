"""`make demo`: raw text -> pre-training -> SFT -> GRPO, PPO or DPO -> frozen model, and GRPO on a real pre-trained one.

The rewards are a verifier's, or come from rankings: of a synthetic judge here, of people with `strop rank`.

Run it again after Ctrl-C, a crash or a power cut: it continues where it stopped. Everything is in RUNS_DIR; delete its
demo-* folders to start over.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

# The repository's own root, from which all paths in the recipes count.
sys.path.insert(0, str(Path(__file__).parents[2]))

import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from recipes.demo.data import write_demo_data
from recipes.demo.measure import measure
from recipes.demo.preferences import FILES, write_rankings
from strop.cli import pipeline
from strop.cli.config import build, merge_tables, read_toml, read_values, to_toml
from strop.cli.pipeline import Entry, Plan, read_plans
from strop.models.smollm2 import get_smollm2
from strop.native.malloc import restart_for_large_blocks
from strop.runs import RunFolder, read_lines
from strop.runs.report import HeldOut, clock, estimate_text, training_seconds, write_report

RECIPES = Path("recipes/demo")
DATA = "runs/demo-data"
"""Where the recipes look for the data; with another --runs-dir they are told otherwise."""

SMOLLM2 = Path("models/smollm2")

PIPELINES = {"scratch": ("scratch", "preferences"), "smollm2": ("smollm2",)}
"""Part -> its pipelines, in order. Between the first and the second the answers to rank are sampled and ranked."""
JUDGED = "demo-sft"
"""The run whose answers are ranked."""
SHARED_STAGES = ("pretrain", "sft")
"""The control has them in common with the demo."""

QUESTIONS = {"scratch": "What is 3 + 8 + 5?", "smollm2": "What is 3 + 4? Answer with just the number."}

EXPECTED_FAILURES = (ValueError, OSError, RuntimeError, ImportError, FloatingPointError)
"""What the stages raise with a message for people."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Both parts of the demo. Run it again to continue where it stopped."""

    parts: Literal["all", "scratch", "smollm2"] = "all"
    """scratch: a small model from raw text on. smollm2: a real one, which is downloaded once (96 MB)."""
    seed: int = 0
    """Seed of every stage; other than 0 it becomes part of the runs' names. The data and its held-out part stay."""
    runs_dir: Path = Path("runs")
    """Folder of all runs."""
    shuffled_rewards: tyro.conf.FlagCreatePairsOff[bool] = False
    """The control: GRPO and PPO on tasks whose answers were dealt out at random, and rankings turned upside down."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """One row of the table at the end."""

    part: str
    run: str
    stage: str
    reward: str
    """What it learned from, where that is a reward: "math" or "reward model"."""
    held_out: HeldOut
    seconds: float


def main(args: Sequence[str]) -> int:
    arguments = tyro.cli(Arguments, args=args, prog="recipes/demo/run.py")
    started = time.monotonic()
    if not RECIPES.is_dir():
        print(f"there is no {RECIPES} here: run this from the root of the repository", file=sys.stderr)
        return 2
    try:
        write_demo_data(arguments.runs_dir / Path(DATA).name)
        results, failures = run_parts(arguments)
    except ValueError as error:
        print(f"the demo's data cannot be written: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nStopped. The same command continues here.")
        return 130
    show(results, failures, arguments, time.monotonic() - started)
    return 1 if failures else 0


def run_parts(arguments: Arguments) -> tuple[list[Result], dict[str, Exception]]:
    """What was measured, and what stopped a part. A part that fails leaves the other, and its own finished stages."""
    results: list[Result] = []
    failures: dict[str, Exception] = {}
    for part in PIPELINES:
        if arguments.parts not in (part, "all"):
            continue
        try:
            recipes = write_pipelines(part, arguments)
            try:
                run_part(part, recipes, arguments)
            except EXPECTED_FAILURES as error:
                failures[part] = error
            plans = [plan for recipe in recipes for plan in read_plans(recipe, arguments.runs_dir)]
            results += measure_part(part, plans, arguments.runs_dir)
        except EXPECTED_FAILURES as error:
            failures.setdefault(part, error)
        if part in failures and os.environ.get("STROP_DEBUG") == "1":
            raise failures[part]
    return results, failures


def run_part(part: str, recipes: Sequence[Path], arguments: Arguments) -> None:
    """The part's pipelines; before those that learn from rankings, the rankings."""
    if part == "smollm2" and not SMOLLM2.exists():
        print(f"Fetching SmolLM2-135M-Instruct (96 MB) into {SMOLLM2}", flush=True)
        get_smollm2(SMOLLM2)
    for number, recipe in enumerate(recipes):
        if number:
            print(f"Ranking answers of {JUDGED}{_suffix(arguments, is_control=False)} by a synthetic judge", flush=True)
            write_rankings(
                JUDGED + _suffix(arguments, is_control=False),
                arguments.runs_dir / Path(DATA).name,
                arguments.runs_dir,
                seed=arguments.seed,
                suffix=_suffix(arguments, is_control=arguments.shuffled_rewards),
                is_upside_down=arguments.shuffled_rewards,
            )
        pipeline.run("pipeline", [str(recipe), "--runs-dir", str(arguments.runs_dir)])


def write_pipelines(part: str, arguments: Arguments) -> list[Path]:
    """The part's pipeline recipes with this call's names, seed and folder, for `strop pipeline`; beside the data."""
    folder = arguments.runs_dir / Path(DATA).name
    entries: dict[str, list[Entry]] = {}
    for name in PIPELINES[part]:
        recipe = RECIPES / f"{name}.toml"
        tables = read_toml(recipe)["stage"]
        entries[name] = [build(Entry, read_values(table, Entry, str(recipe)), str(recipe)) for table in tables]
    own_names = {
        entry.name: entry.name + _suffix(arguments, is_control=_is_control(entry, arguments))
        for own in entries.values()
        for entry in own
    }
    ranking_suffix = _suffix(arguments, is_control=arguments.shuffled_rewards)
    rankings = {f"{DATA}/{name}.jsonl": f"{folder}/{name}{ranking_suffix}.jsonl" for name in FILES.values()}
    paths: list[Path] = []
    for name, own in entries.items():
        tables = ["[[stage]]\n" + to_toml(_own_entry(entry, arguments, own_names | rankings)) for entry in own]
        path = folder / f"{name}{_suffix(arguments, is_control=arguments.shuffled_rewards)}.toml"
        path.write_text("\n".join(tables), encoding="utf-8")
        paths.append(path)
    return paths


def _own_entry(entry: Entry, arguments: Arguments, renamed: Mapping[str, str]) -> Entry:
    """The entry with what this call changes as overrides; `renamed` are runs and files."""
    settings = read_toml(Path(entry.recipe))
    merged = merge_tables(settings, entry.overrides)
    if _is_control(entry, arguments) and "tasks" in merged:
        merged["tasks"] = merged["tasks"].removesuffix(".jsonl") + "_shuffled.jsonl"
    own: dict[str, Any] = _moved(merged, renamed, str(arguments.runs_dir / Path(DATA).name))
    if arguments.seed:
        own["seed"] = arguments.seed
    # Where a stage starts is the entry's business.
    overrides = {key: value for key, value in own.items() if value != settings.get(key) and key != "from"}
    init_from = None if entry.init_from is None else renamed.get(entry.init_from, entry.init_from)
    return dataclasses.replace(entry, name=renamed[entry.name], init_from=init_from, overrides=overrides)


def _is_control(entry: Entry, arguments: Arguments) -> bool:
    return arguments.shuffled_rewards and entry.stage not in SHARED_STAGES


def _moved(value: Any, renamed: Mapping[str, str], folder: str) -> Any:
    """A recipe's settings with other names of runs and files, and the data's folder in place of DATA."""
    if isinstance(value, dict):
        return {key: _moved(item, renamed, folder) for key, item in value.items()}
    if isinstance(value, list):
        return [_moved(item, renamed, folder) for item in value]
    if not isinstance(value, str):
        return value
    is_path = value not in renamed and value.startswith(f"{DATA}/")
    return folder + value.removeprefix(DATA) if is_path else renamed.get(value, value)


def _suffix(arguments: Arguments, *, is_control: bool) -> str:
    return (f"-seed{arguments.seed}" if arguments.seed else "") + ("-shuffled" if is_control else "")


def measure_part(part: str, plans: Sequence[Plan], runs_dir: Path) -> list[Result]:
    """A row for every finished stage."""
    judge = next(plan.config for plan in plans if plan.entry.stage == "grpo")
    results: list[Result] = []
    for plan in plans:
        if plan.state != "finished":
            break
        print(f"Measuring {plan.entry.name} on held-out data", flush=True)
        held_out = measure(plan, judge, runs_dir)
        seconds = training_seconds(list(read_lines(runs_dir / plan.entry.name / "metrics.jsonl")))
        results.append(
            Result(
                part=part,
                run=plan.entry.name,
                stage=plan.entry.stage,
                reward=reward_text(plan),
                held_out=held_out,
                seconds=seconds,
            )
        )
    return results


def reward_text(plan: Plan) -> str:
    """What decides the reward of a stage that acts: the verifier's name, or that it is a reward model."""
    if plan.entry.stage not in ("grpo", "ppo"):
        return ""
    names = [
        "reward model" if reward.name == "model" else reward.name for reward in plan.config.rewards if reward.weight
    ]
    return " + ".join(names)


def show(results: Sequence[Result], failures: dict[str, Exception], arguments: Arguments, seconds: float) -> None:
    """The table, the report, and what to do next."""
    console = Console()
    runs_dir = arguments.runs_dir
    suffix = _suffix(arguments, is_control=arguments.shuffled_rewards)
    name = f"demo{'' if arguments.parts == 'all' else f'-{arguments.parts}'}{suffix}"
    if results:
        table = Table("stage", "held-out metric", box=box.SIMPLE_HEAD, pad_edge=False, title="Strop demo")
        table.columns[0].overflow = "fold"  # a narrow terminal must not hide which stage it was
        for column in ("before", "after", "time"):
            table.add_column(column, no_wrap=True)
        for result in results:
            metric = result.held_out.metric
            before, after = (
                estimate_text(estimate, metric) for estimate in (result.held_out.before, result.held_out.after)
            )
            told = (result.stage, result.reward, "" if result.part == "scratch" else result.part)
            stage = ", ".join(filter(None, told))
            figure = f"{metric.replace('_', ' ')} on {result.held_out.note}"
            table.add_row(stage, figure, before, after, clock(result.seconds))
        console.print(table)
        console.print(
            "In brackets: 95 % interval. Held-out data is never trained on. Time: of training alone.", highlight=False
        )
        rows = [dataclasses.asdict(result) for result in results]
        (runs_dir / f"{name}-results.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
        report = write_report(
            [RunFolder.open(runs_dir, result.run) for result in results],
            runs_dir / f"{name}-report.html",
            title="Strop demo" + suffix.replace("-", ", "),
            held_out={result.run: result.held_out for result in results},
        )
        print(f"\nThis call took {clock(seconds)}. Curves and samples: {report}")
        print("Talk to the result:")
        ready = [result for result in results if result.stage != "reward-model"]
        chosen = {result.part: result.run for result in ready}
        chosen |= {result.part: result.run for result in ready if result.stage == "grpo"}
        folder = "" if runs_dir == Path("runs") else f" --runs-dir {runs_dir}"
        strop = os.path.relpath(Path(sys.executable).with_name("strop"))
        for part, run in chosen.items():
            print(f"  {'strop' if strop.startswith('..') else strop} chat {run}{folder}    (ask: {QUESTIONS[part]})")
    for part, error in failures.items():
        print(
            f"\nThe {part} part stopped: {error}\nWhat is finished is kept in {runs_dir}. Once that is put right, run "
            f"the same command again: it continues there.",
            file=sys.stderr,
        )


if __name__ == "__main__":
    restart_for_large_blocks()
    sys.exit(main(sys.argv[1:]))
