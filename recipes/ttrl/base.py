"""The small model that the recipes of this folder adapt, its prompts and its test questions.

    python recipes/ttrl/base.py        into runs/ttrl; about a minute on one thread

It answers questions about three digits ("back 382 = 283") and is wrong two times in three, seldom twice in the same
way, so that its vote is mostly right: benchmarks/ttrl_tasks.py says how it is made.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
from benchmarks.ttrl_tasks import make_base

if __name__ == "__main__":
    make_base("slips", 0, Path("runs/ttrl"))
