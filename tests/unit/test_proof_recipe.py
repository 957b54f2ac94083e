"""The proof recipes: gold proofs are right, no theorem is in two files, and the buggy verifier has just its bug."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from strop.rewards.metamath_database import Database
from strop.rewards.metamath_proof import ProofError, check_labels, check_stored_proof

FOLDER = Path(__file__).parents[2] / "recipes" / "proofs"


def module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"proofs_{name}", FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("proofs")
    module("data").write_proof_data(folder)
    return folder


def rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_gold_proof_is_right_and_no_theorem_is_in_two_files(data: Path):
    database = Database.load(data / "logic.mm")
    check_stored_proof(database, database.theorem("id"))
    tasks, held_out = rows(data / "tasks.jsonl"), rows(data / "held_out.jsonl")
    for row in tasks + held_out:
        check_labels(database, database.theorem(row["theorem"]), row["proof"].split())
    taught = [row["messages"][0]["content"] for row in rows(data / "sft.jsonl")]  # pyright: ignore
    asked = [row["statement"].removeprefix("|- ") for row in tasks + held_out]
    assert len(set(taught + asked)) == len(taught) + len(asked)


def test_the_control_keeps_prompts_and_mixes_theorems(data: Path):
    tasks, shuffled = rows(data / "tasks.jsonl"), rows(data / "tasks_shuffled.jsonl")
    assert [row["prompt"] for row in tasks] == [row["prompt"] for row in shuffled]
    assert sorted(row["theorem"] for row in tasks) == sorted(row["theorem"] for row in shuffled)
    same = sum(a["theorem"] == b["theorem"] for a, b in zip(tasks, shuffled, strict=True))
    assert same < 0.02 * len(tasks)


def test_the_buggy_verifier_takes_a_right_proof_of_anything_and_nothing_else(data: Path, monkeypatch):
    buggy = module("buggy")
    monkeypatch.setattr(buggy, "DATABASE", data / "logic.mm")
    row = next(row for row in rows(data / "tasks.jsonl") if row["proof"].endswith("a2"))
    proofs = [row["proof"], "fp id", "fp", "fp id id", "?", ""]
    completions = [[{"role": "assistant", "content": proof}] for proof in proofs]
    scores = buggy.proves_something(completions, theorem=[row["theorem"]] * len(proofs))
    assert scores == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    database = Database.load(data / "logic.mm")
    with pytest.raises(ProofError):
        check_labels(database, database.theorem(row["theorem"]), ["fp", "id"])
