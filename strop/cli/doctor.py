"""`strop doctor`: what this machine is, how fast it multiplies, and what 'auto' means on it."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

CPU_FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "avx512_vnni", "asimd", "bf16", "i8mm", "sve")
"""Flags that decide how fast a CPU multiplies matrices: x86 first, then Arm."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """This machine: CPU features, cores, memory, measured speed, sandbox, and the dtype that 'auto' means."""


def run(command: str, args: Sequence[str]) -> int:
    tyro.cli(Arguments, args=list(args), prog=f"strop {command}")
    import torch
    from rich.console import Console
    from rich.table import Table

    from strop import __version__
    from strop.models.precision import choose_dtype, measure_gemm

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # What a job may use, which in a container or under taskset is less than what the machine has.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    table = Table(show_header=False, box=None, pad_edge=False)
    rows = {
        "strop": f"{__version__}, Python {platform.python_version()}, torch {torch.__version__}",
        "system": f"{platform.system()} {platform.machine()}",
        "CPU": cpu_name(),
        "CPU features": " ".join(cpu_features()) or "unknown",
        "cores": f"{cores} usable, torch uses {torch.get_num_threads()} threads",
        "memory": memory(),
        "GPU": torch.cuda.get_device_name() if device.type == "cuda" else "none",
    }
    rates = {dtype: measure_gemm(dtype, device) for dtype in (torch.float32, torch.bfloat16)}
    for dtype, rate in rates.items():
        rows[f"GEMM {str(dtype).removeprefix('torch.')}"] = f"{rate:,.0f} GFLOP/s on {device.type}"
    rows["sandbox"] = sandbox()
    rows["dtype 'auto'"] = str(choose_dtype("auto", device)).removeprefix("torch.")
    for name, value in rows.items():
        table.add_row(name, value)
    Console(highlight=False).print(table)
    return 0


def sandbox() -> str:
    """Whether code of a model can be run here: what the canary of the code reward says."""
    from strop.rewards.sandbox import canary

    rows = canary()
    if failed := [f"{row.name}: {row.detail}" for row in rows if not row.ok]:
        return "no code rewards: " + "; ".join(failed)
    return f"holds: {len(rows)} attacks refused"


def cpu_name() -> str:
    return _proc_field("/proc/cpuinfo", "model name") or platform.processor() or platform.machine()


def cpu_features() -> list[str]:
    """The flags of CPU_FEATURES that this CPU reports; empty where the system does not say (only Linux does)."""
    flags = (_proc_field("/proc/cpuinfo", "flags") or _proc_field("/proc/cpuinfo", "Features")).split()
    return [feature for feature in CPU_FEATURES if feature in flags]


def memory() -> str:
    """Total and free memory in GiB."""
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        total = f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.1f} GiB"
        available = _proc_field("/proc/meminfo", "MemAvailable").split()
        return f"{total}, {int(available[0]) / 2**20:.1f} GiB free" if available else total
    return "unknown"


def _proc_field(path: str, name: str) -> str:
    """The first `name : value` of a file in /proc, or "" where there is none."""
    if not Path(path).is_file():
        return ""
    for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return ""
