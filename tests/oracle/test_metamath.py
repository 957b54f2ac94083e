"""The Metamath checker against Debian's `metamath` program. All of ql.mm and more mutants: benchmarks/metamath.py."""

from __future__ import annotations

import random
import shutil

import pytest

from benchmarks.metamath import mutants, own_mutant_verdicts, own_verdicts, program_verdicts, with_proofs
from strop.evals.suites import load_suite
from strop.rewards.metamath import DEBIAN_FOLDER, find_database
from strop.rewards.metamath_database import Database, read_database_text
from strop.rewards.metamath_proof import check_labels


@pytest.fixture(scope="module", autouse=True)
def databases_are_there() -> None:
    if shutil.which("metamath") is None or not DEBIAN_FOLDER.is_dir():
        pytest.fail("install Debian's packages metamath and metamath-databases (make setup does, as root)")


@pytest.mark.parametrize(("name", "count"), [("hol", 138), ("ql", 1138)])
def test_every_theorem_is_accepted_by_both(name: str, count: int):
    text = read_database_text(find_database(name))
    own = own_verdicts(Database(text, name))
    assert len(own) == count and all(own.values())
    chosen = list(own)[:: max(1, count // 150)]
    assert all(program_verdicts(text, chosen).values())


@pytest.mark.parametrize(("name", "seed"), [("hol", 0), ("ql", 1)])
def test_mutated_proofs_get_the_same_verdict(name: str, seed: int):
    text = read_database_text(find_database(name))
    database = Database(text, name)
    proofs = mutants(database, random.Random(seed), max_labels=60)
    own = own_mutant_verdicts(database, proofs)
    program = program_verdicts(with_proofs(text, proofs), list(proofs))
    assert [label for label in proofs if own[label] != program[label]] == []
    assert 0 < sum(own.values()) < 0.2 * len(own), "some mutants are harmless, most are not"


@pytest.mark.parametrize("what", ["ql", "hol", "set@wal"])
def test_every_row_of_a_suite_is_solved_by_its_gold_proof(what: str):
    suite = load_suite(f"metamath:{what}")
    database_name, _, before = what.partition("@")
    database = Database.load(find_database(database_name), before=before)
    lengths = [row["num_labels"] for row in suite.rows]
    assert lengths == sorted(lengths) and len(lengths) > 50
    for row in suite.rows:
        check_labels(database, database.theorem(row["theorem"]), row["proof"].split())
