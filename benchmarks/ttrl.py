"""What test-time RL does: where the vote is mostly right, where it is systematically wrong, and when it collapses.

    python -m benchmarks.ttrl --save ttrl                   about 9 minutes per seed on one thread
    python -m benchmarks.ttrl --seeds 2 --only misled       a part; what is finished in runs/ttrl-study is not redone

Small models (ttrl_tasks.py), so that every figure can be repeated. Every arm starts from the same base of its seed and
kind. pass@1 and maj@N are measured on frozen weights and the 300 (slips) or 500 (misled) questions that are in no
example and no prompt of a run; their intervals are over questions, within one seed. Differences are of the same
questions, in pairs. maj@8 is the level of the vote that the labels come from, maj@32 that of a larger one.

    majority        TTRL on an adapter                                   slips and misled base
    all weights     TTRL without an adapter                              slips
    shuffled        control of the two: the majority answer of another prompt of the rollout counts as right
    never stopped   TTRL without the early stop                          misled
    collapse        reward = "entropy" at a high learning rate, watched  slips
    unwatched       the same without the early stop                      slips
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.__main__ import ROOT, heading, origin
from benchmarks.ttrl_tasks import make_base
from strop.data import load_rows, tasks_from_rows
from strop.evals.intervals import mean_interval
from strop.evals.tasks import Sample, evaluate_tasks
from strop.generation import Engine
from strop.models import LoraConfig, load_model, tokenizer_folder
from strop.optim import OptimizerConfig
from strop.rewards.base import Reward
from strop.rewards.math import MathReward
from strop.rewards.vote import VoteReward, count_votes
from strop.rollouts.prompts import Sampling
from strop.runs import RunFolder, read_lines, resolve
from strop.stages import ttrl
from strop.stages.ttrl_config import Config, HeldOut
from strop.tokenizer import Tokenizer
from strop.types import Completion, Task, Verdict

VOTES = 8
MANY_VOTES = 32
ARMS = {
    "slips": ("majority", "all weights", "shuffled", "all weights shuffled", "collapse", "unwatched"),
    "misled": ("majority", "never stopped"),
}
SAMPLING = Sampling(max_new_tokens=8)
CURVES = (
    "eval/pass@1", "eval/base_agreement", "eval/self_agreement", "eval/distinct_answers", "eval/entropy",
    "label_accuracy", "reward_accuracy", "majority_share",
)  # fmt: skip


class ShuffledVote(VoteReward):
    """Counts the majority answer of the next prompt of the batch as right: agreement that means nothing."""

    def score(self, tasks: Sequence[Task], completions: Sequence[Completion]) -> list[Verdict]:
        keys = [self.answer_key(completion) for completion in completions]
        names = list(dict.fromkeys(task.id for task in tasks))
        winners = [
            count_votes([key for key, task in zip(keys, tasks, strict=True) if task.id == name]).winner
            for name in names
        ]
        labels = dict(zip(names, [*winners[1:], winners[0]], strict=True))
        return _verdicts(tasks, keys, labels)


def _verdicts(tasks: Sequence[Task], keys: Sequence[str | None], labels: dict[str, str | None]) -> list[Verdict]:
    return [
        Verdict(score=float(key is not None and key == labels[task.id])) for task, key in zip(tasks, keys, strict=True)
    ]


def config(kind: str, arm: str, seed: int, folder: Path) -> Config:
    is_collapse = arm in ("collapse", "unwatched")
    has_all_weights = arm.startswith("all weights")
    every = 5 if is_collapse else 10
    lr = {"slips": 1e-3, "misled": 6e-4}[kind]
    return Config(
        init_from="base",
        tasks=str(folder / "tasks.jsonl"),
        num_steps=60 if is_collapse else {"slips": 150, "misled": 80}[kind],
        reward="entropy" if is_collapse else "majority",
        num_votes=16 if is_collapse else VOTES,
        group_size=16 if is_collapse else VOTES,
        prompts_per_step=16 if is_collapse else 128,
        sampling=SAMPLING,
        # The control is not stopped either: it must have every chance to learn.
        held_out=HeldOut(every=every, max_drop=1.0, min_answers=0.0)
        if arm in ("unwatched", "never stopped") or is_shuffled(arm)
        else HeldOut(every=every),
        kl_coef=0.0 if is_collapse else 0.001,
        all_weights=has_all_weights,
        lora=LoraConfig() if has_all_weights else LoraConfig(rank=16, alpha=32),
        optimizer=OptimizerConfig(lr=3e-2 if is_collapse else 2e-4 if has_all_weights else lr),
        num_slots=256,
        save_every=10**6,
        samples_per_step=32,
        dtype="float32",
        seed=seed,
    )


def is_shuffled(arm: str) -> bool:
    return arm.endswith("shuffled")


def run_arm(kind: str, arm: str, seed: int, folder: Path) -> dict[str, Any]:
    """The arm's run, unless it is finished, and what its result is worth on the test questions."""
    if not is_finished(folder, "base"):
        make_base(kind, seed, folder)
    run = arm.replace(" ", "-")
    if not is_finished(folder, run):
        reward: Reward | None = ShuffledVote() if is_shuffled(arm) else None
        ttrl.train(config(kind, arm, seed, folder), name=run, runs_dir=folder, resume=False, reward=reward)
    before, after = answers("base", folder), answers(run, folder)
    stopped = [line for line in read_lines(folder / run / "metrics.jsonl") if "result_of_step" in line]
    last = max(line["step"] for line in read_lines(folder / run / "metrics.jsonl"))
    vote = majorities(before, VOTES)
    return {
        "kind": kind,
        "arm": arm,
        "seed": seed,
        "pass@1 before": with_interval(rates(before)),
        f"maj@{VOTES} before": with_interval(vote),
        f"maj@{MANY_VOTES} before": with_interval(majorities(before, MANY_VOTES)),
        "pass@1 after": with_interval(rates(after)),
        "after - pass@1": paired_interval(rates(before), rates(after)),
        f"after - maj@{VOTES}": paired_interval(vote, rates(after)),
        "distinct before": distinct(before),
        "distinct after": distinct(after),
        "last step": last,
        "result of step": stopped[-1]["result_of_step"] if stopped else last,
    }


def is_finished(folder: Path, name: str) -> bool:
    return (folder / name / "run.json").is_file() and RunFolder.open(folder, name).info["status"] == "finished"


def answers(name: str, folder: Path) -> list[list[Sample]]:
    """MANY_VOTES answers of the frozen checkpoint to every test question, judged."""
    path = resolve(name, folder).path
    tokenizer = Tokenizer.load(tokenizer_folder(path))
    tasks = tasks_from_rows(load_rows(str(folder / "test.jsonl")))
    reward = MathReward()
    try:
        report = evaluate_tasks(
            Engine(load_model(path, frozen=True), tokenizer, num_slots=128),
            tokenizer,
            tasks,
            reward,
            sampling=SAMPLING.params(tokenizer),
            num_samples=MANY_VOTES,
            seed=2026,
        )
    finally:
        reward.close()
    return [report.samples[start : start + MANY_VOTES] for start in range(0, len(report.samples), MANY_VOTES)]


def rates(groups: Sequence[Sequence[Sample]]) -> list[float]:
    return [sum(sample.is_correct for sample in group) / len(group) for group in groups]


def majorities(groups: Sequence[Sequence[Sample]], votes: int) -> list[float]:
    """The share of ballots of so many answers each whose majority answer is right, per question."""
    return [statistics.fmean(is_right(ballot, winner(ballot)) for ballot in ballots(group, votes)) for group in groups]


def ballots(group: Sequence[Sample], votes: int) -> list[Sequence[Sample]]:
    return [group[start : start + votes] for start in range(0, len(group), votes)]


def is_right(group: Sequence[Sample], answer: str | None) -> bool:
    return answer is not None and any(sample.is_correct for sample in group if key(sample) == answer)


def key(sample: Sample) -> str | None:
    return VoteReward().answer_key(sample.completion)


def winner(group: Sequence[Sample]) -> str | None:
    return count_votes([key(sample) for sample in group]).winner


def distinct(groups: Sequence[Sequence[Sample]]) -> int:
    return len({winner(group) for group in groups})


def with_interval(values: Sequence[float]) -> list[float]:
    return [statistics.fmean(values), *mean_interval(values)]


def paired_interval(before: Sequence[float], after: Sequence[float]) -> list[float]:
    """Mean of after - before per question with its 95 % interval, by the spread between questions."""
    differences = [right - left for left, right in zip(before, after, strict=True)]
    mean = statistics.fmean(differences)
    half = 1.96 * statistics.stdev(differences) / math.sqrt(len(differences))
    return [mean, mean - half, mean + half]


def curve_rows(folder: Path, kind: str, arm: str, seed: int) -> list[dict[str, Any]]:
    return [
        {"kind": kind, "arm": arm, "seed": seed, "step": line["step"], **{name: line.get(name) for name in CURVES}}
        for line in read_lines(folder / arm.replace(" ", "-") / "metrics.jsonl")
        if "result_of_step" not in line
    ]


def render(rows: Sequence[dict[str, Any]]) -> str:
    columns = [
        "pass@1 before",
        f"maj@{VOTES} before",
        f"maj@{MANY_VOTES} before",
        "pass@1 after",
        "after - pass@1",
        f"after - maj@{VOTES}",
    ]
    heads = ["base", "arm", "seed", *columns, "different majority answers", "result of step"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in rows:
        cells = [row["kind"], row["arm"], row["seed"]]
        cells += ["{:.3f} [{:.3f}, {:.3f}]".format(*row[name]) for name in columns]
        cells += [
            f"{row['distinct before']} -> {row['distinct after']}",
            f"{row['result of step']} of {row['last step']}",
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += ["", "Means over the seeds, with the smallest and the largest:", ""]
    lines += ["| base | arm | " + " | ".join(columns) + " |", "|" + "---|" * (2 + len(columns))]
    for kind, arm in dict.fromkeys((row["kind"], row["arm"]) for row in rows):
        own = [row for row in rows if (row["kind"], row["arm"]) == (kind, arm)]
        cells = []
        for name in columns:
            values = [row[name][0] for row in own]
            cells.append(f"{statistics.fmean(values):.3f} ({min(values):.3f} to {max(values):.3f})")
        lines.append(f"| {kind} | {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw_curves(rows: Sequence[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = {
        "eval/pass@1": "pass@1 on the 64 watched prompts",
        "eval/base_agreement": "agreement with the base's votes",
        "eval/self_agreement": "agreement with itself",
        "eval/distinct_answers": "different majority answers",
    }
    arms = list(dict.fromkeys((row["kind"], row["arm"]) for row in rows))
    figure, axes = pyplot.subplots(2, 2, figsize=(11, 7), sharex=True)
    for axis, (name, title) in zip(axes.flat, panels.items(), strict=True):
        for number, (kind, arm) in enumerate(arms):
            seeds = sorted({row["seed"] for row in rows if (row["kind"], row["arm"]) == (kind, arm)})
            for seed in seeds:
                own = [
                    row
                    for row in rows
                    if (row["kind"], row["arm"], row["seed"]) == (kind, arm, seed) and row[name] is not None
                ]
                label = f"{kind}, {arm}" if seed == seeds[0] else None
                axis.plot(
                    [row["step"] for row in own], [row[name] for row in own], color=f"C{number}", alpha=0.8, label=label
                )
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=7)
    for axis in axes[1]:
        axis.set_xlabel("step")
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[2, 3, 4])
    parser.add_argument("--only", nargs="+", choices=ARMS, default=list(ARMS), help="kinds of base")
    parser.add_argument("--arms", nargs="+", help="only these arms")
    parser.add_argument("--runs-dir", type=Path, default=Path("runs/ttrl-study"))
    parser.add_argument("--save", metavar="NAME", help="write benchmarks/results/NAME.md, .csv, .png and .json")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    curves: list[dict[str, Any]] = []
    for kind in options.only:
        for arm in ARMS[kind]:
            if options.arms and arm not in options.arms:
                continue
            for seed in options.seeds:
                folder = options.runs_dir / f"{kind}-{seed}"
                kept = folder / f"{arm}.json"
                if not kept.is_file():
                    kept_row = run_arm(kind, arm, seed, folder)
                    kept.write_text(json.dumps(kept_row), encoding="utf-8")
                rows.append(json.loads(kept.read_text(encoding="utf-8")))
                curves += curve_rows(folder, kind, arm, seed)
                print(json.dumps(rows[-1]), flush=True)
    table = render(rows)
    print(table)
    if options.save:
        about = origin()
        stem = ROOT / "benchmarks" / "results" / options.save
        stem.with_suffix(".md").write_text(f"{heading(about)}\n\n{table}\n", encoding="utf-8")
        stem.with_suffix(".json").write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n", encoding="utf-8")
        with stem.with_suffix(".csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(curves[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(curves)
        draw_curves(curves, stem.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
