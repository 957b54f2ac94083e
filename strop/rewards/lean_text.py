"""What a Lean proof may say, and how it is put under our statement. Text only: nothing of Lean is needed.

Not run against a real Lean here: no toolchain comes from a package registry. The rules err on the side of refusing.
"""

from __future__ import annotations

import re

GOAL = "strop_goal"
"""The name under which every statement is proved."""
MAX_BODY_CHARS = 20_000

_COMMANDS = """
    axiom axioms constant opaque def theorem lemma example abbrev structure inductive class coinductive instance
    deriving macro macro_rules elab elab_rules syntax declare_syntax_cat notation notation3 infix infixl infixr prefix
    postfix alias irreducible_def seal unseal suppress_compilation grind_pattern add_decl_doc
    binder_predicate simproc simproc_decl dsimproc register_simp_attr register_option initialize builtin_initialize
    open namespace section end export include omit universe universes variable variables mutual local scoped private
    protected public noncomputable unsafe partial nonrec set_option attribute import module prelude meta
    implemented_by extern csimp reducible run_cmd run_tac run_elab run_meta by_elab eval
    sorry sorryAx admit stop native_decide decide_native lcProof lcUnreachable lcAny ofReduceBool ofReduceNat
    trustCompiler reduceBool reduceNat unsafeCast unsafeIO unsafeBaseIO unsafeEIO dbg_trace dbgTrace
    IO BaseIO EIO Environment addDecl evalDecl evalExpr
"""
"""Whatever starts a command, changes what text means, leaves a gap, trusts compiled code, or runs code while checking.

A redefined notation or instance makes another statement of ours ("local instance : Add Nat" proves 1 + 0 = 0); an
axiom, sorryAx or native_decide makes any statement true; IO at elaboration can rewrite the checker.
"""
_WORD = re.compile(rf"(?<![\w.'!?])(?:{'|'.join(_COMMANDS.split())})(?![\w'!?])")
_QUALIFIED = re.compile(r"\b(?:Lean|Elab|Meta|IO|System|Unsafe)\s*\.")
_SIGNS = {
    "#": "a command such as #eval",
    "@[": "an attribute",
    '"': "a string, in which a comment could hide",
    "«": "a quoted name, in which a keyword could hide",
    "»": "a quoted name",
    "`": "a quotation, from which a name could be put together",
    "$": "an antiquotation",
    "\0": "a NUL",
}
_FENCE = re.compile(r"```[^\n]*\n(.*?)```", re.DOTALL)
_OUR_HEAD = re.compile(r"^\s*(?:theorem|lemma|example)\b\s*(?:[^\s(:{\[]+\s*)?", re.DOTALL)
_TAIL = re.compile(r":=\s*(?:by\s*)?(?:sorry)?\s*$")


def proof_body(text: str) -> str:
    """The tactics of a completion: the last fenced block, or all of it; a `by` in front is ours already."""
    blocks = _FENCE.findall(text)
    body = (blocks[-1] if blocks else text).strip("\n")
    return re.sub(r"^\s*(?::=\s*)?by\b", "", body, count=1) if re.match(r"\s*(?::=\s*)?by\b", body) else body


def why_refused(body: str) -> str | None:
    """Why a body may not be given to Lean at all, or None. Looks at what is left without comments."""
    if len(body) > MAX_BODY_CHARS:
        return f"a proof longer than {MAX_BODY_CHARS} characters"
    for sign, meaning in _SIGNS.items():
        if sign in body:
            return f"{sign!r} is not allowed in a proof: {meaning}"
    if any(ord(character) < 32 and character not in "\n\t" for character in body):
        return "control characters"
    try:
        bare = without_comments(body)
    except ValueError as error:
        return str(error)
    if not bare.strip():
        return "no proof"
    if match := _WORD.search(bare):
        return f"{match.group()!r} is not allowed in a proof"
    # Also behind a dot: `Nat.rec` is fine, `Lean.Elab` and `foo.sorryAx` are not.
    if match := _QUALIFIED.search(bare):
        return f"{match.group()!r} is not allowed in a proof"
    for word in ("sorry", "ofReduce", "trustCompiler", "native", "lcProof", "unsafe", "addDecl"):
        if word.casefold() in bare.casefold():
            return f"{word!r} is not allowed in a proof"
    return None


def without_comments(body: str) -> str:
    """The body without `-- ...` and nested `/- ... -/`. There are no strings in it. Raises ValueError."""
    parts: list[str] = []
    position, depth = 0, 0
    while position < len(body):
        if body.startswith("/-", position):
            depth, position = depth + 1, position + 2
        elif body.startswith("-/", position):
            if depth == 0:
                raise ValueError("'-/' without '/-'")
            depth, position = depth - 1, position + 2
            parts.append(" ")
        elif depth == 0 and body.startswith("--", position):
            end = body.find("\n", position)
            position = len(body) if end < 0 else end
        else:
            if depth == 0:
                parts.append(body[position])
            elif body[position] == "\n":
                parts.append("\n")
            position += 1
    if depth:
        raise ValueError("a comment that does not end")
    return "".join(parts)


def signature(statement: str) -> str:
    """Binders and type of a task's statement: without `theorem NAME` in front and `:= by sorry` behind.

    >>> signature("theorem add_zero' (n : Nat) : n + 0 = n := by sorry")
    '(n : Nat) : n + 0 = n'
    """
    return _TAIL.sub("", _OUR_HEAD.sub("", statement.strip(), count=1)).strip()


def splice(statement: str, body: str) -> str:
    """Our theorem with the body as its tactic block, every line of it indented under ours."""
    lines = [f"  {line}" for line in without_comments(body).expandtabs(2).splitlines() if line.strip()]
    return f"theorem {GOAL} {signature(statement)} := by\n" + "\n".join(_dedented(lines)) + "\n"


def _dedented(lines: list[str]) -> list[str]:
    """Two spaces in front of the least indented line; the others keep their distance to it."""
    least = min(len(line) - len(line.lstrip(" ")) for line in lines)
    return ["  " + line[least:] for line in lines]
