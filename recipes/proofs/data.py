"""Files of the proof recipes: theorems of propositional logic to prove in Metamath, none of them in two files.

    python recipes/proofs/data.py        writes runs/proofs-data

logic.mm is the database of this folder with every task added as an open theorem ("$= ? $."). A task is an instance of
an axiom, of p > p, or of "q implies p > p", which takes modus ponens; its variables are drawn at random.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).parent
OUTPUT = Path("runs/proofs-data")

VARIABLES = "pqrstuvwxy"
SIZES = {"sft": 640, "tasks": 480, "held_out": 120}
WRONG_EXAMPLES = 0.5
"""Share of the SFT's proofs with a variable in the wrong place, so that the policy is right now and then."""
SHAPES_IN_TEXT = 8_000
"""Lines of pre-training text: formulas with their construction, which is how every proof begins."""

Formula = tuple["Formula", ...] | str
"""A variable, (a,) for ~ a, or (a, b) for ( a > b )."""


def formula(rng: random.Random, depth: int = 0) -> Formula:
    draw = rng.random()
    if depth == 0 or draw < 0.5:
        return rng.choice(VARIABLES)
    return (formula(rng, depth - 1),) if draw < 0.7 else (formula(rng, depth - 1), formula(rng, depth - 1))


def symbols(a: Formula) -> str:
    """As the database writes it.

    >>> symbols((("p",), "q"))
    '( ~ p > q )'
    """
    if isinstance(a, str):
        return a
    return f"~ {symbols(a[0])}" if len(a) == 1 else f"( {symbols(a[0])} > {symbols(a[1])} )"


def construction(a: Formula) -> str:
    """The labels that prove "wff a".

    >>> construction((("p",), "q"))
    'fp n fq i'
    """
    if isinstance(a, str):
        return f"f{a}"
    return " ".join([*map(construction, a), "n" if len(a) == 1 else "i"])


def first_axiom(a: Formula, b: Formula, c: Formula) -> tuple[Formula, str]:
    return (a, (b, a)), f"{construction(a)} {construction(b)} a1"


def second_axiom(a: Formula, b: Formula, c: Formula) -> tuple[Formula, str]:
    return ((a, (b, c)), ((a, b), (a, c))), " ".join([*map(construction, (a, b, c)), "a2"])


def third_axiom(a: Formula, b: Formula, c: Formula) -> tuple[Formula, str]:
    return (((a,), (b,)), (b, a)), f"{construction(a)} {construction(b)} a3"


def identity(a: Formula, b: Formula, c: Formula) -> tuple[Formula, str]:
    return (a, a), f"{construction(a)} id"


def weakened_identity(a: Formula, b: Formula, c: Formula) -> tuple[Formula, str]:
    same = (a, a)
    goal = (b, same)
    parts = [construction(same), construction(goal), construction(a), "id", construction(same), construction(b), "a1"]
    return goal, " ".join([*parts, "mp"])


KINDS: tuple[Callable[[Formula, Formula, Formula], tuple[Formula, str]], ...] = (
    first_axiom,
    second_axiom,
    third_axiom,
    identity,
    weakened_identity,
)


def write_proof_data(folder: Path, *, seed: int = 0) -> None:
    """logic.mm, formulas.txt (pre-training), sft.jsonl, tasks.jsonl (RL), tasks_shuffled.jsonl (the control, where each
    task is judged by another one's theorem), held_out.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    rows: list[dict[str, object]] = []
    seen: set[str] = set()
    while len(rows) < sum(SIZES.values()):
        goal, proof = rng.choice(KINDS)(formula(rng), formula(rng), formula(rng))
        statement = f"|- {symbols(goal)}"
        if statement not in seen:
            seen.add(statement)
            prompt = [{"role": "user", "content": symbols(goal)}]
            rows.append({"prompt": prompt, "theorem": f"t{len(rows)}", "statement": statement, "proof": proof})
    rng.shuffle(rows)  # the small kinds run out of new statements first
    database = [(HERE / "logic.mm").read_text(encoding="utf-8")]
    database += [f"{row['theorem']} $p {row['statement']} $= ? $.\n" for row in rows]
    (folder / "logic.mm").write_text("".join(database), encoding="utf-8")
    lines = [f"{symbols(a)} : {construction(a)}" for a in (formula(rng, 1) for _ in range(SHAPES_IN_TEXT))]
    documents = ["\n".join(lines[start : start + 8]) for start in range(0, len(lines), 8)]
    (folder / "formulas.txt").write_text("\n<|endoftext|>\n".join(documents) + "\n", encoding="utf-8")
    start = 0
    for name, size in SIZES.items():
        chosen = rows[start : start + size]
        start += size
        if name == "sft":
            chosen = [example(row, rng) for row in chosen]
        write_rows(folder / f"{name}.jsonl", chosen)
        if name == "tasks":
            theorems = [(row["theorem"], row["statement"]) for row in chosen]
            rng.shuffle(theorems)
            shuffled = [
                {**row, "theorem": theorem, "statement": statement}
                for row, (theorem, statement) in zip(chosen, theorems, strict=True)
            ]
            write_rows(folder / "tasks_shuffled.jsonl", shuffled)


def example(row: dict[str, object], rng: random.Random) -> dict[str, object]:
    """A task and a proof of it as a conversation; in WRONG_EXAMPLES of them the proof is likely none."""
    labels = str(row["proof"]).split()
    if rng.random() < WRONG_EXAMPLES:
        place = rng.choice([index for index, label in enumerate(labels) if label.startswith("f")])
        labels[place] = f"f{rng.choice(VARIABLES)}"
    prompt = row["prompt"]
    assert isinstance(prompt, list)
    return {"messages": [*prompt, {"role": "assistant", "content": " ".join(labels)}]}


def write_rows(path: Path, rows: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    write_proof_data(OUTPUT)
    print(f"{OUTPUT}: {', '.join(f'{size} {name}' for name, size in SIZES.items())}")
