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


def run_sft(folder: Path, name: str, data: str, held_out: str, init_from: str, lora: LoraConfig | None) -> float:
    """The held-out loss after the last step."""
    config = sft.Config(
        init_from=init_from,
        data=data,
        eval_data=held_out,
        num_steps=500 if lora is None else 250,
        batch_tokens=1024,
        micro_batch_tokens=1024,
        max_length=64,
        optimizer=OptimizerConfig(lr=5e-3 if lora is None else 1e-2, schedule="cosine", warmup_steps=10),
        lora=lora,
        eval_every=1000,
        save_every=1000,
        dtype="float32",
    )
    run = sft.train(config, name=name, runs_dir=folder, resume=False)
    *_, last = read_lines(run / "metrics.jsonl")
    return last["eval/loss"]


def run_grpo(folder: Path, name: str, tasks: str, held_out: str) -> tuple[float, float]:
    """Held-out success before and after, from the run "base"."""
    config = grpo.Config(
        init_from="base",
        tasks=tasks,
        rewards=(RewardConfig(name=f"{folder / 'reward.py'}:exact"),),
        num_steps=60,
        prompts_per_step=16,
        group_size=8,
        sampling=Sampling(max_new_tokens=4),
        optimizer=OptimizerConfig(lr=5e-3),
        lora=LORA,
        eval=Evaluation(tasks=held_out, every=1000, num_samples=4),
        save_every=1000,
        dtype="float32",
    )
    run = grpo.train(config, name=name, runs_dir=folder, resume=False)
    lines = list(read_lines(run / "metrics.jsonl"))
    return lines[0]["eval/pass@1"], lines[-1]["eval/pass@1"]


def test_sft_then_grpo(tiny_folder: Path, tmp_path: Path) -> None:
    """From a base that is right about a third of the time, which training all weights of a random model has made."""
    draw = random.Random(0)
    rows = questions(0)
    training, held_out = rows[:1600], rows[1600:1700]
    answers = draw.sample([row["answer"] for row in training], len(training))
    shuffled = [{**row, "answer": answer} for row, answer in zip(training, answers, strict=True)]

    def examples(name: str, pairs: list[dict[str, str]], share: float) -> str:
        """The given answers to a share of the questions, any digit to the others."""
        digits = [row["answer"] if draw.random() < share else str(draw.randrange(10)) for row in pairs]
        return write_lines(
            tmp_path / f"{name}.jsonl",
            [{"prompt": row["prompt"], "completion": digit} for row, digit in zip(pairs, digits, strict=True)],
        )

    (tmp_path / "reward.py").write_text(REWARD)
    eval_file = examples("sft_held_out", held_out, 1.0)
    run_sft(tmp_path, "base", examples("base", training, 0.33), eval_file, str(tiny_folder), None)
    losses = {
        "right": run_sft(tmp_path, "right", examples("right", training, 1.0), eval_file, "base", LORA),
        "swapped": run_sft(tmp_path, "swapped", examples("swapped", shuffled, 1.0), eval_file, "base", LORA),
    }
    held_out_file = write_lines(tmp_path / "held_out.jsonl", held_out)
    before, after = run_grpo(tmp_path, "rl", write_lines(tmp_path / "tasks.jsonl", training), held_out_file)
    control = run_grpo(tmp_path, "rl_shuffled", write_lines(tmp_path / "shuffled.jsonl", shuffled), held_out_file)
    print(losses, before, after, control)
    assert losses["right"] < 0.3
    assert losses["swapped"] > 1.0
    assert 0.2 < before < 0.5
    assert after > 0.55
    assert control[0] == before
    assert control[1] <= before + 0.1
    base = weight_hash(load_model(tmp_path / "base/checkpoints/step-000500"))
    assert [base_hash(tmp_path / name) for name in ("right", "swapped", "rl", "rl_shuffled")] == [base] * 4
