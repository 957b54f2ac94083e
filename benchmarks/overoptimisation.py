"""Reward over-optimisation: proxy and gold reward against the KL from the SFT policy (Gao et al. 2023).

    python -m benchmarks.overoptimisation --save overoptimisation        from nothing, about 17 minutes on one thread

A model of 1.3 million parameters learns to tell of walks: a list of words, where the prompt says which walk it was. The
gold judge is stated (taste, below). Reward models read its rankings of the SFT's own answers: the weak proxy few of
them, given by a judge with a noisy ear, the strong one many that are right. PPO then maximises each, with several
weights of the KL penalty. At many checkpoints of every run the frozen policy answers held-out prompts, and on these
answers three things are measured:

    KL      mean over answers of sum_t log policy(token) - log SFT(token), in nats: k1, at temperature 1, in float32
    proxy   the reward model's score     } both in standard deviations of the
    gold    the judge's score            } SFT's answers, from their mean

Runs that are there already are not done again, so that the work may be cut by --proxies, --kl and --seeds.
"""

from __future__ import annotations

import argparse
import csv
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

from benchmarks.__main__ import ROOT, heading, origin
from benchmarks.demo_seeds import is_finished
from strop.data import load_rows, tasks_from_rows
from strop.generation import Engine
from strop.models import CausalLM, ModelConfig, init_model, load_model, save_model
from strop.objectives.aggregate import sequence_sum
from strop.objectives.kl import kl_k1
from strop.optim import OptimizerConfig
from strop.ranking.judge import ranks_from_scores
from strop.rewards.config import RewardConfig
from strop.rewards.model import ModelReward
from strop.rollouts.batch import collate_rollouts
from strop.rollouts.logprobs import frozen_logprobs
from strop.rollouts.prompts import Sampling
from strop.runs import read_lines, resolve
from strop.stages import ppo, reward_model, sft
from strop.stages.ppo_config import CriticConfig
from strop.tokenizer import Tokenizer, train_bpe
from strop.types import Completion, Request, SamplingParams, Task

ANIMALS = ("fox", "owl", "hare", "crow", "deer", "wolf", "toad", "swan", "mole", "lynx", "goat", "boar")
THINGS = (
    "gate", "stone", "bridge", "oak", "fence", "well", "tower", "ditch", "field", "cart", "barn", "church", "hedge",
    "path", "pond", "wall", "mill", "ford", "inn", "cross", "bench", "moss", "fern", "reed",
)  # fmt: skip
PLACES = ("lake", "farm", "coast", "abbey", "market", "quarry", "forest", "castle", "harbour", "village", "orchard")
TIMES = ("at dawn", "at noon", "at dusk", "at night", "in spring", "in summer", "in autumn", "in winter")
ANIMAL_SHARE = 0.3
REPEAT_SHARE = 0.15
"""Of the words that a story has already, the share that it says again. The SFT model itself repeats more: in 38 % of
its answers there is a word twice, in 8 % three or more."""
STOP_SHARE = 0.16
"""Of an answer's words after the second, the share that is the last one: lists of two to about 20, mean 6."""
HELD_OUT_EVERY = 3
"""Every so manieth prompt is held out."""
MAX_NEW_TOKENS = 24
STORIES = 6000
NUM_ANSWERS = 4
"""Per ranked prompt."""
NUM_STEPS = 48
EVAL_STEPS = (0, 4, 8, 12, 16, 20, 24, 28, 32, 40, 48)
EVAL_SAMPLES = 16
"""Answers per held-out prompt."""
SHAPE = {"hidden_size": 160, "num_layers": 4, "num_heads": 5, "num_kv_heads": 5, "head_dim": 32}


@dataclass(frozen=True, kw_only=True)
class Proxy:
    """What a reward model may read."""

    rankings: int
    noise: float
    """Standard deviation of what is added to the judge's score before it ranks, in standard deviations of the score."""
    num_steps: int = 0
    batch_size: int = 0
    kl_coefs: tuple[float, ...] = ()
    """Weights of the KL penalty, a run each."""


PROXIES = {
    "weak": Proxy(rankings=40, noise=1.0, num_steps=30, batch_size=16, kl_coefs=(0.0, 0.05, 0.1, 0.3)),
    "strong": Proxy(rankings=2000, noise=0.0, num_steps=90, batch_size=64, kl_coefs=(0.0, 0.1)),
}
HELD_OUT = Proxy(rankings=400, noise=0.0)


def taste(text: str) -> float:
    """The gold judge: the number of different animals, less one for every word that was there before or is none.

    It likes to hear of another animal, and is cross when it hears of one again.
    """
    words = text.split()
    known = {word for word in words if word in ANIMALS or word in THINGS}
    return float(sum(word in ANIMALS for word in known) - (len(words) - len(known)))


@dataclass(frozen=True, kw_only=True)
class Point:
    """One checkpoint on held-out prompts; proxy and gold in standard deviations of the SFT's answers."""

    proxy_name: str
    kl_coef: float
    seed: int
    step: int
    kl: float
    proxy: float
    gold: float
    gold_half: float
    """Half of gold's 95 % interval, over prompts."""
    length: float
    """Words per answer."""
    best: tuple[str, ...] = ()
    """The answers that the proxy likes most, with its score and the judge's."""


def write_task(folder: Path) -> None:
    """sft.jsonl, tasks.jsonl, held_out.jsonl and the folder of an untrained model."""
    prompts = [f"A walk to the {place} {time}:" for place, time in product(PLACES, TIMES)]
    draw = random.Random(0)
    draw.shuffle(prompts)
    held_out = prompts[::HELD_OUT_EVERY]
    training = [prompt for prompt in prompts if prompt not in held_out]
    stories = [{"prompt": draw.choice(training), "completion": story(draw)} for _ in range(STORIES)]
    write_rows(folder / "sft.jsonl", stories)
    write_rows(folder / "tasks.jsonl", [{"prompt": prompt} for prompt in training])
    write_rows(folder / "held_out.jsonl", [{"prompt": prompt} for prompt in held_out])
    tokenizer = train_bpe([row["prompt"] + row["completion"] for row in stories], 512)
    size = -(-tokenizer.vocab_size // 64) * 64
    config = ModelConfig(
        vocab_size=size, intermediate_size=432, max_position_embeddings=64, eos_token_id=tokenizer.eos_id, **SHAPE
    )
    save_model(init_model(config, seed=0), folder / "untrained")
    tokenizer.save(folder / "untrained")


def story(draw: random.Random) -> str:
    words: list[str] = []
    while len(words) < 2 or draw.random() > STOP_SHARE:
        word = draw.choice(ANIMALS if draw.random() < ANIMAL_SHARE else THINGS)
        if word not in words or draw.random() < REPEAT_SHARE:
            words.append(word)
    return "".join(f" {word}" for word in words[: MAX_NEW_TOKENS - 2])


def write_rows(path: Path, rows: Sequence[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


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


def render(points: Sequence[Point]) -> str:
    """A row per run: where gold was highest, and where the run ended."""
    lines = [
        "| proxy | KL coefficient | seed | highest gold | at KL | gold at the end | at KL | proxy at the end | words |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for own in runs(points):
        peak, last = max(own, key=lambda point: point.gold), own[-1]
        lines.append(
            f"| {last.proxy_name} | {last.kl_coef:g} | {last.seed} "
            f"| {peak.gold:+.2f} ± {peak.gold_half:.2f} | {peak.kl:.1f} "
            f"| {last.gold:+.2f} ± {last.gold_half:.2f} | {last.kl:.1f} | {last.proxy:+.2f} | {last.length:.1f} |"
        )
    return "\n".join(lines)


def runs(points: Sequence[Point]) -> list[list[Point]]:
    """The points of each run, in the order of its steps."""
    found: dict[tuple[str, float, int], list[Point]] = {}
    for point in sorted(points, key=lambda point: point.step):
        found.setdefault((point.proxy_name, point.kl_coef, point.seed), []).append(point)
    return [found[key] for key in sorted(found, key=lambda key: (list(PROXIES).index(key[0]), key[1:]))]


def draw(points: Sequence[Point], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(point.proxy_name for point in points))
    figure, panels = pyplot.subplots(1, len(names), figsize=(5.2 * len(names), 4.6), sharey=True, squeeze=False)
    coefs = sorted({point.kl_coef for point in points})
    colours = {coef: f"C{number}" for number, coef in enumerate(coefs)}
    for name, axes in zip(names, panels[0], strict=True):
        for own in runs([point for point in points if point.proxy_name == name]):
            colour, kl = colours[own[0].kl_coef], [max(point.kl, 0.0) for point in own]
            label = f"KL coefficient {own[0].kl_coef:g}" if own[0].seed == min(p.seed for p in points) else None
            axes.plot(kl, [point.gold for point in own], "-o", color=colour, markersize=3, label=label)
            axes.plot(kl, [point.proxy for point in own], "--", color=colour, linewidth=1)
        axes.axhline(0, color="grey", linewidth=0.6)
        axes.set_title(f"{name} proxy: {PROXIES[name].rankings} rankings{', noisy' if PROXIES[name].noise else ''}")
        axes.set_xlabel("KL from the SFT policy, nats per answer")
        axes.grid(True, alpha=0.3)
        axes.legend(fontsize=8)
    panels[0][0].set_ylabel("reward, standard deviations of SFT answers\n(solid: gold; dashed: proxy)")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def save(name: str, start: Start, points: Sequence[Point]) -> None:
    about = origin() | {"command": " ".join(["python -m benchmarks.overoptimisation", *sys.argv[1:]])}
    folder = ROOT / "benchmarks" / "results"
    fields = [field.name for field in dataclasses.fields(Point) if field.name != "best"]
    with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(fields)
        writer.writerows([_short(getattr(point, field)) for field in fields] for point in points)
    draw(points, folder / f"{name}.png")
    ends = [own[-1] for own in runs(points) if own[-1].kl_coef == min(point.kl_coef for point in points)]
    samples = [f"- {point.proxy_name}, seed {point.seed}: {best}" for point in ends for best in point.best]
    text = "\n\n".join(
        [
            heading(about),
            "Gold and proxy in standard deviations of the SFT's answers, from their mean; intervals of 95 % over "
            f"{len(start.held_out)} held-out prompts.",
            render(points),
            "Held-out pairs in the judge's order, by reward model (by length alone):",
            "\n".join(accuracies(start, points)),
            "Answers that the proxy likes most, at the end of the runs without a penalty:",
            "\n".join(samples),
        ]
    )
    (folder / f"{name}.md").write_text(text + "\n", encoding="utf-8")


def accuracies(start: Start, points: Sequence[Point]) -> list[str]:
    lines = []
    for proxy, seed in dict.fromkeys((point.proxy_name, point.seed) for point in points):
        *_, last = read_lines(start.runs_dir / f"overopt-{proxy}-{seed}" / "metrics.jsonl")
        accuracy, length_only = last["eval/accuracy"], last["eval/accuracy_length_only"]
        lines.append(f"- {proxy}, seed {seed}: {accuracy:.3f} ({length_only:.3f})")
    return lines


def _short(value: object) -> object:
    return f"{value:.4f}" if isinstance(value, float) else value


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
        save(options.save, start, points)
    return 0


if __name__ == "__main__":
    sys.exit(main())
