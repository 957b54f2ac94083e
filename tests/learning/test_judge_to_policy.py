"""From a judge to a better policy, through everything between: rankings -> reward model -> PPO, and rankings -> DPO.

The judge stands where people stand: it answers the ranking page's queue. With its answers turned round, the same way
makes a policy that it likes less than the one it began with.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from strop.optim import OptimizerConfig
from strop.ranking import PreferenceStore, export_rankings, rank_with_judge
from strop.rewards.config import RewardConfig
from strop.rollouts.prompts import Sampling
from strop.runs import read_lines
from strop.stages import dpo, ppo, reward_model, sft
from strop.stages.held_out import Evaluation
from strop.stages.ppo_config import Config as PpoConfig
from strop.stages.ppo_config import CriticConfig

GOLD = """
def taste(completions, **_):
    return [min(4, text.split().count("fox")) / 4 for text in completions]
"""
WORDS = ["the", "quick", "brown", "fox", "lazy", "dog", "cat", "sleeps"]


def taste(text: str) -> int:
    """What the judge likes: foxes. The gold reward measures the same."""
    return text.split().count("fox")


def sentence(draw: random.Random) -> str:
    return "".join(f" {draw.choice(WORDS)}" for _ in range(draw.randrange(2, 7)))


def write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def home(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs, among them `start`: a policy that says such sentences."""
    home = tmp_path_factory.mktemp("judge")
    draw = random.Random(0)
    (home / "gold.py").write_text(GOLD)
    said = [{"prompt": f"say {draw.choice(WORDS)}:", "completion": sentence(draw)} for _ in range(400)]
    config = sft.Config(
        init_from=str(tiny_folder),
        data=write_lines(home / "said.jsonl", said),
        num_steps=120,
        batch_tokens=1024,
        micro_batch_tokens=1024,
        max_length=64,
        optimizer=OptimizerConfig(lr=5e-3, schedule="cosine", warmup_steps=10),
        save_every=1000,
        dtype="float32",
    )
    sft.train(config, name="start", runs_dir=home, resume=False)
    write_lines(home / "tasks.jsonl", [{"prompt": f"say {word}:"} for word in WORDS * 8])
    return home


def ranked(home: Path, name: str, judge: Callable[[Any, Sequence[str]], Sequence[float]]) -> tuple[str, str]:
    """The judge's rankings, as pairs and as lists."""
    draw = random.Random(1)
    store = PreferenceStore(home / f"{name}.db", create=True, seed=0)
    for _ in range(250):
        store.add_item(f"say {draw.choice(WORDS)}:", list(dict.fromkeys(sentence(draw) for _ in range(4))))
    assert rank_with_judge(store, judge, name=name) == 250
    files = str(home / f"{name}_pairs.jsonl"), str(home / f"{name}_lists.jsonl")
    export_rankings(store, "trl", files[0])
    export_rankings(store, "listwise", files[1])
    store.close()
    return files


def learn(
    home: Path, name: str, judge: Callable[[Any, Sequence[str]], Sequence[float]]
) -> dict[str, tuple[float, float]]:
    """{stage: the judge's own score of the policy's answers before and after}"""
    pairs, lists = ranked(home, name, judge)
    gold = RewardConfig(name=f"{home / 'gold.py'}:taste", weight=0.0)
    tasks, sampling = str(home / "tasks.jsonl"), Sampling(max_new_tokens=24)
    shared: dict[str, Any] = {"init_from": "start", "sampling": sampling, "save_every": 1000, "dtype": "float32"}
    judged = reward_model.Config(
        init_from="start",
        data=lists,
        num_steps=60,
        batch_size=32,
        optimizer=OptimizerConfig(lr=5e-3, schedule="cosine", warmup_steps=5),
        save_every=1000,
        dtype="float32",
    )
    reward_model.train(judged, name=f"{name}-rm", runs_dir=home, resume=False)
    reinforced = PpoConfig(
        **shared,
        tasks=tasks,
        rewards=(gold, RewardConfig(name="model", options={"model": f"{name}-rm"})),
        num_steps=15,
        prompts_per_step=8,
        group_size=8,
        epochs_per_rollout=2,
        critic=CriticConfig(start=f"{name}-rm", lr=2e-3),
        optimizer=OptimizerConfig(lr=1e-3),
        eval=Evaluation(tasks=tasks, every=1000),
    )
    preferred = dpo.Config(
        **shared,
        data=pairs,
        rewards=(gold,),
        eval_tasks=tasks,
        num_steps=40,
        batch_size=32,
        optimizer=OptimizerConfig(lr=5e-4, schedule="linear"),
        eval_every=1000,
    )
    runs = {
        "ppo": ppo.train(reinforced, name=f"{name}-ppo", runs_dir=home, resume=False),
        "dpo": dpo.train(preferred, name=f"{name}-dpo", runs_dir=home, resume=False),
    }
    scores: dict[str, tuple[float, float]] = {}
    for stage, run in runs.items():
        first, *_, last = read_lines(run / "metrics.jsonl")
        scores[stage] = first["eval/score"], last["eval/score"]
    return scores


def test_the_judges_score_rises_and_falls_with_its_answers_turned_round(home: Path) -> None:
    right = learn(home, "judge", lambda prompt, texts: [taste(text) for text in texts])
    flipped = learn(home, "flipped", lambda prompt, texts: [-taste(text) for text in texts])
    print(right, flipped)
    for stage in ("ppo", "dpo"):
        before = right[stage][0]
        assert flipped[stage][0] == before
        assert right[stage][1] > before + 0.3
        assert flipped[stage][1] < before - 0.05
