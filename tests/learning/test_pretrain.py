"""Pre-training learns what follows what: it beats the best guess without context, where there is something to learn."""

from __future__ import annotations

import math
import random
from collections import Counter
from pathlib import Path

import pytest

from strop.optim import OptimizerConfig
from strop.runs import read_lines
from strop.stages.pretrain import Config, Shape, Source, train
from strop.tokenizer import Tokenizer

NAMES = ["fox", "dog", "cat", "hen", "owl", "bat"]
SEPARATOR = "\n<|endoftext|>\n"


def sentences(count: int, seed: int) -> list[str]:
    """Who chases whom is decided by the first name, and the number comes back at the end."""
    draw = random.Random(seed)
    chosen = [(draw.randrange(len(NAMES)), draw.randrange(10, 100)) for _ in range(count)]
    return [f"the {NAMES[i]} {n} chases the {NAMES[(i + 1) % 6]} and the {NAMES[i]} is {n}." for i, n in chosen]


def without_order(texts: list[str], seed: int) -> list[str]:
    """The same characters, each text's in random order: nothing to learn but how frequent they are."""
    draw = random.Random(seed)
    return ["".join(draw.sample(text, len(text))) for text in texts]


def unigram_bits_per_byte(tokenizer: Tokenizer, training: list[str], held_out: list[str]) -> float:
    """Of the best guess without context: the tokens' training frequencies, over what bits_per_byte counts."""
    counts = Counter(token for text in training for token in [*tokenizer.encode(text), tokenizer.eos_id])
    total = sum(counts.values()) + tokenizer.vocab_size
    bits, num_bytes = 0.0, 0
    for text in held_out:
        ids = tokenizer.encode(text)
        bits -= sum(math.log2((counts[token] + 1) / total) for token in ids[1:])
        num_bytes += len(text.encode()) - len(tokenizer.decode(ids[:1]).encode())
    return bits / num_bytes


def learn(folder: Path, training: list[str], held_out: list[str], seed: int) -> tuple[float, float]:
    """(the model's, the unigram's) bits per byte on held-out text."""
    folder.mkdir()
    (folder / "train.txt").write_text(SEPARATOR.join(training))
    (folder / "held_out.txt").write_text(SEPARATOR.join(held_out))
    config = Config(
        data=(Source(path=str(folder / "train.txt")),),
        eval_data=str(folder / "held_out.txt"),
        vocab_size=275,
        model=Shape(hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=64),
        context_length=64,
        num_steps=150,
        batch_tokens=1024,
        micro_batch_tokens=1024,
        optimizer=OptimizerConfig(lr=1e-2, schedule="cosine", warmup_steps=10, beta2=0.95),
        eval_every=1000,
        dtype="float32",
        seed=seed,
    )
    run = train(config, name="run", runs_dir=folder / "runs", resume=False)
    *_, last = read_lines(run / "metrics.jsonl")
    tokenizer = Tokenizer.load(run / "checkpoints/step-000150")
    return last["eval/bits_per_byte"], unigram_bits_per_byte(tokenizer, training, held_out)


@pytest.mark.parametrize("seed", [0, 1])
def test_beats_the_unigram_where_context_tells_something_and_not_where_it_does_not(tmp_path: Path, seed: int) -> None:
    training, held_out = sentences(600, seed), sentences(60, seed + 100)
    model, unigram = learn(tmp_path / "order", training, held_out, seed)
    assert unigram > 1.5
    assert model < 0.35 * unigram
    # Two digits are not to be guessed the first time: nobody can do better than log2(90) bits a sentence and the name.
    least = (math.log2(90) + math.log2(6)) / (sum(map(len, held_out)) / len(held_out))
    assert model > least

    model, unigram = learn(tmp_path / "none", without_order(training, seed), without_order(held_out, seed + 1), seed)
    assert 0.9 * unigram < model < 1.1 * unigram
