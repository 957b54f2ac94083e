"""The measurements behind forecast.py: small models of the true width run a micro-batch of the true size, here."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from strop.generation.sampler import RowParams, Sampler
from strop.models import Decoder
from strop.models.config import ModelConfig
from strop.models.decoder import uninitialised
from strop.models.heads import ScalarModel
from strop.models.live_memory import LiveMemory
from strop.models.logprobs import label_logprobs
from strop.models.lora import attach, fresh_parts
from strop.native import products
from strop.optim import AdamW, optimizer_step
from strop.stages.forecast import Layers, Learner, Measured, Probe, Rollout, Workload
from strop.types import PackedBatch, SamplingParams, Segment


def measure(workload: Workload, *, has_times: bool = True) -> Probe:
    """Run the small models; some seconds. Call it in a process that has imported what the stage imports.

    Without times, which are all 0 then, it takes a quarter of them.
    """
    with products.int8(workload.in_int8):
        _warm_up(workload)
        import_bytes = resident_bytes()
        small = Small(workload.learner, workload, num_layers=2)
        return Probe(
            learners=tuple(_layers(learner, workload, has_times) for learner in workload.learners.values()),
            import_bytes=import_bytes,
            optimizer_seconds=_optimizer_seconds(small, workload) if has_times else 0.0,
        )


class Small:
    """A learner of few layers, with an optimizer that has taken no step, and a loss of the learner's kind."""

    def __init__(self, learner: Learner, workload: Workload, *, num_layers: int, is_last_kind: bool = False) -> None:
        """is_last_kind: as the last layers of the whole model, which keep less."""
        config = dataclasses.replace(learner.model, num_layers=num_layers)
        build = ScalarModel if learner.output == "scores" else Decoder
        module: Any = uninitialised(build, config, dtype=workload.dtype, device="cpu")
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.normal_(std=0.02) if parameter.ndim > 1 else parameter.fill_(1.0)
        self.scalar: ScalarModel | None = module if learner.output == "scores" else None
        self.decoder: Decoder = module if self.scalar is None else self.scalar.backbone
        self.value_head = nn.Linear(config.hidden_size, 1, bias=False)
        self._learner = learner
        if learner.lora is not None:
            attach(self.decoder, fresh_parts(self.decoder, learner.lora, seed=0))
        if num_layers < learner.model.num_layers:
            # Its first layer stands for others, to whose input a gradient goes; beside an adapter none would here.
            self.decoder.layers[0].register_forward_pre_hook(_want_gradient)
        set_kind(self.decoder, learner, is_last_kind=is_last_kind)
        parameters = [*module.named_parameters(), *self.value_head.named_parameters("value_head")]
        self.optimizer = AdamW(parameters, is_8bit=learner.is_8bit)

    def loss(self, batch: PackedBatch) -> Tensor:
        if self.scalar is not None:
            return self.scalar.scores_R(batch).mean()
        hidden_and_head = self.decoder.hidden_and_head(batch)
        with_entropy = self._learner.with_entropy
        logprobs_R, _ = label_logprobs(self.decoder, hidden_and_head, batch, with_entropy=with_entropy)
        if self._learner.output == "logprobs":
            return logprobs_R.mean()
        return logprobs_R.mean() + self.value_head(hidden_and_head[0][batch.loss_mask_T].float()).mean()


def _want_gradient(_: object, inputs: tuple[Tensor, ...]) -> None:
    inputs[0].requires_grad_()


def set_kind(decoder: Decoder, learner: Learner, *, is_last_kind: bool) -> None:
    """Have all layers compute again what the whole model's first ones do, or its last ones."""
    decoder.set_checkpointing(learner.checkpointing)
    for layer in decoder.layers:
        layer.mlp.is_recomputed = is_last_kind


def _layers(learner: Learner, workload: Workload, has_times: bool) -> Layers:
    one, two = (_measured(Small(learner, workload, num_layers=count), workload, has_times) for count in (1, 2))
    if not learner.num_recomputed:
        return Layers(one=one, two=two)
    last = Small(learner, workload, num_layers=1, is_last_kind=True)
    # Decoding is the same in all layers.
    measured = _measured(last, dataclasses.replace(workload, rollout=None), has_times)
    times = {"decode_seconds": one.decode_seconds, "prefill_seconds": one.prefill_seconds}
    return Layers(one=one, two=two, last=dataclasses.replace(measured, **times))


def _warm_up(workload: Workload) -> None:
    """Run something tiny of everything: torch imports much, and makes its threads, when it is first needed."""
    config = ModelConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=64
    )
    tiny = dataclasses.replace(
        workload,
        learner=dataclasses.replace(workload.learner, model=config),
        critic=None if workload.critic is None else dataclasses.replace(workload.critic, model=config),
        micro_batch=(Segment(trunk=2),),
        num_labels=2,
    )
    if workload.rollout is not None:
        tiny = dataclasses.replace(tiny, rollout=dataclasses.replace(workload.rollout, prompt_tokens=2, new_tokens=2))
    for learner in tiny.learners.values():
        small = Small(learner, tiny, num_layers=1)
        _measured(small, tiny, has_times=True)
        _optimizer_seconds(small, tiny)


def resident_bytes() -> int:
    """Of this process, now. 0 where /proc does not say."""
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.is_file() else []:
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    return 0


def _measured(small: Small, workload: Workload, has_times: bool) -> Measured:
    batch = probe_batch(workload)

    def run_frozen() -> None:
        with torch.no_grad():
            small.loss(batch)

    if workload.accumulates:  # from the third micro-batch on the sums are there, in float32
        for _ in range(2):
            small.loss(batch).backward()
    kept_bytes, head_peak, tail_peak = live_bytes(small, batch)
    small.optimizer.zero_grad()
    if not has_times:
        return Measured(kept_bytes=kept_bytes, head_peak_bytes=head_peak, tail_peak_bytes=tail_peak)
    train_seconds = best_seconds(lambda: small.loss(batch).backward())
    small.optimizer.zero_grad()
    has_forward = workload.frozen_tokens or workload.value_tokens or workload.recorded_tokens
    forward_seconds = best_seconds(run_frozen) if has_forward else 0.0
    prefill_seconds, decode_seconds = (0.0, 0.0)
    if workload.rollout is not None and small.scalar is None:
        prefill_seconds, decode_seconds = _rollout_seconds(small.decoder, workload.rollout)
    return Measured(
        kept_bytes=kept_bytes,
        head_peak_bytes=head_peak,
        tail_peak_bytes=tail_peak,
        train_seconds=train_seconds,
        forward_seconds=forward_seconds,
        decode_seconds=decode_seconds,
        prefill_seconds=prefill_seconds,
    )


def live_bytes(small: Small, batch: PackedBatch) -> tuple[int, int, int]:
    """(kept, peak at the head, peak after it) of one forward and backward pass."""
    marks: list[int] = []

    def mark(*_: object) -> None:
        marks.append(memory.peak_bytes)
        memory.reset_peak()

    norm = small.decoder.final_norm
    hook = norm.register_forward_hook(lambda module, inputs, output: output.register_hook(mark) and None)
    try:
        with LiveMemory() as memory:
            loss = small.loss(batch)
            kept = memory.live_bytes
            loss.backward()
    finally:
        hook.remove()
    [head_peak] = marks
    return kept, head_peak, memory.peak_bytes


def probe_batch(workload: Workload) -> PackedBatch:
    tokens = torch.randint(workload.learner.model.vocab_size, (workload.micro_tokens,))
    is_counted = torch.arange(workload.micro_tokens) >= workload.micro_tokens - workload.num_labels
    return PackedBatch(token_ids_T=tokens, labels_T=tokens, loss_mask_T=is_counted, segments=workload.micro_batch)


def _rollout_seconds(model: Decoder, rollout: Rollout) -> tuple[float, float]:
    """(prefill of all prompts, one decode step at the middle of a completion)."""
    slots = min(rollout.num_slots, rollout.num_samples)
    length = rollout.prompt_tokens + rollout.new_tokens
    cache = model.new_cache(num_slots=slots, max_length=length)
    prompts = [[0] * rollout.prompt_tokens] * min(rollout.num_prompts, slots)
    repeats = rollout.num_prompts / len(prompts)
    prefill = best_seconds(lambda: model.prefill(prompts, cache, range(len(prompts))))
    middle = rollout.prompt_tokens + rollout.new_tokens // 2
    sampler, params = Sampler(), RowParams([SamplingParams()] * slots, torch.device("cpu"))
    tokens_S, uniforms_S = torch.zeros(slots, dtype=torch.int64), torch.full((slots,), 0.5, dtype=torch.float64)

    def step() -> None:
        cache.lengths_S.fill_(middle)
        sampler(model.logits(model.decode_step(tokens_S, cache)), uniforms_S, params)

    with torch.inference_mode(), model.decoding(slots):
        return repeats * prefill, best_seconds(step, tries=5)


def _optimizer_seconds(small: Small, workload: Workload) -> float:
    """Of one update, per entry that learns."""
    batch = probe_batch(dataclasses.replace(workload, micro_batch=(Segment(trunk=2),), num_labels=2))
    best = float("inf")
    for _ in range(3):
        small.loss(batch).backward()
        start = time.perf_counter()
        optimizer_step(small.optimizer, lr=1e-6, max_grad_norm=1.0)
        best = min(best, time.perf_counter() - start)
    config = small.decoder.config
    return best / dataclasses.replace(workload.learner, model=config).num_trained


def best_seconds(run: Callable[[], object], tries: int = 8, clock: Callable[[], float] = time.perf_counter) -> float:
    """The shortest of so many runs, after one that warms up: whatever disturbs a run can only slow it down.

    Many, because what one layer adds is a small difference of two such times, and is multiplied by the layers.
    """
    run()
    best = float("inf")
    for _ in range(tries):
        start = clock()
        run()
        best = min(best, clock() - start)
    return best
