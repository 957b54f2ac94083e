"""Which run came from which, as data and as drawn."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from strop.runs import RunFolder, list_runs, render_list, render_run, render_tree, resolve, show, tree


def draw(renderable: object) -> str:
    console = Console(file=io.StringIO(), width=140)
    console.print(renderable)
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def make(runs_dir: Path, name: str, stage: str, parent: str | None, steps: tuple[int, ...] = (10,)) -> None:
    origin = resolve(parent, runs_dir) if parent else None
    config = {"num_steps": 10, "lr": 0.1}
    with RunFolder.create(
        runs_dir, name, stage=stage, config=config, parent=origin, data_hashes={"a.txt": "ff"}, seed=1
    ) as run:
        for step in steps:
            run.log(step, {"loss": 1 / step})
            run.save_checkpoint(step, lambda folder: (folder / "config.json").write_text("{}") and None, {}, {})


@pytest.fixture
def runs_dir(tmp_path) -> Path:
    runs = tmp_path / "runs"
    make(runs, "base", "pretrain", None)
    make(runs, "chat", "sft", "base", (5, 10))
    make(runs, "sums", "grpo", "chat/5")
    make(runs, "code", "grpo", "chat")
    shutil.copytree(runs / "base/checkpoints/step-000010", tmp_path / "foreign")
    for name in ("checkpoint.json", "training_state.json"):
        (tmp_path / "foreign" / name).unlink()
    make(runs, "other", "sft", str(tmp_path / "foreign"))
    return runs


def test_tree(runs_dir):
    assert draw(render_tree(tree(runs_dir))) == "\n".join(
        (
            "base  pretrain, finished, step 10",
            "└── chat  sft, finished, step 10, from step 10",
            "    ├── sums  grpo, finished, step 10, from step 5",
            "    └── code  grpo, finished, step 10, from step 10",
            f"other  sft, finished, step 10, from {runs_dir.parent}/foreign, not in this folder",
        )
    )


def test_a_run_whose_parent_is_gone_or_replaced_is_a_root(runs_dir):
    shutil.rmtree(runs_dir / "base")
    assert [node.run.name for node in tree(runs_dir)] == ["chat", "other"]
    make(runs_dir, "base", "grpo", "chat")
    roots = tree(runs_dir)
    assert [node.run.name for node in roots] == ["chat", "other"]
    assert [node.run.name for node in roots[0].children] == ["sums", "code", "base"]


def test_list_tells_killed_running_and_damaged_apart(runs_dir):
    with (
        RunFolder.create(runs_dir, "alive", stage="ppo", config={}, parent=None, data_hashes={}, seed=1) as alive,
        RunFolder.create(runs_dir, "dead", stage="ppo", config={}, parent=None, data_hashes={}, seed=1) as dead,
    ):
        dead.close()
        (runs_dir / "sums/run.json").write_text("{")
        (runs_dir / "code/metrics.jsonl").write_text("nonsense\n")
        runs = {run.name: run for run in list_runs(runs_dir)}
        alive.log(1, {"loss": 1.0})
    statuses = {name: run.status for name, run in runs.items()}
    assert statuses == {
        **{"base": "finished", "chat": "finished", "other": "finished"},
        **{"alive": "running", "dead": "killed", "sums": "damaged", "code": "damaged"},
    }
    assert runs["chat"].checkpoint_steps == (5, 10) and runs["chat"].parent == "base" and runs["chat"].parent_step == 10
    drawn = draw(render_list(runs.values()))
    assert "chat" in drawn and "base/10" in drawn and "5, 10" in drawn
    with pytest.raises(ValueError, match=r"run.json is damaged"):
        show(runs_dir, "sums")


def test_show(runs_dir):
    drawn = draw(render_run(show(runs_dir, "sums")))
    for text in ("sums (grpo, finished)", "chat/5", "num_steps  10", "a.txt  ff", "loss  0.1", "seed         1"):
        assert text in drawn, drawn


def test_no_runs_at_all(tmp_path):
    assert list_runs(tmp_path / "nowhere") == [] and tree(tmp_path / "nowhere") == []
