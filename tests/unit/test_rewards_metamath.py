"""Metamath: what the language forbids, what a proof may not do, and the reward through its real worker."""

from __future__ import annotations

from pathlib import Path

import pytest

from strop.rewards.load import load_reward
from strop.rewards.metamath import MetamathReward, proof_labels
from strop.rewards.metamath_database import Database, cut_before
from strop.rewards.metamath_proof import (
    NotAProofError,
    ProofError,
    check_labels,
    check_stored_proof,
    normal_labels,
)
from strop.types import Completion, Task

LOGIC = """
$( Implication, with modus ponens. $)
$c ( ) -> wff |- A. var $.
$v p q r s x y $.
wp $f wff p $.  wq $f wff q $.  wr $f wff r $.  ws $f wff s $.  vx $f var x $.  vy $f var y $.
wi $a wff ( p -> q ) $.
wal $a wff A. x p $.
ax-1 $a |- ( p -> ( q -> p ) ) $.
ax-2 $a |- ( ( p -> ( q -> r ) ) -> ( ( p -> q ) -> ( p -> r ) ) ) $.
${ min $e |- p $.  maj $e |- ( p -> q ) $.  ax-mp $a |- q $. $}
${ $d x p $.  ax-5 $a |- ( p -> A. x p ) $. $}
id $p |- ( p -> p ) $=
  ( wi ax-1 ax-2 ax-mp ) AAABZBZFAACAFABBGFBAFCAFADEE $.
gap $p |- ( p -> ( q -> q ) ) $= ? $.
${ a1i.1 $e |- p $.
   a1i $p |- ( q -> p ) $= wp wq wp wi a1i.1 wp wq ax-1 ax-mp $. $}
later $p |- ( q -> ( p -> p ) ) $= wp wp wi wq wp id a1i $.
${ $d x p $.
   dv $p |- ( p -> A. x p ) $= wp vx ax-5 $. $}
nodv $p |- ( p -> A. x p ) $= ? $.
"""


@pytest.fixture(scope="module")
def logic() -> Database:
    return Database(LOGIC, "logic.mm")


def check(database: Database, theorem: str, proof: str) -> None:
    check_labels(database, database.theorem(theorem), proof.split())


def test_stored_proofs_are_right_and_gaps_are_not(logic):
    for theorem in logic.theorems():
        if not theorem.is_unproven:
            check_stored_proof(logic, theorem)
    for label in ("gap", "nodv"):
        with pytest.raises(ProofError, match="gap"):
            check_stored_proof(logic, logic.theorem(label))


def test_a_compressed_proof_written_out_is_a_normal_proof(logic):
    labels = normal_labels(logic, logic.theorem("id"), limit=100)
    assert labels is not None and len(labels) == 40
    check_labels(logic, logic.theorem("id"), labels)
    assert normal_labels(logic, logic.theorem("id"), limit=39) is None


def test_another_proof_than_the_stored_one_is_accepted(logic):
    check(logic, "later", "wp wp wi wq wp id a1i")
    check(logic, "later", "wp wp wi wq wp wp wi wi wp id wp wp wi wq ax-1 ax-mp")


REFUSED = [
    ("id", "?", "gap"),
    ("id", "wp ?", "gap"),
    ("id", "wp id", "cites the theorem itself"),
    ("id", "wp wp wi wp later", "comes after"),
    ("id", "wp nothing", "no label 'nothing'"),
    ("later", "wq wp gap", "no complete proof itself"),
    ("later", "a1i.1", "hypothesis of another statement"),
    ("a1i", "a1i.1 later.1", "no label"),
    ("a1i", "min", "hypothesis of another statement"),
    ("later", "wp wp wi wq wp id", "3 results are left"),
    ("later", "wq wq id", "2 results are left"),
    ("later", "wp id", "proves '|- ( p -> p )'"),
    ("later", "wp id a1i", "needs 3 results"),
    ("later", "wp wp wi wq wq id a1i", "a1i.1 of a1i is '|- ( p -> p )'"),
    ("later", "vx vx wi", "needs a wff for p"),
    ("nodv", "wp vx ax-5", "disjoint, which the theorem does not say"),
    ("nodv", "wp vx wal vx ax-5", "both contain x"),
    ("later", "wp " * 3, "3 results"),
]  # fmt: skip


@pytest.mark.parametrize(("theorem", "proof", "reason"), REFUSED)
def test_what_is_no_proof_says_why(logic, theorem, proof, reason):
    with pytest.raises(ProofError) as caught:
        check(logic, theorem, proof)
    assert not isinstance(caught.value, NotAProofError)
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "", "   ", "( wi ax-1 ) ABC", "wp $= wp", "wp $. evil $a |- p $.", "$[ /etc/passwd $]", "wp; id", "wp\x00",
        "wp " * 10_001, "${ evil $e |- ( p -> p ) $. evil $}", "é",
    ],
)  # fmt: skip
def test_what_is_no_list_of_labels_is_told_from_a_wrong_proof(logic, text):
    with pytest.raises(NotAProofError):
        check(logic, "later", text)


def test_a_label_list_that_would_write_gigabytes_is_stopped():
    source = "$c |- wff & $. $v p $. wp $f wff p $. dbl $a wff p & p $. goal $p |- p $= ? $."
    database = Database(source)
    with pytest.raises(ProofError, match="symbols"):
        check(database, "goal", "wp " + "dbl " * 60)


BROKEN = [
    ("$c a $.\n$c a $.", "2: the symbol 'a' is declared already"),
    ("$v a $. $c a $.", "declared already"),
    ("${ $c a $. $}", "inside a block"),
    ("$c wff $.\n\nx $f wff p $.", "3: 'x' has the symbol 'p', which is not active"),
    ("$c wff $. ${ $v p $. $} x $f wff p $.", "not active"),
    ("$c wff $. $v p $. x $f wff p $. y $f wff p $.", "has a type already: x"),
    ("$c wff $. $v p $. x $a wff p $.", "no active $f"),
    ("$c wff $. x $a wff $. x $a wff $.", "used twice"),
    ("$c wff x $. x $a wff $.", "math symbol too"),
    ("$c wff $. x $a wff $. $c x $.", "a label already"),
    ("$c wff $. x $a wff", "1: $a ends without $."),
    ("$c wff $. $a wff $.", "$a has no label"),
    ("$c wff $. x $p wff $= $.", "empty proof"),
    ("$c wff $. x y $a wff $.", "followed by 'y'"),
    ("$v p $. x $a p $.", "must begin with a constant"),
    ("$( never closed", "never closed"),
    ("$( nested $( $) $)", "holds $("),
    ("${", "never closed"),
    ("$}", "without ${"),
    ("$v p $. $d p p $.", "different variables"),
    ("$c p q $. $d p q $.", "no active variable"),
    ("$[ /etc/passwd $]", "refused"),
    ("$c wff $. x! $a wff $.", "is no label"),
    ("$= $.", "has no place"),
    ("x", "followed by nothing"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "reason"), BROKEN)
def test_a_broken_database_names_its_line(text, reason):
    with pytest.raises(ValueError, match=r"^broken\.mm:\d+: ") as caught:
        Database(text, "broken.mm")
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("proof", "reason"),
    [
        ("( wi", "no ')'"),
        ("( wi wi ) A", "twice"),
        ("( wp ) A", "mandatory"),
        ("( ) ZA", "'Z' in the wrong place"),
        ("( ) AZZ", "'Z' in the wrong place"),
        ("( ) AU", "inside a number"),
        ("( ) UA", "not saved"),
        ("( ) a", "'a' in the wrong place"),
    ],
)
def test_a_broken_compressed_proof_is_refused(proof, reason):
    database = Database(LOGIC + f"new $p |- ( p -> p ) $= {proof} $.")
    with pytest.raises(ProofError) as caught:
        check_stored_proof(database, database.theorem("new"))
    assert reason in str(caught.value)


def test_a_database_cut_before_a_label_ends_at_the_statement_before(logic):
    cut = Database(cut_before(LOGIC, "ax-5"))
    assert list(cut.statements)[-1] == "ax-mp"
    with pytest.raises(ValueError, match="no label 'ax-9'"):
        cut_before(LOGIC, "ax-9")


def test_the_last_closed_block_is_the_proof():
    assert proof_labels("wp wq") == ["wp", "wq"]
    assert proof_labels("First:\n```\nwp\n```\nno:\n```metamath\nwq wr\n```\nso.") == ["wq", "wr"]
    assert proof_labels("```\nwp\n``` and ```wq") == ["wp"]


def task(theorem: object, **columns: object) -> Task:
    return Task(id="train.jsonl:7", prompt="?", columns={"theorem": theorem, **columns})


def completion(text: str) -> Completion:
    return Completion(token_ids=(1,), sampling_logprobs=(0.0,), finish_reason="stop", text=text)


@pytest.fixture(scope="module")
def reward(tmp_path_factory: pytest.TempPathFactory):
    path = tmp_path_factory.mktemp("metamath") / "logic.mm"
    path.write_text(LOGIC)
    reward = load_reward({"name": "metamath", "database": str(path), "num_workers": 1})
    assert isinstance(reward, MetamathReward)
    yield reward
    reward.close()


def test_the_reward_scores_proofs_one_and_everything_else_zero(reward):
    pairs = [("later", "wp wp wi wq wp id a1i"), ("later", "```\nwp wp wi wq wp id a1i\n```"), ("later", "wp id")]
    pairs += [("later", ""), ("later", "I think it is wp id."), ("gap", "?"), ("gap", "wp wp wi wp wi")]
    verdicts = reward.score([task(theorem) for theorem, _ in pairs], [completion(text) for _, text in pairs])
    assert [(verdict.score, verdict.status) for verdict in verdicts] == [
        (1.0, "ok"), (1.0, "ok"), (0.0, "wrong"), (0.0, "unparsed"), (0.0, "wrong"), (0.0, "wrong"), (0.0, "wrong")
    ]  # fmt: skip
    assert "proves '|- ( p -> p )'" in verdicts[2].detail


def test_tasks_are_checked_against_the_database(reward):
    reward.check_tasks(
        [task("later", statement="|- ( q -> ( p -> p ) )"), task("a1i", statement="|- p => |- ( q -> p )")]
    )
    for bad, reason in [
        (task("nothing"), "no such label"),
        (task("ax-1"), "no theorem"),
        (task("later", statement="|- p"), "another version"),
        (task(None), "needs the column 'theorem'"),
    ]:
        with pytest.raises(ValueError, match=r"train\.jsonl:7: ") as caught:
            reward.check_tasks([bad])
        assert reason in str(caught.value)


def test_a_database_with_a_wrong_proof_judges_nothing(tmp_path: Path):
    path = tmp_path / "wrong.mm"
    path.write_text(LOGIC + "cheat $p |- p $= wp $.")
    reward = MetamathReward(database=str(path), num_workers=1)
    with pytest.raises(ValueError, match="the proof of cheat is wrong"):
        reward.check_tasks([task("later")])
    (verdict,) = reward.score([task("later")], [completion("wp id")])
    assert verdict.status == "infra_error"
    reward.close()


def test_a_missing_database_says_what_to_install():
    with pytest.raises(ValueError, match="metamath-databases"):
        MetamathReward(database="nothing")
