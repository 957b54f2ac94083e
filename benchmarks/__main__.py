"""Strop against TRL and transformers: same model, same work, same run, one system after the other in turn.

    python -m benchmarks                       all jobs, short form
    python -m benchmarks grpo --rounds 5       one job, more rounds
    python -m benchmarks --save NAME           also writes benchmarks/results/NAME.json and .md

Every measurement is a process of its own, so that its peak memory is the operating system's figure for that system
alone. Quote ratios of medians, not absolute times, and only from a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

JOBS = {
    "generation": ("strop", "transformers"),
    "sft": ("strop", "trl"),
    "dpo": ("strop", "trl"),
    "reward-model": ("strop", "trl"),
    "grpo": ("strop", "trl"),
}
MODULES = {"dpo": "preferences", "reward-model": "preferences"}
"""Job -> the first word of the module that measures it, where it is not run_SYSTEM."""
ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "models" / "smollm2"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jobs", nargs="*", metavar="JOB", help=f"any of {', '.join(JOBS)} (all)")
    parser.add_argument("--rounds", type=int, default=2, help="measurements of each system, in turn")
    parser.add_argument("--model", type=Path, default=MODEL, help="a Hugging Face folder")
    parser.add_argument("--save", metavar="NAME", help="write benchmarks/results/NAME.json and NAME.md")
    options = parser.parse_args()
    if unknown := [job for job in options.jobs if job not in JOBS]:
        parser.error(f"no job {unknown[0]!r}: there are {', '.join(JOBS)}")
    if not (options.model / "config.json").is_file():
        parser.error(f"{options.model} holds no model: run `strop models get smollm2` first")
    busy = os.getloadavg()[0]
    if busy > 0.7:
        print(f"warning: the load is {busy:.1f}; other processes distort these figures", file=sys.stderr)
    results = {job: measure(job, options.model, options.rounds) for job in options.jobs or JOBS}
    table = render(results)
    print(table)
    if options.save:
        save(options.save, results, table)
    return 0


def measure(job: str, model: Path, rounds: int) -> dict[str, list[dict[str, float]]]:
    """Each system's measurements of one job, alternating."""
    figures: dict[str, list[dict[str, float]]] = {system: [] for system in JOBS[job]}
    for number in range(rounds):
        for system in JOBS[job]:
            command = [sys.executable, "-m", f"benchmarks.{MODULES.get(job, 'run')}_{system}", job, str(model)]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{system} failed on {job}:\n{done.stderr[-3000:]}")
            figures[system].append(json.loads(done.stdout.strip().splitlines()[-1]))
            print(f"{job} round {number + 1}: {system} {figures[system][-1]}", file=sys.stderr, flush=True)
    return figures


def render(results: dict[str, dict[str, list[dict[str, float]]]]) -> str:
    """A Markdown table: medians, their ratio, peak memories."""
    lines = [
        "| job | ours, tokens/s | theirs, tokens/s | ratio | our peak memory | theirs | share |",
        "|---|---|---|---|---|---|---|",
    ]
    for job, figures in results.items():
        ours, theirs = (figures[system] for system in JOBS[job])
        rate, other = (statistics.median(row["tokens_per_second"] for row in rows) for rows in (ours, theirs))
        peak, other_peak = (statistics.median(row["peak_gb"] for row in rows) for rows in (ours, theirs))
        lines.append(
            f"| {job}, against {JOBS[job][1]} | {rate:.0f} | {other:.0f} | {rate / other:.1f}x | {peak:.2f} GB "
            f"| {other_peak:.2f} GB | {peak / other_peak:.2f} |"
        )
    return "\n".join(lines)


def save(name: str, results: dict[str, dict[str, list[dict[str, float]]]], table: str) -> None:
    folder = ROOT / "benchmarks" / "results"
    folder.mkdir(exist_ok=True)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    command = "python -m benchmarks " + " ".join(sys.argv[1:])
    about = {"command": command, "commit": commit, "machine": machine(), "date": datetime.now(UTC).date().isoformat()}
    (folder / f"{name}.json").write_text(json.dumps(about | {"results": results}, indent=1) + "\n", encoding="utf-8")
    text = f"`{command}`, commit {commit[:12]}, {machine()}, {about['date']}\n\n{table}\n"
    (folder / f"{name}.md").write_text(text, encoding="utf-8")


def machine() -> str:
    """Processor, cores and Python, for the head of a result."""
    return f"{_cpu()}, {os.cpu_count()} cores, Python {platform.python_version()}"


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


if __name__ == "__main__":
    sys.exit(main())
