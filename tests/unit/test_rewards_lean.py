"""The Lean reward, without Lean: what is refused, what Lean would be given, and what happens around it, with a small
program in Lean's place (lean_stand_in.py). That Lean itself says what is expected here nobody has tried."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from strop.rewards.lean import LeanReward
from strop.rewards.lean_repl import NoReplyError, axioms_of, environment_of, reply, request, why_wrong
from strop.rewards.lean_text import MAX_BODY_CHARS, proof_body, signature, splice, why_refused
from strop.rewards.load import load_reward
from strop.rewards.sandbox.python import find_python
from strop.types import Completion, Task

REFUSED = [
    "",
    "   \n",
    "-- nothing",
    "sorry",
    "exact sorry",
    "exact (by admit)",
    "exact sorryAx _ false",
    "exact foo.sorryAx _",
    "native_decide",
    "decide +native",
    "rfl\naxiom cheat : False\ntheorem strop_goal : 1 = 2 := cheat.elim",
    "rfl\n  axiom cheat : False",
    'rfl\nelab "#print " "axioms" n:ident : command => Lean.logInfo "none"',
    "rfl\nelab_rules : command | _ => pure ()",
    "rfl\nmacro_rules | `(tactic| rfl) => `(tactic| sorry)",
    "rfl\nlocal instance : Add Nat := ⟨Nat.mul⟩",
    "rfl\ninstance : Add Nat := ⟨Nat.mul⟩",
    'rfl\nnotation "1" => 0',
    "rfl\nlocal infixl:65 + => Nat.mul",
    "rfl\nsyntax term : tactic",
    "open Classical in exact em _",
    "set_option maxRecDepth 100000 in rfl",
    "set_option debug.skipKernelTC true in rfl",
    "rfl\nimport Lean",
    "rfl\n#eval IO.println 1",
    "#print axioms",
    "rfl\n@[implemented_by foo] def bar := 1",
    "rfl\n@[csimp] theorem x : 1 = 1 := rfl",
    "rfl\nattribute [simp] foo",
    'rfl\n@[extern "x"] opaque y : Nat',
    "run_tac Lean.Elab.Tactic.done",
    "run_tac do pure ()",
    "exact by_elab pure (mkConst `sorryAx)",
    "exact (Lean.Elab.Term.elabTerm foo)",
    "exact Lean . Elab . foo",
    "exact IO.Process.exit 0",
    "exact «sorryAx» _",
    "exact `foo",
    "exact unsafeCast 1",
    "unsafe exact foo",
    "rfl\nunsafe def x : False := x",
    "rfl\ninitialize foo",
    "rfl\nend\nnamespace Foo",
    "rfl\nmutual",
    "exact ofReduceBool _ _ rfl",
    "exact Lean.ofReduceBool _ _ rfl",
    "exact lcProof",
    "exact lcUnreachable",
    "exact dbg_trace 1",
    "rfl /- open",
    "rfl -/ axiom x : False /-",
    "rfl /- a -/ -/",
    "rfl\n/- a /- b -/\naxiom x : False",
    "rfl\x00",
    "rfl\x1b[2J",
    "exact $foo",
    "x" * (MAX_BODY_CHARS + 1),
]
PASSED = [
    "rfl",
    "\n  simp [Nat.add_comm]\n",
    "  intro h\n  cases h with\n  | inl a => exact Or.inr a\n  | inr b => exact Or.inl b",
    "induction n with\n| zero => rfl\n| succ n ih => rw [Nat.add_succ, ih]",
    "have h₁ : a ≤ b := by omega\nexact h₁.trans h₂",
    "decide",
    "rcases h with ⟨x, hx⟩ -- sorry, no axiom needed",
    "/- an axiom /- nested -/ of choice -/ exact h.elim",
    "norm_num\nlinarith [sq_nonneg (a - b)]",
    "exact Nat.rec (motive := fun n => 0 + n = n) rfl (fun n ih => congrArg Nat.succ ih) n",
    "calc a = b := h1\n  _ = c := h2",
    "exact fun axiom' => axiom'",
    "conv => lhs; rw [h]",
    "exact @Eq.symm _ _ _ h",
]


@pytest.mark.parametrize("body", REFUSED)
def test_bodies_with_a_command_a_gap_or_code_are_refused(body: str):
    assert why_refused(proof_body(body)) is not None


@pytest.mark.parametrize("body", PASSED)
def test_ordinary_proofs_are_not_refused(body: str):
    assert why_refused(proof_body(body)) is None


@pytest.mark.parametrize(
    ("text", "body"),
    [
        ("rfl", "rfl"),
        ("by rfl", " rfl"),
        (":= by\n  rfl", "\n  rfl"),
        ("First\n```lean\nsimp\n```\nno:\n```lean4\n  intro h\n  exact h\n```\nthere.", "  intro h\n  exact h"),
        ("bypass", "bypass"),
    ],
)
def test_the_body_is_the_last_block_without_by(text: str, body: str):
    assert proof_body(text) == body


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("(n : Nat) : n + 0 = n", "(n : Nat) : n + 0 = n"),
        ("theorem add_zero' (n : Nat) : n + 0 = n := by sorry", "(n : Nat) : n + 0 = n"),
        ("lemma foo.bar {α : Type}\n  (x : α) : x = x := sorry", "{α : Type}\n  (x : α) : x = x"),
        ("example : 1 = 1 := by\n  sorry", ": 1 = 1"),
        (": let x := 2; x = 2 :=", ": let x := 2; x = 2"),
    ],
)
def test_signature_leaves_binders_and_type(statement: str, expected: str):
    assert signature(statement) == expected


def test_splice_indents_every_line_under_our_theorem_and_drops_comments():
    spliced = splice(
        "theorem x (n : Nat) : n = n := by sorry", "      intro h -- theorem\n\n        exact h\n      done"
    )
    assert spliced == "theorem strop_goal (n : Nat) : n = n := by\n  intro h \n    exact h\n  done\n"
    # No line of a body starts where a command would, however it is written.
    assert splice(": 1 = 1", "rfl\n/- c -/foo\n\tbar") == ("theorem strop_goal : 1 = 1 := by\n  rfl\n   foo\n    bar\n")


def test_what_the_repl_says():
    assert request("import Mathlib", None) == b'{"cmd": "import Mathlib"}\n\n'
    assert request("x", 3) == b'{"cmd": "x", "env": 3}\n\n'
    assert environment_of(reply(b'{"env": 0}')) == 0
    bad = [
        b"", b"x", b"[]", b'{"messages": [1], "env": 0}', b'{"messages": [{"data": "x"}], "env": 0}',
        b'{"messages": [{"severity": "error", "data": 1}], "env": 0}',
    ]  # fmt: skip
    for raw in bad:
        with pytest.raises(NoReplyError):
            reply(raw)
    for raw, reason in (
        (b'{"messages": [{"severity": "error", "data": "unsolved goals"}], "env": 1}', "unsolved"),
        (b'{"sorries": [{"goal": "x"}], "env": 1}', "gap"),
        (b'{"messages": [{"severity": "warning", "data": "declaration uses \'sorry\'"}], "env": 1}', "sorry"),
        (b'{"message": "Unknown environment."}', "Unknown environment"),
        (b"{}", "no environment"),
    ):
        assert reason in str(why_wrong(reply(raw)))
        with pytest.raises(NoReplyError, match=reason):
            environment_of(reply(raw))


def said(*sentences: str) -> bytes:
    messages = ", ".join(f'{{"severity": "info", "data": "{sentence}"}}' for sentence in sentences)
    return f'{{"messages": [{messages}], "env": 1}}'.encode()


def test_axioms_are_read_from_one_sentence_about_our_theorem_and_nothing_else():
    assert axioms_of(reply(said("'strop_goal' does not depend on any axioms"))) == frozenset()
    found = axioms_of(reply(said("'strop_goal' depends on axioms: [propext,\\n Classical.choice]")))
    assert found == {"propext", "Classical.choice"}
    for sentences in (
        (),
        ("none",),
        ("'other' does not depend on any axioms",),
        ("'strop_goal' does not depend on any axioms", "'strop_goal' depends on axioms: [sorryAx]"),
        ("'strop_goal' does not depend on any axioms\\n'strop_goal' depends on axioms: [sorryAx]",),
    ):
        with pytest.raises(NoReplyError):
            axioms_of(reply(said(*sentences)))


@pytest.fixture(scope="module")
def lean_place() -> Iterator[Path]:
    """A folder that a box's user can reach, with the programs and a project."""
    place = Path(tempfile.mkdtemp(prefix="strop-lean-test-"))
    place.chmod(0o755)
    python, prefix = find_python(None)
    source = (Path(__file__).parent / "lean_stand_in.py").read_text(encoding="utf-8")
    for name in ("tools/repl", "replays/replay", "toolchain/bin/lean"):
        program = place / name
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_text(f"#!{python} -sS\n{source}", encoding="utf-8")
        program.chmod(0o755)
    lake = place / "bin" / "lake"
    lake.parent.mkdir()
    paths = "lib" if Path(prefix).is_relative_to("/usr") else f"lib:{prefix}"
    lake.write_text(
        f'#!/bin/sh\ncase "$*" in "env lean --print-prefix") echo {place}/toolchain;;\n'
        f'"env printenv LEAN_PATH") echo {paths};;\n*) echo "lake: $*" >&2; exit 1;; esac\n',
        encoding="utf-8",
    )
    lake.chmod(0o755)
    (place / "project" / "lib").mkdir(parents=True)
    (place / "project" / "lakefile.toml").touch()
    yield place
    shutil.rmtree(place)


def options(place: Path, **changed: Any) -> dict[str, Any]:
    return {
        "project": str(place / "project"),
        "replay": str(place / "replays" / "replay"),
        "repl": str(place / "tools" / "repl"),
        "lake": str(place / "bin" / "lake"),
        **changed,
    }


@pytest.fixture(scope="module")
def lean(lean_place: Path, sandbox_works) -> Iterator[LeanReward]:
    reward = LeanReward(
        **options(lean_place), header="import Sums", timeout=3.0, start_timeout=30.0, memory_mb=1024, num_workers=1
    )
    yield reward
    reward.close()


def task(statement: str = ": 1 + 1 = 2", **columns: str) -> Task:
    return Task(id="t:1", prompt="?", columns={"statement": statement, **columns})


def completion(text: str) -> Completion:
    return Completion(token_ids=(), sampling_logprobs=(), finish_reason="stop", text=text)


def judged(reward: LeanReward, text: str, statement: str = ": 1 + 1 = 2") -> tuple[float, str, str]:
    verdict = reward.score([task(statement)], [completion(text)])[0]
    return verdict.score, verdict.status, verdict.detail


def test_a_proof_is_right_after_repl_axioms_compiler_and_replay(lean: LeanReward):
    for text in ("rfl", "by rfl", "```lean\nclassical\nrfl\n```"):
        assert judged(lean, text) == (1.0, "ok", "")


@pytest.mark.parametrize(
    ("text", "status", "detail"),
    [
        ("trivial", "wrong", "unsolved goals"),
        ("sorry", "unparsed", "sorry"),
        ("smuggle", "wrong", "uses the axioms Smuggled.axiom"),
        ("redefine\nrfl", "wrong", "the replay refuses it: theorem strop_goal: 0 = 0"),
        ("babble\nrfl", "wrong", "no JSON"),
        ("flood\nrfl", "wrong", "without an end"),
        ("crash", "killed", "ended"),
        ("stall", "timeout", "no verdict in 3 s"),
        ("peek", "wrong", "unsolved goals"),
        ("leave", "killed", "ended"),
        ("dial", "wrong", "unsolved goals"),
        ("fork", "wrong", "unsolved goals"),
        ("hoard", "wrong", "unsolved goals"),
    ],
)
def test_everything_else_scores_nothing_and_the_next_proof_is_judged(
    lean: LeanReward, lean_place: Path, text: str, status: str, detail: str
):
    score, found, said = judged(lean, text)
    assert (score, found) == (0.0, status), said
    assert detail in said
    assert judged(lean, "rfl", ": 2 + 3 = 5") == (1.0, "ok", "")
    assert not list((lean_place / "project" / "lib").iterdir())


def test_a_repl_serves_a_stated_number_of_proofs(lean_place: Path, sandbox_works):
    reward = LeanReward(
        **options(lean_place), timeout=3.0, start_timeout=30.0, memory_mb=1024, num_workers=1, recycle_after=3
    )
    try:
        served: list[set[str]] = []
        for _ in range(4):
            assert judged(reward, "rfl") == (1.0, "ok", "")
            served.append(processes(lean_place))
        always = set.intersection(*served)  # the worker, and the fixture's
        first, second, third, fourth = (found - always for found in served)
        # Loading the header was the first of the three uses.
        assert first and first == second and third and not second & third and third == fourth
    finally:
        reward.close()


def test_a_false_statement_has_no_proof(lean: LeanReward):
    assert judged(lean, "rfl", ": 1 + 1 = 3")[:2] == (0.0, "wrong")


def test_statements_and_own_proofs_are_tried_before_training(lean: LeanReward):
    lean.check_tasks([task(proof="rfl"), task("theorem x : 1 + 2 = 3 := by sorry")])
    for row, reason in (
        (task("what : ever"), "does not accept the statement: unexpected token"),
        (task(proof="trivial"), "own proof scores 0: wrong, unsolved goals"),
        (Task(id="t:9", prompt="?", columns={"question": "x"}), "t:9: .*'statement'.*'question'"),
    ):
        with pytest.raises(ValueError, match=reason):
            lean.check_tasks([row])


def test_no_process_is_left(lean_place: Path, sandbox_works):
    before = processes(lean_place)
    reward = LeanReward(**options(lean_place), timeout=3.0, start_timeout=30.0, memory_mb=1024, num_workers=1)
    assert judged(reward, "rfl") == (1.0, "ok", "")
    assert processes(lean_place) > before
    reward.close()
    deadline = time.monotonic() + 5.0
    while processes(lean_place) != before and time.monotonic() < deadline:
        time.sleep(0.1)
    assert processes(lean_place) == before


def processes(place: Path) -> set[str]:
    """Those that name the folder of the programs."""
    found: set[str] = set()
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if str(place / "tools") in Path(f"/proc/{pid}/cmdline").read_text(errors="replace"):
                found.add(pid)
    return found


def test_without_lake_or_lean_interact_the_error_says_what_to_install(lean_place: Path, monkeypatch):
    with pytest.raises(ImportError, match=r"no 'lake-that-is-not-there'.*elan.*pip install 'strop\[lean\]'"):
        LeanReward(**options(lean_place, lake="lake-that-is-not-there"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"lean-interact is not installed.*strop\[lean\]"):
        LeanReward(**options(lean_place, repl=""))


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"project": "/nowhere"}, "no Lake project"),
        ({"replay": "/nowhere"}, "Without a kernel replay"),
        ({"repl": "/nowhere"}, "repl '/nowhere' is no file"),
        ({"timeout": 0.0}, "timeout must be above 0"),
        ({"header": "import Nothing"}, "did not load the header: unknown module prefix"),
    ],
)
def test_a_broken_set_up_is_refused_at_the_start(lean_place: Path, sandbox_works, changed, reason: str):
    chosen = {**options(lean_place), "memory_mb": 1024, "num_workers": 1, **changed}
    with pytest.raises(ValueError, match=reason):
        load_reward({"name": "lean", **chosen})
