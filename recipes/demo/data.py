"""The demo's files: English text, and arithmetic as task text, as questions with answers, and as tasks for a verifier.

Held out and in no training file: 44 sets of three digits and 30 questions about two digits, both in every order, and 20
chapters spread over the book, none of which shares a long verse with another chapter.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations_with_replacement, product
from pathlib import Path

from strop.data.sources import DOCUMENT_SEPARATOR, stream_texts

BOOK = Path(__file__).with_name("kjv.txt.xz")

HELD_OUT_SETS = 44
"""Of the 220 sets of three digits; about 200 of the 1000 sums in their orders."""
SFT_EXAMPLES = 200
FACT_REPEATS = 12
LINES_PER_DOCUMENT = 8
HELD_OUT_CHAPTERS = 20
LONG_VERSE = 60
"""Characters from which a verse that two chapters share is a quotation, not a turn of phrase."""
HELD_OUT_DIGITS = 30

Pair = tuple[int, int]
Row = dict[str, object]


def write_demo_data(folder: Path, *, seed: int = 0, book: Path = BOOK) -> None:
    """Every file of the demo in `folder`; a file that already has its content is not touched.

    english.txt, facts.txt      pre-training           held_out_english.txt
    sft.jsonl, tasks.jsonl      sums of three digits   held_out.jsonl
    smollm2_tasks.jsonl         sums of two digits     smollm2_held_out.jsonl
    tasks_shuffled.jsonl, smollm2_tasks_shuffled.jsonl: the control, where every task has a wrong answer

    Raises ValueError when the book is missing or has too few chapters.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_sums(folder, random.Random(seed))
    write_english(folder, book)
    # Generators of their own, so that a change of one part leaves the others as they are.
    write_digit_sums(folder, random.Random(f"digits {seed}"))
    for name in ("tasks", "smollm2_tasks"):
        rows = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        _write_rows(folder / f"{name}_shuffled.jsonl", with_wrong_answers(rows, random.Random(f"shuffled {seed}")))


def write_sums(folder: Path, rng: random.Random) -> None:
    """Sums of three digits: facts.txt (pre-training), sft.jsonl, tasks.jsonl (RL) and held_out.jsonl.

    What is held out are sets of digits, in all their orders: 8 + 3 + 5 is no help if 3 + 5 + 8 is held out.
    """
    sets = list(combinations_with_replacement(range(10), 3))
    rng.shuffle(sets)
    held_out_sets = set(sets[:HELD_OUT_SETS])
    everything = list(product(range(10), repeat=3))
    rng.shuffle(everything)
    held_out = [digits for digits in everything if tuple(sorted(digits)) in held_out_sets]
    training = [digits for digits in everything if tuple(sorted(digits)) not in held_out_sets]
    _write_rows(folder / "held_out.jsonl", [_task(digits) for digits in held_out])
    _write_rows(folder / "tasks.jsonl", [_task(digits) for digits in training])
    examples: list[Row] = []
    for digits in rng.sample(training, SFT_EXAMPLES):
        answer = {"role": "assistant", "content": str(sum(digits))}
        examples.append({"messages": [{"role": "user", "content": _question(digits)}, answer]})
    _write_rows(folder / "sft.jsonl", examples)
    lines: list[str] = []
    for _ in range(FACT_REPEATS):
        rng.shuffle(training)
        lines += [f"{_sum(digits)} = {sum(digits)}" for digits in training]
    documents = ["\n".join(lines[i : i + LINES_PER_DOCUMENT]) for i in range(0, len(lines), LINES_PER_DOCUMENT)]
    _write_documents(folder / "facts.txt", documents)


def write_english(folder: Path, book: Path) -> None:
    """The book's chapters: english.txt to train on, held_out_english.txt not to."""
    if not book.is_file():
        raise ValueError(f"{book} is missing: it is part of the repository, restore it with git checkout")
    training, held_out = split_book([text for _, text in stream_texts(str(book))], HELD_OUT_CHAPTERS)
    _write_documents(folder / "english.txt", training)
    _write_documents(folder / "held_out_english.txt", held_out)


def split_book(chapters: Sequence[str], num_held_out: int) -> tuple[list[str], list[str]]:
    """(training, held out): whole chapters, one from each of num_held_out equal stretches of the book.

    It is the chapter nearest to the middle of its stretch without a long verse that stands in another chapter too:
    Kings is quoted in Chronicles and Isaiah, a psalm in Samuel. Raises ValueError when a stretch has no such chapter.
    """
    verses = [{line for line in chapter.splitlines() if len(line) >= LONG_VERSE} for chapter in chapters]
    times = Counter(verse for chapter in verses for verse in chapter)
    chosen: set[int] = set()
    size = len(chapters) / num_held_out
    for part in range(num_held_out):
        stretch = range(round(part * size), round((part + 1) * size))
        middle = round((part + 0.5) * size)
        own = [index for index in stretch if all(times[verse] == 1 for verse in verses[index])]
        if not own:
            raise ValueError(
                f"the book has {len(chapters)} chapters, too few to hold out {num_held_out} that quote no other: "
                f"chapters {stretch.start + 1} to {stretch.stop} offer none"
            )
        chosen.add(min(own, key=lambda index: abs(index - middle)))
    return [chapter for index, chapter in enumerate(chapters) if index not in chosen], [
        chapters[index] for index in sorted(chosen)
    ]


def write_digit_sums(folder: Path, rng: random.Random) -> None:
    """All 100 sums of two digits for a model that already talks, 30 of them held out, no pair split by its order."""
    pairs = [(a, b) for a in range(10) for b in range(a, 10)]
    rng.shuffle(pairs)
    held_out: set[Pair] = set()
    for a, b in pairs:
        orders = {(a, b), (b, a)}
        if len(held_out) + len(orders) <= HELD_OUT_DIGITS:
            held_out |= orders
    everything = [(a, b) for a in range(10) for b in range(10)]
    for name, rows in (
        ("smollm2_held_out.jsonl", [pair for pair in everything if pair in held_out]),
        ("smollm2_tasks.jsonl", [pair for pair in everything if pair not in held_out]),
    ):
        _write_rows(folder / name, [_task(pair, " Answer with just the number.") for pair in rows])


def with_wrong_answers(tasks: Sequence[Mapping[str, object]], rng: random.Random) -> list[Row]:
    """The tasks with their answers dealt out anew, none of them right for its task.

    At random, not by a rotation of the sorted answers: that would be a rule that a policy could learn.
    """
    answers = [task["answer"] for task in tasks]
    assert 2 * max(Counter(answers).values()) <= len(answers), "too many equal answers to give each task another one"
    rng.shuffle(answers)
    while right := [index for index, task in enumerate(tasks) if answers[index] == task["answer"]]:
        for index in right:
            other = rng.randrange(len(answers))
            answers[index], answers[other] = answers[other], answers[index]
    return [{**task, "answer": answer} for task, answer in zip(tasks, answers, strict=True)]


def _sum(digits: Sequence[int]) -> str:
    return " + ".join(map(str, digits))


def _question(digits: Sequence[int]) -> str:
    return f"What is {_sum(digits)}?"


def _task(digits: Sequence[int], instruction: str = "") -> Row:
    return {"prompt": [{"role": "user", "content": _question(digits) + instruction}], "answer": str(sum(digits))}


def _write_documents(path: Path, documents: Sequence[str]) -> None:
    _write(path, f"\n{DOCUMENT_SEPARATOR}\n".join(documents) + "\n")


def _write_rows(path: Path, rows: Sequence[Row]) -> None:
    _write(path, "".join(json.dumps(row) + "\n" for row in rows))


def _write(path: Path, text: str) -> None:
    """Whole or not at all, and only where something changes: another seed's run may be reading the same file."""
    content = text.encode()
    if path.is_file() and path.read_bytes() == content:
        return
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(content)
    partial.replace(path)
