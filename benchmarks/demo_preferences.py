"""PPO against a reward model, and DPO, on the demo's rankings over several seeds; their control: upside-down rankings.

    python -m benchmarks.demo_preferences --save demo_preferences      after `make demo`, from whose SFT it starts

Every run starts from the same checkpoint and the same rankings; the seed decides the head's first weights, the order
of the data and the samples. Measured on frozen weights and held-out tasks, before and after: pass@1 (the verifier), and
gold, the mean score that the judge itself gives, of whose taste the reward model is a copy. A control learns from the
same answers, ranked with the worst first.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.__main__ import ROOT, heading, origin
from benchmarks.demo_seeds import ANSWERS, is_finished
from recipes.demo.preferences import FILES, taste, write_rankings
from strop.cli.config import build, read_toml, read_values
from strop.data import load_rows, tasks_from_rows
from strop.evals.tasks import TaskReport, evaluate_tasks
from strop.generation import Engine
from strop.models import load_model
from strop.rewards.load import load_rewards
from strop.runs import read_lines, resolve
from strop.stages import dpo, ppo, reward_model
from strop.tokenizer import Tokenizer

RECIPES = Path("recipes/demo")
Figures = dict[str, list[float]]
"""Name -> [mean, low, high]."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"))
    parser.add_argument("--save", metavar="NAME", help="write benchmarks/results/NAME.json and NAME.md")
    options = parser.parse_args()
    runs_dir = options.runs_dir
    policy = read(ppo, "ppo_reward_model", runs_dir)
    before = measure(policy.init_from, policy, runs_dir)
    data = runs_dir / "demo-data"
    for is_control in (False, True):
        suffix = "-shuffled" if is_control else ""
        write_rankings(policy.init_from, data, runs_dir, seed=0, suffix=suffix, is_upside_down=is_control)
    rows: list[dict[str, Any]] = []
    for seed in options.seeds:
        for is_control in (False, True):
            for row in learn(seed, is_control, policy, runs_dir):
                rows.append(row | {"seed": seed, "is_control": is_control, "before": before})
                print(render(rows[-1:]).splitlines()[-1], flush=True)
                if options.save:
                    save(options.save, rows)
    print(render(rows))
    return 0


def learn(seed: int, is_control: bool, policy: ppo.Config, runs_dir: Path) -> list[dict[str, Any]]:
    """A row for PPO with its reward model, and one for DPO."""
    suffix = "-shuffled" if is_control else ""
    end = f"{seed}{suffix}"
    model_name, policy_name, dpo_name = (f"seeds-{what}-{end}" for what in ("reward", "ppo-model", "dpo"))
    own_data = {f"{name}.jsonl": f"{name}{suffix}.jsonl" for name in FILES.values()}

    def ranked(config: Any) -> Any:
        sides = {field: Path(getattr(config, field)) for field in ("data", "eval_data")}
        changed = {field: str(path.with_name(own_data[path.name])) for field, path in sides.items()}
        return dataclasses.replace(config, seed=seed, **changed)

    run(reward_model, ranked(read(reward_model, "reward_model", runs_dir)), model_name, runs_dir)
    rewards = tuple(
        dataclasses.replace(part, options={"model": model_name}) if part.name == "model" else part
        for part in policy.rewards
    )
    critic = dataclasses.replace(policy.critic, start=model_name)
    run(ppo, dataclasses.replace(policy, seed=seed, rewards=rewards, critic=critic), policy_name, runs_dir)
    run(dpo, ranked(read(dpo, "dpo", runs_dir)), dpo_name, runs_dir)
    *_, last = read_lines(runs_dir / model_name / "metrics.jsonl")
    agreement = {key: last[f"eval/{key}"] for key in ("accuracy", "accuracy_length_only")}
    return [
        {"method": "ppo, reward model", "reward_model": agreement, "after": measure(policy_name, policy, runs_dir)},
        {"method": "dpo", "after": measure(dpo_name, policy, runs_dir)},
    ]


def run(stage: Any, config: Any, name: str, runs_dir: Path) -> None:
    if not is_finished(runs_dir, name):
        stage.train(config, name=name, runs_dir=runs_dir, resume=(runs_dir / name / "run.json").is_file())


def read(stage: Any, recipe: str, runs_dir: Path) -> Any:
    """A recipe's Config, its data in runs_dir."""
    path = RECIPES / f"{recipe}.toml"
    text = json.dumps(read_toml(path)).replace('"runs/demo-data/', f'"{runs_dir}/demo-data/')
    return build(stage.Config, read_values(json.loads(text), stage.Config, str(path)), str(path))


def measure(reference: str, config: ppo.Config, runs_dir: Path) -> Figures:
    """pass@1 and gold on the recipe's held-out tasks."""
    folder = resolve(reference, runs_dir).path
    model, tokenizer = load_model(folder, frozen=True), Tokenizer.load(folder)
    tasks = tasks_from_rows(load_rows(config.eval.tasks))
    with load_rewards(config.rewards[0]) as reward:
        report = evaluate_tasks(
            Engine(model, tokenizer, num_slots=config.num_slots),
            tokenizer,
            tasks,
            reward.first,
            sampling=config.sampling.params(tokenizer),
            num_samples=max(1, min(8, ANSWERS // len(tasks))),
            seed=2026,
        )
    return {
        "pass@1": [report.metrics[name] for name in ("pass@1", "pass@1_low", "pass@1_high")],
        "gold": gold(report, len(tasks)),
    }


def gold(report: TaskReport, num_tasks: int) -> list[float]:
    """[mean score by the judge, low, high], 95 % over tasks."""
    scores = [taste(sample.task.prompt, [sample.completion.text])[0] for sample in report.samples]
    by_task = np.array(scores).reshape(num_tasks, -1).mean(axis=1)
    mean, half = by_task.mean(), 1.96 * by_task.std(ddof=1) / np.sqrt(num_tasks)
    return [float(mean), float(mean - half), float(mean + half)]


def render(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| learner | rankings | seed | pass@1 before | after | gold before | after |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        figures = [
            f"{value:.3f} [{low:.3f}, {high:.3f}]"
            for name in ("pass@1", "gold")
            for value, low, high in (row["before"][name], row["after"][name])
        ]
        rankings = "upside down" if row["is_control"] else "the judge's"
        lines.append(f"| {row['method']} | {rankings} | {row['seed']} | {' | '.join(figures)} |")
    return "\n".join(lines)


def save(name: str, rows: list[dict[str, Any]]) -> None:
    about = origin() | {"command": " ".join(["python -m benchmarks.demo_preferences", *sys.argv[1:]])}
    folder = ROOT / "benchmarks" / "results"
    (folder / f"{name}.json").write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n", encoding="utf-8")
    text = f"{heading(about)}\n\n{render(rows)}\n"
    (folder / f"{name}.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
