"""Do GRPO and PPO learn from verifiers, and only from them? One code task and one proof task, each with controls.

    python -m benchmarks.verifier_learning start code            data, pre-training and SFT of recipes/code
    python -m benchmarks.verifier_learning run code grpo right 0
    python -m benchmarks.verifier_learning run code grpo shuffled 0
    python -m benchmarks.verifier_learning table                 results/verifier_learning.md and .csv of what has run

A run is one to four minutes on one thread; a finished one is not repeated. The table keeps the rows of earlier runs
that are not in runs/ any more: the same commands make them again. The control differs in nothing but the tasks: each is
judged by another one's tests, or another one's theorem. All runs of a domain start from one SFT model; the seed is that
of prompts, samples, minibatches and held-out samples.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.__main__ import ROOT, machine
from strop.cli.config import build, read_toml, read_values
from strop.runs import RunFolder, read_lines
from strop.stages import grpo, ppo

RUNS = Path("runs")
STAGES = {"grpo": grpo, "ppo": ppo}
DOMAINS = ("code", "proofs")
WHATS = ("right", "shuffled")
NUM_SAMPLES = 4
"""Answers per held-out task, before and after."""


def name_of(domain: str, algorithm: str, what: str, seed: int) -> str:
    return f"learn-{domain}-{algorithm}-{what}-{seed}"


def is_finished(name: str) -> bool:
    return (RUNS / name / "run.json").is_file() and RunFolder.open(RUNS, name).info["status"] == "finished"


def start(domain: str) -> None:
    """The data, and the models that all runs of the domain start from."""
    subprocess.run([sys.executable, ROOT / "recipes" / domain / "data.py"], check=True)
    for stage, suffix in (("pretrain", "base"), ("sft", "sft")):
        if not is_finished(f"{domain}-{suffix}"):
            recipe = ROOT / "recipes" / domain / f"{stage}.toml"
            command = [sys.executable, "-m", "strop.cli.main", stage, recipe, "--name", f"{domain}-{suffix}"]
            subprocess.run(command, check=True)


def run(domain: str, algorithm: str, what: str, seed: int) -> None:
    name = name_of(domain, algorithm, what, seed)
    if is_finished(name):
        return
    stage = STAGES[algorithm]
    recipe = ROOT / "recipes" / domain / f"{algorithm}.toml"
    config = build(stage.Config, read_values(read_toml(recipe), stage.Config, str(recipe)), str(recipe))
    config = dataclasses.replace(
        config,
        seed=seed,
        tasks=config.tasks.replace(".jsonl", "_shuffled.jsonl") if what == "shuffled" else config.tasks,
        # Only before and after: what comes between would cost more than the training.
        eval=dataclasses.replace(config.eval, every=config.num_steps, num_samples=NUM_SAMPLES),
    )
    stage.train(config, name=name, runs_dir=RUNS, resume=(RUNS / name / "run.json").is_file())


def rows() -> list[dict[str, Any]]:
    """One row per finished run: held-out pass@1 with its interval, before and after."""
    found: list[dict[str, Any]] = []
    for domain in DOMAINS:
        for algorithm in STAGES:
            for what in WHATS:
                for folder in sorted(RUNS.glob(name_of(domain, algorithm, what, 0)[:-1] + "*")):
                    if not is_finished(folder.name):
                        continue
                    lines = [line for line in read_lines(folder / "metrics.jsonl") if "eval/pass@1" in line]
                    steps = [line for line in read_lines(folder / "metrics.jsonl") if "time/reward_wait_share" in line]
                    before, after = lines[0], lines[-1]
                    found.append(
                        {
                            "task": domain,
                            "algorithm": algorithm,
                            "judged_by": "its own" if what == "right" else "another task's",
                            "seed": int(folder.name.rpartition("-")[2]),
                            "before": before["eval/pass@1"],
                            "after": after["eval/pass@1"],
                            "after_low": after["eval/pass@1_low"],
                            "after_high": after["eval/pass@1_high"],
                            "steps": after["step"],
                            "held_out_tasks": int(after["eval/num_tasks"]),
                            "seconds": sum(line["time/step_seconds"] for line in steps),
                            "reward_wait_share": sum(line["time/reward_wait_seconds"] for line in steps)
                            / sum(line["time/step_seconds"] for line in steps),
                        }
                    )
    return found


def with_earlier(found: list[dict[str, Any]], path: Path) -> list[dict[str, Any]]:
    """The rows and those of an earlier table that have no run here, in one order."""
    number = {"seed": int, "steps": int, "held_out_tasks": int}
    text = ("task", "algorithm", "judged_by")
    merged = {_key(row): row for row in found}
    if path.is_file():
        with path.open(encoding="utf-8", newline="") as file:
            for read in csv.DictReader(file):
                row = {name: value if name in text else number.get(name, float)(value) for name, value in read.items()}
                merged.setdefault(_key(row), row)
    return [merged[key] for key in sorted(merged)]


def _key(row: dict[str, Any]) -> tuple[int, int, bool, int]:
    is_control = row["judged_by"] != "its own"
    return DOMAINS.index(row["task"]), list(STAGES).index(row["algorithm"]), is_control, row["seed"]


def summary(found: list[dict[str, Any]]) -> str:
    """Over the seeds: means, and the range of the seeds' own means."""
    lines = [
        "| task | algorithm | judged by | seeds | pass@1 before | after | lowest, highest seed |",
        "|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in found:
        groups.setdefault((row["task"], row["algorithm"], row["judged_by"]), []).append(row)
    for (task, algorithm, judged_by), rows in groups.items():
        before, after = ([row[when] for row in rows] for when in ("before", "after"))
        seeds = ", ".join(str(row["seed"]) for row in rows)
        lines.append(
            f"| {task} | {algorithm.upper()} | {judged_by} | {seeds} | {statistics.mean(before):.1%} "
            f"| {statistics.mean(after):.1%} | {min(after):.1%}, {max(after):.1%} |"
        )
    return "\n".join(lines) + "\n"


def table(found: list[dict[str, Any]]) -> str:
    lines = [
        "| task | algorithm | judged by | seed | steps | pass@1 before | after [95 %] | training | waits |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in found:
        lines.append(
            f"| {row['task']} | {row['algorithm'].upper()} | {row['judged_by']} | {row['seed']} | {row['steps']} "
            f"| {row['before']:.1%} | {row['after']:.1%} [{row['after_low']:.1%}, {row['after_high']:.1%}] "
            f"| {row['seconds']:.0f} s | {row['reward_wait_share']:.0%} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("start").add_argument("domain", choices=DOMAINS)
    of_run = commands.add_parser("run")
    of_run.add_argument("domain", choices=DOMAINS)
    of_run.add_argument("algorithm", choices=list(STAGES))
    of_run.add_argument("what", choices=WHATS)
    of_run.add_argument("seed", type=int)
    commands.add_parser("table")
    options = parser.parse_args()
    if options.command == "start":
        start(options.domain)
    elif options.command == "run":
        run(options.domain, options.algorithm, options.what, options.seed)
    else:
        path = ROOT / "benchmarks" / "results" / "verifier_learning.md"
        found = with_earlier(rows(), path.with_suffix(".csv"))
        text = f"{summary(found)}\n{table(found)}"
        print(text)
        heading = "`python -m benchmarks.verifier_learning`, "
        about = f"{heading}{machine()}; held-out tasks never trained on, {NUM_SAMPLES} answers each\n\n"
        notes = path.read_text(encoding="utf-8").partition("\n## ")[1:] if path.is_file() else ()
        path.write_text(about + text + "".join(notes), encoding="utf-8")
        with path.with_suffix(".csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(found[0]))
            writer.writeheader()
            writer.writerows(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
