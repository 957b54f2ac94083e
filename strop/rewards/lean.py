"""Rewards complete Lean 4 proofs. NOT RUN AGAINST A REAL LEAN HERE: no toolchain comes from a package registry.

What is tested is everything around it: which texts are refused, how a body is put under our statement, the REPL's
protocol, the boxes, what counts as accepted. Try it on proofs that you know before you trust it.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from strop.rewards.lean_text import proof_body, why_refused
from strop.rewards.worker import Reply, WorkerPool
from strop.types import Completion, Task, Verdict

INSTALL = (
    "install Lean's toolchain manager elan (https://lean-lang.org/install), which brings lake, and "
    "pip install 'strop[lean]'"
)


class LeanReward:
    """1.0 when the completion proves the task's statement in Lean 4, else 0.0.

    The completion is the body of the proof, tactics after `by` (the last fenced block, where there is one). It is put
    under the task's statement in a file of ours, may hold no word that starts a command, and is checked in boxes: by
    the REPL, by its axioms (propext, Classical.choice, Quot.sound and no other), and by `replay` in fresh processes,
    which compares the compiled theorem with the statement and takes it through the kernel again.

    Not run against a real Lean here; see the module's text.

    Status: ok, wrong (with what Lean said), unparsed (refused before Lean), timeout, killed, infra_error.
    """

    def __init__(
        self,
        *,
        project: str,
        replay: str,
        header: str = "",
        repl: str = "",
        lake: str = "lake",
        name: str = "lean",
        statement_column: str = "statement",
        timeout: float = 60.0,
        start_timeout: float = 300.0,
        memory_mb: int = 16384,
        recycle_after: int = 200,
        num_workers: int | None = None,
    ) -> None:
        """project is the folder of a built Lake project; replay the program that judges two compiled files, as
        `replay REFERENCE.olean SUBMISSION.olean` with exit status 0 for the same statement, proved (SafeVerify's
        binary); header what stands before every statement (`import Mathlib`); repl a built REPL, empty = lean-interact
        builds it for the project's Lean. timeout in seconds per proof, start_timeout for loading the header; a REPL is
        thrown away after recycle_after proofs. Raises ImportError saying what to install, and ValueError.
        """
        lake_path = shutil.which(lake)
        if lake_path is None:
            raise ImportError(f"reward {name!r}: there is no {lake!r}: {INSTALL}")
        if not repl and importlib.util.find_spec("lean_interact") is None:
            raise ImportError(f"reward {name!r}: lean-interact is not installed: {INSTALL}; or name a built REPL, repl")
        for option, value in (("timeout", timeout), ("start_timeout", start_timeout), ("recycle_after", recycle_after)):
            if not value > 0:
                raise ValueError(f"reward {name!r}: {option} must be above 0, got {value}")
        folder = Path(project).resolve()
        if not any((folder / file).is_file() for file in ("lakefile.toml", "lakefile.lean")):
            raise ValueError(f"reward {name!r}: project {project!r} is no Lake project: it has no lakefile")
        for option, file in (("replay", replay), ("repl", repl)):
            if (file or option == "replay") and not Path(file).is_file():
                raise ValueError(
                    f"reward {name!r}: {option} {file!r} is no file. Without a kernel replay no proof is believed; "
                    "build SafeVerify in the project and give .lake/packages/SafeVerify/.lake/build/bin/safe_verify"
                )
        self.name = name
        self._statement_column = statement_column
        options = {
            "project": str(folder),
            "header": header,
            "lake": lake_path,
            "repl": str(Path(repl).resolve()) if repl else build_repl(folder, lake_path),
            "replay": str(Path(replay).resolve()),
            "timeout": timeout,
            "start_seconds": start_timeout,
            "memory_mb": memory_mb,
            "recycle_after": recycle_after,
        }
        self._pool = WorkerPool(
            "strop.rewards.lean_worker",
            timeout=2 * timeout + start_timeout,
            start_timeout=start_timeout + 300.0,
            num_workers=num_workers,
            arguments=[json.dumps(options)],
        )
        try:
            self._pool.start()
        except RuntimeError as error:
            self._pool.close()
            raise ValueError(f"reward {name!r}: {error}") from None

    def score(self, tasks: Sequence[Task], completions: Sequence[Completion]) -> list[Verdict]:
        """One verdict per pair tasks[i], completions[i]. Raises ValueError when a task has no statement."""
        bodies = [proof_body(completion.text) for completion in completions]
        verdicts: list[Verdict | None] = []
        requests: list[dict[str, Any]] = []
        for task, body in zip(tasks, bodies, strict=True):
            statement = self._statement(task)
            reason = why_refused(body)
            verdicts.append(None if reason is None else Verdict(score=0.0, status="unparsed", detail=reason))
            if reason is None:
                requests.append({"statement": statement, "body": body})
        replies = iter(self._pool.map(requests))
        return [verdict or _verdict(task, next(replies)) for task, verdict in zip(tasks, verdicts, strict=True)]

    def check_tasks(self, tasks: Sequence[Task]) -> None:
        """Raises ValueError, naming the task, when Lean does not accept its statement, or not its own `proof`."""
        requests = [{"statement": self._statement(task), "body": None} for task in tasks]
        for task, reply in zip(tasks, self._pool.map(requests), strict=True):
            verdict = _verdict(task, reply)
            if verdict.status != "ok":
                raise ValueError(f"{task.id}: Lean does not accept the statement: {verdict.detail}")
        proved = [task for task in tasks if isinstance(task.columns.get("proof"), str)]
        answers = [
            Completion(token_ids=(), sampling_logprobs=(), finish_reason="stop", text=task.columns["proof"])
            for task in proved
        ]
        for task, verdict in zip(proved, self.score(proved, answers), strict=True):
            if verdict.status != "ok":
                raise ValueError(f"{task.id}: the task's own proof scores 0: {verdict.status}, {verdict.detail}")

    @property
    def num_parallel(self) -> int:
        return self._pool.num_workers

    def close(self) -> None:
        self._pool.close()

    def _statement(self, task: Task) -> str:
        statement = task.columns.get(self._statement_column)
        if not isinstance(statement, str) or ":" not in statement:
            raise ValueError(
                f"{task.id}: the {self.name!r} reward needs the column {self._statement_column!r}, such as "
                f"'(n : Nat) : n + 0 = n'; this row has {', '.join(map(repr, task.columns)) or 'no columns'}"
            )
        return statement


def build_repl(project: Path, lake: str) -> str:
    """The REPL's binary for the project's Lean version, which lean-interact downloads and builds where needed."""
    lean_interact: Any = importlib.import_module("lean_interact")
    config = lean_interact.LeanREPLConfig(
        project=lean_interact.LocalProject(directory=str(project), auto_build=False), lake_path=lake
    )
    return str(Path(config.cache_repl_dir) / ".lake" / "build" / "bin" / "repl")


def _verdict(task: Task, reply: Reply) -> Verdict:
    status, detail = (reply.failure, reply.detail) if reply.failure else reply.value
    return Verdict(
        score=float(status == "ok"),
        status=status,
        detail=f"{task.id}: {detail}" if status == "infra_error" else detail,
        milliseconds=reply.milliseconds,
    )
