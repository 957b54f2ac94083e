"""Line charts as SVG text that takes its colours from the page around it, so that one file reads in light and dark."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from io import StringIO
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_INK, _LINE = "#010203", "#040506"
"""Colours that nothing else has, exchanged in the finished SVG for the page's text colour and its --line."""

_SMOOTH_FROM = 40
"""Points from which a noisy curve is drawn faint, with its running mean over it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """One figure over the steps of a run.

    Example: Curve(title="reward", steps=(1, 2, 3), values=(0.1, None, 0.3)); None was not finite and leaves a gap.
    """

    title: str
    steps: Sequence[int]
    values: Sequence[float | None]
    low: Sequence[float | None] | None = None
    """With high: the 95 % interval of each value, drawn as a band."""
    high: Sequence[float | None] | None = None
    is_noisy: bool = False
    """A figure of one training batch: what counts is its running mean."""

    @property
    def num_missing(self) -> int:
        return sum(value is None for value in self.values)


def draw(curve: Curve, name: str) -> str:
    """The curve as an <svg> element, 360 x 210 units, without a colour, font, script or address of its own.

    The name must be unique on the page. The same curve gives the same text. Raises ImportError without matplotlib.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        raise ImportError("a report's curves need matplotlib: pip install 'strop[report]'") from None
    # Text stays text: smaller, selectable, and in the reader's own font. No pyplot, so no display is looked for.
    settings: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "font.family": "sans-serif",
        "font.size": 11,
        "text.color": _INK,
        "axes.edgecolor": _INK,
        "axes.labelcolor": _INK,
        "xtick.color": _INK,
        "ytick.color": _INK,
        "axes.unicode_minus": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with rc_context(settings):
        figure = Figure(figsize=(5, 210 / 72), layout="constrained")
        axes = figure.add_subplot()
        axes.set_axisbelow(True)
        axes.grid(axis="y", color=_INK, alpha=0.12, linewidth=0.8)
        axes.tick_params(length=0)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
        if len(curve.steps) == 1:
            axes.set_xticks(list(curve.steps))
        axes.set_xlabel("step")
        _plot(axes, curve)
        buffer = StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _embeddable(buffer.getvalue(), curve.title)


def _plot(axes: Axes, curve: Curve) -> None:
    values = _with_gaps(curve.values)
    steps = list(curve.steps)
    if curve.low is not None and curve.high is not None:
        band = {"color": _LINE, "alpha": 0.2, "linewidth": 0}
        axes.fill_between(steps, _with_gaps(curve.low), _with_gaps(curve.high), **band)
    marker = "o" if len(steps) <= _SMOOTH_FROM else None
    if curve.is_noisy and len(steps) > _SMOOTH_FROM:
        axes.plot(steps, values, color=_LINE, alpha=0.3, linewidth=0.8)
        axes.plot(steps, running_mean(values, window=max(5, len(steps) // 15)), color=_LINE, linewidth=1.8)
    else:
        axes.plot(steps, values, color=_LINE, linewidth=1.8, marker=marker, markersize=3.5)


def running_mean(values: Sequence[float], *, window: int) -> list[float]:
    """The mean of each value and its neighbours within half a window on both sides, skipping nan; nan where it is."""
    half = window // 2
    means: list[float] = []
    for index, value in enumerate(values):
        near = [other for other in values[max(0, index - half) : index + half + 1] if not math.isnan(other)]
        means.append(value if math.isnan(value) else sum(near) / len(near))
    return means


def _with_gaps(values: Sequence[float | None]) -> list[float]:
    return [math.nan if value is None else float(value) for value in values]


def _embeddable(svg: str, title: str) -> str:
    """The <svg> element alone: sized by the page, in its colours, without what would clash with other charts in it."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<style[^>]*>.*?</style>", "", svg, flags=re.DOTALL)
    # Numbered names of groups repeat from chart to chart; the hashed ones of clip paths and markers are referred to.
    svg = re.sub(r' id="[a-z0-9]*[A-Za-z]+[a-z0-9.]*_\d+"', "", svg)
    svg = re.sub(r" font-family: [^;]*;", "", svg)
    svg = re.sub(
        r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', rf'<svg role="img" aria-label="{escape(title)} over the steps" \1>', svg
    )
    return svg.replace(_INK, "currentColor").replace(_LINE, "var(--line)")
