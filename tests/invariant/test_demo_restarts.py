"""`make demo` in miniature: a part that fails leaves the rest, and a second call finds everything done."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from strop.cli.config import FIELD_NAMES, to_toml
from strop.cli.pipeline import Entry

DEMO = Path(__file__).parents[2] / "recipes" / "demo"

SUPERVISED = {"num_steps": 2, "batch_tokens": 1024, "micro_batch_tokens": 1024, "optimizer": {"warmup_steps": 0}}
SHAPE = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "intermediate_size": 32}
RL = {
    "num_steps": 2,
    "prompts_per_step": 2,
    "group_size": 2,
    "sampling": {"max_new_tokens": 2},
    "optimizer": {"warmup_steps": 0},
    "eval": {"every": 2, "max_tasks": 4},
}
COMPARED = {"num_steps": 2, "batch_size": 4, "eval_every": 2, "optimizer": {"warmup_steps": 0}}
TINY = {
    "pretrain": SUPERVISED | {"model": SHAPE, "optimizer": {"lr": 1e-3, "schedule": "constant", "warmup_steps": 0}},
    "sft": SUPERVISED,
    "grpo": RL,
    "ppo": RL,
    "reward-model": COMPARED,
    "dpo": COMPARED | {"max_eval_tasks": 4, "sampling": {"max_new_tokens": 2}},
}
RUNS = ["demo-base", "demo-sft", "demo-grpo", "demo-ppo", "demo-reward", "demo-ppo-model", "demo-dpo"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The demo's recipes, its stages with tiny numbers over them, and a SmolLM2 folder that is cut short."""
    shutil.copytree(DEMO, tmp_path / "recipes" / "demo", ignore=shutil.ignore_patterns("*.py", "*.xz"))
    for name in ("scratch", "preferences"):
        stages = tomllib.loads((DEMO / f"{name}.toml").read_text(encoding="utf-8"))["stage"]
        entries = [Entry(**_renamed(stage), overrides=TINY[stage["stage"]]) for stage in stages]
        text = "\n".join(f"[[stage]]\n{to_toml(entry)}" for entry in entries)
        (tmp_path / "recipes" / "demo" / f"{name}.toml").write_text(text, encoding="utf-8")
    (tmp_path / "models" / "smollm2").mkdir(parents=True)
    (tmp_path / "models" / "smollm2" / "config.json").write_text("{}", encoding="utf-8")
    return tmp_path


def _renamed(stage: dict[str, str]) -> dict[str, str]:
    return {FIELD_NAMES.get(key, key): value for key, value in stage.items() if key != "overrides"}


def call(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(DEMO / "run.py"), *arguments],
        cwd=folder,
        env=os.environ | {"STROP_PROGRESS": "off", "COLUMNS": "120"},
        capture_output=True,
        text=True,
        check=False,
    )


def results(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "runs" / "demo-results.json").read_text(encoding="utf-8"))


def rankings(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "runs" / "demo-data").glob("preferences*.jsonl")}


def test_a_part_that_fails_leaves_the_other_and_a_second_call_repeats_nothing(folder: Path):
    first = call(folder)
    assert first.returncode == 1, first.stderr
    assert "The smollm2 part stopped: " in first.stderr and "run the same command again" in first.stderr
    rows = results(folder)
    assert [row["run"] for row in rows] == RUNS
    before = [row["held_out"]["before"] for row in rows if row["stage"] in ("grpo", "ppo", "dpo")]
    assert before == [rows[1]["held_out"]["after"]] * 4, "the same weights, measured alike"
    assert [row["reward"] for row in rows] == ["", "", "math", "math", "", "reward model", ""]
    assert all(row["held_out"]["before"] != row["held_out"]["after"] for row in (rows[0], rows[4]))
    assert "strop chat demo-grpo" in first.stdout
    page = (folder / "runs" / "demo-report.html").read_text(encoding="utf-8")
    stages = ("pretrain", "sft", "grpo", "ppo", "reward-model", "ppo", "dpo")
    assert re.findall(r'<td data-name="stage">(.*?)</td>', page) == list(stages)

    measured = {path.name: path.stat().st_mtime_ns for path in (folder / "runs" / "demo-eval").iterdir()}
    ranked = rankings(folder)
    assert set(ranked) == {f"preferences{which}{form}.jsonl" for which in ("", "_held_out") for form in ("", "_pairs")}
    # As if it had been stopped between ranking and writing the held-out ones.
    untouched = folder / "runs" / "demo-data" / "preferences.jsonl"
    written = untouched.stat().st_mtime_ns
    for path in untouched.parent.glob("preferences_held_out*.jsonl"):
        path.unlink()
    second = call(folder)
    assert second.stdout.count("finished before") == len(RUNS)
    assert second.stdout.count(" items") == 1 and "step 1/" not in second.stderr, "answers are kept in the store"
    assert rankings(folder) == ranked and untouched.stat().st_mtime_ns == written
    assert {path.name: path.stat().st_mtime_ns for path in (folder / "runs" / "demo-eval").iterdir()} == measured
    assert results(folder) == rows
