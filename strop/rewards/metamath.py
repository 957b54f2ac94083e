"""Rewards complete Metamath proofs, by a checker of our own in worker processes that can be killed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from strop.rewards.metamath_database import INSTALL, Assertion, Database
from strop.rewards.metamath_proof import MAX_LABELS
from strop.rewards.worker import Reply, WorkerPool
from strop.types import Completion, Task, Verdict

DEBIAN_FOLDER = Path("/usr/share/metamath/databases")


def find_database(name: str) -> Path:
    """The file that a recipe names: a path, or the name of one of Debian's databases ("ql", "ql.mm").

    Raises ValueError saying what to install.
    """
    path = Path(name)
    if path.is_file():
        return path
    installed = DEBIAN_FOLDER / (name if name.endswith(".mm") else f"{name}.mm")
    if "/" not in name and installed.is_file():
        return installed
    raise ValueError(f"there is no Metamath database {name!r}: give the path of a .mm file. {INSTALL}")


class MetamathReward:
    """1.0 when the completion proves the task's theorem, else 0.0.

    The completion is the proof's list of labels in normal (reverse Polish) order and nothing else; where it has a block
    between ``` lines, the last such block is the proof. What is proved is the statement in the database, under the
    database up to it: a completion cannot add an axiom, change the statement, cite itself or what comes later, or leave
    a gap.

    Status: ok, wrong (with the step and the reason), unparsed (no list of labels), timeout, killed, infra_error.
    """

    def __init__(
        self,
        *,
        database: str,
        before: str = "",
        name: str = "metamath",
        theorem_column: str = "theorem",
        timeout: float = 2.0,
        num_workers: int | None = None,
    ) -> None:
        """database is a path or the name of one of Debian's ("ql"), of which only what stands before the label `before`
        is read where that is given; theorem_column names the column with the label of the theorem to prove; timeout in
        seconds per proof. Raises ValueError.
        """
        self.name = name
        self._path = find_database(database).resolve()
        self._before = before
        self._theorem_column = theorem_column
        self._pool = WorkerPool(
            "strop.rewards.metamath_worker",
            timeout=timeout,
            num_workers=num_workers,
            arguments=[os.fspath(self._path), before],
        )

    def score(self, tasks: Sequence[Task], completions: Sequence[Completion]) -> list[Verdict]:
        """One verdict per pair tasks[i], completions[i]. Raises ValueError when a task names no theorem."""
        requests = [
            {"theorem": self._theorem(task), "labels": proof_labels(completion.text)}
            for task, completion in zip(tasks, completions, strict=True)
        ]
        return [_verdict(task, reply) for task, reply in zip(tasks, self._pool.map(requests), strict=True)]

    def check_tasks(self, tasks: Sequence[Task]) -> None:
        """Raises ValueError, naming the task, when the database does not have its theorem or states it otherwise."""
        database = Database.load(self._path, before=self._before)
        for task in tasks:
            try:
                theorem = database.theorem(self._theorem(task))
            except ValueError as error:
                raise ValueError(f"{task.id}: {error}") from None
            stated = task.columns.get("statement")
            if stated is not None and stated != statement_text(theorem):
                raise ValueError(
                    f"{task.id}: states {stated!r:.120}, but {theorem.label} in {database.name} is "
                    f"{statement_text(theorem)!r:.120}: the tasks were made from another version, make them again"
                )
        try:
            self._pool.start()
        except RuntimeError as error:
            raise ValueError(f"reward {self.name!r}: {error}") from None

    @property
    def num_parallel(self) -> int:
        return self._pool.num_workers

    def close(self) -> None:
        self._pool.close()

    def _theorem(self, task: Task) -> str:
        label = task.columns.get(self._theorem_column)
        if not isinstance(label, str):
            raise ValueError(
                f"{task.id}: the {self.name!r} reward needs the column {self._theorem_column!r} with the label of the "
                f"theorem to prove; this row has {', '.join(map(repr, task.columns)) or 'no columns'}"
            )
        return label


def proof_labels(text: str) -> list[str]:
    """The words that a completion gives as its proof; beyond MAX_LABELS they are cut, and refused all the same."""
    blocks = text.split("```")[1:-1:2]  # between a fence and the one that closes it
    if blocks:
        text = blocks[-1].partition("\n")[2]  # the rest of the opening line names a language
    return text.split(maxsplit=MAX_LABELS + 1)[: MAX_LABELS + 1]


def statement_text(theorem: Assertion) -> str:
    """What a theorem states, its hypotheses before it: "|- a = b => |- b = a"."""
    essential = [" ".join(h.expression) for h in theorem.hypotheses if not h.is_floating]
    conclusion = " ".join(theorem.expression)
    return f"{' & '.join(essential)} => {conclusion}" if essential else conclusion


def _verdict(task: Task, reply: Reply) -> Verdict:
    if reply.failure is not None:
        detail = f"{task.id}: {reply.detail}" if reply.failure == "infra_error" else reply.detail
        return Verdict(score=0.0, status=reply.failure, detail=detail, milliseconds=reply.milliseconds)
    status, detail = reply.value
    return Verdict(score=float(status == "ok"), status=status, detail=detail, milliseconds=reply.milliseconds)
