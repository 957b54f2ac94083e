"""`make demo` in miniature: a part that fails leaves the rest, and a second call finds everything done."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from strop.cli.config import FIELD_NAMES, to_toml
from strop.cli.pipeline import Entry

DEMO = Path(__file__).parents[2] / "recipes" / "demo"

SUPERVISED = {"num_steps": 2, "batch_tokens": 1024, "micro_batch_tokens": 1024, "optimizer": {"warmup_steps": 0}}
SHAPE = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "intermediate_size": 32}
GRPO = {"num_steps": 2, "prompts_per_step": 2, "group_size": 2, "sampling": {"max_new_tokens": 2}}
TINY = {
    "pretrain": SUPERVISED | {"model": SHAPE, "optimizer": {"lr": 1e-3, "schedule": "constant", "warmup_steps": 0}},
    "sft": SUPERVISED,
    "grpo": GRPO | {"optimizer": {"warmup_steps": 0}, "eval": {"every": 2, "max_tasks": 4}},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The demo's recipes, its stages with tiny numbers over them, and a SmolLM2 folder that is cut short."""
    shutil.copytree(DEMO, tmp_path / "recipes" / "demo", ignore=shutil.ignore_patterns("*.py", "*.xz"))
    stages = tomllib.loads((DEMO / "scratch.toml").read_text(encoding="utf-8"))["stage"]
    entries = [Entry(**_renamed(stage), overrides=TINY[stage["stage"]]) for stage in stages]
    text = "\n".join(f"[[stage]]\n{to_toml(entry)}" for entry in entries)
    (tmp_path / "recipes" / "demo" / "scratch.toml").write_text(text, encoding="utf-8")
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


def results(folder: Path) -> list[dict[str, object]]:
    return json.loads((folder / "runs" / "demo-results.json").read_text(encoding="utf-8"))


def test_a_part_that_fails_leaves_the_other_and_a_second_call_repeats_nothing(folder: Path):
    first = call(folder)
    assert first.returncode == 1, first.stderr
    assert "The smollm2 part stopped: " in first.stderr and "run the same command again" in first.stderr
    rows = results(folder)
    assert [row["run"] for row in rows] == ["demo-base", "demo-sft", "demo-grpo"]
    assert rows[1]["held_out"]["after"] == rows[2]["held_out"]["before"], "the same weights, measured alike"
    assert rows[0]["held_out"]["before"] != rows[0]["held_out"]["after"]
    assert "strop chat demo-grpo" in first.stdout
    page = (folder / "runs" / "demo-report.html").read_text(encoding="utf-8")
    assert all(f'<td data-name="stage">{stage}</td>' in page for stage in ("pretrain", "sft", "grpo"))

    measured = {path.name: path.stat().st_mtime_ns for path in (folder / "runs" / "demo-eval").iterdir()}
    second = call(folder)
    assert second.stdout.count("finished before") == 3
    assert {path.name: path.stat().st_mtime_ns for path in (folder / "runs" / "demo-eval").iterdir()} == measured
    assert results(folder) == rows
