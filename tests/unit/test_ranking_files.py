"""Rankings to files and back: the same bytes, the stages' readers, and what is refused."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from strop.data import load_rows, read_preferences, read_unpaired
from strop.ranking import (
    Answer,
    PreferenceStore,
    export_rankings,
    import_rankings,
    load_gold,
    next_item,
    rank_with_judge,
    rankings,
    submit,
)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[PreferenceStore]:
    """Thirty items of 2 to 5 answers, text and chat, by three people: ties, strengths, comments, all bad, skips."""
    made = PreferenceStore(tmp_path / "people.db", create=True, seed=1)
    draw = random.Random(7)
    for n in range(30):
        prompt: Any = f"prompt {n} ü\u2028" if n % 2 else [{"role": "user", "content": f"question {n}"}]
        size = range(2 + n % 4)
        made.add_item(prompt, [f"answer {n}.{k}" for k in size], models=[f"run/{k}" for k in size])
    made.change_settings(overlap=0.5, people=3)
    while any(items := {name: next_item(made, name) for name in ("ann", "bob", "cem")}.values()):
        for item in items:
            if item is None:
                continue
            size = len(item.completions)
            fields: dict[str, Any] = {"ranks": [draw.randint(1, size) for _ in range(size)]}
            if draw.random() < 0.1:
                fields = {"verdict": "all_bad"}
            elif draw.random() < 0.1:
                fields = {"verdict": "skipped", "reason": "same"}
            elif size == 2 and len(set(fields["ranks"])) == 2:
                fields |= {"strength": draw.randint(1, 4), "comment": 'hm "quoted"\n', "milliseconds": 1234}
            submit(made, item.id, item.annotator, Answer(uuid=f"{item.annotator}-{item.id:08}", **fields))
    yield made
    made.close()


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def write(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("format", ["trl", "kto", "listwise"])
def test_a_round_trip_is_the_same_bytes(store: PreferenceStore, tmp_path: Path, format: Any):
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    report = export_rankings(store, format, first)
    other = PreferenceStore(tmp_path / "other.db", create=True)
    read = import_rankings(other, str(first))
    assert read.format == format and read.num_rankings == report.num_rankings - report.num_silent > 20
    export_rankings(other, format, second)
    assert second.read_bytes() == first.read_bytes()
    again = import_rankings(other, str(first))
    assert (again.num_rankings, again.num_known) == (read.num_rankings, read.num_rankings)
    export_rankings(other, format, second)
    assert second.read_bytes() == first.read_bytes()
    other.close()


def test_pairs_are_all_strict_pairs_of_a_ranking_and_the_stages_read_them(store: PreferenceStore, tmp_path: Path):
    path = tmp_path / "pairs.jsonl"
    report = export_rankings(store, "trl", path)
    rows = lines(path)
    wanted = sum(
        one.ranks[i] < one.ranks[j]
        for one in rankings(store)
        for i in range(len(one.ranks))
        for j in range(len(one.ranks))
    )
    assert len(rows) == report.num_lines == wanted
    totals: dict[tuple[str, str], float] = {}
    for row in rows:
        key = (row["group_id"], row["annotator"])
        totals[key] = totals.get(key, 0) + row["weight"]
    assert all(total == pytest.approx(1) for total in totals.values())  # a prompt with more answers counts no more
    read = list(read_preferences(load_rows(str(path))))
    assert len(read) == len(rows) and {type(row.prompt) for row in read} == {str, tuple}


def test_kto_labels_the_best_and_the_worst_and_nothing_between(tmp_path: Path):
    store = PreferenceStore(tmp_path / "k.db", create=True)
    store.add_item("p", ["short", "longer text", "the longest text", "the longest teXT"])
    rank_with_judge(store, lambda _, texts: [len(text) for text in texts], name="len")
    export_rankings(store, "kto", tmp_path / "kto.jsonl")
    read = [(row.completion, row.label) for row in read_unpaired(load_rows(str(tmp_path / "kto.jsonl")))]
    assert read == [("the longest text", True), ("the longest teXT", True), ("short", False)]
    store.close()


def test_the_split_is_by_prompt_and_stays_when_rankings_are_added(store: PreferenceStore, tmp_path: Path):
    path, held_out = tmp_path / "pairs.jsonl", tmp_path / "pairs.held_out.jsonl"
    export_rankings(store, "trl", path, held_out=0.3)
    prompts = [{json.dumps(row["prompt"]) for row in lines(one)} for one in (path, held_out)]
    assert not prompts[0] & prompts[1] and 3 <= len(prompts[1]) <= 15
    for n in range(30):
        store.add_item(f"new {n}", ["a", "bb"])
    rank_with_judge(store, lambda _, texts: [len(text) for text in texts], name="len")
    export_rankings(store, "trl", path, held_out=0.3)
    later = [{json.dumps(row["prompt"]) for row in lines(one)} for one in (path, held_out)]
    assert prompts[0] <= later[0] and prompts[1] <= later[1] and len(later[1]) > len(prompts[1])


def test_what_says_nothing_is_counted(tmp_path: Path):
    store = PreferenceStore(tmp_path / "k.db", create=True)
    for n in range(3):
        store.add_item(f"p{n}", ["a", "bb"])
    with pytest.raises(ValueError, match="no line of format trl to write: nothing has been ranked"):
        export_rankings(store, "trl", tmp_path / "out.jsonl")
    rank_with_judge(store, lambda _, texts: [0 for _ in texts], name="ties", limit=2)
    with pytest.raises(ValueError, match="none of the 2 rankings has one"):
        export_rankings(store, "trl", tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()
    item = next_item(store, "ann")
    assert item is not None
    submit(store, item.id, "ann", Answer(uuid="uuid-0001", verdict="all_bad"))
    report = export_rankings(store, "kto", tmp_path / "out.jsonl")
    assert (report.num_lines, report.num_silent, report.is_one_sided) == (2, 2, True)
    assert export_rankings(store, "listwise", tmp_path / "out.jsonl").num_lines == 3
    store.close()


PAIR = {"prompt": "p", "chosen": "a", "rejected": "b"}
LIST = {"prompt": "p", "completions": ["a", "b"], "ranks": [1, 2]}
USER = {"role": "user", "content": "p"}
CYCLE = [{"prompt": "p", "chosen": c, "rejected": r, "group_id": "g"} for c, r in ("ab", "bc", "ca")]

REFUSED: dict[str, tuple[list[dict[str, Any]], str]] = {
    "equal": ([PAIR, {**PAIR, "rejected": "a"}], r"bad.jsonl:2: columns 'chosen' and 'rejected' are equal"),
    "empty": ([{**PAIR, "chosen": " "}], r"bad.jsonl:1: column 'chosen' is empty"),
    "cycle": (CYCLE, r"bad.jsonl:1: the pairs of group g contradict each other"),
    "partial": (CYCLE[:2], r"not all those of one ranking \(missing: 'a' before 'c'\)"),
    "prompts": (
        [{**CYCLE[0]}, {**CYCLE[1], "prompt": "q"}],
        r"bad.jsonl:1: the rows of group g have different",
    ),
    "weight": ([{**PAIR, "weight": 0.5}], r"bad.jsonl:1: column 'weight' is 0.5, but follows from the ranking"),
    "tools": ([{**PAIR, "tools": [{"name": "f"}]}], r"column 'tools' cannot be kept"),
    "both": (
        [{"prompt": "p", "completion": "a", "label": label} for label in (True, False)],
        r"bad.jsonl:2: this completion of the prompt is labelled both ways",
    ),
    "ranks": ([{**LIST, "ranks": [1]}], r"bad.jsonl:1: column 'ranks' must be a list of 2"),
    "words": ([{**LIST, "ranks": ["1", "2"]}], r"'ranks' must hold whole numbers"),
    "same": ([{**LIST, "completions": ["a", "a"]}], r"two of the completions are equal"),
    "order": ([{**LIST, "shown_order": [0, 0]}], r"'shown_order' must hold each of 0 to 1 once"),
    "strength": ([{**LIST, "strength": 9}], r"bad.jsonl:1: strength must be 1, 2, 3 or 4"),
    "skip": ([{**LIST, "verdict": "skipped", "ranks": [1, 1]}], r"verdict 'skipped' is no ranking"),
    "turns": (
        [{**LIST, "prompt": [USER], "completions": [[USER], [USER]]}],
        r"one assistant message",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_bad_file_is_refused_whole_with_its_line(tmp_path: Path, case: str):
    rows, message = REFUSED[case]
    store = PreferenceStore(tmp_path / "k.db", create=True)
    with pytest.raises(ValueError, match=message):
        import_rankings(store, write(tmp_path / "bad.jsonl", *rows))
    assert not store.query("SELECT 1 FROM rankings") and not store.query("SELECT 1 FROM items")
    store.close()


def test_labels_of_one_class_are_kept(tmp_path: Path):
    store = PreferenceStore(tmp_path / "k.db", create=True)
    rows = [{"prompt": f"p{n}", "completion": "a", "label": True} for n in range(3)]
    assert import_rankings(store, write(tmp_path / "kto.jsonl", *rows)).num_rankings == 3
    assert next_item(store, "ann") is None  # a single answer is nothing to rank
    assert export_rankings(store, "kto", tmp_path / "out.jsonl").is_one_sided
    assert [row["label"] for row in lines(tmp_path / "out.jsonl")] == [True] * 3
    store.close()


def test_gold_needs_a_right_answer(tmp_path: Path):
    store = PreferenceStore(tmp_path / "k.db", create=True)
    assert load_gold(store, write(tmp_path / "gold.jsonl", LIST)) == 1
    with pytest.raises(ValueError, match=r"gold.jsonl:2: a gold item needs two answers of different rank"):
        load_gold(store, write(tmp_path / "gold.jsonl", LIST, {**LIST, "ranks": [1, 1]}))
    store.close()


def test_names_are_text_and_lead_to_no_other_file(tmp_path: Path):
    home = tmp_path / "home"
    home.mkdir()
    store = PreferenceStore(home / "k.db", create=True)
    hostile = "../../escaped"
    store.add_item("p", ["a", "bb"], models=[hostile, "/etc/passwd"])
    rank_with_judge(store, lambda _, texts: [len(text) for text in texts], name=hostile)
    export_rankings(store, "listwise", home / "out.jsonl")
    assert lines(home / "out.jsonl")[0]["annotator"] == f"judge:{hostile}"
    store.close()
    assert {path.name for path in home.iterdir()} == {"k.db", "out.jsonl"} and [*tmp_path.iterdir()] == [home]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing/out.jsonl", "the folder .*missing does not exist"),
        ("folder", "folder is a folder: name a file in it"),
        ("people.db", "people.db belongs to the store itself"),
        ("people.db-wal", "people.db-wal belongs to the store itself"),
        ("folder/../people.db", "people.db belongs to the store itself"),
        ("link.jsonl", "link.jsonl belongs to the store itself"),
    ],
)
def test_an_export_goes_to_a_file_of_its_own(store: PreferenceStore, tmp_path: Path, name: str, message: str):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "people.db")
    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=message):
        export_rankings(store, "trl", tmp_path / name)
    assert {path.name for path in tmp_path.iterdir()} == before and not [*(tmp_path / "folder").iterdir()]
    assert export_rankings(store, "trl", tmp_path / "out.jsonl").num_lines  # the store is whole


def test_a_line_of_a_megabyte_is_kept_whole_and_a_broken_one_is_named_without_being_repeated(tmp_path: Path):
    long = {**PAIR, "chosen": "\u00fc" * 1_000_000}
    store = PreferenceStore(tmp_path / "k.db", create=True)
    assert import_rankings(store, write(tmp_path / "long.jsonl", PAIR, long)).num_rankings == 2
    export_rankings(store, "trl", tmp_path / "out.jsonl")
    assert [row["chosen"] for row in lines(tmp_path / "out.jsonl")] == ["a", long["chosen"]]
    (tmp_path / "bad.jsonl").write_text(json.dumps(PAIR) + '\n{"prompt": "' + "y" * 1_000_000)
    with pytest.raises(ValueError, match=r"bad.jsonl:2") as caught:
        import_rankings(store, str(tmp_path / "bad.jsonl"))
    assert len(str(caught.value)) < 1000
    store.close()
