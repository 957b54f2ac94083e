"""Which settings of the other systems were tried, and what each gave: the bars take the fastest that works.

python -m benchmarks.settings                          every setting, one timed step each: about an hour
python -m benchmarks.settings SYSTEM JOB [SETTING ...]  some of them, added to benchmarks/results/settings.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

from benchmarks.__main__ import MODEL, ROOT, get_gguf_beside, heading, origin
from benchmarks.work import JOBS

RESULTS = ROOT / "benchmarks" / "results" / "settings.json"
TRIED = {"trl": ("sft", "grpo-64"), "transformers": ("generation-1", "generation-32"), "llama_cpp": ("generation-32",)}
"""System -> the jobs that its settings are tried on."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("system", nargs="?", choices=list(TRIED))
    parser.add_argument("job", nargs="?", choices=list(JOBS))
    parser.add_argument("settings", nargs="*")
    options = parser.parse_args()
    if options.system and not options.job:
        parser.error("name a job too")
    chosen = [(options.system, options.job)] if options.system else [(s, job) for s in TRIED for job in TRIED[s]]
    found = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    for system, job in chosen:
        known = settings_of(system)
        if unknown := [setting for setting in options.settings if setting not in known]:
            parser.error(f"{system} has no setting {unknown[0]!r}: there are {'; '.join(known)}")
        for setting in options.settings or known:
            figures = measure(system, job, setting)
            found[f"{system}, {job}, {setting}"] = figures
            print(system, job, setting, figures, flush=True)
            about = origin() | {"command": "python -m benchmarks.settings"}
            RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            text = f"{heading(about)}\n\nOne timed step each.\n\n{render(found)}\n"
            RESULTS.with_suffix(".md").write_text(text, encoding="utf-8")
    return 0


def settings_of(system: str) -> list[str]:
    import importlib

    return list(importlib.import_module(f"benchmarks.run_{system}").SETTINGS)


def measure(system: str, job: str, setting: str) -> dict[str, float | str]:
    """The figures of one timed step; where the setting does not work, the last line of its error."""
    if system == "llama_cpp":
        get_gguf_beside(MODEL)
    command = [sys.executable, "-m", f"benchmarks.run_{system}", f"{job}/1", str(MODEL), setting]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        # The last line, without what in it belongs to this machine.
        reason = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
        return {"does not work": reason.replace(str(ROOT), ".")[:200]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def render(found: dict[str, dict[str, float | str]]) -> str:
    """One row per setting."""
    lines = ["| system, job, setting | tokens/s | peak memory |", "|---|---|---|"]
    for name, figures in found.items():
        if "does not work" in figures:
            lines.append(f"| {name} | does not work: {figures['does not work']} | |")
        else:
            lines.append(f"| {name} | {figures['tokens_per_second']} | {figures['peak_gb']} GB |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
