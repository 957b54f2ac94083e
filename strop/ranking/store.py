"""A preference store: one SQLite file with prompts, answers to them, and every ranking that people gave."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import secrets
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from strop.ranking.schema import APPLICATION_ID, SCHEMA, VERSION

if TYPE_CHECKING:
    from strop.types import Message

BUSY_SECONDS = 10.0
"""How long a writer waits for another process that writes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How items are handed out. Kept in the store, so that reopening it goes on the same way.

    Example: Settings(overlap=0.2, people=2, repeats=0.05)
    """

    overlap: float = 0.0
    """Share of the items that `people` people rank; every other item is ranked once."""
    people: int = 2
    """How many people rank an item of the overlap."""
    repeats: float = 0.0
    """Share of a person's work that is an item they have ranked before, in reversed order."""
    gold: float = 0.1
    """Share of a person's work that is gold items (whose right answer is known), while there are some they lack."""
    lease_seconds: float = 900.0
    """How long an item that is shown to somebody is kept from others."""
    newest_first: bool = False
    """Hand out the items sampled last first (active mode)."""

    def __post_init__(self) -> None:
        for name in ("overlap", "repeats", "gold"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must be a share from 0 to 1")
        if self.people < 2:
            raise ValueError(f"people={self.people}: an overlap needs at least 2 people per item")
        if self.lease_seconds <= 0:
            raise ValueError(f"lease_seconds={self.lease_seconds} must be above 0")


class PreferenceStore:
    """The store of one file. Any number of processes and threads may have it open; writers wait for each other.

    What a transaction has written is on the disk when it returns (WAL, synchronous=FULL), also after kill -9 or a
    power cut. Nothing but leases is ever changed or deleted.

    Example:
        store = PreferenceStore("people.db", create=True)
        store.add_item("The sky is", [" blue.", " green."])
    """

    def __init__(self, path: str | Path, *, create: bool = False, seed: int | None = None) -> None:
        """Open the store; with `create`, make it where it does not exist.

        seed decides every order in which answers are shown; random unless given, and fixed once the store exists.
        Raises ValueError for a file that is no store, or that a newer version wrote.
        """
        self.path = Path(path)
        if not create and not self.path.exists():
            raise ValueError(f"{path} does not exist; make a store with: strop rank {path} --prompts FILE --from RUN")
        if not self.path.parent.is_dir():
            raise ValueError(f"{path}: the folder {self.path.parent} does not exist")
        if self.path.is_dir():
            raise ValueError(f"{path} is a folder; a store is one file, such as {self.path / 'people.db'}")
        self._lock = threading.RLock()
        self._connection = sqlite3.connect(
            self.path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
        )
        self._connection.row_factory = sqlite3.Row
        self._connection.create_function("people_wanted", 1, self._people_wanted, deterministic=False)
        try:
            self._prepare(create, seed)
        except sqlite3.DatabaseError as error:
            self._connection.close()
            if isinstance(error, sqlite3.OperationalError):
                raise OSError(f"{path}: {error}") from error
            raise ValueError(f"{path} is not a preference store ({error}); name another file") from error
        except ValueError:
            self._connection.close()
            raise
        self.settings = Settings(**json.loads(self.meta("settings")))

    def _prepare(self, create: bool, seed: int | None) -> None:
        connection = self._connection
        is_empty = connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0] == 0
        if not is_empty and connection.execute("PRAGMA application_id").fetchone()[0] != APPLICATION_ID:
            raise ValueError(f"{self.path} is a database, but not a preference store; name another file")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")
        with self.transaction():
            # Asked again, now that nobody else writes: another process may have made the tables meanwhile.
            is_empty = connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0] == 0
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            if is_empty and create:
                self._create_tables(seed)
            elif is_empty:
                raise ValueError(f"{self.path} is empty; make a store with --prompts FILE --from RUN")
            elif version != VERSION:
                raise ValueError(f"{self.path} has version {version}, this Strop reads version {VERSION}")

    def _create_tables(self, seed: int | None) -> None:
        # One statement at a time: executescript would commit the transaction that two first openers wait for.
        statement = ""
        for line in SCHEMA.splitlines(keepends=True):
            statement += line
            if sqlite3.complete_statement(statement):
                self._connection.execute(statement)
                statement = ""
        values = {
            "seed": str(secrets.randbits(63) if seed is None else seed),
            "secret": secrets.token_hex(32),
            "settings": json.dumps(dataclasses.asdict(Settings())),
        }
        self._connection.executemany("INSERT INTO meta VALUES (?, ?)", list(values.items()))
        self._connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        self._connection.execute(f"PRAGMA user_version = {VERSION}")

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All or nothing, and alone: nobody else writes meanwhile. May be nested; the outermost commits."""
        with self._lock:
            if self._connection.in_transaction:
                yield self._connection
                return
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
            except BaseException:
                self._connection.execute("ROLLBACK")
                raise
            self._connection.execute("COMMIT")

    def query(self, sql: str, *values: Any) -> list[sqlite3.Row]:
        with self._lock:
            return self._connection.execute(sql, values).fetchall()

    def meta(self, key: str) -> str:
        return self.query("SELECT value FROM meta WHERE key = ?", key)[0][0]

    def change_settings(self, **changes: Any) -> None:
        """Keep these fields of Settings from now on. ValueError for one out of range."""
        with self.transaction() as connection:
            self.settings = dataclasses.replace(Settings(**json.loads(self.meta("settings"))), **changes)
            text = json.dumps(dataclasses.asdict(self.settings))
            connection.execute("UPDATE meta SET value = ? WHERE key = 'settings'", (text,))

    def record(self, event: str, detail: str) -> None:
        """A row of the audit table."""
        with self.transaction() as connection:
            connection.execute("INSERT INTO audit VALUES (NULL, ?, ?, ?)", (event, detail, time.time()))

    def add_prompt(self, prompt: str | Sequence[Message]) -> str:
        """The prompt's id, which its content alone decides; adding it again changes nothing."""
        prompt_id = prompt_id_of(prompt)
        with self.transaction() as connection:
            content = json.dumps(prompt, ensure_ascii=False)
            connection.execute("INSERT OR IGNORE INTO prompts VALUES (?, ?, ?)", (prompt_id, content, time.time()))
        return prompt_id

    def add_policy(self, label: str, weights: str = "") -> int:
        """The id of a policy: a checkpoint's name and content hash."""
        with self.transaction() as connection:
            values = (label, weights, time.time())
            connection.execute("INSERT OR IGNORE INTO policies VALUES (NULL, ?, ?, ?)", values)
            return self.query("SELECT id FROM policies WHERE label = ? AND weights = ?", label, weights)[0][0]

    def add_response(
        self, prompt_id: str, policy_id: int, sampling: str, sample_index: int, text: str, finish_reason: str
    ) -> int:
        """The id of an answer. One (prompt, policy, sampling, sample_index) is stored once: the first text stays."""
        with self.transaction() as connection:
            key = (prompt_id, policy_id, sampling, sample_index)
            connection.execute(
                "INSERT OR IGNORE INTO responses VALUES (NULL, ?, ?, ?, ?, ?, ?, ?)",
                (*key, text, finish_reason, time.time()),
            )
            where = "prompt_id = ? AND policy_id = ? AND sampling = ? AND sample_index = ?"
            return self.query(f"SELECT id FROM responses WHERE {where}", *key)[0][0]

    def add_item(
        self,
        prompt: str | Sequence[Message],
        completions: Sequence[str],
        *,
        models: Sequence[str] | None = None,
        group_id: str | None = None,
        gold_ranks: Sequence[int] | None = None,
    ) -> int:
        """The id of an item made of texts that are already there; models names their origin. The same again is the
        same item. ValueError for texts that are empty or equal."""
        with self.transaction():
            prompt_id = self.add_prompt(prompt)
            group_id = group_id or group_id_of(prompt_id, completions)
            sampling = json.dumps({"group_id": group_id, "texts": content_hash(list(completions))})
            response_ids = [
                self.add_response(prompt_id, self.add_policy(model), sampling, position, text, "")
                for position, (text, model) in enumerate(
                    zip(completions, models or ["given"] * len(completions), strict=True)
                )
            ]
            return self.add_item_of(prompt_id, response_ids, group_id=group_id, gold_ranks=gold_ranks)

    def add_item_of(
        self,
        prompt_id: str,
        response_ids: Sequence[int],
        *,
        group_id: str | None = None,
        gold_ranks: Sequence[int] | None = None,
    ) -> int:
        """The id of an item made of stored answers to one prompt."""
        with self.transaction() as connection:
            texts = [self.query("SELECT text FROM responses WHERE id = ?", one)[0][0] for one in response_ids]
            if not texts or not all(text.strip() for text in texts):
                raise ValueError("an item needs at least one answer, and none may be empty")
            if len(set(texts)) < len(texts):
                raise ValueError("two answers of an item are equal, so that nobody could rank them")
            if gold_ranks is not None and len(gold_ranks) != len(texts):
                raise ValueError(f"{len(gold_ranks)} gold ranks for {len(texts)} answers")
            group_id = group_id or group_id_of(prompt_id, texts)
            gold = None if gold_ranks is None else json.dumps(dense_ranks(gold_ranks))
            key = content_hash([group_id, prompt_id, texts, gold is not None])
            if known := self.query("SELECT id FROM items WHERE key = ?", key):
                return known[0][0]
            values = (key, group_id, prompt_id, len(texts), gold, time.time())
            item_id = connection.execute("INSERT INTO items VALUES (NULL, ?, ?, ?, ?, ?, ?)", values).lastrowid
            assert item_id is not None
            rows = [(item_id, position, response_id) for position, response_id in enumerate(response_ids)]
            connection.executemany("INSERT INTO item_responses VALUES (?, ?, ?)", rows)
            return item_id

    def prompt(self, prompt_id: str) -> str | list[Message]:
        return json.loads(self.query("SELECT content FROM prompts WHERE id = ?", prompt_id)[0][0])

    def completions(self, item_id: int) -> list[str]:
        """The texts of an item, in its own order."""
        sql = "SELECT text FROM item_responses JOIN responses ON id = response_id WHERE item_id = ? ORDER BY position"
        return [row[0] for row in self.query(sql, item_id)]

    def models(self, item_id: int) -> list[str]:
        """Which policy wrote each text of an item. Not for the page: people rank blind."""
        return [
            row[0]
            for row in self.query(
                "SELECT label FROM item_responses JOIN responses ON responses.id = response_id "
                "JOIN policies ON policies.id = policy_id WHERE item_id = ? ORDER BY position",
                item_id,
            )
        ]

    def _people_wanted(self, key: str) -> int:
        return self.settings.people if share_of(key) < self.settings.overlap else 1


def dense_ranks(values: Sequence[float]) -> list[int]:
    """Ranks from 1 without gaps, the smallest value first; equal values tie: [3, 7, 3] -> [1, 2, 1]."""
    place = {value: rank for rank, value in enumerate(sorted(set(values)), start=1)}
    return [place[value] for value in values]


def content_hash(value: Any) -> str:
    """SHA-256 of a value as JSON with sorted keys."""
    text = json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def prompt_id_of(prompt: str | Sequence[Message]) -> str:
    return content_hash(prompt if isinstance(prompt, str) else list(prompt))


def group_id_of(prompt_id: str, completions: Sequence[str]) -> str:
    return content_hash([prompt_id, list(completions)])[:16]


def share_of(key: str) -> float:
    """A number in [0, 1) that the key alone decides: which side of a split something falls on, now and later."""
    return int(hashlib.sha256(key.encode()).hexdigest()[:13], 16) / 16**13
