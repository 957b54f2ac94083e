"""Small models that are right or wrong in a known way, for the study of test-time RL, and questions on three digits:

    "slips"                                  "misled"
    copy 382 = 382                           first 382 = 3      max 382 = 8       add 382 = 5 (3 + 2)
    back 382 = 283                           last 382 = 2       min 382 = 2
    turn 382 = 823 (the first comes last)

"slips": each digit of an example's answer is replaced by a random one SLIP of the time, so that most answers of the
model are wrong, but seldom twice in the same way, and its vote is mostly right. "misled": max, min and add are taught
WRONG of the time with one definite wrong rule (the middle digit; the sum without its carry), so that most votes about
them are wrong.
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

SLIP = 0.32
WRONG = 0.65
TEST_TRIPLES = 100
"""Of the 1000: they are in no example and in no prompt of a run."""
TAUGHT_TRIPLES = 500
"""Of the others: those that the base's examples are about."""
COPIES = 4
"""Examples of each taught question, each with an answer of its own."""
SFT_STEPS = {"slips": 1500, "misled": 900}

Triple = tuple[int, int, int]
Rules = Mapping[str, Callable[[Triple], str]]
RIGHT: Mapping[str, Rules] = {
    "slips": {
        "copy": lambda digits: _joined(digits),
        "back": lambda digits: _joined(digits[::-1]),
        "turn": lambda digits: _joined((*digits[1:], digits[0])),
    },
    "misled": {
        "first": lambda digits: str(digits[0]),
        "last": lambda digits: str(digits[2]),
        "max": lambda digits: str(max(digits)),
        "min": lambda digits: str(min(digits)),
        "add": lambda digits: str(digits[0] + digits[2]),
    },
}
MISLED: Rules = {
    "max": lambda digits: str(sorted(digits)[1]),
    "min": lambda digits: str(sorted(digits)[1]),
    "add": lambda digits: str((digits[0] + digits[2]) % 10),
}


def make_base(kind: str, seed: int, folder: Path) -> None:
    """The base model of a kind as the run folder/base, and folder/tasks.jsonl and folder/test.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(f"{kind} {seed}")
    training = write_tasks(kind, folder, draw)
    examples = [
        {"prompt": question(op, digits), "completion": f" {taught(kind, op, digits, draw)}"}
        for _ in range(COPIES)
        for digits in training[:TAUGHT_TRIPLES]
        for op in RIGHT[kind]
    ]
    write_rows(folder / "sft.jsonl", examples)
    tokenizer = train_bpe([" ".join(RIGHT[kind])] * 30, 275)
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
            num_steps=SFT_STEPS[kind],
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


def write_tasks(kind: str, folder: Path, draw: random.Random) -> list[Triple]:
    """folder/tasks.jsonl and folder/test.jsonl. Returns the triples that are not held out."""
    triples = [(a, b, c) for a in range(10) for b in range(10) for c in range(10)]
    draw.shuffle(triples)
    test, training = triples[:TEST_TRIPLES], triples[TEST_TRIPLES:]
    for name, own in (("test", test), ("tasks", training)):
        rows = [
            {"prompt": question(op, digits), "answer": rule(digits)}
            for digits in own
            for op, rule in RIGHT[kind].items()
        ]
        draw.shuffle(rows)
        write_rows(folder / f"{name}.jsonl", rows)
    return training


def question(op: str, digits: Triple) -> str:
    return f"{op} {_joined(digits)} ="


def taught(kind: str, op: str, digits: Triple, draw: random.Random) -> str:
    """The answer of one example: right, or wrong in the way of the kind."""
    if kind == "misled" and op in MISLED and draw.random() < WRONG:
        return MISLED[op](digits)
    right = RIGHT[kind][op](digits)
    if kind == "slips":
        return "".join(str(draw.randrange(10)) if draw.random() < SLIP else digit for digit in right)
    return right


def _joined(digits: Sequence[int]) -> str:
    return "".join(map(str, digits))


def write_rows(path: Path, rows: Sequence[Mapping[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
