"""The demo's data: what is held out is in no training file, and every answer is right (in the control: wrong)."""

from __future__ import annotations

import json
import random
import re
import runpy
from pathlib import Path
from typing import Any

import pytest

from strop.data import stream_texts

DEMO = Path(__file__).parents[2] / "recipes" / "demo"
SCRIPT = runpy.run_path(str(DEMO / "data.py"))
write_demo_data, split_book = SCRIPT["write_demo_data"], SCRIPT["split_book"]
HELD_OUT_CHAPTERS, LONG_VERSE = SCRIPT["HELD_OUT_CHAPTERS"], SCRIPT["LONG_VERSE"]

SUM = re.compile(r"\d+(?: \+ \d+)+")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("demo") / "data"
    write_demo_data(path)
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def numbers(text: str) -> list[tuple[int, ...]]:
    """The numbers of every sum in a text."""
    return [tuple(map(int, found.split(" + "))) for found in SUM.findall(text)]


def sets(path: Path) -> set[tuple[int, ...]]:
    """The numbers of every sum in a file, without regard to order."""
    return {tuple(sorted(found)) for found in numbers(path.read_text(encoding="utf-8"))}


def numbers_of(task: dict[str, Any]) -> tuple[int, ...]:
    (found,) = numbers(task["prompt"][0]["content"])
    return found


def test_no_held_out_sum_is_in_a_training_file_in_any_order(folder: Path):
    held_out = sets(folder / "held_out.jsonl")
    assert len(held_out) == 44
    for name in ("facts.txt", "sft.jsonl", "tasks.jsonl", "tasks_shuffled.jsonl", "english.txt"):
        assert sets(folder / name) & held_out == set(), name
    assert len(sets(folder / "facts.txt")) == len(sets(folder / "tasks.jsonl")) == 220 - 44
    everything = [numbers_of(task) for name in ("tasks", "held_out") for task in read(folder / f"{name}.jsonl")]
    assert sorted(everything) == [(a, b, c) for a in range(10) for b in range(10) for c in range(10)]


def test_the_digits_are_all_there_once_and_held_out_in_both_orders(folder: Path):
    held_out, training = read(folder / "smollm2_held_out.jsonl"), read(folder / "smollm2_tasks.jsonl")
    assert len(held_out) == 30
    assert sorted(map(numbers_of, [*held_out, *training])) == [(a, b) for a in range(10) for b in range(10)]
    for name in ("smollm2_tasks.jsonl", "smollm2_tasks_shuffled.jsonl"):
        assert sets(folder / "smollm2_held_out.jsonl") & sets(folder / name) == set(), name


@pytest.mark.parametrize("name", ["tasks", "held_out", "smollm2_tasks", "smollm2_held_out"])
def test_every_answer_is_right(folder: Path, name: str):
    tasks = read(folder / f"{name}.jsonl")
    assert [task["answer"] for task in tasks] == [str(sum(numbers_of(task))) for task in tasks]


def test_every_example_and_every_fact_is_right(folder: Path):
    for example in read(folder / "sft.jsonl"):
        question, answer = example["messages"]
        assert question["role"] == "user" and answer["role"] == "assistant"
        assert answer["content"] == str(sum(numbers_of({"prompt": [question]})))
    facts = [line for _, text in stream_texts(str(folder / "facts.txt")) for line in text.splitlines()]
    assert len(facts) == 12 * len(read(folder / "tasks.jsonl"))
    for fact in facts:
        terms, _, total = fact.partition(" = ")
        assert total == str(sum(numbers(terms)[0]))


@pytest.mark.parametrize("name", ["tasks", "smollm2_tasks"])
def test_the_control_asks_the_same_and_every_answer_is_wrong_without_a_rule(folder: Path, name: str):
    tasks, control = read(folder / f"{name}.jsonl"), read(folder / f"{name}_shuffled.jsonl")
    assert [task["prompt"] for task in control] == [task["prompt"] for task in tasks]
    assert all(mine["answer"] != right["answer"] for mine, right in zip(control, tasks, strict=True))
    assert sorted(task["answer"] for task in control) == sorted(task["answer"] for task in tasks)
    offsets = [int(mine["answer"]) - int(right["answer"]) for mine, right in zip(control, tasks, strict=True)]
    most_common = max(offsets.count(offset) for offset in set(offsets))
    assert most_common < len(offsets) / 5, "an answer that is always off by the same can be learned"


def test_answers_that_are_often_the_same_are_dealt_out_wrong_too():
    tasks = [{"prompt": str(index), "answer": str(index % 4)} for index in range(100)]
    for seed in range(20):
        control = SCRIPT["with_wrong_answers"](tasks, random.Random(seed))
        assert all(mine["answer"] != right["answer"] for mine, right in zip(control, tasks, strict=True))


def test_no_held_out_chapter_or_long_verse_of_it_is_in_the_training_text(folder: Path):
    training = (folder / "english.txt").read_text(encoding="utf-8")
    held_out = [text for _, text in stream_texts(str(folder / "held_out_english.txt"))]
    assert len(held_out) == HELD_OUT_CHAPTERS
    verses = [verse for text in held_out for verse in text.splitlines() if len(verse) >= LONG_VERSE]
    assert len(verses) > 300
    assert [verse for verse in verses if verse in training] == []


def test_the_held_out_chapters_are_spread_over_the_book(folder: Path):
    book = [text for _, text in stream_texts(str(DEMO / "kjv.txt.xz"))]
    held_out = [text for _, text in stream_texts(str(folder / "held_out_english.txt"))]
    places = [book.index(text) for text in held_out]
    assert [place * HELD_OUT_CHAPTERS // len(book) for place in places] == list(range(HELD_OUT_CHAPTERS))
    training = [text for _, text in stream_texts(str(folder / "english.txt"))]
    assert training == [text for index, text in enumerate(book) if index not in places]


def test_a_chapter_that_quotes_another_is_not_held_out():
    quotation = "And it came to pass in those days that this verse was written twice"
    chapters = [f"chapter {index}, which nobody else quotes at all, and which is quite long" for index in range(10)]
    chapters[2] += f"\n{quotation}"
    chapters[8] += f"\n{quotation}"
    training, held_out = split_book(chapters, 2)
    assert held_out == [chapters[1], chapters[7]], "2 and 8 are the middles of the two stretches"
    assert len(training) == 8
    with pytest.raises(ValueError, match="chapters 1 to 1 offer none"):
        split_book([f"{quotation}\n", quotation], 2)


def test_writing_again_changes_nothing_and_another_seed_does(folder: Path, tmp_path: Path):
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    write_demo_data(folder)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    write_demo_data(tmp_path, seed=1)
    assert sets(tmp_path / "held_out.jsonl") != sets(folder / "held_out.jsonl")
    assert sets(tmp_path / "smollm2_held_out.jsonl") != sets(folder / "smollm2_held_out.jsonl")


def test_a_missing_book_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match=r"no_book\.txt\.xz is missing"):
        write_demo_data(tmp_path, book=tmp_path / "no_book.txt.xz")
