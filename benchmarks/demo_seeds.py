"""GRPO's gain on the demo's tasks over several seeds, and its control: the same run with shuffled answers.

    python -m benchmarks.demo_seeds --save demo_seeds            after `make demo`, whose SFT checkpoint it starts from

Every run starts from the same checkpoint; the seed decides prompts, samples and minibatches. Held-out pass@1 is
measured on frozen weights with several answers per task, before and after. A control's reward compares with the answers
of other tasks: what it gains, the reward's content had no part in.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from benchmarks.__main__ import ROOT, heading, origin
from strop.cli.config import build, read_toml, read_values
from strop.data import load_rows, tasks_from_rows
from strop.evals.tasks import evaluate_tasks
from strop.generation import Engine
from strop.models import load_model
from strop.native import products
from strop.rewards.load import load_rewards
from strop.runs import RunFolder, resolve
from strop.stages import grpo
from strop.tokenizer import Tokenizer

RECIPES = {"scratch": "recipes/demo/grpo.toml", "smollm2": "recipes/demo/smollm2_grpo.toml"}
ANSWERS = 1400
"""Answers per measurement: several per task, so that the interval shows the tasks' spread and little sampling noise."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--dtype", default="auto", help="what the runs compute in; measured is in the dtype on disk")
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"))
    parser.add_argument("--save", metavar="NAME", help="write benchmarks/results/NAME.json and NAME.md")
    options = parser.parse_args()
    rows = []
    for part in options.parts:
        recipe = RECIPES[part]
        config = build(grpo.Config, read_values(read_toml(Path(recipe)), grpo.Config, recipe), recipe)
        before = measure(config.init_from, config, options.runs_dir)
        for is_control in (False, True):
            for seed in options.seeds:
                tasks = config.tasks.replace(".jsonl", "_shuffled.jsonl") if is_control else config.tasks
                name = f"seeds-{part}-{options.dtype}-{seed}" + ("-shuffled" if is_control else "")
                chosen = dataclasses.replace(config, seed=seed, tasks=tasks, dtype=options.dtype)
                if not is_finished(options.runs_dir, name):
                    resume = (options.runs_dir / name / "run.json").is_file()
                    grpo.train(chosen, name=name, runs_dir=options.runs_dir, resume=resume)
                after = measure(name, config, options.runs_dir)
                rows.append({"part": part, "seed": seed, "is_control": is_control, "before": before, "after": after})
                print(render(rows[-1:]).splitlines()[-1], flush=True)
    table = render(rows)
    print(table)
    if options.save:
        save(options.save, rows, table)
    return 0


def is_finished(runs_dir: Path, name: str) -> bool:
    return (runs_dir / name / "run.json").is_file() and RunFolder.open(runs_dir, name).info["status"] == "finished"


def measure(reference: str, config: grpo.Config, runs_dir: Path) -> list[float]:
    """[pass@1, low, high] on the recipe's held-out tasks, in the dtype on disk, whatever the runs compute in."""
    folder = resolve(reference, runs_dir).path
    model, tokenizer = load_model(folder, frozen=True), Tokenizer.load(folder)
    tasks = tasks_from_rows(load_rows(config.eval.tasks))
    with products.int8(False), load_rewards(config.rewards) as reward:
        report = evaluate_tasks(
            Engine(model, tokenizer, num_slots=config.num_slots),
            tokenizer,
            tasks,
            reward.first,
            sampling=config.sampling.params(tokenizer),
            num_samples=max(1, min(8, ANSWERS // len(tasks))),
            seed=2026,
        )
    return [report.metrics[name] for name in ("pass@1", "pass@1_low", "pass@1_high")]


def render(rows: list[dict]) -> str:
    lines = ["| part | rewards | seed | pass@1 before | after |", "|---|---|---|---|---|"]
    for row in rows:
        before, after = (f"{value:.3f} [{low:.3f}, {high:.3f}]" for value, low, high in (row["before"], row["after"]))
        rewards = "shuffled" if row["is_control"] else "true"
        lines.append(f"| {row['part']} | {rewards} | {row['seed']} | {before} | {after} |")
    return "\n".join(lines)


def save(name: str, rows: list[dict], table: str) -> None:
    about = origin() | {"command": " ".join(["python -m benchmarks.demo_seeds", *sys.argv[1:]])}
    folder = ROOT / "benchmarks" / "results"
    (folder / f"{name}.json").write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n", encoding="utf-8")
    text = f"{heading(about)}\n\n{table}\n"
    (folder / f"{name}.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
