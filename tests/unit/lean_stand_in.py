"""Stands in for Lean's REPL, its compiler and the replay program, by the name under which it is started.

It speaks their protocol and command lines, and knows no logic: sums of numbers, and a few tactics that misbehave. What
it accepts says nothing about Lean.
"""

import contextlib
import json
import os
import re
import socket
import sys
import time

GOAL = re.compile(r"theorem strop_goal :\s*([0-9+ ]+) = ([0-9+ ]+) := by\n(.*)", re.DOTALL)


def proves(text):
    """(statement, axioms, error) of a file with our theorem in it."""
    match = GOAL.search(text)
    if match is None:
        return None, [], "unexpected token"
    left, right, body = match.groups()
    tactics = [line.strip() for line in body.splitlines() if line.strip()]
    lines = body.splitlines()
    if any(not line.startswith("  ") for line in lines if line.strip()):
        return None, [], "expected command"
    is_true = sum(map(int, left.split("+"))) == sum(map(int, right.split("+")))
    statement, axioms = f"{left} = {right}", []
    for tactic in tactics:
        if tactic == "stall":
            time.sleep(60)
        elif tactic == "crash":
            os._exit(3)
        elif tactic == "flood":
            sys.stdout.write("x" * (8 << 20))
            sys.stdout.flush()
        elif tactic == "babble":
            sys.stdout.write("no json\n\n")
        elif tactic == "smuggle":
            return statement, ["propext", "Smuggled.axiom"], None
        elif tactic == "classical":
            axioms += ["propext", "Classical.choice", "Quot.sound"]
        elif tactic == "redefine":  # the REPL is content, the compiled theorem is another one
            return "0 = 0", axioms, None
        elif tactic == "peek":
            for path in (os.environ.get("STROP_SECRET", ""), "/etc/passwd", "/root"):
                if path and os.path.exists(path):
                    return statement, axioms, None
        elif tactic == "dial":
            with contextlib.suppress(OSError), socket.socket():  # not even one that is connected to nobody
                return statement, axioms, None
        elif tactic == "fork":
            with contextlib.suppress(OSError):
                if os.fork() == 0:
                    os._exit(0)
                return statement, axioms, None
        elif tactic == "hoard":
            with contextlib.suppress(MemoryError):
                bytearray(4 << 30)
                return statement, axioms, None
        elif tactic == "leave":
            with open(os.path.join(os.environ["LEAN_PATH"].split(":")[0], "left"), "w"):
                pass
        elif tactic == "rfl":
            return statement, axioms, None if is_true else "The rfl tactic failed"
        elif tactic == "sorry":
            return statement, ["sorryAx"], "declaration uses 'sorry'"
    return statement, axioms, "unsolved goals"


def repl():
    environments: list[tuple[str | None, list[str]]] = [("", [])]
    for block in iter(read_block, None):
        request = json.loads(block)
        command = request["cmd"]
        reply: dict[str, object] = {}
        if command.startswith("import "):
            known = command == "import Sums"
            reply = {"messages": [] if known else [{"severity": "error", "data": "unknown module prefix"}]}
        elif command.startswith("example"):
            reply = {}
        elif command == "#print axioms strop_goal":
            axioms = environments[request["env"]][1]
            said = f"depends on axioms: [{', '.join(axioms)}]" if axioms else "does not depend on any axioms"
            reply = {"messages": [{"severity": "info", "data": f"'strop_goal' {said}"}]}
        else:
            statement, axioms, error = proves(command)
            if error is not None:
                severity = "warning" if "declaration uses" in error else "error"
                reply = {"messages": [{"severity": severity, "data": error}]}
            environments.append((statement, axioms))
        reply["env"] = len(environments) - 1
        sys.stdout.write(json.dumps(reply, indent=1) + "\n\n")
        sys.stdout.flush()


def read_block():
    lines = []
    for line in sys.stdin:
        if not line.strip():
            return "".join(lines)
        lines.append(line)
    return None


def lean(arguments):
    _, output, source = arguments
    with open(source) as file:
        text = file.read()
    statement, _, error = proves(text)
    if statement is None or (error and "declaration uses" not in error):
        print(f"{source}: error: {error}")
        sys.exit(1)
    assert os.readlink("/proc/self/exe").endswith("lean"), "lean finds its folder by this"
    with open(output, "w") as file:
        json.dump({"statement": statement, "gap": error}, file)


def replay(reference, submission):
    with open(reference) as file:
        asked = json.load(file)
    with open(submission) as file:
        given = json.load(file)
    if given != {"statement": asked["statement"], "gap": None}:
        print(f"theorem strop_goal: {given['statement']} is not what was asked")
        sys.exit(1)


if __name__ == "__main__":
    name = os.path.basename(sys.argv[0])
    if name == "repl":
        repl()
    elif name == "lean":
        lean(sys.argv[1:])
    else:
        replay(*sys.argv[1:])
