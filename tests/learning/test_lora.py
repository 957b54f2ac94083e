"""With LoRA, SFT and GRPO learn as with all weights trained, not from swapped answers, and the base stays."""

from __future__ import annotations

import json
import random
from pathlib import Path

from strop.models import LoraConfig, load_model, weight_hash
from strop.models.decoder import Decoder
from strop.models.lora import detach
from strop.optim import OptimizerConfig
from strop.rewards.config import RewardConfig
from strop.rollouts.prompts import Sampling
from strop.runs import read_lines
from strop.stages import grpo, sft
from strop.stages.grpo_config import Evaluation

REWARD = """
def exact(completions, answer, **_):
    return [float(text.strip() == right) for text, right in zip(completions, answer)]
"""
LORA = LoraConfig(rank=8, alpha=16)


def write_lines(path: Path, rows: list[dict[str, str]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def questions(seed: int) -> list[dict[str, str]]:
    """The first or the last of three digits is asked for."""
    rows = [
        {"prompt": f"{which} {number:03d} =", "answer": f"{number:03d}"[place]}
        for which, place in (("first", 0), ("last", 2))
        for number in range(1000)
    ]
    random.Random(seed).shuffle(rows)
    return rows


def base_hash(run: Path) -> str:
    """Of the last checkpoint's model with its adapter taken away."""
    model = load_model(max(run.glob("checkpoints/step-*")), adapter="keep")
    assert isinstance(model, Decoder) and model.adapter is not None
    detach(model)
    return weight_hash(model)


def test_sft_then_grpo(tiny_folder: Path, tmp_path: Path) -> None:
    draw = random.Random(0)
    rows = questions(0)
    training, held_out = rows[:1600], rows[1600:1700]
    answers = draw.sample([row["answer"] for row in training], len(training))
    shuffled = [{**row, "answer": answer} for row, answer in zip(training, answers, strict=True)]
    # A third of the answers that it is taught are right, the others random: so it learns to be right about that often.
    taught = [
        {"prompt": row["prompt"], "completion": row["answer"] if draw.random() < 0.33 else str(draw.randrange(10))}
        for row in training
    ]
    (tmp_path / "reward.py").write_text(REWARD)
    as_examples = [{"prompt": row["prompt"], "completion": row["answer"]} for row in held_out]
    losses: dict[str, list[float]] = {}
    for name, examples in (
        ("taught", taught),
        ("swapped", [{"prompt": row["prompt"], "completion": row["answer"]} for row in shuffled]),
    ):
        run = sft.train(
            sft.Config(
                init_from=str(tiny_folder),
                data=write_lines(tmp_path / f"{name}.jsonl", examples),
                eval_data=write_lines(tmp_path / "sft_held_out.jsonl", as_examples),
                num_steps=400,
                batch_tokens=1024,
                micro_batch_tokens=1024,
                max_length=64,
                optimizer=OptimizerConfig(lr=1e-2, schedule="cosine", warmup_steps=10),
                lora=LORA,
                eval_every=399,
                save_every=1000,
                dtype="float32",
            ),
            name=name,
            runs_dir=tmp_path,
            resume=False,
        )
        losses[name] = [line["eval/loss"] for line in read_lines(run / "metrics.jsonl") if "eval/loss" in line]
    success: dict[str, tuple[float, float]] = {}
    for name, tasks in (("right", training), ("shuffled", shuffled)):
        run = grpo.train(
            grpo.Config(
                init_from="taught",
                tasks=write_lines(tmp_path / f"{name}.jsonl", tasks),
                rewards=(RewardConfig(name=f"{tmp_path / 'reward.py'}:exact"),),
                num_steps=50,
                prompts_per_step=16,
                group_size=8,
                sampling=Sampling(max_new_tokens=4),
                optimizer=OptimizerConfig(lr=5e-3),
                lora=LORA,
                eval=Evaluation(tasks=write_lines(tmp_path / "held_out.jsonl", held_out), every=1000, num_samples=4),
                save_every=1000,
                dtype="float32",
            ),
            name=name,
            runs_dir=tmp_path,
            resume=False,
        )
        lines = list(read_lines(run / "metrics.jsonl"))
        success[name] = lines[0]["eval/pass@1"], lines[-1]["eval/pass@1"]
    print(losses, success)
    before, after = success["right"]
    # Two thirds of the answers are noise: about 1.2 nats is the best that can be reached.
    assert losses["taught"][-1] < 1.0
    assert losses["swapped"][-1] > 1.2
    assert 0.2 < before < 0.5
    assert after > 0.8
    assert success["shuffled"][0] == before
    assert success["shuffled"][1] <= before + 0.1
    base = weight_hash(load_model(tiny_folder))
    assert [base_hash(tmp_path / name) for name in ("taught", "swapped", "right", "shuffled")] == [base] * 4
