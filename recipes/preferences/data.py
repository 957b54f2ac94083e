"""Preferences of a stated synthetic judge, who likes right sums: python recipes/preferences/data.py.

From the demo's sums of two digits (recipes/demo/data.py writes them) it makes, in runs/preferences-data,
rankings.jsonl and held_out_rankings.jsonl: the right answer first, answers that are off by one or two tied behind it,
and one that is far off last. The held-out file has other questions.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "demo"))

from data import write_demo_data

SOURCE, TARGET = Path("runs/demo-data"), Path("runs/preferences-data")


def ranking(task: dict[str, object], draw: random.Random) -> dict[str, object]:
    right = int(str(task["answer"]))
    near = [right + 1, right - 1 if right else right + 2]
    distance = draw.randrange(5, 12)
    # To either side: were it always above, it would often be the longer answer, and length would tell it.
    far = right - distance if distance <= right and draw.random() < 0.7 else right + distance
    answers = [(right, 1), *((number, 2) for number in near), (far, 3)]
    draw.shuffle(answers)
    return {
        "prompt": task["prompt"],
        "completions": [str(number) for number, _ in answers],
        "ranks": [rank for _, rank in answers],
    }


def main() -> None:
    write_demo_data(SOURCE)
    TARGET.mkdir(parents=True, exist_ok=True)
    for source, target in (("smollm2_tasks", "rankings"), ("smollm2_held_out", "held_out_rankings")):
        lines = (SOURCE / f"{source}.jsonl").read_text(encoding="utf-8").splitlines()
        draw = random.Random(target)
        rows = [ranking(json.loads(line), draw) for line in lines]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (TARGET / f"{target}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
