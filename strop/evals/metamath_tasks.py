"""Theorems of a Metamath database as tasks, the shortest proof first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from strop.rewards.metamath import statement_text
from strop.rewards.metamath_database import Assertion, Database
from strop.rewards.metamath_proof import normal_labels

Row = dict[str, Any]


def metamath_rows(path: Path, *, before: str = "", max_labels: int = 100, typecode: str = "|-") -> list[Row]:
    """One row per theorem of that typecode whose stored proof has at most max_labels labels in normal order.

    Columns: prompt (one user message), theorem (its label), statement, proof (the database's own, a completion that
    scores 1), num_labels. Ordered by num_labels: how long a proof is says much about how hard it is to find.
    Raises ValueError when there is no such theorem.
    """
    database = Database.load(path, before=before)
    rows: list[Row] = []
    for theorem in database.theorems():
        if theorem.expression[0] != typecode or theorem.is_unproven:
            continue
        labels = normal_labels(database, theorem, limit=max_labels)
        if labels is not None:
            rows.append(
                {
                    "prompt": [{"role": "user", "content": prompt_text(theorem)}],
                    "theorem": theorem.label,
                    "statement": statement_text(theorem),
                    "proof": " ".join(labels),
                    "num_labels": len(labels),
                }
            )
    if not rows:
        raise ValueError(
            f"{path}: no theorem of type {typecode!r} has a complete proof of at most {max_labels} labels"
            + ("" if any(database.theorems()) else "; the file has axioms only")
        )
    rows.sort(key=lambda row: row["num_labels"])
    return rows


def prompt_text(theorem: Assertion) -> str:
    """What the policy sees: one line per mandatory hypothesis, with its label, and the statement to prove.

    Example, ql.mm's 3tr2, whose proof begins with one of these labels:

        Prove in Metamath. Answer with the proof's labels in reverse Polish order, nothing else.
        wva term a
        ...
        3tr2.1 |- a = b
        prove |- c = d
    """
    lines = ["Prove in Metamath. Answer with the proof's labels in reverse Polish order, nothing else."]
    lines += [f"{hypothesis.label} {' '.join(hypothesis.expression)}" for hypothesis in theorem.hypotheses]
    lines += [f"$d {first} {second}" for first, second in sorted(theorem.disjoint)]
    lines.append(f"prove {' '.join(theorem.expression)}")
    return "\n".join(lines)
