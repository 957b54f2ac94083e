"""What each stage of the demo did to a held-out figure: the checkpoint before it and the one after it, measured alike.

Weights are frozen. Data, number of answers and seed are the same on both sides and in every run, so that figures of
other seeds and of the control can be compared. What was measured once is kept under RUNS_DIR/demo-eval.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from strop.cli.frozen import FrozenModel, ModelArguments, frozen_model
from strop.cli.pipeline import Plan
from strop.data import load_rows, stream_texts, tasks_from_rows
from strop.evals.tasks import evaluate_tasks
from strop.evals.text import bits_per_byte
from strop.models import CausalLM, Decoder, compute_in, init_model
from strop.rewards.load import load_rewards
from strop.runs import derive_seed, read_lines, resolve
from strop.runs.report import Estimate, HeldOut, logged_held_out
from strop.stages import grpo
from strop.tokenizer import Tokenizer

NUM_ANSWERS = 1600
MAX_ANSWERS_PER_TASK = 8
SEED = 0


def measure(plan: Plan, judge: grpo.Config, runs_dir: Path) -> HeldOut:
    """The held-out figure of a finished stage. `judge` is the part's GRPO: its held-out tasks, its reward and its
    sampling measure every policy, whatever that learned from."""
    if plan.entry.stage == "pretrain":
        return measure_text(plan, runs_dir)
    if plan.entry.stage == "reward-model":
        return measure_rankings(plan, runs_dir)
    return measure_tasks(plan, judge, runs_dir)


def measure_text(plan: Plan, runs_dir: Path) -> HeldOut:
    """Bits per byte of the held-out chapters, under the initial weights and under the trained ones."""
    config = plan.config
    chapters = [text for _, text in stream_texts(config.eval_data)]
    settings = {"text": chapters, "context_length": config.context_length}

    def trained(frozen: FrozenModel) -> Estimate:
        return text_estimate(frozen.model, frozen.tokenizer, chapters, config.context_length)

    def initial(frozen: FrozenModel) -> Estimate:
        assert isinstance(frozen.model, Decoder), "a run from scratch makes no other"
        model = init_model(frozen.model.config, seed=derive_seed(config.seed, "init"), dtype=frozen.model.dtype)
        return text_estimate(model, frozen.tokenizer, chapters, config.context_length)

    return HeldOut(
        metric="bits_per_byte",
        before=kept(plan.entry.name, runs_dir, settings | {"initial weights of seed": config.seed}, initial),
        after=kept(plan.entry.name, runs_dir, settings, trained),
        note=f"{len(chapters)} chapters",
    )


def text_estimate(model: CausalLM, tokenizer: Tokenizer, texts: Sequence[str], context_length: int) -> Estimate:
    """Bits per byte over all texts, with the interval of a ratio of sums over documents (linearised, normal)."""
    reports = [bits_per_byte(model, tokenizer, [text], context_length=context_length) for text in texts]
    sizes = [report["num_bytes"] for report in reports]
    bits = [report["bits_per_byte"] * report["num_bytes"] for report in reports]
    rate = sum(bits) / sum(sizes)
    squares = sum((own - rate * size) ** 2 for own, size in zip(bits, sizes, strict=True))
    half = 1.96 * math.sqrt(squares * len(texts) / (len(texts) - 1)) / sum(sizes)
    return Estimate(value=rate, low=rate - half, high=rate + half)


def measure_rankings(plan: Plan, runs_dir: Path) -> HeldOut:
    """Held-out pairs of answers in the judge's order: with the head as it was drawn, and as it was trained."""
    rows = list(read_lines(runs_dir / plan.entry.name / "metrics.jsonl"))
    length_only = rows[-1]["eval/accuracy_length_only"]
    num_rankings = len(load_rows(plan.config.eval_data))
    logged = logged_held_out(rows)
    assert logged is not None and logged.metric == "accuracy", "the recipe has eval_data"
    note = f"{num_rankings} rankings (by length alone: {length_only:.3f})"
    return dataclasses.replace(logged, note=note)


def measure_tasks(plan: Plan, judge: grpo.Config, runs_dir: Path) -> HeldOut:
    """pass@1 on the held-out tasks, several answers each, of the checkpoint the run started from and of its last."""
    rows = load_rows(judge.eval.tasks)
    tasks = tasks_from_rows(rows)
    num_samples = min(MAX_ANSWERS_PER_TASK, max(1, NUM_ANSWERS // len(tasks)))
    settings = {
        "tasks": rows.content_hash,
        "reward": judge.rewards[0].spec(),
        "sampling": dataclasses.asdict(judge.sampling),
        "num_samples": num_samples,
    }

    def answered(frozen: FrozenModel) -> Estimate:
        with load_rewards(judge.rewards) as reward:
            metrics = evaluate_tasks(
                frozen.engine,
                frozen.tokenizer,
                tasks,
                reward.first,
                sampling=judge.sampling.params(frozen.tokenizer),
                num_samples=num_samples,
                seed=SEED,
            ).metrics
        return Estimate(value=metrics["pass@1"], low=metrics["pass@1_low"], high=metrics["pass@1_high"])

    return HeldOut(
        metric="pass@1",
        before=kept(plan.config.init_from, runs_dir, settings, answered),
        after=kept(plan.entry.name, runs_dir, settings, answered),
        note=f"{len(tasks)} sums x {num_samples}",
    )


@functools.cache
def compute_dtype() -> Literal["float32", "bfloat16"]:
    """What `auto` means here, asked once: a second measurement may come out differently, and both sides must agree."""
    return "bfloat16" if compute_in("auto") is torch.bfloat16 else "float32"


def kept(
    reference: str, runs_dir: Path, settings: Mapping[str, Any], compute: Callable[[FrozenModel], Estimate]
) -> Estimate:
    """compute(checkpoint), or its result from an earlier call on the same weights with the same settings."""
    checkpoint = resolve(reference, runs_dir)
    key = json.dumps([checkpoint.content_hash, SEED, compute_dtype(), settings], sort_keys=True)
    path = runs_dir / "demo-eval" / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"
    if path.is_file():
        return Estimate(**json.loads(path.read_text(encoding="utf-8")))
    with frozen_model(ModelArguments(model=reference, runs_dir=runs_dir, dtype=compute_dtype())) as frozen:
        estimate = compute(frozen)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(dataclasses.asdict(estimate)), encoding="utf-8")
    partial.replace(path)
    return estimate
