"""python -m benchmarks.verifiers: the code judge on HumanEval's own solutions.

Latency of one verdict at a time, with boxes started ahead, and verdicts per second on two workers. Every program is
right, so every verdict runs its tests to the end. The bars: a median of 50 ms, and 30 verdicts per second on two cores.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time

from benchmarks.__main__ import machine
from strop.data.tasks import tasks_from_rows
from strop.evals.suites import load_suite
from strop.rewards.code import CodeReward
from strop.types import Completion

PAUSE_SECONDS = 0.1
"""Between two verdicts one at a time: the boxes for the next one are started in it, as in a run that generates."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=164, help="only so many")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    tasks = tasks_from_rows(load_suite("humaneval").rows)[: options.tasks]
    answers = [
        Completion(token_ids=(), sampling_logprobs=(), finish_reason="stop", text=task.columns["solution"])
        for task in tasks
    ]
    alone, rates = [], []
    reward = CodeReward(num_workers=1)
    try:
        time.sleep(1.0)
        for task, answer in list(zip(tasks, answers, strict=True))[:60]:
            (verdict,) = reward.score([task], [answer])
            assert verdict.score == 1.0, (task.id, verdict)
            alone.append(verdict.milliseconds)
            time.sleep(PAUSE_SECONDS)
    finally:
        reward.close()
    reward = CodeReward(num_workers=2)
    try:
        for _ in range(options.rounds):
            started = time.perf_counter()
            verdicts = reward.score(tasks, answers)
            rates.append(len(tasks) / (time.perf_counter() - started))
            assert all(verdict.score == 1.0 for verdict in verdicts)
            print(f"round: {rates[-1]:.1f} verdicts/s", file=sys.stderr, flush=True)
    finally:
        reward.close()
    in_batch = statistics.median(verdict.milliseconds for verdict in verdicts)
    print(f"{machine()}\n")
    print("| code judge, HumanEval | figure | bar |\n|---|---|---|")
    print(f"| one verdict at a time, median | {statistics.median(alone):.0f} ms | 50 ms |")
    print(f"| one verdict at a time, 95th percentile | {sorted(alone)[int(0.95 * len(alone))]:.0f} ms | |")
    print(f"| two workers, median of {options.rounds} rounds | {statistics.median(rates):.1f} verdicts/s | 30 /s |")
    print(f"| a verdict in such a batch, median | {in_batch:.0f} ms | |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
