"""`strop runs report`: one HTML file that shows what a run, or a row of them, did to a model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from strop.runs.charts import Curve, draw
from strop.runs.folder import RunFolder
from strop.runs.metrics import read_lines
from strop.runs.report_page import PAGE

HELD_OUT_METRICS = ("pass@1", "bits_per_byte", "loss", "score", "accuracy", "base_agreement", "random/win")
"""The first of them that a run logged as eval/NAME stands in the table."""

CURVES = {
    "eval/pass@1": "held-out pass@1",
    "eval/bits_per_byte": "held-out bits per byte",
    "eval/loss": "held-out loss, nats per token",
    "eval/score": "held-out score",
    "eval/accuracy": "agreement with held-out preferences",
    "eval/base_agreement": "agreement with the base's votes on held-out prompts",
    "eval/self_agreement": "agreement with its own votes on held-out prompts",
    "eval/distinct_answers": "different majority answers on held-out prompts",
    "eval/entropy": "entropy on held-out prompts, nats per token",
    "eval/start/win": "games won against the run's beginning",
    "eval/random/win": "games won against moves by lot",
    "eval/perfect/win": "games won against perfect play",
    "eval/random/illegal": "games against moves by lot that it ended with a move that is not allowed",
    "past/win": "games won against a past self",
    "illegal": "games ended with a move that is not allowed",
    "draw": "draws against itself",
    "majority_share": "share of the majority answer",
    "label_accuracy": "share of majority answers that are right",
    "reward_accuracy": "share of rewards that the right answer would have given",
    "reward": "reward",
    "reward_penalised": "reward after penalties for KL and missing EOS",
    "loss": "training loss, nats per token",
    "completion_length": "completion length, tokens",
    "truncated": "share of completions without EOS",
    "groups_flat": "share of groups whose rewards are all equal",
    "entropy": "entropy, nats per token",
    "kl": "KL to the reference, nats per token",
    "kl_sequence": "KL to the reference, nats per completion",
    "kl_coef": "KL coefficient",
    "explained_variance": "variance of the returns that the critic explains",
    "value_loss": "value loss",
    "return_mean": "mean return per token",
    "advantage_std": "standard deviation of the advantages",
    "clipped_low": "share of tokens clipped from below",
    "clipped_high": "share of tokens clipped from above",
    "update_kl": "KL of a rollout's updates, nats per token",
    "ptx_loss": "language-modelling loss beside PPO's, nats per token",
    "engine_gap": "gap between engine and trainer, nats per token",
    "accuracy": "agreement with the step's preferences",
    "margin": "better answer's score or implicit reward minus the worse one's",
    "logprob_chosen": "logprob of the better answers, nats per token",
    "logprob_rejected": "logprob of the worse answers, nats per token",
    "grad_norm": "gradient norm",
    "critic_grad_norm": "gradient norm of the critic",
}
"""Metric -> title, in the order of the page; those that a run did not log are left out."""

LEARNED_JUDGE = (
    "A learned judge gave (part of) this reward. It can be gamed: a rising reward may be a policy that found what the "
    "judge likes. Read the samples, and trust figures that it has no part in."
)

SAMPLES_PER_STEP = 8
MAX_TEXT = 1500
"""Characters of a prompt or completion that are shown."""

_SIGNS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {0x7F: 0x2421}


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A held-out figure with its 95 % interval, where it has one.

    Example: Estimate(value=0.42, low=0.38, high=0.46)
    """

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """What a stage did to one held-out metric. `note` says on what, or when, it was measured.

    Example: HeldOut(metric="pass@1", before=Estimate(value=0.2), after=Estimate(value=0.6), note="400 sums")
    """

    metric: str
    before: Estimate | None
    after: Estimate | None
    note: str = ""


def write_report(
    runs: Sequence[RunFolder],
    output: Path,
    *,
    title: str = "",
    held_out: Mapping[str, HeldOut] | None = None,
) -> Path:
    """Write the report of the runs, in the given order, to `output`; returns output.

    The file needs nothing beside itself, runs no script, and everything that a model wrote is escaped. The table's
    held-out figures come from metrics.jsonl, unless `held_out` has the run's name. Raises ValueError naming file:line
    for a damaged log, ImportError when matplotlib is not installed.
    """
    assert runs, "a report needs a run"
    given = held_out or {}
    sections = [_section(run, given.get(run.name)) for run in runs]
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"visible": visible, "short": short, "clock": clock, "estimate": estimate_text}
    page = environment.from_string(PAGE)
    text = page.render(title=title or " → ".join(run.name for run in runs), sections=sections)
    output.parent.mkdir(parents=True, exist_ok=True)
    # A log may hold a lone surrogate, which UTF-8 lacks.
    output.write_bytes(text.encode("utf-8", "backslashreplace"))
    return output


def _section(run: RunFolder, held_out: HeldOut | None) -> dict[str, Any]:
    rows = list(read_lines(run.path / "metrics.jsonl"))
    info = run.info
    parent = info["parent"]
    origin = "" if parent is None else parent["run"] or Path(parent["folder"]).name
    if parent is not None and parent["step"] is not None:
        origin += f"/{parent['step']}"
    charts: list[dict[str, Any]] = []
    for curve in curves(rows):
        known = [value for value in curve.values if value is not None]
        svg = Markup(draw(curve, f"{run.name} {curve.title}")) if known else None
        charts.append({"curve": curve, "svg": svg, "ends": known[:1] + known[1:][-1:]})
    return {
        "name": run.name,
        "stage": info["stage"],
        "status": info["status"],
        "origin": origin,
        "steps": rows[-1]["step"] if rows else 0,
        "seconds": training_seconds(rows),
        "held_out": held_out or logged_held_out(rows),
        "warning": LEARNED_JUDGE if has_learned_judge(info["config"]) else "",
        "charts": charts,
        "samples": list(_samples(run.path / "samples.jsonl")),
        "config": json.dumps(info["config"], indent=2, ensure_ascii=False),
        "facts": {
            "created": info["created"],
            "seed": info["seed"],
            "git": "none" if info["git"] is None else info["git"]["revision"],
            "versions": ", ".join(f"{name} {version}" for name, version in info["versions"].items()),
            "machine": f"{info['machine']['cpu']}, {info['machine']['cores']} cores",
        }
        | ({"error": info["error"]} if "error" in info else {}),
    }


def curves(rows: Sequence[Mapping[str, Any]]) -> list[Curve]:
    """The figures of metrics.jsonl that have a chart. A null there (inf or nan) is None here."""
    found: list[Curve] = []
    scores = dict.fromkeys(name for row in rows for name in row if name.startswith("score/"))
    # One reward's score is the reward itself.
    shown = CURVES | ({name: f"score of {name.removeprefix('score/')}" for name in scores} if len(scores) > 1 else {})
    for metric, title in shown.items():
        logged = [row for row in rows if metric in row]
        # Where answers are right or wrong, their mean score says the same once more.
        if not logged or (metric == "eval/score" and "eval/pass@1" in logged[0]):
            continue
        has_interval = all(f"{metric}_low" in row and f"{metric}_high" in row for row in logged)
        found.append(
            Curve(
                title=title,
                steps=[row["step"] for row in logged],
                values=[_share_of_groups(row) if metric == "groups_flat" else row[metric] for row in logged],
                low=[row[f"{metric}_low"] for row in logged] if has_interval else None,
                high=[row[f"{metric}_high"] for row in logged] if has_interval else None,
                is_noisy=not metric.startswith("eval/"),
            )
        )
    return found


def has_learned_judge(config: Mapping[str, Any]) -> bool:
    """Whether a network, not a verifier, gave a part of the reward."""
    rewards = config.get("rewards")
    parts = rewards if isinstance(rewards, list) else []
    return any(isinstance(part, Mapping) and part.get("name") in ("judge", "model") for part in parts)


def _share_of_groups(row: Mapping[str, Any]) -> float | None:
    return row["groups_flat"] / row["groups"] if row.get("groups") and row["groups_flat"] is not None else None


def logged_held_out(rows: Sequence[Mapping[str, Any]]) -> HeldOut | None:
    """The first and the last held-out figure in metrics.jsonl; `before` only where it was measured before step 1."""
    for metric in HELD_OUT_METRICS:
        key = f"eval/{metric}"
        logged = [row for row in rows if row.get(key) is not None]
        if not logged:
            continue
        first, last = (
            Estimate(value=row[key], low=row.get(f"{key}_low"), high=row.get(f"{key}_high"))
            for row in (logged[0], logged[-1])
        )
        is_before = logged[0]["step"] == 0
        after = last if len(logged) > 1 or not is_before else None
        return HeldOut(
            metric=metric, before=first if is_before else None, after=after, note=f"step {logged[-1]['step']}"
        )
    return None


def training_seconds(rows: Sequence[Mapping[str, Any]]) -> float:
    """Seconds inside training steps: without start, evaluation and checkpoints, and of no step that a resume redid."""
    return sum(row.get("time/step_seconds") or 0.0 for row in rows)


def _samples(path: Path) -> Iterator[dict[str, Any]]:
    """The first and the last step that logged samples, each with its first few, side by side under their prompts."""
    steps: dict[int, list[dict[str, Any]]] = {}
    for row in read_lines(path):
        if row["step"] not in steps and len(steps) == 2:
            steps.popitem()
        kept = steps.setdefault(row["step"], [])
        if len(kept) < SAMPLES_PER_STEP:
            kept.append(row)
    for step, rows in steps.items():
        groups = groupby(rows, key=lambda row: _text(row.get("prompt", " against ".join(row.get("seats", ())))))
        yield {
            "step": step,
            "groups": [{"prompt": prompt, "rows": [_answer(row) for row in own]} for prompt, own in groups],
        }


def _answer(row: Mapping[str, Any]) -> dict[str, Any]:
    parts = row.get("parts") or {}
    return {
        # A game of self-play has moves, and a reward for each seat, of which the first is shown.
        "text": _text(row.get("completion", ", ".join(map(str.strip, row.get("moves", ()))))),
        "reward": row.get("reward", (row.get("rewards") or [None])[0]),
        "verdicts": [{"name": name, **verdict} for name, verdict in parts.items()],
        "is_cut": row.get("finish_reason") == "length",
    }


def _text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]} … ({len(text) - MAX_TEXT:,} more characters)"


def visible(text: str) -> str:
    """The text with control characters, which HTML forbids and a half-trained model writes, as signs."""
    return text.translate(_SIGNS)


def short(value: float) -> str:
    """Three significant digits; large numbers whole."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def clock(seconds: float) -> str:
    """12 s, or minutes with one decimal."""
    return f"{seconds:.0f} s" if seconds < 60 else f"{seconds / 60:.1f} min"


def estimate_text(estimate: Estimate | None, metric: str) -> str:
    """A rate in per cent, anything else with three decimals; the interval in brackets."""
    if estimate is None:
        return "–"
    is_rate = metric.startswith(("pass@", "maj@")) or metric.endswith("/win")
    value, low, high = (
        "" if number is None else f"{100 * number:.1f}" if is_rate else f"{number:.3f}"
        for number in (estimate.value, estimate.low, estimate.high)
    )
    interval = f" [{low}, {high}]" if low and high else ""
    return f"{value}{' %' if is_rate else ''}{interval}"
