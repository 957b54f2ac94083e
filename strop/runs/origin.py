"""What a run was made with: source revision, versions, machine. Nothing that names a person or a host."""

from __future__ import annotations

import dataclasses
import enum
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

import strop

# Not inside a longer path: /srv/root/data is not in /root.
_HOME = re.compile(rf"(?<![\w./-]){re.escape(os.path.expanduser('~'))}(?=/|\s|$)")


def git_origin() -> tuple[str, str] | None:
    """Revision of the current directory's git repository and the diff of its tracked files to it ("" if clean).

    None without git, repository or commit.
    """
    try:
        revision = _git("rev-parse", "--verify", "HEAD")
        diff = _git("diff", "--no-ext-diff", "--no-color", "HEAD")
    except (OSError, subprocess.SubprocessError):
        return None
    return revision.strip(), diff


def _git(*arguments: str) -> str:
    command = ("git", *arguments)
    done = subprocess.run(command, capture_output=True, check=True, timeout=60, encoding="utf-8", errors="replace")
    return done.stdout


def versions() -> dict[str, str]:
    """Of the parts that decide a run's numbers. Read from the package metadata, so nothing is imported for it."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
        "strop": strop.__version__,
    }


def machine() -> dict[str, Any]:
    """The parts of this machine that decide a run's speed, and with it the order of its floating-point sums."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.machine()}",
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def recordable(value: Any) -> Any:
    """A config (dict or dataclass) as it comes back from JSON: what run.json holds, and what compares equal to it."""
    return json.loads(json.dumps(value, default=_to_json))


def without_home(text: str) -> str:
    """text with the home folder written ~, so that a run folder can be passed on."""
    return _HOME.sub("~", text)


def _to_json(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, Path | torch.dtype | torch.device):
        return str(value)
    raise TypeError(f"{value!r} of type {type(value).__name__} cannot be recorded in run.json")
