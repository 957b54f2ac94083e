"""DPO makes right answers likelier on tasks that it has never seen: from given pairs, from single labels, and online.

Its controls, flipped pairs and rewards for the answers of other tasks, do not.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from strop.optim import OptimizerConfig
from strop.rewards.config import RewardConfig
from strop.rollouts.prompts import Sampling
from strop.runs import read_lines
from strop.stages import dpo, sft
from strop.stages.dpo_config import Config, Online

REWARD = """
def exact(completions, answer, **_):
    return [float(text.strip() == right) for text, right in zip(completions, answer)]
"""


def test_learns_from_preferences_and_not_from_wrong_ones(tiny_folder: Path, tmp_path: Path) -> None:
    draw = random.Random(0)
    questions = [
        (f"{which} {number:03d} =", f"{number:03d}"[place])
        for which, place in (("first", 0), ("last", 2))
        for number in range(1000)
    ]
    draw.shuffle(questions)
    training, held_out = questions[:1600], questions[1600:1700]

    def write(name: str, rows: list[dict[str, Any]]) -> str:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / name)

    def wrong(answer: str) -> str:
        return draw.choice([str(digit) for digit in range(10) if str(digit) != answer])

    # A third of the answers that it is taught are right, the others random: so it learns to be right about that often.
    taught = [(p, a if draw.random() < 0.33 else str(draw.randrange(10))) for p, a in training]
    pairs = [{"prompt": p, "chosen": a, "rejected": wrong(a)} for p, a in training]
    flipped = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in pairs]
    singles = [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row in pairs
        for side in ("chosen", "rejected")
    ]
    others = draw.sample([answer for _, answer in training], len(training))
    tasks = [{"prompt": p, "answer": a} for p, a in training]
    shuffled = [{**row, "answer": answer} for row, answer in zip(tasks, others, strict=True)]
    (tmp_path / "reward.py").write_text(REWARD)
    held_out_pairs = write("held.jsonl", [{"prompt": p, "chosen": a, "rejected": wrong(a)} for p, a in held_out])
    held_out_tasks = write("held_tasks.jsonl", [{"prompt": p, "answer": a} for p, a in held_out])
    sft.train(
        sft.Config(
            init_from=str(tiny_folder),
            data=write("sft.jsonl", [{"prompt": p, "completion": a} for p, a in taught]),
            num_steps=500,
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

    def learn(name: str, num_steps: int, **options: Any) -> tuple[float, float, dict[str, Any]]:
        """(pass@1 before, after, the last line of the log)"""
        config = Config(
            init_from="taught",
            rewards=(RewardConfig(name=f"{tmp_path / 'reward.py'}:exact"),),
            eval_tasks=held_out_tasks,
            sampling=Sampling(max_new_tokens=4),
            num_steps=num_steps,
            optimizer=OptimizerConfig(lr=1e-3, schedule="linear"),
            eval_every=1000,
            save_every=1000,
            dtype="float32",
            **options,
        )
        lines = list(read_lines(dpo.train(config, name=name, runs_dir=tmp_path, resume=False) / "metrics.jsonl"))
        return lines[0]["eval/pass@1"], lines[-1]["eval/pass@1"], lines[-1]

    offline = {"batch_size": 32, "eval_data": held_out_pairs}
    before, after, last = learn("sppo", 100, loss="sppo", data=write("pairs.jsonl", pairs), **offline)
    assert 0.2 < before < 0.5 and after > 0.7
    assert last["eval/accuracy"] > 0.95
    _, after, last = learn("sigmoid", 60, data=write("pairs.jsonl", pairs), **offline)
    assert last["eval/accuracy"] > 0.95
    _, after, last = learn("flipped", 60, data=write("flipped.jsonl", flipped), **offline)
    assert last["eval/accuracy"] < 0.2 and after < before - 0.15
    _, after, _ = learn("kto", 100, loss="kto", batch_size=64, data=write("singles.jsonl", singles))
    assert after > before + 0.15

    online = {"batch_size": 16, "online": Online(tasks=write("tasks.jsonl", tasks), group_size=8)}
    _, after, _ = learn("online", 80, **online)
    assert after > 0.7
    online["online"] = Online(tasks=write("shuffled.jsonl", shuffled), group_size=8)
    _, after, _ = learn("shuffled", 80, **online)
    assert after <= before + 0.1
