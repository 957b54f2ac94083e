"""The process that judges code. Started by code.CodeReward; imports no torch and runs no foreign code itself.

Two boxes per verdict of the function kind: one has the solution and sees only the arguments of each call, the other has
the tests and sees only the results, and this process passes the messages on without looking into them. So a solution
can neither read what is expected, nor bring an object whose __eq__ says yes, nor decide the verdict. Tests without code
(code_tests.PlainAssertion) and a solution that cannot be loaded need no second box.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from strop.rewards.code_tests import MAX_WORD_BYTES, PlainAssertion, plain_assertions
from strop.rewards.sandbox.box import (
    Box,
    BoxPool,
    BoxSettings,
    DeadlineError,
    EndedError,
    Launcher,
    MisbehavedError,
)
from strop.rewards.sandbox.canary import check_canary
from strop.rewards.sandbox.guest import ID_BYTES, WireError, decode, encode
from strop.rewards.serve import Handler, end_with_parent, serve

BOXES_AHEAD = 4
MAX_OUTPUT_BYTES = 4 << 20

_NO_WORD = "no word on how it was loaded"

Outcome = tuple[Literal["ok", "wrong", "unparsed", "timeout", "killed", "infra_error"], str]


def main() -> None:
    serve(_make_handler, respawn=False)


def _make_handler() -> Handler:
    options = json.loads(sys.argv[1])
    timeout = options.pop("timeout")
    end_with_parent()
    settings = BoxSettings(**options)
    if settings.backend != "local":
        check_canary(settings)
    judge = CodeJudge(BoxPool(Launcher(settings), size=BOXES_AHEAD), timeout=timeout)
    judge.pool.refill()
    return judge.judge


class _TestsEndedError(Exception):
    """The box of the tests ended before its verdict; has_data says whether it had seen anything of the solution's."""

    def __init__(self, has_data: bool) -> None:
        super().__init__()
        self.has_data = has_data


class CodeJudge:
    """Judges one solution at a time. Used by the thread that made it, since boxes die with it."""

    def __init__(self, pool: BoxPool, *, timeout: float) -> None:
        """timeout in seconds of wall time per verdict."""
        self.pool = pool
        self._timeout = timeout

    def judge(self, request: Mapping[str, Any]) -> Outcome:
        """The verdict on request["code"], by its "tests" and "entry_point", or by its "cases". Raises BoxError.

        A program that is killed is run once more: killed again, the fault is its own; else it was somebody else's (the
        out-of-memory killer, an operator), and the second verdict counts.
        """
        run = self._judge_function if request.get("cases") is None else self._judge_program
        outcome = run(request)
        if outcome[0] != "killed":
            return outcome
        self.pool.close()  # whoever ended that box may be ending those that wait, and they look alive a little longer
        return run(request)

    def _judge_function(self, request: Mapping[str, Any]) -> Outcome:
        solution, tests = self.pool.take(), None
        try:
            deadline = time.monotonic() + self._timeout
            if (failure := self._load(solution, request, deadline)) is not None:
                return failure
            has_prelude = bool(request["prelude"].strip())
            plain = None if has_prelude else plain_assertions(request["tests"], request["entry_point"])
            if plain is not None:
                return _compare(solution, plain, deadline)
            started = time.monotonic()  # waiting for a box is not the solution's time
            tests = self.pool.take()
            return self._converse(tests, solution, request, deadline + time.monotonic() - started)
        except DeadlineError:
            return "timeout", f"no result in {self._timeout:g} s"
        except MisbehavedError as error:
            return "wrong", str(error)
        except _TestsEndedError as error:
            if error.has_data:
                return "killed", "its result ended the process of the tests"
            return "infra_error", "the tests ended their own process before they called anything"
        finally:
            solution.close()
            if tests is not None:
                tests.close()

    def _load(self, solution: Box, request: Mapping[str, Any], deadline: float) -> Outcome | None:
        """Has the solution's source run in its box; the verdict where that already fails."""
        load = {"role": "solution", "code": request["code"], **_shared(request)}
        message_id = secrets.token_bytes(ID_BYTES)
        try:
            solution.send(message_id, encode(load), deadline)
            self.pool.refill()
            loaded = _solution_says(solution, message_id, deadline)
        except EndedError:
            return _how_it_ended(solution, deadline, "while it was loaded")
        if len(loaded) > MAX_WORD_BYTES:
            return "wrong", _NO_WORD
        try:
            outcome = decode(loaded)
        except WireError as error:
            return "wrong", str(error)
        if outcome == ["ok"]:
            return None
        return ("unparsed" if _is_syntax_error(outcome) else "wrong"), _reason(outcome)

    def _converse(self, tests: Box, solution: Box, request: Mapping[str, Any], deadline: float) -> Outcome:
        """Passes calls and results between the two boxes until the tests have their verdict."""
        job = encode({"role": "tests", "tests": request["tests"], **_shared(request)})
        num_calls = 0
        try:
            tests.send(bytes(ID_BYTES), job, deadline)
            self.pool.refill()
            while True:
                _, word = tests.read_frame(deadline)
                kind, payload = word[:1], word[1:]
                if kind == b"E":
                    break
                try:
                    result = _ask(solution, payload, deadline)
                except EndedError:
                    return _how_it_ended(solution, deadline, f"in call {num_calls + 1}")
                tests.send(bytes(ID_BYTES), result, deadline)
                num_calls += 1
        except EndedError:
            raise _TestsEndedError(has_data=num_calls > 0) from None
        outcome = _tests_verdict(decode(payload))
        return _last_word(solution, deadline) if outcome[0] == "ok" else outcome

    def _judge_program(self, request: Mapping[str, Any]) -> Outcome:
        cases: Sequence[Sequence[str]] = request["cases"]
        job = encode({"role": "program", "prelude": request["prelude"], "code": request["code"]})
        seconds_left = self._timeout
        for number, (given, expected) in enumerate(cases, 1):
            where = f"case {number} of {len(cases)}"
            box = self.pool.take()
            started = time.monotonic()  # waiting for a box is not the program's time
            deadline = started + seconds_left
            try:
                box.send(bytes(ID_BYTES), job, deadline, then_close=given.encode("utf-8", "surrogatepass"))
                self.pool.refill()
                output = box.read_all(deadline, MAX_OUTPUT_BYTES)
                status = box.exit_status(deadline)
            except EndedError:
                return _how_it_ended(box, deadline, f"in {where}")
            except DeadlineError:
                return "timeout", f"{where}: no end in {self._timeout:g} s"
            except MisbehavedError as error:
                return "wrong", f"{where}: {error}"
            finally:
                box.close()
            seconds_left -= time.monotonic() - started
            if status < 0:
                return "killed", f"{where}: ended by signal {-status}"
            if status != 0:
                return "wrong", f"{where}: exit status {status}"
            if normal_output(output.decode("utf-8", "replace")) != normal_output(expected):
                return "wrong", f"{where}: the output differs"
        return "ok", ""


def normal_output(text: str) -> list[str]:
    """What is compared: all lines, without white space at their ends, and without empty lines at the end."""
    lines = [line.rstrip() for line in text.replace("\r\n", "\n").split("\n")]
    while lines and not lines[-1]:
        lines.pop()
    return lines


def _shared(request: Mapping[str, Any]) -> dict[str, str]:
    return {"prelude": request["prelude"], "entry_point": request["entry_point"]}


def _compare(solution: Box, assertions: Sequence[PlainAssertion], deadline: float) -> Outcome:
    """The verdict by tests without code. Raises as Box does."""
    for number, assertion in enumerate(assertions, 1):
        try:
            reason = assertion.why_wrong(_ask(solution, assertion.arguments, deadline))
        except EndedError:
            return _how_it_ended(solution, deadline, f"in call {number}")
        if reason is not None:
            return "wrong", reason
    return _last_word(solution, deadline)


def _ask(solution: Box, arguments: bytes, deadline: float) -> bytes:
    """The solution's reply to one call. A new id for every call: an answer written in advance, or meant for another
    call, does not have it."""
    message_id = secrets.token_bytes(ID_BYTES)
    solution.send(message_id, arguments, deadline)
    return _solution_says(solution, message_id, deadline)


def _solution_says(solution: Box, message_id: bytes, deadline: float) -> bytes:
    answer_id, payload = solution.read_frame(deadline)
    if answer_id != message_id:
        raise MisbehavedError("it answered a call that was not asked")
    return payload


def _last_word(solution: Box, deadline: float) -> Outcome:
    """Ok for a solution that has written nothing but its answers. Raises MisbehavedError for one that has more.

    It is asked for one more answer, to no call at all: whatever else it wrote before comes out first, however slowly it
    was written. One that has ended by now owes nothing.
    """
    with contextlib.suppress(EndedError):
        _ask(solution, encode(None), deadline)
    return ("wrong", "it wrote a result that nobody had asked for") if solution.has_spoken() else ("ok", "")


def _tests_verdict(said: Sequence[Any]) -> Outcome:
    outcome, kind, text, calls, bad = said
    if bad:
        return "infra_error", bad
    if outcome != "passed":
        return (
            ("wrong", f"{kind}: {text}" if text else kind) if calls else ("infra_error", f"the tests: {kind}: {text}")
        )
    if not calls:
        return "infra_error", "the tests never call the function"
    return "ok", ""


def _how_it_ended(box: Box, deadline: float, when: str) -> Outcome:
    status = box.exit_status(deadline)
    return ("killed", f"ended by signal {-status} {when}") if status < 0 else ("wrong", f"ended its process {when}")


def _is_syntax_error(outcome: Any) -> bool:
    return isinstance(outcome, list) and outcome[1:2] in (["SyntaxError"], ["IndentationError"], ["TabError"])


def _reason(outcome: Any) -> str:
    if isinstance(outcome, list) and len(outcome) == 3 and all(isinstance(part, str) for part in outcome):
        return f"{outcome[1]}: {outcome[2]}"[:300]
    return _NO_WORD
