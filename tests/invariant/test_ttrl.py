"""Test-time RL reads no label, leaves its base alone in memory and on disk; a stopped run is its best checkpoint."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from strop.models import LoraConfig, load_model, weight_hash
from strop.models.adapters import is_adapter
from strop.models.decoder import Decoder
from strop.models.lora import detach
from strop.optim import OptimizerConfig
from strop.rewards.vote import VoteReward
from strop.rollouts.prompts import Sampling
from strop.runs import RunFolder, load_training_state, read_lines, resolve
from strop.stages import ttrl
from strop.stages.ttrl_config import Config, HeldOut
from strop.types import Completion, Task, Verdict

PROMPTS = [f"the quick {word} {number}" for word in ("fox", "dog", "cat") for number in range(8)]


def write_tasks(path: Path, answers: list[Any] | None) -> str:
    rows = [{"prompt": prompt} for prompt in PROMPTS]
    if answers is not None:
        rows = [{**row, "answer": answer} for row, answer in zip(rows, answers, strict=True)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def config(tiny_folder: Path, tasks: str, **changes: Any) -> Config:
    settings: dict[str, Any] = {
        "init_from": str(tiny_folder),
        "tasks": tasks,
        "answer_pattern": "whole",
        "num_steps": 3,
        "num_votes": 6,
        "group_size": 4,
        "prompts_per_step": 4,
        "kl_coef": 0.01,
        "sampling": Sampling(max_new_tokens=2),
        "optimizer": OptimizerConfig(lr=1e-2),
        "lora": LoraConfig(rank=2),
        "held_out": HeldOut(num_prompts=8, num_samples=4, every=1, max_drop=1.0, min_answers=0.0),
        "dtype": "float32",
    }
    return Config(**{**settings, **changes})


def files_hash(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("reward", ["majority", "weighted", "entropy", "self_certainty"])
def test_labels_change_nothing_but_the_report(tiny_folder: Path, tmp_path: Path, reward: str) -> None:
    hashes, lines = [], []
    numbers = [str(number) for number in range(len(PROMPTS))]
    for name, answers in (("none", None), ("right", numbers), ("other", numbers[::-1])):
        (tmp_path / name).mkdir()
        tasks = write_tasks(tmp_path / name / "tasks.jsonl", answers)
        votes = {"num_votes": 4} if reward in ("entropy", "self_certainty") else {}
        ttrl.train(
            config(tiny_folder, tasks, reward=reward, num_steps=2, **votes),
            name=name, runs_dir=tmp_path / "runs", resume=False,
        )  # fmt: skip
        checkpoint = RunFolder.open(tmp_path / "runs", name).latest_checkpoint()
        assert checkpoint is not None
        hashes.append(hashlib.sha256((checkpoint.path / "adapter_model.safetensors").read_bytes()).hexdigest())
        labelled = ("pass@", "maj@", "accuracy")
        lines.append(
            [
                {key: value for key, value in line.items() if not any(word in key for word in labelled)}
                for line in read_lines(tmp_path / "runs" / name / "metrics.jsonl", with_clock=False)
            ]
        )
        logged = list(read_lines(tmp_path / "runs" / name / "metrics.jsonl"))
        assert ("eval/pass@1" in logged[0]) == ("label_accuracy" in logged[1]) == (answers is not None)
    assert hashes[0] == hashes[1] == hashes[2]
    assert lines[0] == lines[1] == lines[2]
    assert any(line.get("grad_norm", 0) > 0 for line in lines[0]), "nothing was learned, so that nothing was tested"


class Onlooker(VoteReward):
    """A vote that notes every column that it could have read."""

    def __init__(self) -> None:
        super().__init__(answer_pattern="whole")
        self.columns: set[str] = set()

    def score(self, tasks: Sequence[Task], completions: Sequence[Completion]) -> list[Verdict]:
        self.columns |= {name for task in tasks for name in task.columns}
        return super().score(tasks, completions)


def test_a_reward_is_not_even_given_the_labels(tiny_folder: Path, tmp_path: Path) -> None:
    tasks = write_tasks(tmp_path / "t.jsonl", [str(number) for number in range(len(PROMPTS))])
    reward = Onlooker()
    ttrl.train(config(tiny_folder, tasks, num_steps=1), name="run", runs_dir=tmp_path, resume=False, reward=reward)
    assert reward.columns == set()


def test_the_base_stays_as_it_is_on_disk_and_under_the_adapter(tiny_folder: Path, tmp_path: Path) -> None:
    before = files_hash(tiny_folder)
    base_hash = weight_hash(load_model(tiny_folder, dtype=torch.float32))
    run = ttrl.train(
        config(tiny_folder, write_tasks(tmp_path / "t.jsonl", None)), name="run", runs_dir=tmp_path, resume=False
    )
    assert files_hash(tiny_folder) == before
    folder = resolve("run", tmp_path).path
    assert is_adapter(folder) and folder.parent.parent == run
    model = load_model(folder, adapter="keep")
    assert isinstance(model, Decoder)
    assert any(bool(value.any()) for name, value in model.named_parameters() if name.endswith(".B"))
    detach(model)
    assert weight_hash(model) == base_hash


def test_a_write_to_the_base_in_memory_ends_the_process(tiny_folder: Path) -> None:
    """The adapter can be written to, the base cannot: not by torch, not by anything."""
    code = f"""
import torch
from strop.models import LoraConfig, load_model
from strop.models.adapters import add_adapter
from strop.models.protect import protect
model = load_model({str(tiny_folder)!r}, dtype=torch.float32)
add_adapter(model, LoraConfig(rank=2), seed=0, base={str(tiny_folder)!r})
assert protect(model, only_frozen=True)
learns = [value for value in model.parameters() if value.requires_grad]
with torch.no_grad():
    learns[0].add_(1)
    print("adapter written", flush=True)
    next(value for value in model.parameters() if not value.requires_grad).add_(1)
print("base written", flush=True)
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert done.stdout == "adapter written\n"
    assert done.returncode == -signal.SIGSEGV


def test_the_stage_protects_its_base(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[set[str], bool]] = []
    real = ttrl.protect

    def spy(model: nn.Module, *, only_frozen: bool) -> bool:
        done = real(model, only_frozen=only_frozen)
        seen.append(({name for name, value in model.named_parameters() if value.requires_grad}, done))
        return done

    monkeypatch.setattr(ttrl, "protect", spy)
    tasks = write_tasks(tmp_path / "t.jsonl", None)
    ttrl.train(config(tiny_folder, tasks, num_steps=1), name="run", runs_dir=tmp_path, resume=False)
    [(learning, done)] = seen
    assert done and learning and all(".adapter." in name for name in learning)


def test_a_stopped_run_is_its_best_checkpoint_and_does_not_go_on(tiny_folder: Path, tmp_path: Path) -> None:
    """Any measurement but the first is an alarm here, so that the run stops at once and the base is what is left."""
    tasks = write_tasks(tmp_path / "t.jsonl", None)
    watched = HeldOut(num_prompts=8, num_samples=4, every=2, min_answers=1.0, max_drop=0.0, patience=2)
    settings = config(
        tiny_folder, tasks, num_steps=40, held_out=watched, optimizer=OptimizerConfig(lr=0.3), keep_checkpoints=1
    )
    run = ttrl.train(settings, name="run", runs_dir=tmp_path, resume=False)
    folder = RunFolder.open(tmp_path, "run")
    newest = folder.latest_checkpoint()
    assert newest is not None and newest.step is not None and newest.step < 40
    assert folder.info["status"] == "finished"
    watch = load_training_state(newest)[1]["watch"]
    assert watch["reason"] and watch["best_step"] < newest.step
    best = folder.checkpoint(watch["best_step"])
    name = "adapter_model.safetensors"
    assert (newest.path / name).read_bytes() == (best.path / name).read_bytes()
    *_, measured, result = read_lines(run / "metrics.jsonl")
    assert measured["step"] == result["step"] == newest.step and result["result_of_step"] == watch["best_step"]
    assert result["eval/base_agreement"] == watch["best_metrics"]["eval/base_agreement"]
    assert result["eval/base_agreement"] > measured["eval/base_agreement"] or (
        measured["eval/distinct_answers"] < watch["base_distinct"]
    )
    lines = (run / "metrics.jsonl").read_bytes()
    ttrl.train(settings, name="run", runs_dir=tmp_path, resume=True)
    assert (run / "metrics.jsonl").read_bytes() == lines
    with pytest.raises(ValueError, match=r"was stopped at step \d+ .* does not go on"):
        ttrl.train(Config(**{**vars(settings), "num_steps": 50}), name="run", runs_dir=tmp_path, resume=True)


def test_a_trained_whole_model_is_put_back_too(tiny_folder: Path, tmp_path: Path) -> None:
    tasks = write_tasks(tmp_path / "t.jsonl", None)
    watched = HeldOut(num_prompts=8, num_samples=4, every=1, min_answers=1.0, max_drop=0.0, patience=2)
    ttrl.train(
        config(
            tiny_folder, tasks, num_steps=40, held_out=watched, lora=LoraConfig(), all_weights=True,
            optimizer=OptimizerConfig(lr=0.1),
        ),
        name="run", runs_dir=tmp_path, resume=False,
    )  # fmt: skip
    newest = resolve("run", tmp_path)
    best = load_training_state(newest)[1]["watch"]["best_step"]
    assert newest.step is not None and best < newest.step < 40
    assert weight_hash(load_model(newest.path)) == weight_hash(load_model(resolve(f"run/{best}", tmp_path).path))
