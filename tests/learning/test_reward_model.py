"""The reward model learns what people prefer, beyond length, and applies it to answers that it has never seen.

Its controls do not: flipped labels teach the opposite, shuffled ones nothing.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from strop.optim import OptimizerConfig
from strop.runs import read_lines
from strop.stages.reward_model import Config, train

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "cat", "sleeps"]


def taste(text: str) -> int:
    """What the judge likes: foxes and cats, no dogs; length does not matter to it."""
    words = text.split()
    return words.count("fox") + words.count("cat") - words.count("dog")


def rankings(count: int, draw: random.Random) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    while len(rows) < count:
        texts = [" ".join(draw.choices(WORDS, k=draw.randrange(2, 8))) for _ in range(draw.choice([2, 3, 4]))]
        ranks = [-taste(text) for text in texts]
        if len(set(texts)) == len(texts) and len(set(ranks)) > 1:
            prompt = f"say {draw.choice(WORDS)}:"
            rows.append({"prompt": prompt, "completions": [f" {text}" for text in texts], "ranks": ranks})
    return rows


def flipped(row: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    return {**row, "ranks": [-rank for rank in row["ranks"]]}


def shuffled(row: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    return {**row, "ranks": draw.sample(row["ranks"], len(row["ranks"]))}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("loss", ["kwise", "plackett_luce"])
def test_learns_a_taste_and_not_from_flipped_or_shuffled_ranks(
    tiny_folder: Path, tmp_path: Path, loss: Any, seed: int
) -> None:
    draw = random.Random(seed)
    training, held_out = rankings(1000, draw), rankings(200, draw)

    def learn(name: str, change: Callable[[dict[str, Any], random.Random], dict[str, Any]]) -> dict[str, float]:
        for file, rows in ((f"{name}.jsonl", [change(row, draw) for row in training]), ("held_out.jsonl", held_out)):
            (tmp_path / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = Config(
            init_from=str(tiny_folder),
            data=str(tmp_path / f"{name}.jsonl"),
            eval_data=str(tmp_path / "held_out.jsonl"),
            num_steps=60,
            batch_size=32,
            loss=loss,
            optimizer=OptimizerConfig(lr=5e-3, schedule="cosine", warmup_steps=5),
            eval_every=1000,
            dtype="float32",
            seed=seed,
        )
        *_, last = read_lines(train(config, name=name, runs_dir=tmp_path / "runs", resume=False) / "metrics.jsonl")
        return last

    right = learn("right", lambda row, draw: row)
    assert right["eval/accuracy"] > 0.95
    assert right["eval/accuracy_low"] > right["eval/accuracy_length_only"] + 0.2
    assert right["eval/accuracy_chosen_shorter"] > 0.9
    assert right["eval/nll"] < 0.25
    assert learn("flipped", flipped)["eval/accuracy"] < 0.05
    # Of nothing, the best guess is that both are as likely: log 2 = 0.693 for every pair.
    assert learn("shuffled", shuffled)["eval/nll"] > 0.6
