"""Small models that are right or wrong in a known way, for the study of test-time RL. Five questions on three digits:

    first 382 =   3        last 382 =   2        max 382 =   8        min 382 =   2        add 382 =   5 (3 + 2)

"noisy": the first four; every example's answer is replaced by a random digit NOISE of the time, so that the model is
often wrong but seldom twice in the same way, and its vote is mostly right. "noisier": more of that noise. "misled":
max, min and add are taught WRONG of the time with one definite wrong rule (the middle digit; the sum without its
carry), so that most votes about them are wrong.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from strop.models import ModelConfig, init_model, save_model
from strop.optim import OptimizerConfig
from strop.stages import sft
from strop.tokenizer import train_bpe

NOISE = {"noisy": 0.42, "noisier": 0.5}
WRONG = 0.65
TEST_TRIPLES = 100
"""Of the 1000: they are in no example and in no prompt of a run."""
TAUGHT_TRIPLES = 500
"""Of the others: those that the base's examples are about."""
COPIES = 4
"""Examples of each taught question, each with an answer of its own."""
SFT_STEPS = 900

Triple = tuple[int, int, int]
RIGHT: Mapping[str, Callable[[Triple], int]] = {
    "first": lambda digits: digits[0],
    "last": lambda digits: digits[2],
    "max": max,
    "min": min,
    "add": lambda digits: digits[0] + digits[2],
}
MISLED: Mapping[str, Callable[[Triple], int]] = {
    "max": lambda digits: sorted(digits)[1],
    "min": lambda digits: sorted(digits)[1],
    "add": lambda digits: (digits[0] + digits[2]) % 10,
}


def make_base(kind: str, seed: int, folder: Path) -> None:
    """The base model of a kind as the run folder/base, and folder/tasks.jsonl and folder/test.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(f"{kind} {seed}")
    training, ops = write_tasks(kind, folder, draw)
    examples = [
        {"prompt": question(op, digits), "completion": f" {taught(kind, op, digits, draw)}"}
        for _ in range(COPIES)
        for digits in training[:TAUGHT_TRIPLES]
        for op in ops
    ]
    write_rows(folder / "sft.jsonl", examples)
    tokenizer = train_bpe([" ".join(RIGHT)] * 30, 275)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_layers=2,
        num_heads=4,
        num_kv_heads=4,
        head_dim=16,
        max_position_embeddings=32,
        eos_token_id=tokenizer.eos_id,
    )
    save_model(init_model(config, seed=seed), folder / "blank")
    tokenizer.save(folder / "blank")
    sft.train(
        sft.Config(
            init_from=str(folder / "blank"),
            data=str(folder / "sft.jsonl"),
            num_steps=SFT_STEPS,
            batch_tokens=2048,
            micro_batch_tokens=2048,
            max_length=16,
            optimizer=OptimizerConfig(lr=3e-3, schedule="cosine", warmup_steps=20),
            save_every=10**6,
            dtype="float32",
            seed=seed,
        ),
        name="base",
        runs_dir=folder,
        resume=False,
    )


def write_tasks(kind: str, folder: Path, draw: random.Random) -> tuple[list[Triple], list[str]]:
    """folder/tasks.jsonl and folder/test.jsonl. Returns the triples that are not held out, and the questions asked."""
    triples = [(a, b, c) for a in range(10) for b in range(10) for c in range(10)]
    draw.shuffle(triples)
    ops = [op for op in RIGHT if kind == "misled" or op != "add"]
    test, training = triples[:TEST_TRIPLES], triples[TEST_TRIPLES:]
    for name, own in (("test", test), ("tasks", training)):
        rows = [{"prompt": question(op, digits), "answer": str(RIGHT[op](digits))} for digits in own for op in ops]
        draw.shuffle(rows)
        write_rows(folder / f"{name}.jsonl", rows)
    return training, ops


def question(op: str, digits: Triple) -> str:
    return f"{op} {digits[0]}{digits[1]}{digits[2]} ="


def taught(kind: str, op: str, digits: Triple, draw: random.Random) -> int:
    """The answer of one example: right, or wrong in the way of the kind."""
    if kind == "misled" and op in MISLED and draw.random() < WRONG:
        return MISLED[op](digits)
    if draw.random() < NOISE.get(kind, 0.0):
        return draw.randrange(10)
    return RIGHT[op](digits)


def write_rows(path: Path, rows: Sequence[Mapping[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
