"""Rankings -> JSON lines for training, in three formats (docs/ranking.md), the same bytes for the same answers.

    trl         {"prompt", "chosen", "rejected", "margin", "group_id", "annotator", "weight"}   one line per strict pair
    kto         {"prompt", "completion", "label", "group_id", "annotator"}                      one line per answer
    listwise    {"prompt", "completions", "ranks", "verdict", ...}                              one line per ranking

Left out of all of them: skips, what was taken back, gold items, repeats.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from strop.ranking.queue import ANSWERED
from strop.ranking.store import PreferenceStore, share_of

if TYPE_CHECKING:
    from strop.types import Message

ExportFormat = Literal["trl", "kto", "listwise"]

Line = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking:
    """One ranking with all that an export may say about it."""

    prompt_id: str
    prompt: str | Sequence[Message]
    completions: Sequence[str]
    ranks: Sequence[int]
    verdict: str
    group_id: str
    annotator: str
    strength: int | None
    models: Sequence[str]
    shown_order: Sequence[int]
    milliseconds: int
    comment: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportReport:
    """What was written, and what says nothing in that format.

    Example: ExportReport(num_rankings=40, num_lines=220, num_held_out=24, num_silent=3, is_one_sided=False)
    """

    num_rankings: int
    num_lines: int
    num_held_out: int
    """Of the lines, those in the held-out file."""
    num_silent: int
    """Rankings without a line: nothing but ties (trl, kto), or all bad (trl)."""
    is_one_sided: bool
    """kto: every label is the same, so that nothing could be learnt from them."""


def export_rankings(
    store: PreferenceStore, format: ExportFormat, path: str | Path, *, held_out: float = 0.0
) -> ExportReport:
    """Write the rankings that hold now to `path`, and those of held-out prompts to NAME.held_out.SUFFIX beside it.

    The split is by prompt, and the prompt alone decides its side: it never changes sides when rankings are added, and
    no prompt is on both. Both files appear whole or not at all. Raises ValueError where there is nothing to write, and
    for a path that is a folder, in no folder, or the store itself.
    """
    if not 0 <= held_out < 1:
        raise ValueError(f"held_out={held_out} must be a share from 0 to below 1")
    path = Path(path)
    for target in (path, held_out_path(path)) if held_out else (path,):
        _check_target(target, store.path)
    sides: tuple[list[Line], list[Line]] = ([], [])
    num_rankings = num_silent = 0
    for ranking in rankings(store):
        lines = list(lines_of(ranking, format))
        num_rankings += 1
        num_silent += not lines
        sides[share_of("held out " + ranking.prompt_id) < held_out].extend(lines)
    if not any(sides):
        reason = f"none of the {num_rankings} rankings has one" if num_rankings else "nothing has been ranked"
        raise ValueError(f"{store.path}: there is no line of format {format} to write: {reason}")
    _write(path, sides[0])
    if held_out:
        _write(held_out_path(path), sides[1])
    labels = {line["label"] for side in sides for line in side} if format == "kto" else set()
    return ExportReport(
        num_rankings=num_rankings,
        num_lines=len(sides[0]) + len(sides[1]),
        num_held_out=len(sides[1]),
        num_silent=num_silent,
        is_one_sided=len(labels) == 1,
    )


def _check_target(path: Path, store: Path) -> None:
    if not path.parent.is_dir():
        raise ValueError(f"{path}: the folder {path.parent} does not exist")
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name a file in it, for example {path / 'rankings.jsonl'}")
    journals = (store.with_name(store.name + end) for end in ("", "-wal", "-shm"))
    if path.resolve() in {one.resolve() for one in journals}:
        raise ValueError(f"{path} belongs to the store itself, which an export would destroy: name another file")


def held_out_path(path: Path) -> Path:
    """pairs.jsonl -> pairs.held_out.jsonl."""
    return path.with_name(f"{path.stem}.held_out{path.suffix}")


def rankings(store: PreferenceStore) -> Iterator[Ranking]:
    """The rankings that hold now, first times only and without gold items: by item, then in the order given."""
    rows = store.query(
        f"""
        SELECT answers.*, group_id, prompt_id,
               min(item_id) OVER (PARTITION BY group_id) AS first_item
        FROM answers JOIN items ON items.id = item_id
        WHERE purpose = 'first' AND gold_ranks IS NULL AND verdict IN {ANSWERED}
        ORDER BY first_item, answers.id
        """
    )
    for row in rows:
        yield Ranking(
            prompt_id=row["prompt_id"],
            prompt=store.prompt(row["prompt_id"]),
            completions=store.completions(row["item_id"]),
            ranks=json.loads(row["ranks"]),
            verdict=row["verdict"],
            group_id=row["group_id"],
            annotator=row["annotator"],
            strength=row["strength"],
            models=store.models(row["item_id"]),
            shown_order=json.loads(row["shown_order"]),
            milliseconds=row["milliseconds"],
            comment=row["comment"],
        )


def lines_of(ranking: Ranking, format: ExportFormat) -> Iterator[Line]:
    """The lines that one ranking gives in a format; none where it says nothing there."""
    answers = [_like_prompt(ranking.prompt, text) for text in ranking.completions]
    ranks = ranking.ranks
    origin = {"group_id": ranking.group_id, "annotator": ranking.annotator}
    if format == "listwise":
        yield {
            "prompt": ranking.prompt,
            "completions": answers,
            "ranks": list(ranks),
            "verdict": ranking.verdict,
            **origin,
            "strength": ranking.strength,
            "models": list(ranking.models),
            "shown_order": list(ranking.shown_order),
            "milliseconds": ranking.milliseconds,
            "comment": ranking.comment,
        }
        return
    best_first = sorted(range(len(ranks)), key=lambda index: (ranks[index], index))
    if format == "kto":
        labels = labels_of(ranking)
        for index in best_first:
            if labels[index] is not None:
                yield {"prompt": ranking.prompt, "completion": answers[index], "label": labels[index], **origin}
        return
    pairs = [(i, j) for i in best_first for j in best_first if ranks[i] < ranks[j]]
    for i, j in pairs:
        margin = ranking.strength or ranks[j] - ranks[i]
        yield {
            "prompt": ranking.prompt,
            "chosen": answers[i],
            "rejected": answers[j],
            "margin": float(margin),
            **origin,
            "weight": 1 / len(pairs),
        }


def labels_of(ranking: Ranking) -> list[bool | None]:
    """KTO's thumbs: the best tier up, the worst down, what lies between and mere ties neither; all bad is all down."""
    if ranking.verdict != "ranked":
        return [ranking.verdict == "all_good"] * len(ranking.ranks)
    worst = max(ranking.ranks)
    if worst == 1:
        return [None] * len(ranking.ranks)
    return [True if rank == 1 else False if rank == worst else None for rank in ranking.ranks]


def _like_prompt(prompt: str | Sequence[Message], text: str) -> str | list[Message]:
    """TRL's rule: beside a prompt of text an answer is text, beside messages it is messages."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def _write(path: Path, lines: Sequence[Line]) -> None:
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
