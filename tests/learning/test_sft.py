"""SFT learns a mapping well enough to apply it to prompts that it has never seen, and not from swapped answers."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from strop.evals.tasks import evaluate_tasks
from strop.generation import Engine
from strop.models import load_model
from strop.optim import OptimizerConfig
from strop.rewards.function import FunctionReward
from strop.runs import read_lines
from strop.stages.sft import Config, train
from strop.tokenizer import Tokenizer
from strop.types import SamplingParams, Task


def questions(seed: int) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(training, held out): the first or the last of three digits is asked for."""
    everything = [
        (f"{which} {number:03d} =", f"{number:03d}"[place])
        for which, place in (("first", 0), ("last", 2))
        for number in range(1000)
    ]
    random.Random(seed).shuffle(everything)
    return everything[:1600], everything[1600:1700]


def exact(completions: Sequence[str], answer: Sequence[str], **_: object) -> list[float]:
    return [float(text.strip() == right) for text, right in zip(completions, answer, strict=True)]


def accuracy(folder: Path, held_out: Sequence[tuple[str, str]]) -> float:
    """Exact match of greedy answers."""
    tokenizer = Tokenizer.load(folder)
    tasks = [Task(id=prompt, prompt=prompt, columns={"answer": answer}) for prompt, answer in held_out]
    sampling = SamplingParams(max_new_tokens=4, temperature=0.0, stop_token_ids=tokenizer.stop_token_ids)
    engine = Engine(load_model(folder), tokenizer)
    return evaluate_tasks(engine, tokenizer, tasks, FunctionReward(exact), sampling=sampling).metrics["pass@1"]


@pytest.mark.parametrize("seed", [0, 1])
def test_learns_to_answer_what_it_has_not_seen(tiny_folder: Path, tmp_path: Path, seed: int) -> None:
    training, held_out = questions(seed)
    assert accuracy(tiny_folder, held_out) < 0.2
    answers = [answer for _, answer in training]
    found = {}
    for name, order in (("right", answers), ("swapped", random.Random(seed).sample(answers, len(answers)))):
        rows = [{"prompt": prompt, "completion": answer} for (prompt, _), answer in zip(training, order, strict=True)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / "held_out.jsonl").write_text(
            "".join(json.dumps({"prompt": prompt, "completion": answer}) + "\n" for prompt, answer in held_out)
        )
        config = Config(
            init_from=str(tiny_folder),
            data=str(tmp_path / f"{name}.jsonl"),
            eval_data=str(tmp_path / "held_out.jsonl"),
            num_steps=250,
            batch_tokens=1024,
            micro_batch_tokens=1024,
            max_length=64,
            optimizer=OptimizerConfig(lr=5e-3, schedule="cosine", warmup_steps=10),
            eval_every=1000,
            dtype="float32",
            seed=seed,
        )
        run = train(config, name=name, runs_dir=tmp_path / "runs", resume=False)
        *_, last = read_lines(run / "metrics.jsonl")
        found[name] = accuracy(run / "checkpoints/step-000250", held_out), last["eval/loss"]
    assert found["right"][0] > 0.9
    assert found["right"][1] < 0.2
    assert found["swapped"][0] < 0.3
    assert found["swapped"][1] > 1.0
