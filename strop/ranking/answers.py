"""What a person says about an item: rank, skip, take back. Every word is a new row."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args

from strop.ranking.queue import Presentation, lease, load_presentation
from strop.ranking.store import PreferenceStore, dense_ranks

Verdict = Literal["ranked", "all_bad", "all_good", "skipped"]

SKIP_REASONS = {
    "cannot_judge": "I cannot judge this",
    "unclear": "The prompt is unclear or broken",
    "harmful": "I do not want to read this",
    "same": "The answers are all the same",
    "other": "Another reason",
}

MAX_COMMENT = 2000
MAX_MILLISECONDS = 24 * 3600 * 1000
_UUID = re.compile(r"[0-9A-Za-z-]{8,64}")


class ConflictError(Exception):
    """The item has another answer already: from a second tab, or from another client with the same uuid."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One person's word on one presentation; ranks are in the order shown.

    Example: Answer(uuid="4f0c9a55e2d1", verdict="ranked", ranks=(2, 1, 2), milliseconds=8120)
    """

    uuid: str
    """Chosen by the client, once per answer: sent twice, it is stored once."""
    verdict: Verdict = "ranked"
    ranks: Sequence[int] | None = None
    """1 is best, equal numbers tie. For "ranked" only; gaps are closed."""
    strength: int | None = None
    """How clear the preference is, 1 to 4; only between two answers that do not tie."""
    reason: str = ""
    """Why it was skipped: a key of SKIP_REASONS."""
    comment: str = ""
    milliseconds: int = 0
    """How long the item was before the person."""


def submit(store: PreferenceStore, presentation_id: int, annotator: str, answer: Answer) -> int:
    """Store the answer and return its row's id; once it returns, the answer is on the disk.

    The same uuid with the same content again returns the same id. Raises ValueError for an answer that does not fit
    what was shown, or a presentation that is not this person's, and ConflictError where there is another answer.
    """
    with store.transaction() as connection:
        order = _shown_order(store, presentation_id, annotator)
        ranks = _checked_ranks(answer, len(order))
        by_position = None if ranks is None else [ranks[order.index(position)] for position in range(len(order))]
        values = (
            presentation_id,
            answer.verdict,
            None if by_position is None else json.dumps(by_position),
            answer.reason,
            answer.comment,
            answer.strength,
        )
        if (known := _known(store, answer.uuid)) is not None:
            if tuple(known)[1:7] != values:
                raise ConflictError("this answer was sent before with other content")
            return known["id"]
        last = _last_row(store, presentation_id)
        if last is not None and last["verdict"] != "undone":
            raise ConflictError("this item has been answered already, perhaps in another tab")
        row_id = connection.execute(
            "INSERT INTO rankings (presentation_id, verdict, ranks, reason, comment, strength, uuid, milliseconds, "
            "supersedes, created) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (*values, answer.uuid, answer.milliseconds, None if last is None else last["id"], time.time()),
        ).lastrowid
        connection.execute(
            "DELETE FROM leases WHERE annotator = ? AND item_id = (SELECT item_id FROM presentations WHERE id = ?)",
            (annotator, presentation_id),
        )
        assert row_id is not None
        return row_id


def undo(store: PreferenceStore, annotator: str, uuid: str) -> Presentation | None:
    """Take back this person's last answer, as a new row, and return the item, which is theirs again.

    None when there is no answer to take back. The same uuid again takes back nothing more.
    """
    _check_uuid(uuid)
    with store.transaction() as connection:
        known = _known(store, uuid)
        if known is not None:
            if known["verdict"] != "undone":
                raise ConflictError("this uuid belongs to an answer")
            _shown_order(store, known["presentation_id"], annotator)
            return load_presentation(store, known["presentation_id"])
        rows = store.query(
            "SELECT id, presentation_id FROM answers WHERE annotator = ? ORDER BY id DESC LIMIT 1", annotator
        )
        if not rows:
            return None
        connection.execute(
            "INSERT INTO rankings VALUES (NULL, ?, ?, 'undone', NULL, '', '', NULL, 0, ?, ?)",
            (uuid, rows[0]["presentation_id"], rows[0]["id"], time.time()),
        )
        lease(store, rows[0]["presentation_id"])
        return load_presentation(store, rows[0]["presentation_id"])


def _shown_order(store: PreferenceStore, presentation_id: int, annotator: str) -> list[int]:
    rows = store.query("SELECT annotator, shown_order FROM presentations WHERE id = ?", presentation_id)
    if not rows or rows[0]["annotator"] != annotator:
        raise ValueError(f"item {presentation_id} was never shown to you")
    return json.loads(rows[0]["shown_order"])


def _known(store: PreferenceStore, uuid: str):
    columns = "id, presentation_id, verdict, ranks, reason, comment, strength"
    rows = store.query(f"SELECT {columns} FROM rankings WHERE uuid = ?", uuid)
    return rows[0] if rows else None


def _last_row(store: PreferenceStore, presentation_id: int):
    sql = "SELECT id, verdict FROM rankings WHERE presentation_id = ? ORDER BY id DESC LIMIT 1"
    rows = store.query(sql, presentation_id)
    return rows[0] if rows else None


def _check_uuid(uuid: object) -> None:
    if not isinstance(uuid, str) or not _UUID.fullmatch(uuid):
        raise ValueError("uuid must be 8 to 64 letters, digits or hyphens")


def _checked_ranks(answer: Answer, num_shown: int) -> list[int] | None:
    """The ranks without gaps, or None for a skip; ValueError for what does not fit."""
    _check_uuid(answer.uuid)
    if answer.verdict not in get_args(Verdict):
        raise ValueError(f"verdict must be one of {', '.join(get_args(Verdict))}")
    if not _is_int(answer.milliseconds) or not 0 <= answer.milliseconds <= MAX_MILLISECONDS:
        raise ValueError("milliseconds must be a whole number, at most a day")
    if not isinstance(answer.comment, str) or len(answer.comment) > MAX_COMMENT:
        raise ValueError(f"comment must be text of at most {MAX_COMMENT} characters")
    if answer.verdict == "skipped":
        if answer.reason not in SKIP_REASONS:
            raise ValueError(f"reason must be one of {', '.join(SKIP_REASONS)}")
    elif answer.reason:
        raise ValueError("only a skip has a reason; use comment")
    ranks = None
    if answer.verdict == "ranked":
        is_list = isinstance(answer.ranks, list | tuple) and len(cast(Sequence[int], answer.ranks)) == num_shown
        if not is_list or not all(_is_int(rank) for rank in cast(Sequence[int], answer.ranks)):
            raise ValueError(f"ranks must be {num_shown} whole numbers, one for each answer shown")
        ranks = dense_ranks(cast(Sequence[int], answer.ranks))
    elif answer.ranks is not None:
        raise ValueError(f"{answer.verdict} has no ranks")
    elif answer.verdict != "skipped":
        ranks = [1] * num_shown
    if answer.strength is not None:
        if not _is_int(answer.strength) or not 1 <= answer.strength <= 4:
            raise ValueError("strength must be 1, 2, 3 or 4")
        if ranks is None or num_shown != 2 or len(set(ranks)) != 2:
            raise ValueError("strength says how much better one of two answers is; here none is")
    return ranks


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
