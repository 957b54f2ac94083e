"""The process that checks Metamath proofs. Started by metamath.MetamathReward with the database's path; no torch."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Literal

from strop.rewards.metamath_database import Database
from strop.rewards.metamath_proof import NotAProofError, ProofError, check_labels, check_stored_proof
from strop.rewards.serve import Handler, serve

MEMORY_BYTES = 1 << 30

Outcome = tuple[Literal["ok", "wrong", "unparsed"], str]


def main() -> None:
    serve(_make_handler, respawn=True, memory_bytes=MEMORY_BYTES)


def _make_handler() -> Handler:
    database = load_verified(Path(sys.argv[1]), before=sys.argv[2])

    def handle(request: dict[str, Any]) -> Outcome:
        return judge(database, request["theorem"], request["labels"])

    return handle


def load_verified(path: Path, *, before: str = "") -> Database:
    """The database, every stored proof of it checked: a wrong theorem could otherwise be cited to prove anything.

    Theorems whose proof is "?" pass: they are open tasks, which nobody may cite. Raises ValueError.
    """
    database = Database.load(path, before=before)
    for theorem in database.theorems():
        if not theorem.is_unproven:
            try:
                check_stored_proof(database, theorem)
            except ProofError as error:
                raise ValueError(f"{database.name}: the proof of {theorem.label} is wrong: {error}") from None
    return database


def judge(database: Database, theorem: str, labels: list[str]) -> Outcome:
    """The verdict on a list of labels, and why. Raises ValueError for a theorem that the database does not have."""
    try:
        check_labels(database, database.theorem(theorem), labels)
    except NotAProofError as error:
        return "unparsed", str(error)
    except ProofError as error:
        return "wrong", str(error)
    return "ok", ""
