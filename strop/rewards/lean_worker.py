"""The process that checks Lean proofs. Started by lean.LeanReward; imports no torch and runs no model text itself.

Twice, each time in a box. First in a REPL that has the header loaded, which turns nearly all wrong proofs away in
milliseconds and says which axioms were used. Then, for what is left, in fresh processes: `lean` compiles our statement
alone and our statement with the proof, and a replay program compares the two files and takes the proof through the
kernel again. Only that last word is a 1.

Not run against a real Lean here. What stands in for it in the tests speaks the same protocol and command lines.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from strop.rewards.lean_repl import (
    ALLOWED_AXIOMS,
    END,
    NoReplyError,
    axioms_of,
    environment_of,
    reply,
    request,
    why_wrong,
)
from strop.rewards.lean_text import GOAL, signature, splice, why_refused
from strop.rewards.sandbox.box import Box, BoxSettings, DeadlineError, EndedError, Launcher, MisbehavedError
from strop.rewards.sandbox.canary import check_canary
from strop.rewards.sandbox.python import is_open_to_all
from strop.rewards.serve import Handler, end_with_parent, serve

MAX_REPLY_BYTES = 4 << 20
OLEAN_MB = 64
SETUP_SECONDS = 120.0
TRIVIAL = "example : True := trivial"
"""Said to a REPL that has no header to load."""

Outcome = tuple[Literal["ok", "wrong", "unparsed", "timeout", "killed", "infra_error"], str]


def main() -> None:
    serve(_make_handler, respawn=False)


def _make_handler() -> Handler:
    options = json.loads(sys.argv[1])
    end_with_parent()
    check_canary(BoxSettings())
    judge = LeanJudge(**options)
    judge.start()
    return judge.judge


class LeanJudge:
    """Judges one proof at a time. Used by the thread that made it, since boxes die with it."""

    def __init__(
        self,
        *,
        project: str,
        header: str,
        lake: str,
        repl: str,
        replay: str,
        timeout: float,
        start_seconds: float,
        memory_mb: int,
        recycle_after: int,
    ) -> None:
        """As LeanReward's options. Raises RuntimeError when the project's environment cannot be found out."""
        prefix = _ask_lake(lake, project, "lean", "--print-prefix")
        # Lake names them from the project's folder.
        named = _ask_lake(lake, project, "printenv", "LEAN_PATH").split(":")
        paths = [os.path.realpath(os.path.join(project, path)) for path in named]
        self._header = header.strip()
        self._lean, self._repl_program, self._replay = f"{prefix}/bin/lean", repl, replay
        self._timeout, self._start_seconds, self._recycle_after = timeout, start_seconds, recycle_after
        self._memory_mb = memory_mb
        self._environment = {"LEAN_PATH": ":".join(paths), "LEAN_SYSROOT": prefix, "HOME": "/tmp"}
        places = [prefix, *paths, str(Path(repl).parent), str(Path(replay).parent)]
        self._read_only = tuple(dict.fromkeys(os.path.realpath(place) for place in places if os.path.isdir(place)))
        if os.geteuid() == 0 and (closed := [place for place in self._read_only if not is_open_to_all(place)]):
            raise RuntimeError(f"boxes run as nobody, who cannot reach {closed[0]}: move Lean and the project")
        self._repl: Box | None = None
        self._base: int | None = None
        self._uses = 0

    def start(self) -> None:
        """Starts the REPL and loads the header, so that a broken set-up shows at once. Raises RuntimeError."""
        self._ready_repl()

    def judge(self, task: Mapping[str, Any]) -> Outcome:
        """The verdict on task["body"] as a proof of task["statement"]; a body of None asks whether the statement itself
        is right. A proof whose box is ended by somebody is tried once more."""
        body = task["body"]
        if body is not None and (reason := why_refused(body)) is not None:
            return "unparsed", reason
        outcome = self._judge_once(task["statement"], body)
        return self._judge_once(task["statement"], body) if outcome[0] == "killed" else outcome

    def close(self) -> None:
        if self._repl is not None:
            self._repl.close()
            self._repl = None

    def _judge_once(self, statement: str, body: str | None) -> Outcome:
        try:
            deadline = self._ready_repl() + self._timeout
            if body is None:
                found = self._say(f"theorem {GOAL} {signature(statement)} := by\n  sorry", self._base, deadline)
                errors = [message["data"] for message in found.get("messages", ()) if message["severity"] == "error"]
                return ("wrong", errors[0].strip()[:300]) if errors or "env" not in found else ("ok", "")
            found = self._say(splice(statement, body), self._base, deadline)
            if (reason := why_wrong(found)) is not None:
                return "wrong", reason
            axioms = axioms_of(self._say(f"#print axioms {GOAL}", environment_of(found), deadline))
            if extra := axioms - ALLOWED_AXIOMS:
                return "wrong", f"uses the axioms {', '.join(sorted(extra))}"
            return self._replayed(statement, body, deadline)
        except NoReplyError as error:
            self.close()
            return "wrong", str(error)
        except DeadlineError:
            self.close()
            return "timeout", f"no verdict in {self._timeout:g} s"
        except EndedError:
            self.close()
            return "killed", "the REPL ended"
        except MisbehavedError as error:
            self.close()
            return "wrong", str(error)

    def _ready_repl(self) -> float:
        """A REPL with the header loaded, and the time. A used one is thrown away after recycle_after proofs."""
        if self._repl is not None and (self._uses >= self._recycle_after or not self._repl.is_running()):
            self.close()
        if self._repl is None:
            self._repl, self._base, self._uses = self._launcher(self._repl_program).start(), None, 0
            try:
                loaded = self._say(self._header or TRIVIAL, None, time.monotonic() + self._start_seconds)
                self._base = environment_of(loaded)
            except EndedError:
                words = self._repl.last_words()
                self._repl = None
                raise RuntimeError(f"the REPL ended before it had loaded the header: {words}") from None
            except (DeadlineError, MisbehavedError, NoReplyError) as error:
                self.close()
                raise RuntimeError(f"Lean did not load the header: {error or type(error).__name__}") from None
        self._uses += 1
        return time.monotonic()

    def _say(self, command: str, environment: int | None, deadline: float) -> dict[str, Any]:
        assert self._repl is not None
        self._repl.write(request(command, environment), deadline)
        return reply(self._repl.read_until(END, deadline, MAX_REPLY_BYTES))

    def _replayed(self, statement: str, body: str, deadline: float) -> Outcome:
        """The word of the replay program, in processes that have seen nothing of the REPL."""
        gap = f"theorem {GOAL} {signature(statement)} := by\n  sorry\n"
        with tempfile.TemporaryDirectory(prefix="strop-lean-") as folder:
            os.chmod(folder, 0o755)  # boxes run as nobody
            built: list[str] = []
            for name, text in (("reference", gap), ("submission", splice(statement, body))):
                # A folder each: what compiles the proof must not reach what it is compared with.
                own = Path(folder) / name
                own.mkdir()
                own.chmod(0o777)
                source = own / "Goal.lean"
                source.write_text(f"{self._header}\n\n{text}", encoding="utf-8")
                built.append(f"{own}/Goal.olean")
                status, words = self._run([self._lean, "-o", built[-1], str(source)], deadline, writable=(str(own),))
                if status != 0 or not os.path.isfile(built[-1]):
                    whose = "infra_error" if name == "reference" else "wrong"
                    return whose, f"lean did not compile the {name}: {words}"
            status, words = self._run([self._replay, *built], deadline, read_only=(folder,))
            return ("ok", "") if status == 0 else ("wrong", f"the replay refuses it: {words}")

    def _run(
        self, command: list[str], deadline: float, *, writable: tuple[str, ...] = (), read_only: tuple[str, ...] = ()
    ) -> tuple[int, str]:
        """Exit status and last line of a program in a box of its own."""
        box = self._launcher(*command, writable=writable, read_only=read_only).start()
        try:
            box.write(b"", deadline, then_close=True)
            words = box.read_all(deadline, MAX_REPLY_BYTES).decode("utf-8", "replace").strip()
            return box.exit_status(deadline), words.splitlines()[-1][:300] if words else ""
        finally:
            box.close()

    def _launcher(self, *command: str, writable: tuple[str, ...] = (), read_only: tuple[str, ...] = ()) -> Launcher:
        settings = BoxSettings(
            memory_mb=self._memory_mb,
            cpu_seconds=max(1, int(self._recycle_after * self._timeout)),
            start_seconds=self._start_seconds,
            read_only=(*self._read_only, *read_only),
            writable=writable,
            file_mb=OLEAN_MB,
        )
        return Launcher(settings, command=command, environment=self._environment)


def _ask_lake(lake: str, project: str, *command: str) -> str:
    try:
        done = subprocess.run(
            [lake, "env", *command], cwd=project, capture_output=True, text=True, check=True, timeout=SETUP_SECONDS
        )
    except (OSError, subprocess.SubprocessError) as error:
        words = getattr(error, "stderr", None) or str(error)
        raise RuntimeError(f"lake env {' '.join(command)} failed in {project}: {words.strip()[:300]}") from None
    return done.stdout.strip()
