"""Reward over-optimisation: proxy and gold reward against the KL from the SFT policy (Gao et al. 2023).

    python -m benchmarks.overoptimisation --save overoptimisation        from nothing, about 17 minutes on one thread

A model of 1.3 million parameters learns to tell of walks: a list of words, where the prompt says which walk it was. The
gold judge is stated (taste, in overoptimisation_task.py). Reward models read its rankings of the SFT's own answers: the
weak proxy few of them, given by a judge with a noisy ear, the strong one many that are right. PPO then maximises each,
with several weights of the KL penalty. At many checkpoints of every run the frozen policy answers held-out prompts, and
on these answers three things are measured:

    KL      mean over answers of sum_t log policy(token) - log SFT(token), in nats: k1, at temperature 1, in float32
    proxy   the reward model's score     } both in standard deviations of the
    gold    the judge's score            } SFT's answers, from their mean

Runs that are there already are not done again, so that the work may be cut by --proxies, --kl and --seeds.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch

from benchmarks.demo_seeds import is_finished
from benchmarks.overoptimisation_report import Point, render, save
from benchmarks.overoptimisation_task import HELD_OUT, MAX_NEW_TOKENS, PROXIES, Proxy, taste, write_rows, write_task
from strop.data import load_rows, tasks_from_rows
from strop.generation import Engine
from strop.models import CausalLM, load_model
from strop.objectives.aggregate import sequence_sum
from strop.objectives.kl import kl_k1
from strop.optim import OptimizerConfig
from strop.ranking.judge import ranks_from_scores
from strop.rewards.config import RewardConfig
from strop.rewards.model import ModelReward
from strop.rollouts.batch import collate_rollouts
from strop.rollouts.logprobs import frozen_logprobs
from strop.rollouts.prompts import Sampling
from strop.runs import resolve
from strop.stages import ppo, reward_model, sft
from strop.stages.ppo_config import CriticConfig
from strop.tokenizer import Tokenizer
from strop.types import Completion, Request, SamplingParams, Task

NUM_ANSWERS = 4
"""Per ranked prompt."""
NUM_STEPS = 48
EVAL_STEPS = (0, 4, 8, 12, 16, 20, 24, 28, 32, 40, 48)
EVAL_SAMPLES = 16
"""Answers per held-out prompt."""


@dataclass(frozen=True)
class Start:
    """The SFT policy, and what its own answers score."""

    runs_dir: Path
    folder: Path
    """Of the task's files."""
    model: CausalLM
    tokenizer: Tokenizer
    gold_mean: float
    gold_std: float

    @property
    def held_out(self) -> list[Task]:
        return tasks_from_rows(load_rows(str(self.folder / "held_out.jsonl")))


def make_start(runs_dir: Path) -> Start:
    folder = runs_dir / "overopt-data"
    if not (folder / "untrained" / "config.json").is_file():
        write_task(folder)
    config = sft.Config(
        init_from=str(folder / "untrained"),
        data=str(folder / "sft.jsonl"),
        num_steps=300,
        batch_tokens=1536,
        micro_batch_tokens=1536,
        max_length=64,
        optimizer=OptimizerConfig(lr=3e-3, schedule="cosine", warmup_steps=10),
        dtype="float32",
    )
    train(sft, config, "overopt-sft", runs_dir)
    model, tokenizer = load(runs_dir, "overopt-sft")
    tasks = tasks_from_rows(load_rows(str(folder / "held_out.jsonl")))
    scores = [taste(one.text) for own in answers(model, tokenizer, tasks, 64, seed=1) for one in own]
    return Start(runs_dir, folder, model, tokenizer, float(np.mean(scores)), float(np.std(scores)))


def train(stage, config, name: str, runs_dir: Path) -> None:
    if not is_finished(runs_dir, name):
        stage.train(config, name=name, runs_dir=runs_dir, resume=(runs_dir / name / "run.json").is_file())


def load(runs_dir: Path, reference: str) -> tuple[CausalLM, Tokenizer]:
    folder = resolve(reference, runs_dir).path
    return load_model(folder, dtype=torch.float32, frozen=True), Tokenizer.load(folder)


def answers(
    model: CausalLM, tokenizer: Tokenizer, tasks: Sequence[Task], num_samples: int, *, seed: int
) -> list[list[Completion]]:
    sampling = SamplingParams(max_new_tokens=MAX_NEW_TOKENS, stop_token_ids=tokenizer.stop_token_ids)
    requests = [
        Request(
            prompt_ids=tuple(tokenizer.encode_prompt(task.prompt)),
            sampling=sampling,
            num_samples=num_samples,
            seed=seed * 100_003 + index,
        )
        for index, task in enumerate(tasks)
    ]
    return Engine(model, tokenizer, num_slots=128).generate(requests)


def make_proxy(start: Start, name: str, seed: int) -> str:
    """The run of a reward model that has read the proxy's share of rankings."""
    proxy, run = PROXIES[name], f"overopt-{name}-{seed}"
    sides = {"": (proxy, "tasks"), "_held_out": (HELD_OUT, "held_out")}
    paths = {side: start.folder / f"{run}{side}.jsonl" for side in sides}
    for number, (side, (own, tasks)) in enumerate(sides.items()):
        if not paths[side].is_file():
            draw = random.Random(f"{name} {seed}{side}")
            write_rows(paths[side], rankings(start, own, tasks, draw, 10 + 2 * seed + number))
    config = reward_model.Config(
        init_from="overopt-sft",
        data=str(paths[""]),
        eval_data=str(paths["_held_out"]),
        num_steps=proxy.num_steps,
        batch_size=proxy.batch_size,
        max_length=64,
        optimizer=OptimizerConfig(lr=1e-3, schedule="cosine", warmup_steps=5),
        eval_every=1000,
        dtype="float32",
        seed=seed,
    )
    train(reward_model, config, run, start.runs_dir)
    return run


def rankings(start: Start, proxy: Proxy, tasks: str, draw: random.Random, seed: int) -> list[dict]:
    """The SFT's answers to prompts of the file, ranked by what the judge hears."""
    known = tasks_from_rows(load_rows(str(start.folder / f"{tasks}.jsonl")))
    asked = [draw.choice(known) for _ in range(proxy.rankings)]
    rows = []
    for task, own in zip(asked, answers(start.model, start.tokenizer, asked, NUM_ANSWERS, seed=seed), strict=True):
        texts = list(dict.fromkeys(one.text for one in own))
        heard = [taste(text) + draw.gauss(0, proxy.noise * start.gold_std) for text in texts]
        if len(texts) > 1 and len(set(heard)) > 1:
            rows.append({"prompt": task.prompt, "completions": texts, "ranks": ranks_from_scores(heard)})
    return rows


def reinforce(start: Start, proxy: str, kl_coef: float, seed: int) -> list[Point]:
    """PPO against the proxy, and its measured checkpoints."""
    judge_run, name = make_proxy(start, proxy, seed), f"overopt-ppo-{proxy}-{kl_coef}-{seed}"
    kept = start.runs_dir / name / "points.json"
    if kept.is_file():
        return [Point(**point) for point in json.loads(kept.read_text(encoding="utf-8"))]
    config = ppo.Config(
        init_from="overopt-sft",
        tasks=str(start.folder / "tasks.jsonl"),
        rewards=(RewardConfig(name="model", options={"model": judge_run}),),
        num_steps=NUM_STEPS,
        prompts_per_step=32,
        group_size=4,
        epochs_per_rollout=2,
        gae_lambda=1.0,
        kl_coef=kl_coef,
        critic=CriticConfig(network="shared"),
        sampling=Sampling(max_new_tokens=MAX_NEW_TOKENS),
        optimizer=OptimizerConfig(lr=3e-4),
        num_slots=128,
        save_every=4,
        keep_checkpoints=NUM_STEPS,
        dtype="float32",
        seed=seed,
    )
    train(ppo, config, name, start.runs_dir)
    judge = ModelReward(model=str(resolve(judge_run, start.runs_dir).path))
    judge.bind(start.tokenizer, 64)
    unit = scores(start, start.model, judge, num_samples=64)[1]
    mean, std = float(np.mean(unit)), float(np.std(unit))
    points = []
    for step in EVAL_STEPS:
        model = start.model if step == 0 else load(start.runs_dir, f"{name}/{step}")[0]
        kl, proxies, golds, texts = scores(start, model, judge, num_samples=EVAL_SAMPLES)
        by_prompt = golds.reshape(len(start.held_out), -1).mean(axis=1)
        half = 1.96 * by_prompt.std(ddof=1) / np.sqrt(len(by_prompt)) / start.gold_std
        order = dict.fromkeys(texts[index] for index in np.argsort(-proxies, kind="stable"))
        seen = dict(zip(texts, proxies, strict=True))
        point = Point(
            proxy_name=proxy,
            kl_coef=kl_coef,
            seed=seed,
            step=step,
            kl=kl,
            proxy=(float(proxies.mean()) - mean) / std,
            gold=(float(golds.mean()) - start.gold_mean) / start.gold_std,
            gold_half=float(half),
            length=float(np.mean([len(text.split()) for text in texts])),
            best=tuple(
                f"{text.strip()} (proxy {(seen[text] - mean) / std:.1f}, gold "
                f"{(taste(text) - start.gold_mean) / start.gold_std:.1f})"
                for text in list(order)[:3]
            ),
        )
        points.append(point)
    kept.write_text(json.dumps([dataclasses.asdict(point) for point in points], indent=1), encoding="utf-8")
    for path in (start.runs_dir / name / "checkpoints").glob("step-*"):
        if path.name != f"step-{NUM_STEPS:06d}":
            shutil.rmtree(path)
    return points


def scores(
    start: Start, model: CausalLM, judge: ModelReward, *, num_samples: int
) -> tuple[float, np.ndarray, np.ndarray, list[str]]:
    """KL from the SFT in nats per answer, the proxy's and the judge's scores, and the answers, on held-out prompts."""
    tasks = start.held_out
    groups = answers(model, start.tokenizer, tasks, num_samples, seed=2)
    batch = collate_rollouts([start.tokenizer.encode_prompt(task.prompt) for task in tasks], groups)
    own_BT, sft_BT = (
        frozen_logprobs(network, batch, temperature=1.0, max_tokens=4096) for network in (model, start.model)
    )
    kl_B = sequence_sum(kl_k1(own_BT, sft_BT, batch.response_mask_BT), batch.response_mask_BT)
    flat = [one for own in groups for one in own]
    verdicts = judge.score([task for task in tasks for _ in range(num_samples)], flat)
    proxies = np.array([verdict.score for verdict in verdicts])
    return float(kl_B.mean()), proxies, np.array([taste(one.text) for one in flat]), [one.text for one in flat]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--proxies", nargs="+", choices=PROXIES, default=list(PROXIES))
    parser.add_argument("--kl", nargs="+", type=float, help="weights of the KL penalty, in place of the proxies' own")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"))
    parser.add_argument("--save", metavar="NAME", help="write benchmarks/results/NAME.md, .csv and .png")
    options = parser.parse_args()
    start = make_start(options.runs_dir)
    points: list[Point] = []
    for proxy, seed in product(options.proxies, options.seeds):
        for kl_coef in options.kl or PROXIES[proxy].kl_coefs:
            own = reinforce(start, proxy, kl_coef, seed)
            points += own
            print(render(own).splitlines()[-1], flush=True)
    print(render(points))
    if options.save:
        save(options.save, points, num_prompts=len(start.held_out), runs_dir=options.runs_dir)
    return 0


if __name__ == "__main__":
    sys.exit(main())
