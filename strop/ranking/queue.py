"""Who ranks what next: leases, overlap, gold items and flipped repeats."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from strop.ranking.store import PreferenceStore

if TYPE_CHECKING:
    from strop.types import Message

REPEAT_GAP = 4
"""An item comes back, flipped, after at least so many others: sooner, people remember what they said."""

ANSWERED = "('ranked', 'all_bad', 'all_good')"

TAKEN = f"""
(SELECT count(*) FROM (
    SELECT annotator FROM answers WHERE item_id = items.id AND purpose = 'first' AND verdict IN {ANSWERED}
    UNION SELECT annotator FROM leases WHERE item_id = items.id AND until > :now)
WHERE annotator != :annotator)
"""
"""How many other people have ranked an item or have it before them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Presentation:
    """One item as it is shown to one person: blind, in an order that the store drew and keeps.

    Example: Presentation(id=7, annotator="ann", prompt="The sky is", completions=(" green.", " blue."))
    """

    id: int
    annotator: str
    prompt: str | Sequence[Message]
    completions: tuple[str, ...]
    """As shown: completions[0] stands first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far the work is. Rankings count; skips do not, and neither do gold items and repeats in done and wanted."""

    mine: int
    """What this person has ranked, gold items and repeats included."""
    done: int
    wanted: int


def next_item(store: PreferenceStore, annotator: str) -> Presentation | None:
    """The item that this person should rank now, leased to them; None when there is nothing (left) for them.

    Asking again without answering gives the same item in the same order: a reload, or a second tab, changes nothing.
    """
    now = time.time()
    with store.transaction() as connection:
        presentation_id = _open_presentation(store, annotator, now)
        if presentation_id is None:
            found = _due_gold(store, annotator) or _due_repeat(store, annotator) or _new_item(store, annotator, now)
            if found is None:
                return None
            item_id, purpose = found
            order = _draw_order(store, item_id, annotator, purpose)
            presentation_id = connection.execute(
                "INSERT INTO presentations VALUES (NULL, ?, ?, ?, ?, ?)",
                (item_id, annotator, purpose, json.dumps(order), now),
            ).lastrowid
            assert presentation_id is not None
        presentation = load_presentation(store, presentation_id)
        lease(store, presentation_id)
    return presentation


def present(store: PreferenceStore, item_id: int, annotator: str) -> Presentation:
    """This item as it is shown to this person, whatever comes next in the queue; the same presentation when shown
    before."""
    known = store.query(
        "SELECT id FROM presentations WHERE item_id = ? AND annotator = ? AND purpose = 'first'", item_id, annotator
    )
    if known:
        return load_presentation(store, known[0]["id"])
    with store.transaction() as connection:
        order = json.dumps(_draw_order(store, item_id, annotator, "first"))
        presentation_id = connection.execute(
            "INSERT INTO presentations VALUES (NULL, ?, ?, 'first', ?, ?)", (item_id, annotator, order, time.time())
        ).lastrowid
        assert presentation_id is not None
        return load_presentation(store, presentation_id)


def lease(store: PreferenceStore, presentation_id: int) -> None:
    """Keep the item of a presentation from others for a while."""
    with store.transaction() as connection:
        connection.execute(
            "INSERT OR REPLACE INTO leases SELECT item_id, annotator, ? FROM presentations WHERE id = ?",
            (time.time() + store.settings.lease_seconds, presentation_id),
        )


def load_presentation(store: PreferenceStore, presentation_id: int) -> Presentation:
    row = store.query(
        "SELECT item_id, annotator, prompt_id, shown_order FROM presentations JOIN items ON items.id = item_id "
        "WHERE presentations.id = ?",
        presentation_id,
    )[0]
    texts = store.completions(row["item_id"])
    return Presentation(
        id=presentation_id,
        annotator=row["annotator"],
        prompt=store.prompt(row["prompt_id"]),
        completions=tuple(texts[position] for position in json.loads(row["shown_order"])),
    )


def progress(store: PreferenceStore, annotator: str) -> Progress:
    """Counts for the page: this person's, and the whole store's."""
    mine = store.query(f"SELECT count(*) FROM answers WHERE annotator = ? AND verdict IN {ANSWERED}", annotator)
    done, wanted = store.query(
        f"""
        SELECT coalesce(sum(min(wanted, ranked)), 0), coalesce(sum(wanted), 0) FROM (
            SELECT people_wanted(key) AS wanted, (
                SELECT count(DISTINCT annotator) FROM answers
                WHERE item_id = items.id AND purpose = 'first' AND verdict IN {ANSWERED}) AS ranked
            FROM items WHERE gold_ranks IS NULL AND num_responses > 1)
        """
    )[0]
    return Progress(mine=mine[0][0], done=done, wanted=wanted)


def num_open(store: PreferenceStore) -> int:
    """Items that nobody has answered, skipped or before them: what is left before new ones must be sampled."""
    sql = """
        SELECT count(*) FROM items WHERE gold_ranks IS NULL AND num_responses > 1
        AND NOT EXISTS (SELECT 1 FROM answers WHERE item_id = items.id)
        AND NOT EXISTS (SELECT 1 FROM leases WHERE item_id = items.id AND until > ?)
    """
    return store.query(sql, time.time())[0][0]


def _open_presentation(store: PreferenceStore, annotator: str, now: float) -> int | None:
    """What was shown to this person and has no answer (what they took back last comes first), unless others have
    meanwhile done all that was wanted."""
    rows = _named(
        store,
        f"""
        SELECT presentations.id FROM presentations JOIN items ON items.id = item_id
        WHERE annotator = :annotator
        AND NOT EXISTS (SELECT 1 FROM answers WHERE presentation_id = presentations.id)
        AND (purpose = 'repeat' OR gold_ranks IS NOT NULL OR {TAKEN} < people_wanted(key))
        ORDER BY (SELECT max(id) FROM rankings WHERE presentation_id = presentations.id) DESC, presentations.id DESC
        LIMIT 1
        """,
        annotator,
        now,
    )
    return rows[0][0] if rows else None


def _due_gold(store: PreferenceStore, annotator: str) -> tuple[int, str] | None:
    num_seen, num_gold = store.query(
        "SELECT count(*), coalesce(sum(gold_ranks IS NOT NULL), 0) FROM answers JOIN items ON items.id = item_id "
        "WHERE annotator = ?",
        annotator,
    )[0]
    if num_gold + 1 > store.settings.gold * (num_seen + 1):
        return None
    rows = store.query(
        "SELECT id FROM items WHERE gold_ranks IS NOT NULL AND NOT EXISTS "
        "(SELECT 1 FROM presentations WHERE item_id = items.id AND annotator = ?) ORDER BY id LIMIT 1",
        annotator,
    )
    return (rows[0][0], "first") if rows else None


def _due_repeat(store: PreferenceStore, annotator: str) -> tuple[int, str] | None:
    answered = store.query(
        "SELECT item_id, purpose, verdict, gold_ranks IS NOT NULL AS is_gold FROM answers "
        "JOIN items ON items.id = item_id WHERE annotator = ? ORDER BY answers.id",
        annotator,
    )
    repeated = {row["item_id"] for row in answered if row["purpose"] == "repeat"}
    if len(repeated) + 1 > store.settings.repeats * (len(answered) + 1):
        return None
    for row in answered[: -REPEAT_GAP or None]:
        if row["item_id"] not in repeated and row["verdict"] == "ranked" and not row["is_gold"]:
            return row["item_id"], "repeat"
    return None


def _new_item(store: PreferenceStore, annotator: str, now: float) -> tuple[int, str] | None:
    rows = _named(
        store,
        f"""
        SELECT items.id FROM items WHERE gold_ranks IS NULL AND num_responses > 1
        AND NOT EXISTS (SELECT 1 FROM presentations WHERE item_id = items.id AND annotator = :annotator)
        AND {TAKEN} < people_wanted(key)
        ORDER BY items.id {"DESC" if store.settings.newest_first else "ASC"} LIMIT 1
        """,
        annotator,
        now,
    )
    return (rows[0][0], "first") if rows else None


def _named(store: PreferenceStore, sql: str, annotator: str, now: float) -> list[tuple[int]]:
    with store.transaction() as connection:
        return connection.execute(sql, {"annotator": annotator, "now": now}).fetchall()


def _draw_order(store: PreferenceStore, item_id: int, annotator: str, purpose: str) -> list[int]:
    """A repeat reverses the order of the first time; everything else is shuffled."""
    if purpose == "repeat":
        sql = "SELECT shown_order FROM presentations WHERE item_id = ? AND annotator = ? AND purpose = 'first'"
        return json.loads(store.query(sql, item_id, annotator)[0][0])[::-1]
    order = list(range(store.query("SELECT num_responses FROM items WHERE id = ?", item_id)[0][0]))
    random.Random(f"{store.meta('seed')}:{item_id}:{annotator}").shuffle(order)
    return order
