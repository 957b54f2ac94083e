"""The table, the picture and the files of the study of reward over-optimisation."""

from __future__ import annotations

import csv
import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.__main__ import ROOT, heading, origin
from benchmarks.overoptimisation_task import PROXIES
from strop.runs import read_lines


@dataclass(frozen=True, kw_only=True)
class Point:
    """One checkpoint on held-out prompts; proxy and gold in standard deviations of the SFT's answers."""

    proxy_name: str
    kl_coef: float
    seed: int
    step: int
    kl: float
    proxy: float
    gold: float
    gold_half: float
    """Half of gold's 95 % interval, over prompts."""
    length: float
    """Words per answer."""
    best: tuple[str, ...] = ()
    """The answers that the proxy likes most, with its score and the judge's."""


def render(points: Sequence[Point]) -> str:
    """A row per run: where gold was highest, and where the run ended."""
    lines = [
        "| proxy | KL coefficient | seed | highest gold | at KL | gold at the end | at KL | proxy at the end | words |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for own in runs(points):
        peak, last = max(own, key=lambda point: point.gold), own[-1]
        lines.append(
            f"| {last.proxy_name} | {last.kl_coef:g} | {last.seed} "
            f"| {peak.gold:+.2f} ± {peak.gold_half:.2f} | {peak.kl:.1f} "
            f"| {last.gold:+.2f} ± {last.gold_half:.2f} | {last.kl:.1f} | {last.proxy:+.2f} | {last.length:.1f} |"
        )
    return "\n".join(lines)


def runs(points: Sequence[Point]) -> list[list[Point]]:
    """The points of each run, in the order of its steps."""
    found: dict[tuple[str, float, int], list[Point]] = {}
    for point in sorted(points, key=lambda point: point.step):
        found.setdefault((point.proxy_name, point.kl_coef, point.seed), []).append(point)
    return [found[key] for key in sorted(found, key=lambda key: (list(PROXIES).index(key[0]), key[1:]))]


def draw(points: Sequence[Point], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(point.proxy_name for point in points))
    figure, panels = pyplot.subplots(1, len(names), figsize=(5.2 * len(names), 4.6), sharey=True, squeeze=False)
    coefs = sorted({point.kl_coef for point in points})
    colours = {coef: f"C{number}" for number, coef in enumerate(coefs)}
    for name, axes in zip(names, panels[0], strict=True):
        for own in runs([point for point in points if point.proxy_name == name]):
            colour, kl = colours[own[0].kl_coef], [max(point.kl, 0.0) for point in own]
            label = f"KL coefficient {own[0].kl_coef:g}" if own[0].seed == min(p.seed for p in points) else None
            axes.plot(kl, [point.gold for point in own], "-o", color=colour, markersize=3, label=label)
            axes.plot(kl, [point.proxy for point in own], "--", color=colour, linewidth=1)
        axes.axhline(0, color="grey", linewidth=0.6)
        axes.set_title(f"{name} proxy: {PROXIES[name].rankings} rankings{', noisy' if PROXIES[name].noise else ''}")
        axes.set_xlabel("KL from the SFT policy, nats per answer")
        axes.grid(True, alpha=0.3)
        axes.legend(fontsize=8)
    panels[0][0].set_ylabel("reward, standard deviations of SFT answers\n(solid: gold; dashed: proxy)")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def save(name: str, points: Sequence[Point], *, num_prompts: int, runs_dir: Path) -> None:
    """benchmarks/results/NAME.md, .csv and .png; num_prompts held-out prompts were asked."""
    about = origin() | {"command": " ".join(["python -m benchmarks.overoptimisation", *sys.argv[1:]])}
    folder = ROOT / "benchmarks" / "results"
    fields = [field.name for field in dataclasses.fields(Point) if field.name != "best"]
    with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(fields)
        writer.writerows([_short(getattr(point, field)) for field in fields] for point in points)
    draw(points, folder / f"{name}.png")
    ends = [own[-1] for own in runs(points) if own[-1].kl_coef == min(point.kl_coef for point in points)]
    samples = [f"- {point.proxy_name}, seed {point.seed}: {best}" for point in ends for best in point.best]
    text = "\n\n".join(
        [
            heading(about),
            "Gold and proxy in standard deviations of the SFT's answers, from their mean; intervals of 95 % over "
            f"{num_prompts} held-out prompts.",
            render(points),
            "Held-out pairs in the judge's order, by reward model (by length alone):",
            "\n".join(accuracies(points, runs_dir)),
            "Answers that the proxy likes most, at the end of the runs without a penalty:",
            "\n".join(samples),
        ]
    )
    (folder / f"{name}.md").write_text(text + "\n", encoding="utf-8")


def accuracies(points: Sequence[Point], runs_dir: Path) -> list[str]:
    """Of every reward model in its order, on held-out pairs, beside that of length alone."""
    lines = []
    for proxy, seed in dict.fromkeys((point.proxy_name, point.seed) for point in points):
        *_, last = read_lines(runs_dir / f"overopt-{proxy}-{seed}" / "metrics.jsonl")
        accuracy, length_only = last["eval/accuracy"], last["eval/accuracy_length_only"]
        lines.append(f"- {proxy}, seed {seed}: {accuracy:.3f} ({length_only:.3f})")
    return lines


def _short(value: object) -> object:
    return f"{value:.4f}" if isinstance(value, float) else value
