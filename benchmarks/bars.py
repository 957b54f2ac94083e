"""The bars: how much faster and smaller Strop must be than what people use today, and whether it is."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Figures = Mapping[str, Sequence[Mapping[str, float]]]
"""System -> its measurements of one job, one mapping of figures per round."""


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One row of the table: a ratio of medians, ours to theirs, with what it must reach and what it should."""

    what: str
    job: str
    figure: str
    """The figure of ours; also of theirs, unless `their_figure` names another."""
    theirs: str
    """The other system, or "machine": its figure is then that of the job "machine"."""
    must: float
    aim: float
    better: Literal["higher", "lower"] = "higher"
    ours: str = "strop"
    """"strop", or "strop_int8" for what it does in int8."""
    their_figure: str = ""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A bar with its measurement. ours, other and ratio are None where the job was not measured."""

    bar: Bar
    ours: float | None
    other: float | None

    @property
    def ratio(self) -> float | None:
        return None if self.ours is None or self.other is None else self.ours / self.other

    @property
    def verdict(self) -> Literal["aim met", "met", "not met", "not measured"]:
        if self.ratio is None:
            return "not measured"
        if _reaches(self.ratio, self.bar.aim, self.bar.better):
            return "aim met"
        return "met" if _reaches(self.ratio, self.bar.must, self.bar.better) else "not met"


def _speed(what: str, job: str, theirs: str, must: float, aim: float) -> Bar:
    return Bar(what=what, job=job, figure="tokens_per_second", theirs=theirs, must=must, aim=aim)


def _memory(what: str, job: str, must: float, aim: float) -> Bar:
    return Bar(what=what, job=job, figure="peak_gb", theirs="trl", must=must, aim=aim, better="lower")


_BARS = (
    _speed("GRPO tokens/s, 4 x 8, up to 64 tokens", "grpo-64", "trl", 8, 15),
    _speed("GRPO tokens/s, 4 x 16, up to 256 tokens", "grpo-256", "trl", 8, 15),
    _speed("SFT tokens/s, 8 rows", "sft", "trl", 6, 10),
    _speed("generation, batch 1", "generation-1", "transformers", 2, 3),
    _speed("generation, batch 8", "generation-8", "transformers", 4, 6),
    _speed("generation, batch 32", "generation-32", "transformers", 6, 10),
    _speed("generation, batch 64", "generation-64", "transformers", 6, 10),
    _speed("generation, batch 32, bf16 to Q4_1", "generation-32", "llama_cpp", 1.5, 3),
    _speed("generation, batch 1, bf16 to Q4_1", "generation-1", "llama_cpp", 1 / 2, 1),
    _speed("DPO, 8 pairs", "dpo", "trl", 7, 12),
    _speed("reward model, 8 pairs", "reward-model", "trl", 2.5, 4),
    _memory("peak memory, GRPO 4 x 8", "grpo-64", 1 / 3, 1 / 4),
    _memory("peak memory, GRPO 4 x 16", "grpo-256", 1 / 3, 1 / 4),
    _memory("peak memory, SFT", "sft", 1 / 2, 2 / 5),
    _memory("peak memory, GRPO 4 x 8, LoRA", "grpo-64-lora", 1 / 3, 1 / 5),
    _memory("peak memory, DPO", "dpo", 1 / 3, 1 / 4),
    _memory("peak memory, reward model", "reward-model", 1 / 2, 2 / 5),
    Bar(
        what="training FLOP/s, SFT 8,000 tokens per step",
        job="sft-8k",
        figure="training_gflops",
        theirs="machine",
        their_figure="gemm_bf16_gflops",
        must=0.6,
        aim=0.75,
    ),
)
BARS = (*_BARS, *(dataclasses.replace(bar, what=f"{bar.what}, int8", ours="strop_int8") for bar in _BARS))


def rows(results: Mapping[str, Figures]) -> list[Row]:
    """Every bar, with the medians of its job where the results have it; results: job -> Figures."""
    return [
        Row(
            bar=bar,
            ours=median(results, bar.job, bar.ours, bar.figure),
            other=median(
                results,
                "machine" if bar.theirs == "machine" else bar.job,
                bar.theirs,
                bar.their_figure or bar.figure,
            ),
        )
        for bar in BARS
    ]


def median(results: Mapping[str, Figures], job: str, system: str, figure: str) -> float | None:
    """Over the rounds; None where the job or the system was not measured. KeyError for a figure that it lacks."""
    measured = results.get(job, {}).get(system, ())
    return statistics.median(one[figure] for one in measured) if measured else None


def render(table: Sequence[Row]) -> str:
    """The bars as a Markdown table."""
    lines = ["| | against | ours | theirs | ratio | must | aim | |", "|---|---|---|---|---|---|---|---|"]
    for row in table:
        bar, sign = row.bar, "<= " if row.bar.better == "lower" else ">= "
        lines.append(
            f"| {bar.what} | {bar.theirs} | {_number(row.ours)} | {_number(row.other)} | {_number(row.ratio)} "
            f"| {sign}{_number(bar.must)} | {sign}{_number(bar.aim)} | {row.verdict} |"
        )
    return "\n".join(lines)


def render_figures(results: Mapping[str, Figures]) -> str:
    """The median of every figure of every system, as a Markdown table."""
    lines = ["| job | system | figures, medians |", "|---|---|---|"]
    for job, figures in results.items():
        for system, measured in figures.items():
            medians = {name: median(results, job, system, name) for name in measured[0]} if measured else {}
            text = ", ".join(f"{name} {_number(value)}" for name, value in medians.items())
            lines.append(f"| {job} | {system} | {text or 'not measured'} |")
    return "\n".join(lines)


def _reaches(ratio: float, bound: float, better: str) -> bool:
    return ratio >= bound if better == "higher" else ratio <= bound


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
