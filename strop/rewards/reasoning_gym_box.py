"""The process that has answers scored in a box, for those of reasoning-gym's scorers that run them as Python code.

Started by reasoning_gym.ReasoningGymReward; imports no reasoning-gym itself. Importing that takes seconds, so a box
serves many answers, with another one ready behind it. That is safe for the score, because what reaches a scorer holds
no call and no assignment (reasoning_gym_text.why_not_run, asked out here and again in the box); it is killed with its
box when it does not come to an end.
"""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
import sys
import time
from pathlib import Path
from typing import Any

from strop.rewards.reasoning_gym_text import why_not_run
from strop.rewards.sandbox import guest
from strop.rewards.sandbox.box import Box, BoxPool, BoxSettings, DeadlineError, EndedError, Launcher, MisbehavedError
from strop.rewards.sandbox.canary import check_canary
from strop.rewards.serve import Handler, end_with_parent, serve

MEMORY_MB = 2048
CPU_SECONDS = 1800
"""Of one box in all; the deadline of each answer is much shorter."""

_PROGRAM = "import sys; sys.path += {path!r}; from strop.rewards.reasoning_gym_box import in_box; in_box()"


def main() -> None:
    serve(_make_handler, respawn=False)


def _make_handler() -> Handler:
    options = json.loads(sys.argv[1])
    end_with_parent()
    scorer = BoxedScorer(timeout=options["timeout"], start_seconds=options["start_seconds"], python=options["python"])
    scorer.start()
    return scorer.score


_ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
"""numpy would reserve memory for as many threads as there are cores."""


class BoxedScorer:
    """Scores one answer at a time. Used by the thread that made it, since boxes die with it."""

    def __init__(self, *, timeout: float, start_seconds: float, python: str | None) -> None:
        """Seconds per answer, and for a box to get ready. Raises FileNotFoundError or ImportError without a sandbox."""
        self._timeout = timeout
        package = importlib.util.find_spec("reasoning_gym")
        assert package is not None and package.submodule_search_locations
        packages = Path(package.submodule_search_locations[0]).resolve().parent
        ours = Path(__file__).resolve().parents[1]
        folders = [str(folder) for folder in dict.fromkeys((packages, ours))]
        self._settings = BoxSettings(
            memory_mb=MEMORY_MB,
            cpu_seconds=CPU_SECONDS,
            python=python,
            start_seconds=start_seconds,
            read_only=tuple(folder for folder in folders if not Path(folder).is_relative_to("/usr")),
        )
        path = [str(ours.parent), str(packages)]
        self._pool = BoxPool(
            Launcher(self._settings, source=_PROGRAM.format(path=path), environment=_ONE_THREAD), size=1
        )
        self._box: Box | None = None

    def start(self) -> None:
        """Attacks a box like those that will be used, then starts one. Raises RuntimeError, BoxError."""
        check_canary(self._settings)
        self._take()

    def score(self, request: dict[str, Any]) -> dict[str, Any]:
        """As reasoning_gym_worker.score; {"failure": status, "detail": text} where there is no score.

        A box that is killed is tried once more, since somebody else may have killed it. Raises BoxError.
        """
        if request["answer"] is not None and (reason := why_not_run(request["dataset"], request["answer"])) is not None:
            return {"failure": "unparsed", "detail": reason}
        for _ in range(2):
            box = self._take()
            message_id = secrets.token_bytes(guest.ID_BYTES)
            deadline = time.monotonic() + self._timeout
            try:
                box.send(message_id, guest.encode(request), deadline)
                answer_id, payload = box.read_frame(deadline)
                if answer_id == message_id and not box.has_spoken():
                    return _checked(guest.decode(payload))
                raise MisbehavedError("it answered what was not asked")
            except DeadlineError:
                self._drop()
                return {"failure": "timeout", "detail": f"no score in {self._timeout:g} s; the box was killed"}
            except (MisbehavedError, guest.WireError) as error:
                self._drop()
                return {"failure": "killed", "detail": str(error)}
            except EndedError:
                self._drop()
        return {"failure": "killed", "detail": "ended its box twice"}

    def close(self) -> None:
        self._drop()
        self._pool.close()

    def _take(self) -> Box:
        if self._box is None:
            self._box = self._pool.take()
            self._pool.refill()
        return self._box

    def _drop(self) -> None:
        if self._box is not None:
            self._box.close()
            self._box = None


def _checked(found: Any) -> dict[str, Any]:
    """The box's reply, if it is one. Raises MisbehavedError."""
    shape = {"score": float, "floor": float, "error": str, "question": str}
    if not isinstance(found, dict) or any(type(found.get(key)) is not kind for key, kind in shape.items()):
        raise MisbehavedError("it answered with no score")
    if "failure" in found or not 0.0 <= found["score"] <= 1.0:
        raise MisbehavedError("it answered with no score")
    return found


def in_box() -> None:
    """What runs in the box: scores one request after the other."""
    requests, replies, null = os.dup(0), os.dup(1), os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1):
        os.dup2(null, fd)
    import reasoning_gym  # noqa: F401  # before the greeting: it takes seconds

    from strop.rewards.reasoning_gym_worker import score

    guest.write_frame(replies, bytes(guest.ID_BYTES), b"ready")
    while True:
        message_id, payload = guest.read_frame(requests)
        found = score(guest.decode(payload))
        guest.write_frame(replies, message_id, guest.encode({**found, "gold": str(found["gold"])}))
