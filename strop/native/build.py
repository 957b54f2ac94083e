"""Compiles the C++ files of this room once per machine and loads them.

Kernels are called through ctypes with plain pointers: no torch headers (which take a minute to compile), no Python
objects, and the lock of the interpreter is released while they run. They share torch's own OpenMP threads, because its
libgomp is in the process already when the library that names it is loaded.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from functools import cache
from pathlib import Path

import torch

FOLDER = Path(__file__).parent
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-fno-math-errno", "-fPIC", "-shared")
REQUIRED = ("avx512_bf16", "avx512_vnni", "avx512bw", "avx512vl")

_failure = ""
"""Why there are no kernels although there could be, once `library` has tried."""


def why_unavailable() -> str | None:
    """The reason for which this machine works without the kernels, or None when it can have them."""
    if os.environ.get("STROP_NATIVE") == "0":
        return "STROP_NATIVE=0 is set"
    features = _cpu_features()
    if not features.issuperset(REQUIRED):
        return f"the CPU lacks {', '.join(sorted(set(REQUIRED) - features))}"
    if _compiler() is None:
        return "there is no C++ compiler (install g++)"
    return None


def why_missing() -> str:
    """The reason for which library() is None, in one line."""
    return why_unavailable() or _failure


@cache
def library() -> ctypes.CDLL | None:
    """The loaded kernels, compiled first if this machine has not done so yet (seconds), or None: see why_unavailable.

    Sources that do not compile are reported as a warning; everything works without them, slower.
    """
    global _failure
    if why_unavailable() is not None:
        return None
    compiler = _compiler()
    assert compiler is not None
    sources = sorted(FOLDER.glob("*.cpp"))
    target = _cache_folder() / f"strop-{_fingerprint(compiler, sources)}.so"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            built = Path(folder) / target.name
            command = [compiler, *FLAGS, "-o", str(built), *map(str, sources)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                _failure = _compiler_failure(done.stderr)
                warnings.warn(
                    f"the C++ kernels do not compile here, so decoding is slower:\n{done.stderr}", stacklevel=2
                )
                return None
            os.replace(built, target)  # another process may be doing the same
    torch.get_num_threads()  # torch's OpenMP is loaded before a library that wants one
    loaded = ctypes.CDLL(str(target))
    if not loaded.strop_can_run():
        _failure = "the system does not let this process use the CPU's matrix tiles (AMX)"
        return None
    return loaded


def _compiler_failure(said: str) -> str:
    """The compiler's first error, in one line."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    first_error = next((line for line in lines if "error" in line), lines[-1] if lines else "no message")
    return f"the C++ kernels do not compile ({first_error})"


def _compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++"))


@cache
def _cpu_features() -> frozenset[str]:
    if platform.machine() != "x86_64" or not Path("/proc/cpuinfo").exists():
        return frozenset()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            return frozenset(line.split(":", 1)[1].split())
    return frozenset()


def _fingerprint(compiler: str, sources: list[Path]) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    parts = [*FLAGS, version, " ".join(sorted(_cpu_features()))]
    parts += [path.read_text() for path in (*sources, *sorted(FOLDER.glob("*.h")))]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "strop" / "native"
