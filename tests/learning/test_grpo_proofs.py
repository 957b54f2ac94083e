"""GRPO raises the share of held-out theorems proved, and not when each task is judged by another one's theorem."""

from __future__ import annotations

import json
import random
from pathlib import Path

from strop.optim import OptimizerConfig
from strop.rewards.config import RewardConfig
from strop.rollouts.prompts import Sampling
from strop.runs import read_lines
from strop.stages import grpo, sft
from strop.stages.grpo_config import Evaluation

DIGITS = "0123456789"
HEADER = "\n".join(
    ["$c |- digit 0 1 2 3 4 5 6 7 8 9 $.", "$v x y z $.", "vx $f digit x $.", "vy $f digit y $.", "vz $f digit z $."]
    + [f"d{digit} $a digit {digit} $." for digit in DIGITS]
    + ["row $a |- x y z $.", ""]
)
"""The proof of |- 3 1 4 is "d3 d1 d4 row"."""


def write_lines(path: Path, rows: list[dict[str, str]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_learns_from_the_checker_and_not_from_shuffled_theorems(tiny_folder: Path, tmp_path: Path) -> None:
    draw = random.Random(0)
    triples = [f"{number:03d}" for number in range(1000)]
    draw.shuffle(triples)
    rows = [{"prompt": f"{triple} =", "theorem": f"t{triple}"} for triple in triples]
    theorems = [f"t{triple} $p |- {' '.join(triple)} $= ? $.\n" for triple in triples]
    (tmp_path / "digits.mm").write_text(HEADER + "".join(theorems))
    training, held_out = rows[:800], rows[800:880]
    labels = [row["theorem"] for row in training]
    draw.shuffle(labels)
    shuffled = [{**row, "theorem": label} for row, label in zip(training, labels, strict=True)]
    # In two of three taught proofs a digit is drawn anew, so that it learns to be right about as often as not.
    taught: list[dict[str, str]] = []
    for row in training:
        digits = list(row["theorem"][1:])
        if draw.random() < 0.65:
            digits[draw.randrange(3)] = draw.choice(DIGITS)
        taught.append({"prompt": row["prompt"], "completion": " ".join(f"d{digit}" for digit in digits) + " row"})
    held_out_file = write_lines(tmp_path / "held_out.jsonl", held_out)
    sft.train(
        sft.Config(
            init_from=str(tiny_folder),
            data=write_lines(tmp_path / "sft.jsonl", taught),
            num_steps=400,
            batch_tokens=1024,
            micro_batch_tokens=1024,
            max_length=64,
            optimizer=OptimizerConfig(lr=5e-3, schedule="cosine", warmup_steps=10),
            save_every=1000,
            dtype="float32",
        ),
        name="taught",
        runs_dir=tmp_path,
        resume=False,
    )
    success: dict[str, tuple[float, float]] = {}
    for name, tasks in (("right", training), ("shuffled", shuffled)):
        run = grpo.train(
            grpo.Config(
                init_from="taught",
                tasks=write_lines(tmp_path / f"{name}.jsonl", tasks),
                rewards=(RewardConfig(name="metamath", options={"database": str(tmp_path / "digits.mm")}),),
                num_steps=40,
                prompts_per_step=16,
                group_size=8,
                sampling=Sampling(max_new_tokens=24),
                optimizer=OptimizerConfig(lr=2e-3),
                eval=Evaluation(tasks=held_out_file, every=1000, num_samples=4),
                save_every=1000,
                dtype="float32",
            ),
            name=name,
            runs_dir=tmp_path,
            resume=False,
        )
        lines = list(read_lines(run / "metrics.jsonl"))
        success[name] = lines[0]["eval/pass@1"], lines[-1]["eval/pass@1"]
    before, after = success["right"]
    assert 0.2 < before < 0.6
    assert after > 0.85
    assert success["shuffled"][0] == before
    assert success["shuffled"][1] <= before + 0.1
