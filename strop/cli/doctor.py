"""`strop doctor`: what this machine is, how fast it multiplies, and what 'auto' means on it; with --recipe, what a run
will need of it."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from strop.cli.config import read_toml, read_values
from strop.cli.flags import StageCall, parse_stage_flags
from strop.cli.stages import STAGES, load_stage

if TYPE_CHECKING:
    from strop.stages.forecast import Forecast, Workload

CPU_FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "avx512_vnni", "asimd", "bf16", "i8mm", "sve")
"""Flags that decide how fast a CPU multiplies matrices: x86 first, then Arm."""

MARGIN = 0.9
"""Share of the free memory that a run may be forecast to need: forecasts are within a fifth, and others live here."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """This machine: CPU features, cores, memory, measured speed, sandbox, compiler, and the dtype that 'auto' means.

    strop doctor --recipe RECIPE.toml [--from RUN[/STEP]|FOLDER] [--stage STAGE] [--FIELD VALUE ...] instead says what a
    step of that recipe will need here, in memory by component and in seconds, after some seconds of measurement.
    """


def run(command: str, args: Sequence[str]) -> int:
    options, rest = _split(args)
    if "recipe" in options:
        return _forecast(Path(options["recipe"]), options.get("stage"), rest)
    if "stage" in options:
        raise ValueError("--stage says which stage a recipe is for: name the recipe with --recipe")
    tyro.cli(Arguments, args=rest, prog=f"strop {command}")
    _print(machine_rows())
    return 0


def machine_rows() -> dict[str, str]:
    """What `strop doctor` prints, by name."""
    import torch

    from strop import __version__
    from strop.models.precision import fastest, measure_bandwidth, measure_dtypes, measure_gemm
    from strop.native.build import library

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # What a job may use, which in a container or under taskset is less than what the machine has.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    rows = {
        "strop": f"{__version__}, Python {platform.python_version()}, torch {torch.__version__}",
        "system": f"{platform.system()} {platform.machine()}",
        "CPU": cpu_name(),
        "CPU features": " ".join(cpu_features()) or "unknown",
        "cores": f"{cores} usable, torch uses {torch.get_num_threads()} threads",
        "memory": memory(),
        "GPU": torch.cuda.get_device_name() if device.type == "cuda" else "none",
        "C++ kernels": kernels(),
        "sandbox": sandbox(),
    }
    rates = measure_dtypes(device)
    chosen = fastest(rates)
    if device.type == "cpu" and library() is not None:
        rates["int8"] = measure_gemm("int8")
    for name, rate in rates.items():
        rows[f"GEMM {name}"] = f"{rate:,.0f} GFLOP/s on {device.type}"
    if device.type == "cpu":
        read, copy = measure_bandwidth()
        rows["memory bandwidth"] = f"{read:.0f} GB/s reading, {copy:.0f} GB/s copying (read and written)"
    ratio = rates["bfloat16"] / rates["float32"]
    rows["dtype 'auto'"] = f"{chosen}, by measurement: bfloat16 multiplies {ratio:.1f}x as fast as float32 here"
    return rows


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
        available = free_bytes()
        return f"{total}, {available / 2**30:.1f} GiB free" if available else total
    return "unknown"


def free_bytes() -> int | None:
    """What a new process may use before the system swaps or kills: free memory, within this container's limit."""
    available = _proc_field("/proc/meminfo", "MemAvailable").split()
    if not available:
        return None
    free = int(available[0]) * 1024
    limit, used = (_number(Path("/sys/fs/cgroup") / name) for name in ("memory.max", "memory.current"))
    return free if limit is None or used is None else max(0, min(free, limit - used))


def kernels() -> str:
    """Whether the C++ kernels work here, or why not."""
    from strop.native.build import library, why_missing

    return "compiled for this CPU" if library() is not None else f"none: {why_missing()}"


def stage_of(recipe: Path, table: dict[str, Any]) -> str:
    """The one stage whose Config has every field of the recipe. ValueError where none or several have."""
    if "stage" in table:
        raise ValueError(f"{recipe} is a pipeline: name the recipe of one of its stages")
    fitting, problems = [], []
    for stage in STAGES:
        try:
            read_values(table, load_stage(stage).Config, str(recipe))
            fitting.append(stage)
        except ValueError as error:
            problems.append(f"{stage}: {error}")
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise ValueError(f"{recipe} could be for {' or '.join(fitting)}: add --stage")
    raise ValueError(f"{recipe} is a recipe of no stage:\n  " + "\n  ".join(problems))


def _forecast(recipe: Path, stage: str | None, args: Sequence[str]) -> int:
    table = read_toml(recipe)
    stage = stage or stage_of(recipe, table)
    if stage not in STAGES:
        raise ValueError(f"--stage {stage}: there are {', '.join(STAGES)}")
    config_class = load_stage(stage).Config
    values = read_values(table, config_class, str(recipe))
    prog = f"strop doctor --recipe {recipe}"
    call = parse_stage_flags(config_class, values, args, prog=prog, where=str(recipe), name=recipe.stem)
    import torch.utils.tensorboard  # noqa: F401  what a run imports belongs to its memory

    from strop.cli.workload import workload
    from strop.stages.forecast import forecast
    from strop.stages.forecast_probe import measure

    work = workload(stage, call.config, call.runs_dir)
    result = forecast(work, measure(work))
    free = free_bytes()
    _print_forecast(stage, work, result, free)
    if free is not None and result.peak_bytes > MARGIN * free:
        _print_remedies(stage, call, free)
    return 0


def _print_forecast(stage: str, work: Workload, result: Forecast, free: int | None) -> None:
    from rich.console import Console
    from rich.table import Table

    from strop.models.precision import measure_gemm

    console = Console(highlight=False)
    learner = work.learner
    model = f"{learner.num_weights / 1e6:.1f} M parameters, {learner.model.num_layers} layers"
    if learner.lora is not None:
        model += f", {learner.num_trained / 1e6:.2f} M of an adapter that learn"
    if work.critic is not None:
        model += f"; critic {work.critic.num_weights / 1e6:.1f} M"
    dtype = work.dtype_name
    peak = measure_gemm(dtype)
    _print(
        {
            "stage": stage,
            "model": f"{model}; {dtype}",
            "gradient checkpointing": learner.checkpointing,
            "micro-batch": f"{work.micro_tokens:,} tokens, {work.num_labels:,} of them count",
            "step": f"{work.tokens_per_step:,} training tokens, {work.num_updates} update(s)",
            **{f"assumed {number}": text for number, text in enumerate(work.assumptions, start=1)},
        }
    )
    table = Table("memory, GB", *result.phases, box=None, pad_edge=False, title_justify="left")
    for name in dict.fromkeys(name for phase in result.phases.values() for name in phase):
        row = [phase.get(name, 0.0) / 1e9 for phase in result.phases.values()]
        if any(row):
            table.add_row(name, *(f"{value:.2f}" for value in row))
    table.add_row("together", *(f"{sum(phase.values()) / 1e9:.2f}" for phase in result.phases.values()))
    console.print(table)
    of_free = "" if free is None else f" of {free / 1e9:.2f} GB free"
    console.print(f"peak memory: {result.peak_bytes / 1e9:.2f} GB{of_free}, in the phase '{result.largest_phase}'")
    parts = ", ".join(f"{name} {value:.2f}" for name, value in result.seconds.items())
    console.print(f"time per step: {result.step_seconds:.2f} s ({parts})")
    share = result.training_gflops / peak
    console.print(f"training: {result.training_gflops:,.0f} GFLOP/s, {share:.0%} of the {peak:,.0f} of a {dtype} GEMM")


def _print_remedies(stage: str, call: StageCall, free: int) -> None:
    """Forecast what each smaller setting would need, and name those that fit."""
    from strop.cli.workload import smaller, workload
    from strop.stages.forecast import forecast
    from strop.stages.forecast_probe import measure

    print(f"\nThis does not fit into {MARGIN:.0%} of the free memory. What would be needed with")
    fits = False
    for what, config in smaller(stage, call.config):
        work = workload(stage, config, call.runs_dir)
        needed = forecast(work, measure(work, has_times=False)).peak_bytes
        fits = fits or needed <= MARGIN * free
        print(f"  {what}: {needed / 1e9:.2f} GB{', which fits' if needed <= MARGIN * free else ''}")
    if not fits:
        print("None of these alone is enough: combine them, or take a smaller model")


def _split(args: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """--recipe and --stage, as `--name value` or `--name=value`, and all other arguments."""
    options: dict[str, str] = {}
    rest: list[str] = []
    remaining = iter(args)
    for argument in remaining:
        name, is_joined, value = argument.partition("=")
        if name not in ("--recipe", "--stage"):
            rest.append(argument)
            continue
        if not is_joined:
            value = next(remaining, "")
        if not value or value.startswith("--"):
            raise ValueError(f"{name} needs a value")
        options[name.removeprefix("--")] = value
    return options, rest


def _print(rows: dict[str, str]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in rows.items():
        table.add_row(name, value)
    Console(highlight=False).print(table)


def _number(path: Path) -> int | None:
    """The number in a file; None where there is no file, or it says "max"."""
    text = path.read_text().strip() if path.is_file() else ""
    return int(text) if text.isdigit() else None


def _proc_field(path: str, name: str) -> str:
    """The first `name : value` of a file in /proc, or "" where there is none."""
    if not Path(path).is_file():
        return ""
    for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return ""
