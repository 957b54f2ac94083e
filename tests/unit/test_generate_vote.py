"""`strop generate --vote N`: the answer of the majority of the very completions that --num-samples N would print."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from strop.cli.main import main


@pytest.fixture
def call(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    Path("prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("the quick", "a lazy")))
    shape = ["--max-new-tokens", "1", "--temperature", "0.4", "--dtype", "float32", "--seed", "3"]
    return ["generate", str(tiny_folder), "--file", "prompts.jsonl", *shape]


def rows(path: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_it_counts_the_completions_that_the_same_seed_samples(call: list[str]) -> None:
    assert main([*call, "--num-samples", "24", "--output", "samples.jsonl"]) == 0
    assert main([*call, "--vote", "24", "--answer-pattern", "whole", "--output", "votes.jsonl"]) == 0
    samples, votes = rows("samples.jsonl"), rows("votes.jsonl")
    assert [vote["id"] for vote in votes] == ["prompts.jsonl:1", "prompts.jsonl:2"]
    for vote in votes:
        texts = [str(row["completion"]).strip() for row in samples if row["id"] == vote["id"]]
        counts = Counter(text for text in texts if text)
        assert vote["tally"] == counts and len(counts) > 1
        assert vote["answer"] == counts.most_common(1)[0][0]
        assert vote["share"] == counts.most_common(1)[0][1] / 24 and vote["num_samples"] == 24


def test_it_prints_answer_share_and_tally(call: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*call, "--vote", "24", "--answer-pattern", "whole", "--output", "votes.jsonl"]) == 0
    capsys.readouterr()
    assert main([*call, "--vote", "24", "--answer-pattern", "whole"]) == 0
    heads = capsys.readouterr().out
    for vote in rows("votes.jsonl"):
        tally = vote["tally"]
        assert isinstance(tally, dict)
        first = max(tally.values())
        assert (
            f"--- {vote['id']}\n{vote['answer']}   {first} of 24 ({first / 24:.0%})   tally: {vote['answer']} {first}"
            in heads
        )
    assert main([*call, "--vote", "4", "--answer-pattern", "boxed"]) == 0
    assert capsys.readouterr().out.count("no answer: none of 4 completions has one that 'boxed' finds") == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--vote", "1"], "--vote 1: a vote needs at least 2 completions"),
        (["--vote", "4", "--num-samples", "2"], "leave --num-samples out"),
        (["--vote", "4", "--temperature", "0"], "--vote needs --temperature above 0"),
        (["--vote", "4", "--answer-pattern", "bxed"], "bxed"),
        (["--answer-pattern", "boxed"], "--answer-pattern belongs to --vote"),
    ],
)
def test_what_cannot_be_meant(
    call: list[str], capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert main([*call, *flags]) == 2
    assert message in capsys.readouterr().err
