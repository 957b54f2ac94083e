"""The protocol of Lean's REPL (leanprover-community/repl, the one that lean-interact builds), and what its replies say.

One JSON object per request and per reply, each followed by an empty line. Not run against a real Lean here; the tests
speak the protocol with a small program in its place.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from strop.rewards.lean_text import GOAL

ALLOWED_AXIOMS = frozenset({"propext", "Classical.choice", "Quot.sound"})
"""Those of ordinary mathematics. Lean.ofReduceBool and Lean.trustCompiler trust compiled code, sorryAx anything."""
END = b"\n\n"

_AXIOMS = re.compile(rf"'{GOAL}' depends on axioms: \[([^\[\]]*)\]")
_NO_AXIOMS = f"'{GOAL}' does not depend on any axioms"


class NoReplyError(ValueError):
    """What came is no reply of the REPL."""


def request(command: str, environment: int | None) -> bytes:
    """One command, in an environment that an earlier reply named."""
    message: dict[str, Any] = {"cmd": command}
    if environment is not None:
        message["env"] = environment
    return json.dumps(message).encode() + END


def reply(raw: bytes) -> dict[str, Any]:
    """One reply. Raises NoReplyError."""
    try:
        found = json.loads(raw)
    except ValueError as error:
        raise NoReplyError(f"no JSON: {error}") from None
    if not isinstance(found, dict):
        raise NoReplyError(f"no object: {raw[:80]!r}")
    for message in found.get("messages", ()):
        if not isinstance(message, dict) or not isinstance(message.get("data"), str) or "severity" not in message:
            raise NoReplyError(f"no message: {message!r:.80}")
    return found


def environment_of(found: Mapping[str, Any]) -> int:
    """The environment after a command that went well. Raises NoReplyError with what Lean said."""
    wrong = why_wrong(found)
    if wrong is not None or type(found.get("env")) is not int:
        raise NoReplyError(wrong or "no environment in the reply")
    return found["env"]


def why_wrong(found: Mapping[str, Any]) -> str | None:
    """Why a reply does not say that everything went well: an error, a gap, or a reply of another shape; else None."""
    messages = found.get("messages", [])
    for message in messages:
        if message["severity"] == "error":
            return message["data"].strip()[:300]
    if found.get("sorries"):
        return "a gap (sorry)"
    for message in messages:
        if "sorry" in message["data"] or "failed" in message["data"]:
            return message["data"].strip()[:300]
    if "env" not in found:
        return str(found.get("message", "the REPL gave no environment"))[:300]
    return None


def axioms_of(found: Mapping[str, Any]) -> frozenset[str]:
    """The axioms that a reply to `#print axioms` names. Raises NoReplyError unless it is exactly one such sentence."""
    said = [message["data"].strip() for message in found.get("messages", ()) if message["severity"] == "info"]
    if why_wrong(found) is None and len(said) == 1:
        if said[0] == _NO_AXIOMS:
            return frozenset()
        if match := _AXIOMS.fullmatch(" ".join(said[0].split())):
            return frozenset(name.strip() for name in match.group(1).split(","))
    raise NoReplyError(f"no list of axioms: {said!r:.200}")
