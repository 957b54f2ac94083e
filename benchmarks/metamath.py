"""Strop's Metamath checker against Debian's `metamath` program (and metamath-py, where it is installed), and its speed.

    python -m benchmarks.metamath --save metamath

Every theorem of ql.mm and hol.mm, then mutated proofs: labels swapped, dropped, doubled, replaced by another label that
the proof or the database has. A mutant can be harmless; what counts is that the checkers agree on each.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.__main__ import ROOT, machine
from strop.rewards.metamath import find_database
from strop.rewards.metamath_database import Assertion, Database, read_database_text
from strop.rewards.metamath_proof import ProofError, check_labels, check_stored_proof, normal_labels


def own_verdicts(database: Database) -> dict[str, bool]:
    """Theorem -> whether its stored proof is complete and right."""
    verdicts: dict[str, bool] = {}
    for theorem in database.theorems():
        try:
            check_stored_proof(database, theorem)
            verdicts[theorem.label] = True
        except ProofError:
            verdicts[theorem.label] = False
    return verdicts


def program_verdicts(text: str, labels: Sequence[str]) -> dict[str, bool]:
    """The same from the metamath program. One theorem after the other: its 'verify proof *' stays silent on some."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "mutants.mm").write_text(text, encoding="ascii")
        commands = ["read mutants.mm", "set scroll continuous", "set width 9999", "set echo on"]
        script = "\n".join([*commands, *(f"verify proof {label}" for label in labels), "exit", "exit"]) + "\n"
        done = subprocess.run(["metamath"], input=script, capture_output=True, text=True, cwd=folder, check=True)
    answers = re.split(r"MM> !VERIFY PROOF (\S+)", done.stdout)[1:]
    said = dict(zip(answers[::2], answers[1::2], strict=True))
    # A right proof is answered by its label alone, anything else by complaints.
    return {label: said[label].removesuffix("MM> !EXIT\n").replace("MM>", "").strip() == label for label in labels}


def with_proofs(text: str, proofs: Mapping[str, Sequence[str]]) -> str:
    """The database with some of its proofs replaced."""

    def replaced(match: re.Match[str]) -> str:
        proof = proofs.get(match[1] or "")
        return match[0] if proof is None else f"{match[1]} $p{match[2]}$= {' '.join(proof)} $."

    # Comments first: ql.mm keeps unfinished theorems in them.
    return re.sub(
        r"\$\(\s.*?\s\$\)|(?<!\S)([A-Za-z0-9._-]+)\s+\$p(\s.*?\s)\$=\s.*?\s\$\.", replaced, text, flags=re.DOTALL
    )


def mutated(labels: Sequence[str], others: Sequence[str], rng: random.Random) -> list[str]:
    """The proof with one change; `others` are labels that it may be given in place of its own."""
    proof = list(labels)
    place = rng.randrange(len(proof))
    kind = rng.choice(["drop", "double", "swap", "own label", "other label", "gap"])
    if kind == "drop" and len(proof) > 1:
        del proof[place]
    elif kind == "double":
        proof.insert(place, proof[place])
    elif kind == "swap":
        other = rng.randrange(len(proof))
        proof[place], proof[other] = proof[other], proof[place]
    elif kind == "own label":
        proof[place] = rng.choice(proof)
    elif kind == "gap":
        proof[place] = "?"
    else:
        proof[place] = rng.choice(others)
    return proof


def mutants(database: Database, rng: random.Random, max_labels: int = 400) -> dict[str, list[str]]:
    """One mutant of each theorem whose proof has at most max_labels labels."""
    others = list(database.statements)
    found: dict[str, list[str]] = {}
    for theorem in database.theorems():
        labels = normal_labels(database, theorem, limit=max_labels)
        if labels is not None:
            found[theorem.label] = mutated(labels, others, rng)
    return found


def own_mutant_verdicts(database: Database, proofs: Mapping[str, Sequence[str]]) -> dict[str, bool]:
    verdicts: dict[str, bool] = {}
    for label, proof in proofs.items():
        try:
            check_labels(database, database.theorem(label), proof)
            verdicts[label] = True
        except ProofError:
            verdicts[label] = False
    return verdicts


def library_verdicts(text: str, labels: Sequence[str]) -> dict[str, bool] | None:
    """The same from metamath-py; None where it is not installed."""
    try:
        from metamathpy.database import parse  # pyright: ignore[reportMissingImports]
        from metamathpy.proof import verify_proof  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mutants.mm"
        path.write_text(text, encoding="ascii")
        database = parse(str(path))
    verdicts: dict[str, bool] = {}
    for label in labels:
        try:
            verify_proof(database, database.rules[label])
            verdicts[label] = True
        except Exception:  # it asserts, and fails with IndexError and KeyError, on what is no proof
            verdicts[label] = False
    return verdicts


def agreement(name: str, rounds: int, rng: random.Random) -> dict[str, object]:
    """How often the checkers agree on a database's theorems and on rounds of mutants of them."""
    text = read_database_text(find_database(name))
    database = Database(text, name)
    own = own_verdicts(database)
    labels = list(own)
    row: dict[str, object] = {"database": name, "theorems": len(own), "accepted": sum(own.values())}
    row["program_agrees"] = sum(own[label] == said for label, said in program_verdicts(text, labels).items())
    library = library_verdicts(text, labels)
    row["library_agrees"] = None if library is None else sum(own[label] == library[label] for label in labels)
    counts = {"mutants": 0, "mutants_accepted": 0, "mutants_program_agrees": 0, "mutants_library_agrees": 0}
    for _ in range(rounds):
        proofs = mutants(database, rng)
        judged = own_mutant_verdicts(database, proofs)
        changed = with_proofs(text, proofs)
        program = program_verdicts(changed, list(proofs))
        library = library_verdicts(changed, list(proofs))
        counts["mutants"] += len(judged)
        counts["mutants_accepted"] += sum(judged.values())
        counts["mutants_program_agrees"] += sum(judged[label] == program[label] for label in judged)
        if library is not None:
            counts["mutants_library_agrees"] += sum(judged[label] == library[label] for label in judged)
    if library is None:
        del counts["mutants_library_agrees"]
    return row | counts


def speed(name: str) -> dict[str, object]:
    """Milliseconds per check of a proof in normal order, as a model gives it."""
    database = Database.load(find_database(name))
    cases: list[tuple[Assertion, list[str]]] = []
    for theorem in database.theorems():
        labels = normal_labels(database, theorem, limit=1000)
        if labels is not None:
            cases.append((theorem, labels))
    times: list[float] = []
    for theorem, labels in cases:
        best = float("inf")
        for _ in range(3):
            started = time.perf_counter()
            check_labels(database, theorem, labels)
            best = min(best, time.perf_counter() - started)
        times.append(1000.0 * best)
    times.sort()
    return {
        "database": name,
        "proofs of at most 1000 labels": len(times),
        "median_ms": round(statistics.median(times), 3),
        "p99_ms": round(times[int(0.99 * len(times))], 3),
        "max_ms": round(times[-1], 3),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2, help="mutants per theorem")
    parser.add_argument("--save", metavar="NAME", help="write benchmarks/results/NAME.json")
    options = parser.parse_args()
    rng = random.Random(0)
    rows = [agreement(name, options.rounds, rng) for name in ("ql", "hol")]
    times = [speed(name) for name in ("ql", "hol")]
    for row in [*rows, *times]:
        print(json.dumps(row))
    if options.save:
        about = {"command": "python -m benchmarks.metamath " + " ".join(sys.argv[1:]), "machine": machine()}
        path = ROOT / "benchmarks" / "results" / f"{options.save}.json"
        path.write_text(json.dumps(about | {"agreement": rows, "speed": times}, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
