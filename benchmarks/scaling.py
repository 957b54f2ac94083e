"""Scaling in the work: cost per token against model size, context, and group size.

    python -m benchmarks.scaling [model] [context] [group] [--save] [--cpu-time]

Random weights of true shapes; times are the best of a few runs. --cpu-time takes one thread's CPU time instead of the
clock's: what it shows of growth holds on a busy machine too. --save writes results/scaling_SWEEP.csv and .png.
Beside every measured curve stands what it must cost: its counted floating-point operations (strop/models/footprint.py)
at one fixed rate, that of its fastest point. A curve that rises above that line as x grows has a term that grows faster
than the work.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from benchmarks.__main__ import ROOT
from strop.generation.sampler import RowParams, Sampler
from strop.models import ModelConfig, compute_in, init_model
from strop.models.decoder import Decoder
from strop.models.footprint import layer_matrices, num_parameters, training_flops
from strop.models.logprobs import packed_logprobs
from strop.native.malloc import restart_for_large_blocks
from strop.stages.forecast_probe import best_seconds
from strop.types import PackedBatch, SamplingParams, Segment

FIELDS = ("hidden_size", "num_layers", "num_heads", "num_kv_heads", "intermediate_size", "vocab_size")
SHAPES = (
    (96, 6, 3, 3, 256, 4096),
    (192, 8, 3, 3, 512, 4096),
    (320, 12, 5, 5, 896, 8192),
    (576, 16, 9, 3, 1536, 16384),
    (576, 30, 9, 3, 1536, 49152),  # SmolLM2-135M
    (960, 32, 15, 5, 2560, 49152),  # SmolLM2-360M
)
MIDDLE = SHAPES[2]
CONTEXTS = (128, 256, 512, 1024, 2048, 4096)
GROUPS = (4, 8, 16, 32, 64)
CLOCK: list[Callable[[], float]] = [time.perf_counter]
"""What measures; main replaces it for --cpu-time."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """One measurement: what one token costs, and what it must."""

    sweep: str
    x: int
    curve: str
    seconds_per_token: float
    flops_per_token: float


def model_sweep() -> list[Point]:
    """Training on 512 tokens in documents of 128, and decoding 32 sequences at 128 tokens, by parameters."""
    points = []
    for shape in SHAPES:
        model = random_model(shape)
        x = num_parameters(model.config)
        segments = [Segment(trunk=128)] * 4
        points.append(train_point("model", x, "training", model, segments, 512, 512))
        points.append(decode_point("model", x, "decoding", model, slots=32, length=128))
    return points


def context_sweep() -> list[Point]:
    """Training on 4096 tokens in documents of x, and decoding 8 sequences that hold x tokens."""
    model = random_model(MIDDLE)
    points = []
    for x in CONTEXTS:
        points.append(train_point("context", x, "training", model, [Segment(trunk=x)] * (4096 // x), 4096, 4096))
        points.append(decode_point("context", x, "decoding", model, slots=8, length=x))
    return points


def group_sweep() -> list[Point]:
    """Training on, and decoding, a group of x completions of 64 tokens to one prompt of 256, per completion token."""
    model = random_model(MIDDLE)
    points = []
    for x in GROUPS:
        segments = [Segment(trunk=255, branches=(64,) * x)]
        points.append(train_point("group", x, "training", model, segments, 64 * x, 64 * x))
        points.append(decode_point("group", x, "decoding", model, slots=x, length=256 + 32))
    return points


def random_model(shape: Sequence[int]) -> Decoder:
    sizes = dict(zip(FIELDS, shape, strict=True))
    config = ModelConfig(**sizes, head_dim=sizes["hidden_size"] // sizes["num_heads"], max_position_embeddings=8192)
    return init_model(config, seed=0, dtype=compute_in("auto"))


def train_point(
    sweep: str, x: int, curve: str, model: Decoder, segments: Sequence[Segment], labels: int, per: int
) -> Point:
    """Forward and backward pass over the segments, the last `labels` positions counting, for each of `per` tokens."""
    total = sum(map(len, segments))
    tokens = torch.randint(model.config.vocab_size, (total,), generator=torch.Generator().manual_seed(0))
    batch = PackedBatch(
        token_ids_T=tokens,
        labels_T=tokens,
        loss_mask_T=torch.arange(total) >= total - labels,
        segments=tuple(segments),
    )

    def run() -> None:
        logprobs_R, _ = packed_logprobs(model, batch)
        logprobs_R.mean().backward()
        for parameter in model.parameters():
            parameter.grad = None

    flops = training_flops(model.config, segments, labels)
    return Point(
        sweep=sweep,
        x=x,
        curve=curve,
        seconds_per_token=best_seconds(run, clock=CLOCK[0]) / per,
        flops_per_token=flops / per,
    )


def decode_point(sweep: str, x: int, curve: str, model: Decoder, *, slots: int, length: int) -> Point:
    """One decode step of `slots` sequences that hold `length` tokens each, sampler included, per sampled token."""
    config = model.config
    cache = model.new_cache(num_slots=slots, max_length=length + 1)
    sampler, params = Sampler(), RowParams([SamplingParams()] * slots, torch.device("cpu"))
    tokens_S, uniforms_S = torch.zeros(slots, dtype=torch.int64), torch.full((slots,), 0.5, dtype=torch.float64)

    def run() -> None:
        cache.lengths_S.fill_(length)
        sampler(model.logits(model.decode_step(tokens_S, cache)), uniforms_S, params)

    with torch.inference_mode(), model.decoding(slots):
        seconds = best_seconds(run, 5, CLOCK[0])
    layer = 2 * layer_matrices(config) + 4 * config.num_heads * config.head_dim * (length + 1)
    flops = config.num_layers * layer + 2 * config.vocab_size * config.hidden_size
    return Point(sweep=sweep, x=x, curve=curve, seconds_per_token=seconds / slots, flops_per_token=float(flops))


def excess(points: Sequence[Point]) -> float:
    """How much faster than the counted work a curve's cost grows from its fastest point to its last: 1 = not at all."""
    rates = [point.flops_per_token / point.seconds_per_token for point in points]
    return max(rates) / rates[-1]


def draw(points: Sequence[Point], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    label = {"model": "parameters", "context": "tokens of context", "group": "completions per prompt"}
    figure, axes = pyplot.subplots(figsize=(6, 4))
    for curve in dict.fromkeys(point.curve for point in points):
        own = [point for point in points if point.curve == curve]
        rate = max(point.flops_per_token / point.seconds_per_token for point in own)
        xs = [point.x for point in own]
        [line] = axes.loglog(xs, [1e3 * point.seconds_per_token for point in own], "o-", label=curve)
        axes.loglog(
            xs,
            [1e3 * point.flops_per_token / rate for point in own],
            "--",
            color=line.get_color(),
            label=f"{curve}: its work at {rate / 1e9:,.0f} GFLOP/s",
        )
    ticks = sorted({point.x for point in points})
    axes.set_xticks(ticks, labels=[f"{x / 1e6:.3g} M" if x >= 10**6 else str(x) for x in ticks])
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    for formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        formatter(ticker.FormatStrFormatter("%.3g"))
    axes.set_xlabel(label[points[0].sweep])
    axes.set_ylabel("ms per token")
    axes.grid(True, which="both", alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


SWEEPS = {"model": model_sweep, "context": context_sweep, "group": group_sweep}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweeps", nargs="*", metavar="SWEEP", help=f"any of {', '.join(SWEEPS)} (all)")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/scaling_SWEEP.csv and .png")
    parser.add_argument("--cpu-time", action="store_true", help="CPU time of one thread, for a busy machine")
    options = parser.parse_args()
    if options.cpu_time:
        torch.set_num_threads(1)
        CLOCK[0] = time.process_time
    if unknown := [sweep for sweep in options.sweeps if sweep not in SWEEPS]:
        parser.error(f"no sweep {unknown[0]!r}: there are {', '.join(SWEEPS)}")
    for sweep in options.sweeps or SWEEPS:
        points = SWEEPS[sweep]()
        stem = ROOT / "benchmarks" / "results" / f"scaling_{sweep}"
        rows = [("sweep", "x", "curve", "microseconds_per_token", "mflop_per_token", "gflops")]
        for point in points:
            micros, rate = 1e6 * point.seconds_per_token, point.flops_per_token / point.seconds_per_token / 1e9
            rows.append(
                (sweep, point.x, point.curve, f"{micros:.2f}", f"{point.flops_per_token / 1e6:.3f}", f"{rate:.1f}")
            )
        csv.writer(sys.stdout, lineterminator="\n").writerows(rows)
        for curve in dict.fromkeys(point.curve for point in points):
            grown = excess([point for point in points if point.curve == curve])
            print(f"{sweep}, {curve}: at the last point {grown:.2f}x the cost of the fastest point's rate", flush=True)
        if options.save:
            with stem.with_suffix(".csv").open("w", encoding="utf-8", newline="") as file:
                csv.writer(file, lineterminator="\n").writerows(rows)
            draw(points, str(stem.with_suffix(".png")))
    return 0


if __name__ == "__main__":
    restart_for_large_blocks()
    sys.exit(main())
