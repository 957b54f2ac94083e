"""JSON lines, or any other data source -> rankings in a store: what export.py writes, and other people's files.

A file is read whole and checked before anything is stored. Lines of one group_id and annotator are one ranking; lines
without a group_id are a ranking each (kto: those of one prompt are). Exporting again gives the bytes that were read.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from strop.ranking.answers import Answer, submit
from strop.ranking.export import Ranking, lines_of
from strop.ranking.store import PreferenceStore, dense_ranks, group_id_of, prompt_id_of

if TYPE_CHECKING:
    from strop.data import Rows

DEFAULT_ANNOTATOR = "imported"


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportReport:
    """Example: ImportReport(format="trl", num_rankings=40, num_known=0)"""

    format: str
    num_rankings: int
    num_known: int
    """Rankings that the store had already, from an earlier import of the same file."""


def import_rankings(store: PreferenceStore, source: str) -> ImportReport:
    """Store the rankings of a file, whose columns say which of the three formats it is; all of them or none.

    Raises ValueError naming file and line for a row that is broken, says nothing (equal or empty answers), contradicts
    another of its group, or holds something that a ranking cannot keep.
    """
    from strop.data import load_rows

    rows = load_rows(source)
    columns = set(rows[0])
    if "completions" in columns:
        format, found = "listwise", list(_listwise(rows))
    elif "label" in columns:
        format, found = "kto", list(_unpaired(rows))
    else:
        format, found = "trl", list(_pairs(rows))
    num_known = 0
    with store.transaction():
        for where, ranking in found:
            try:
                num_known += not _store(store, ranking)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from error
    return ImportReport(format=format, num_rankings=len(found), num_known=num_known)


def load_gold(store: PreferenceStore, source: str) -> int:
    """Add the rows of a listwise file as gold items: their ranks are the right answer. Returns how many."""
    from strop.data import load_rows

    with store.transaction():
        found = list(_listwise(load_rows(source)))
        for where, ranking in found:
            if len(ranking.completions) < 2 or len(set(ranking.ranks)) < 2:
                raise ValueError(f"{where}: a gold item needs two answers of different rank")
            try:
                store.add_item(ranking.prompt, ranking.completions, models=ranking.models, gold_ranks=ranking.ranks)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from error
    return len(found)


def _store(store: PreferenceStore, ranking: Ranking) -> bool:
    """Whether it was new."""
    item_id = store.add_item(ranking.prompt, ranking.completions, models=ranking.models, group_id=ranking.group_id)
    with store.transaction() as connection:
        connection.execute(
            "INSERT OR IGNORE INTO presentations VALUES (NULL, ?, ?, 'first', ?, ?)",
            (item_id, ranking.annotator, json.dumps(list(ranking.shown_order)), time.time()),
        )
        sql = "SELECT id FROM presentations WHERE item_id = ? AND annotator = ? AND purpose = 'first'"
        presentation_id = store.query(sql, item_id, ranking.annotator)[0][0]
        uuid = hashlib.sha256(f"import\0{item_id}\0{ranking.annotator}".encode()).hexdigest()
        is_new = not store.query("SELECT 1 FROM rankings WHERE uuid = ?", uuid)
        shown = [ranking.ranks[position] for position in ranking.shown_order]
        answer = Answer(
            uuid=uuid,
            verdict=cast(Any, ranking.verdict),
            ranks=shown if ranking.verdict == "ranked" else None,
            strength=ranking.strength,
            comment=ranking.comment,
            milliseconds=ranking.milliseconds,
        )
        submit(store, presentation_id, ranking.annotator, answer)
    return is_new


def _pairs(rows: Rows) -> Iterator[tuple[str, Ranking]]:
    from strop.data import read_preferences

    groups: dict[tuple[Any, ...], list[tuple[int, Any, str, str]]] = {}
    for index, row in enumerate(read_preferences(rows)):
        _refuse_tools(row.tools, row.where)
        chosen, rejected = _text_of(row.chosen, row.where), _text_of(row.rejected, row.where)
        if chosen == rejected:
            raise ValueError(f"{row.where}: columns 'chosen' and 'rejected' are equal; remove the row")
        key = _group_key(rows[index], prompt_id_of(row.prompt), (chosen, rejected), row.where)
        groups.setdefault(key, []).append((index, row.prompt, chosen, rejected))
    for (group_id, annotator, *_), members in groups.items():
        where = rows.where(members[0][0])
        prompt = _one_prompt([member[1] for member in members], group_id, where)
        completions = list(dict.fromkeys(text for _, _, chosen, rejected in members for text in (chosen, rejected)))
        ranks = _ranks_of_pairs(completions, {(c, r) for _, _, c, r in members}, group_id, where)
        margin = rows[members[0][0]].get("margin")
        strength = int(margin) if len(completions) == 2 and margin in (1, 2, 3, 4) else None
        ranking = _ranking(prompt, completions, ranks, group_id, annotator, where, strength=strength)
        _check_derived(rows, [(index, (chosen, rejected)) for index, _, chosen, rejected in members], ranking)
        yield where, ranking


def _check_derived(rows: Rows, pairs: Sequence[tuple[int, tuple[str, str]]], ranking: Ranking) -> None:
    """margin and weight follow from the ranking; other values would be lost, so they are refused."""
    lines = {(_text_of(one["chosen"], ""), _text_of(one["rejected"], "")): one for one in lines_of(ranking, "trl")}
    for index, texts in pairs:
        for column in ("margin", "weight"):
            given, derived = rows[index].get(column), lines[texts][column]
            if given is not None and given != derived:
                raise ValueError(
                    f"{rows.where(index)}: column {column!r} is {given!r}, but follows from the ranking here "
                    f"({derived!r}) and cannot be kept; remove the column"
                )


def _ranks_of_pairs(completions: Sequence[str], better: set[tuple[str, str]], group_id: str, where: str) -> list[int]:
    """The ranking whose strict pairs these are: a tier is what only the tiers before it beat."""
    tier: dict[str, int] = {}
    rest = list(completions)
    while rest:
        top = [text for text in rest if not any((other, text) in better for other in rest)]
        if not top:
            raise ValueError(f"{where}: the pairs of group {group_id} contradict each other; remove one, or group_id")
        rank = len(set(tier.values())) + 1
        tier |= dict.fromkeys(top, rank)
        rest = [text for text in rest if text not in tier]
    for winner in completions:
        for loser in completions:
            if tier[winner] < tier[loser] and (winner, loser) not in better:
                raise ValueError(
                    f"{where}: the pairs of group {group_id} are not all those of one ranking (missing: "
                    f"{winner!r:.40} before {loser!r:.40}); add them, or remove group_id"
                )
    return [tier[text] for text in completions]


def _unpaired(rows: Rows) -> Iterator[tuple[str, Ranking]]:
    from strop.data import read_unpaired

    groups: dict[tuple[Any, ...], list[tuple[int, Any, str, bool]]] = {}
    for index, row in enumerate(read_unpaired(rows)):
        _refuse_tools(row.tools, row.where)
        key = _group_key(rows[index], prompt_id_of(row.prompt), (), row.where)
        groups.setdefault(key, []).append((index, row.prompt, _text_of(row.completion, row.where), row.label))
    for (group_id, annotator, *_), members in groups.items():
        where = rows.where(members[0][0])
        prompt = _one_prompt([member[1] for member in members], group_id, where)
        labels: dict[str, bool] = {}
        for index, _, text, label in members:
            if text in labels:
                said = "labelled both ways" if labels[text] != label else "there twice"
                raise ValueError(f"{rows.where(index)}: this completion of the prompt is {said}; keep one row")
            labels[text] = label
        if len(set(labels.values())) == 2:
            ranks, verdict = [1 if label else 2 for label in labels.values()], "ranked"
        else:
            ranks, verdict = [1] * len(labels), "all_good" if members[0][3] else "all_bad"
        yield where, _ranking(prompt, list(labels), ranks, group_id, annotator, where, verdict=verdict)


def _listwise(rows: Rows) -> Iterator[tuple[str, Ranking]]:
    from strop.data.tasks import tasks_from_rows

    for index, task in enumerate(tasks_from_rows(rows)):
        where, row = rows.where(index), rows[index]
        _refuse_tools(row.get("tools"), where)
        completions = _list(row, "completions", where)
        texts = [_completion_of(value, task.prompt, where) for value in completions]
        ranks = _list(row, "ranks", where, len(texts))
        if not all(isinstance(rank, int) and not isinstance(rank, bool) for rank in ranks):
            raise ValueError(f"{where}: column 'ranks' must hold whole numbers, 1 for the best")
        if len(set(texts)) < len(texts):
            raise ValueError(f"{where}: two of the completions are equal; remove one, and its rank")
        models = _list(row, "models", where, len(texts)) if row.get("models") is not None else None
        if models is not None and not all(isinstance(model, str) for model in models):
            raise ValueError(f"{where}: column 'models' must hold text")
        verdict = row.get("verdict") or "ranked"
        if verdict != "ranked" and len(set(ranks)) > 1:
            raise ValueError(f"{where}: verdict {verdict!r} leaves no room for ranks that differ; remove one")
        order = _list(row, "shown_order", where, len(texts)) if row.get("shown_order") is not None else None
        if order is not None and sorted(order) != list(range(len(texts))):
            raise ValueError(f"{where}: column 'shown_order' must hold each of 0 to {len(texts) - 1} once")
        key = _group_key(row, prompt_id_of(task.prompt), texts, where)
        yield (
            where,
            _ranking(
                task.prompt,
                texts,
                dense_ranks(ranks),
                key[0],
                key[1],
                where,
                verdict=verdict,
                strength=row.get("strength"),
                models=models,
                shown_order=order,
                milliseconds=row.get("milliseconds") or 0,
                comment=row.get("comment") or "",
            ),
        )


def _ranking(
    prompt: Any,
    completions: Sequence[str],
    ranks: Sequence[int],
    group_id: str | None,
    annotator: str,
    where: str,
    *,
    verdict: str = "ranked",
    strength: int | None = None,
    models: Sequence[str] | None = None,
    shown_order: Sequence[int] | None = None,
    milliseconds: int = 0,
    comment: str = "",
) -> Ranking:
    if verdict == "skipped" or verdict == "undone":
        raise ValueError(f"{where}: verdict {verdict!r} is no ranking; remove the row")
    prompt_id = prompt_id_of(prompt)
    return Ranking(
        prompt_id=prompt_id,
        prompt=prompt,
        completions=completions,
        ranks=ranks,
        verdict=verdict,
        group_id=group_id or group_id_of(prompt_id, completions),
        annotator=annotator,
        strength=strength,
        models=models or [DEFAULT_ANNOTATOR] * len(completions),
        shown_order=shown_order or list(range(len(completions))),
        milliseconds=milliseconds,
        comment=comment,
    )


def _group_key(row: Mapping[str, Any], prompt_id: str, texts: Sequence[str], where: str) -> tuple[Any, ...]:
    """(group_id or None, annotator, and what tells rows without a group_id apart)."""
    group_id, annotator = row.get("group_id"), row.get("annotator")
    for column, value in (("group_id", group_id), ("annotator", annotator)):
        if value is not None and (not isinstance(value, str) or not value):
            raise ValueError(f"{where}: column {column!r} must be text that is not empty, found {value!r}")
    annotator = annotator or DEFAULT_ANNOTATOR
    return (group_id, annotator) if group_id else (None, annotator, prompt_id, *texts)


def _one_prompt(prompts: Sequence[Any], group_id: str | None, where: str) -> Any:
    if len({prompt_id_of(prompt) for prompt in prompts}) > 1:
        raise ValueError(f"{where}: the rows of group {group_id} have different prompts; a group has one")
    return prompts[0]


def _completion_of(value: Any, prompt: Any, where: str) -> str:
    from strop.data.sources import checked_text

    if isinstance(value, str) != isinstance(prompt, str):
        raise ValueError(f"{where}: columns 'prompt' and 'completions' must be both text or both messages")
    return _text_of(value, where) if isinstance(value, list) else checked_text(value, "a completion", where)


def _text_of(completion: Any, where: str) -> str:
    """The text of an answer: itself, or of its only message."""
    if isinstance(completion, str):
        return completion
    messages = list(completion)
    is_plain = len(messages) == 1 and isinstance(messages[0], dict) and set(messages[0]) == {"role", "content"}
    if not is_plain or messages[0]["role"] != "assistant" or not isinstance(messages[0]["content"], str):
        raise ValueError(f"{where}: an answer must be text or one assistant message with nothing but its content")
    if not messages[0]["content"].strip():
        raise ValueError(f"{where}: an answer is empty; fill it or remove the row")
    return messages[0]["content"]


def _list(row: Mapping[str, Any], column: str, where: str, length: int | None = None) -> list[Any]:
    value = row.get(column)
    if not isinstance(value, list) or not value or (length is not None and len(value) != length):
        size = "that is not empty" if length is None else f"of {length}, one per completion"
        raise ValueError(f"{where}: column {column!r} must be a list {size}")
    return value


def _refuse_tools(tools: object, where: str) -> None:
    if tools:
        raise ValueError(f"{where}: column 'tools' cannot be kept in a ranking; remove it")
