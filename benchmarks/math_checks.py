"""Math checks per second on one core, warm, through MathReward and its worker process.

    python -m benchmarks.math_checks --save math_checks

Three kinds of batches of 256: numbers, each pair different; expressions, each pair different, so that every one goes to
the parser; and a GRPO batch, 32 golds with 8 answers each, three of four golds numbers as in MATH, where right answers
mostly repeat each other.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable

from benchmarks.__main__ import ROOT, machine
from strop.rewards.math import MathReward
from strop.types import Completion, Task

Pair = tuple[str, str]

SIZE = 256
REPEATS = 3


def numbers(rng: random.Random) -> list[Pair]:
    pairs: list[Pair] = []
    for _ in range(SIZE):
        a, b = rng.randrange(10_000), rng.randrange(2, 99)
        gold = rng.choice([str(a), rf"\frac{{{a}}}{{{b}}}", f"{a}.5", f"-{a}"])
        pairs.append((gold, gold if rng.random() < 0.5 else str(rng.randrange(10_000))))
    return pairs


def expressions(rng: random.Random) -> list[Pair]:
    pairs: list[Pair] = []
    for _ in range(SIZE):
        a, b, c = (rng.randrange(2, 1000) for _ in range(3))
        gold, answer = rng.choice(
            [
                (f"{a}x+{b}", f"{b}+{a}x"),
                (rf"{a}\sqrt{{{b}}}", rf"{a}\sqrt{{{c}}}"),
                (f"({a},{b})", f"({a}, {c})"),
                (rf"\frac{{{a}\pi}}{{{b}}}", rf"\frac{{{a}}}{{{b}}}\pi"),
                (f"x={a}y", f"x={c}y"),
            ]
        )
        pairs.append((gold, answer))
    return pairs


def grpo_batch(rng: random.Random) -> list[Pair]:
    pairs: list[Pair] = []
    easy, hard = numbers(rng), expressions(rng)
    for group in range(SIZE // 8):
        gold, other = (hard if group % 4 == 0 else easy)[group]
        wrong = (hard if group % 4 == 0 else easy)[group + 100][0]
        pairs += [(gold, rng.choice([gold, gold, other, wrong])) for _ in range(8)]
    return pairs


KINDS: dict[str, Callable[[random.Random], list[Pair]]] = {
    "numbers": numbers,
    "expressions, all different": expressions,
    "a GRPO batch": grpo_batch,
}


def checks_per_second(kind: Callable[[random.Random], list[Pair]]) -> list[float]:
    """One rate per repeat, each with pairs that were never seen before; the first, which warms up, is left out."""
    rates: list[float] = []
    reward = MathReward(num_workers=1)
    for repeat in range(REPEATS + 1):
        pairs = kind(random.Random(repeat))
        tasks = [Task(id=str(number), prompt="?", columns={"answer": gold}) for number, (gold, _) in enumerate(pairs)]
        completions = [
            Completion(token_ids=(1,), sampling_logprobs=(0.0,), finish_reason="stop", text=rf"\boxed{{{answer}}}")
            for _, answer in pairs
        ]
        started = time.perf_counter()
        verdicts = reward.score(tasks, completions)
        rates.append(SIZE / (time.perf_counter() - started))
        assert {verdict.status for verdict in verdicts} <= {"ok", "wrong"}, verdicts
    reward.close()
    return rates[1:]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", metavar="NAME", help="write benchmarks/results/NAME.json")
    options = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # parent and worker share one core
    rows: list[dict[str, object]] = []
    for name, kind in KINDS.items():
        rates = checks_per_second(kind)
        rows.append({"batch": name, "checks_per_second": round(statistics.median(rates)), "lowest": round(min(rates))})
        print(json.dumps(rows[-1]), flush=True)
    if options.save:
        about = {"command": "python -m benchmarks.math_checks " + " ".join(sys.argv[1:]), "machine": machine()}
        path = ROOT / "benchmarks" / "results" / f"{options.save}.json"
        path.write_text(json.dumps(about | {"rates": rows}, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
