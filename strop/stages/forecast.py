"""What a training step will cost, before it runs: peak memory by component, and seconds.

Two small models, of one and of two layers but otherwise of the true shape, run a micro-batch of the true size here and
now. What the second layer adds is what every further layer adds; the rest is embedding and head. So the forecast
follows the code that will run, whatever it keeps, drops or recomputes.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from strop.generation.sampler import MAX_ELEMENTS, RowParams, Sampler
from strop.models.cache import BLOCK
from strop.models.config import ModelConfig
from strop.models.decoder import Decoder, uninitialised
from strop.models.footprint import cache_bytes, layer_matrices, num_parameters, num_recomputed, training_flops
from strop.models.fused import can_pack
from strop.models.live_memory import LiveMemory
from strop.models.logprobs import packed_logprobs
from strop.optim import AdamW, eight_bit, optimizer_step
from strop.types import PackedBatch, SamplingParams, Segment

ALLOCATOR_SHARE = 1.0
"""Of the activations, added for freed blocks that the C library keeps and cannot use for the next, larger ones: a run
of many small tensors was measured to need about twice its live activations (benchmarks/results/forecast.md)."""


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """The sampling of one GRPO step.

    Example: Rollout(num_prompts=4, group_size=8, prompt_tokens=46, new_tokens=64, num_slots=32)
    """

    num_prompts: int
    group_size: int
    prompt_tokens: int
    """Of a prompt, on average."""
    new_tokens: int
    """Of a completion: the longest that is allowed, so that the forecast errs on the safe side."""
    num_slots: int
    eval_samples: int = 0
    """Completions of a held-out evaluation, which share the same cache."""

    @property
    def num_samples(self) -> int:
        return self.num_prompts * self.group_size


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One step of a stage, as far as its cost depends on it."""

    model: ModelConfig
    dtype: torch.dtype
    micro_batch: tuple[Segment, ...]
    """The largest one."""
    num_labels: int
    """Positions of it that get logits."""
    tokens_per_step: int
    """Packed positions that are trained on in one step, over all its updates."""
    tokens_per_update: int
    num_updates: int = 1
    frozen_tokens: int = 0
    """Positions that get a forward pass only: for old and for reference logprobs."""
    has_reference: bool = False
    with_entropy: bool = False
    file_bytes: int = 0
    """Size of the weights on disk, which are mapped while they are read; 0 = a new model."""
    rollout: Rollout | None = None
    has_kernels: bool = False
    """Whether the C++ kernels do the work: then a master is the weight and 2 bytes, the gradients of a single
    micro-batch stay in bfloat16, and the packed weights of a rollout include the head."""
    is_8bit: bool = False
    """Whether [optimizer] state = "8bit"."""
    assumptions: tuple[str, ...] = ()
    """What could not be known and was supposed instead, in words."""

    @property
    def micro_tokens(self) -> int:
        return sum(map(len, self.micro_batch))

    @property
    def accumulates(self) -> bool:
        """Whether an update has more than one micro-batch, so that gradients wait while activations are made."""
        return self.tokens_per_update > self.micro_tokens

    @property
    def gradient_bytes(self) -> float:
        """Per parameter."""
        return 2.0 if self.has_kernels and not self.accumulates else 4.0


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Of one of the two small models; bytes are on top of weights, masters and moments."""

    kept_bytes: int
    """What the forward pass leaves for the backward pass."""
    head_peak_bytes: int
    """Peak until the gradient reaches the last layer, without gradients from an earlier micro-batch."""
    tail_peak_bytes: int
    """Peak from there to the end of the backward pass."""
    train_seconds: float
    forward_seconds: float
    decode_seconds: float = 0.0
    """One step of all slots, sampler included."""
    prefill_seconds: float = 0.0
    """All prompts of a step."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What was measured here for one Workload."""

    one: Measured
    two: Measured
    """With one and with two layers."""
    import_bytes: int
    """Resident size of a process that has imported everything and has no model yet."""
    optimizer_seconds: float
    """Per parameter."""

    def at(self, name: str, num_layers: int) -> float:
        """A figure of Measured for so many layers."""
        one, two = getattr(self.one, name), getattr(self.two, name)
        return one + (num_layers - 1) * max(0.0, two - one)


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Bytes by component in each phase of a run, and the seconds of a step by part."""

    phases: dict[str, dict[str, float]]
    seconds: dict[str, float]
    training_gflops: float
    """Useful floating-point operations per second of the updates, in 1e9."""

    @property
    def largest_phase(self) -> str:
        return max(self.phases, key=lambda phase: sum(self.phases[phase].values()))

    @property
    def peak_bytes(self) -> float:
        return sum(self.phases[self.largest_phase].values())

    @property
    def step_seconds(self) -> float:
        return sum(self.seconds.values())


def forecast(workload: Workload, probe: Probe) -> Forecast:
    """The arithmetic from two layers to all of them. A run's peak is that of its largest phase."""
    config, itemsize = workload.model, workload.dtype.itemsize
    parameters = num_parameters(config)
    is_low = workload.dtype.itemsize < 4
    resident = {
        "imports": float(probe.import_bytes),
        "weights": float(parameters * itemsize),
        "reference": float(parameters * itemsize * workload.has_reference),
    }
    master_bytes = (2.0 if workload.has_kernels else 4.0) if is_low else 0.0
    # Two bytes and two fp32 scales per block; the few norms that stay wide do not show.
    moment_bytes = 2.0 + 8.0 / eight_bit.BLOCK if workload.is_8bit else 8.0
    optimizer = {"masters": master_bytes * parameters, "moments": moment_bytes * parameters}
    phases = {"load": resident | {"weights file": float(workload.file_bytes)}}
    if workload.rollout is not None:
        phases["rollout"] = resident | optimizer | _rollout_bytes(workload, workload.rollout)
    phases["update"] = resident | optimizer | _update_bytes(workload, probe)
    seconds = _seconds(workload, probe)
    flops = training_flops(config, workload.micro_batch, workload.num_labels)
    return Forecast(
        phases=phases,
        seconds=seconds,
        training_gflops=flops / probe.at("train_seconds", config.num_layers) / 1e9,
    )


def _update_bytes(workload: Workload, probe: Probe) -> dict[str, float]:
    """Gradients, activations, and whatever else lives at the worst moment of a backward pass."""
    config = workload.model
    gradients = workload.gradient_bytes * num_parameters(config)
    # One and two layers are too few for any to be recomputed.
    gate_up = 2 * config.intermediate_size * workload.dtype.itemsize * workload.micro_tokens
    not_kept = num_recomputed(config) * gate_up
    kept = probe.at("kept_bytes", config.num_layers) - not_kept
    # While it runs, the last layer has its gate and up after all.
    at_head = probe.at("head_peak_bytes", config.num_layers) - max(0, not_kept - gate_up)
    if workload.accumulates:
        parts = {"gradients": gradients, "activations": kept, "head": at_head - kept}
    else:
        # With one micro-batch gradients come as activations go: either end of the backward pass may be the worst.
        one_layer = workload.gradient_bytes * _layer_parameters(config)
        at_end = probe.one.tail_peak_bytes + (config.num_layers - 1) * one_layer
        if at_head >= at_end:
            parts = {"gradients": 0.0, "activations": kept, "head": at_head - kept}
        else:
            parts = {"gradients": gradients, "activations": 0.0, "head": max(0.0, at_end - gradients)}
    return parts | {"allocator": ALLOCATOR_SHARE * kept}


def _rollout_bytes(workload: Workload, rollout: Rollout) -> dict[str, float]:
    """Cache, packed weights, and what a decode step makes, of which logits and sampler are all but a little."""
    config, dtype = workload.model, workload.dtype
    slots = min(rollout.num_slots, max(rollout.num_samples, rollout.eval_samples))
    prompts = min(max(1, rollout.num_slots // 4), max(rollout.num_prompts, rollout.eval_samples))
    length = -(-(rollout.prompt_tokens + rollout.new_tokens) // BLOCK) * BLOCK
    packed = config.num_layers * layer_matrices(config) * can_pack(torch.empty(0, dtype=dtype))
    if workload.has_kernels:
        packed += config.vocab_size * config.hidden_size
    sampler_rows = min(slots, max(1, MAX_ELEMENTS // config.vocab_size))
    return {
        "cache": float(cache_bytes(config, num_slots=slots + prompts, length=length, bytes_per_number=dtype.itemsize)),
        "packed weights": float(packed * dtype.itemsize),
        "logits": float(slots * config.vocab_size * dtype.itemsize + 2 * sampler_rows * config.vocab_size * 4),
    }


def _seconds(workload: Workload, probe: Probe) -> dict[str, float]:
    layers = workload.model.num_layers
    micro_batches = workload.tokens_per_step / workload.micro_tokens
    seconds = {}
    if workload.rollout is not None:
        rollout = workload.rollout
        rounds = rollout.num_samples / min(rollout.num_slots, rollout.num_samples)
        seconds["prefill"] = probe.at("prefill_seconds", layers)
        seconds["decoding"] = rounds * (rollout.new_tokens - 1) * probe.at("decode_seconds", layers)
    if workload.frozen_tokens:
        frozen_batches = workload.frozen_tokens / workload.micro_tokens
        seconds["old and reference logprobs"] = frozen_batches * probe.at("forward_seconds", layers)
    seconds["forward and backward"] = micro_batches * probe.at("train_seconds", layers)
    seconds["optimizer"] = workload.num_updates * probe.optimizer_seconds * num_parameters(workload.model)
    return seconds


def measure(workload: Workload) -> Probe:
    """Run the two small models; some seconds. Call it in a process that has imported what the stage imports."""
    _warm_up(workload)
    import_bytes = resident_bytes()
    models = [_model(workload, num_layers) for num_layers in (1, 2)]
    one, two = (_measured(model, workload) for model in models)
    return Probe(one=one, two=two, import_bytes=import_bytes, optimizer_seconds=_optimizer_seconds(models[1], workload))


def _warm_up(workload: Workload) -> None:
    """Run something tiny of everything: torch imports much, and makes its threads, when it is first needed."""
    config = ModelConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=64
    )
    tiny = dataclasses.replace(workload, model=config, micro_batch=(Segment(trunk=2),), num_labels=2)
    if workload.rollout is not None:
        tiny = dataclasses.replace(tiny, rollout=dataclasses.replace(workload.rollout, prompt_tokens=2, new_tokens=2))
    model = _model(tiny, 1)
    _measured(model, tiny)
    _optimizer_seconds(model, tiny)


def resident_bytes() -> int:
    """Of this process, now. 0 where /proc does not say."""
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.is_file() else []:
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    return 0


def _layer_parameters(config: ModelConfig) -> int:
    fewer = dataclasses.replace(config, num_layers=config.num_layers + 1)
    return num_parameters(fewer) - num_parameters(config)


def _model(workload: Workload, num_layers: int) -> Decoder:
    config = dataclasses.replace(workload.model, num_layers=num_layers)
    model = uninitialised(Decoder, config, dtype=workload.dtype, device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02) if parameter.ndim > 1 else parameter.fill_(1.0)
    return model


def _measured(model: Decoder, workload: Workload) -> Measured:
    batch = probe_batch(workload)

    def train() -> None:
        logprobs_R, _ = packed_logprobs(model, batch, with_entropy=workload.with_entropy)
        logprobs_R.mean().backward()

    def run_frozen() -> None:
        with torch.no_grad():
            packed_logprobs(model, batch)

    optimizer = AdamW(model.named_parameters())
    kept_bytes, head_peak, tail_peak = live_bytes(model, batch, workload)
    optimizer.zero_grad()
    train_seconds = _best_seconds(train)
    optimizer.zero_grad()
    forward_seconds = _best_seconds(run_frozen) if workload.frozen_tokens else 0.0
    prefill_seconds, decode_seconds = (0.0, 0.0)
    if workload.rollout is not None:
        prefill_seconds, decode_seconds = _rollout_seconds(model, workload.rollout)
    return Measured(
        kept_bytes=kept_bytes,
        head_peak_bytes=head_peak,
        tail_peak_bytes=tail_peak,
        train_seconds=train_seconds,
        forward_seconds=forward_seconds,
        decode_seconds=decode_seconds,
        prefill_seconds=prefill_seconds,
    )


def live_bytes(model: Decoder, batch: PackedBatch, workload: Workload) -> tuple[int, int, int]:
    """(kept, peak at the head, peak after it) of one forward and backward pass."""
    marks: list[int] = []

    def mark(*_: object) -> None:
        marks.append(memory.peak_bytes)
        memory.reset_peak()

    hook = model.final_norm.register_forward_hook(lambda module, inputs, output: output.register_hook(mark) and None)
    try:
        with LiveMemory() as memory:
            logprobs_R, _ = packed_logprobs(model, batch, with_entropy=workload.with_entropy)
            kept = memory.live_bytes
            logprobs_R.mean().backward()
    finally:
        hook.remove()
    [head_peak] = marks
    return kept, head_peak, memory.peak_bytes


def probe_batch(workload: Workload) -> PackedBatch:
    tokens = torch.randint(workload.model.vocab_size, (workload.micro_tokens,))
    is_counted = torch.arange(workload.micro_tokens) >= workload.micro_tokens - workload.num_labels
    return PackedBatch(token_ids_T=tokens, labels_T=tokens, loss_mask_T=is_counted, segments=workload.micro_batch)


def _rollout_seconds(model: Decoder, rollout: Rollout) -> tuple[float, float]:
    """(prefill of all prompts, one decode step at the middle of a completion)."""
    slots = min(rollout.num_slots, rollout.num_samples)
    length = rollout.prompt_tokens + rollout.new_tokens
    cache = model.new_cache(num_slots=slots, max_length=length)
    prompts = [[0] * rollout.prompt_tokens] * min(rollout.num_prompts, slots)
    repeats = rollout.num_prompts / len(prompts)
    prefill = _best_seconds(lambda: model.prefill(prompts, cache, range(len(prompts))))
    middle = rollout.prompt_tokens + rollout.new_tokens // 2
    sampler, params = Sampler(), RowParams([SamplingParams()] * slots, torch.device("cpu"))
    tokens_S, uniforms_S = torch.zeros(slots, dtype=torch.int64), torch.full((slots,), 0.5, dtype=torch.float64)

    def step() -> None:
        cache.lengths_S.fill_(middle)
        sampler(model.logits(model.decode_step(tokens_S, cache)), uniforms_S, params)

    with torch.inference_mode(), model.decoding(slots):
        return repeats * prefill, _best_seconds(step, tries=5)


def _optimizer_seconds(model: Decoder, workload: Workload) -> float:
    """Of one update, per parameter."""
    optimizer = AdamW(model.named_parameters(), is_8bit=workload.is_8bit)

    def update() -> None:
        for parameter in model.parameters():
            parameter.grad = None
        logprobs_R, _ = packed_logprobs(model, small)
        logprobs_R.mean().backward()

    small = probe_batch(dataclasses.replace(workload, micro_batch=(Segment(trunk=2),), num_labels=2))
    best = float("inf")
    for _ in range(3):
        update()
        start = time.perf_counter()
        optimizer_step(optimizer, lr=1e-6, max_grad_norm=1.0)
        best = min(best, time.perf_counter() - start)
    return best / num_parameters(model.config)


def _best_seconds(run: Callable[[], object], tries: int = 2) -> float:
    run()
    best = float("inf")
    for _ in range(tries):
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best


def packed_segments(pattern: Sequence[Segment], max_tokens: int) -> tuple[Segment, ...]:
    """The pattern, again and again, as long as it fits into max_tokens; at least its first segment."""
    segments: list[Segment] = []
    total = 0
    while pattern:
        segment = pattern[len(segments) % len(pattern)]
        if segments and total + len(segment) > max_tokens:
            break
        segments.append(segment)
        total += len(segment)
    return tuple(segments)
