"""What a training step will cost, before it runs: peak memory by component, and seconds.

Small models, of one and of two layers but otherwise of the true shape, run a micro-batch of the true size here and now
(forecast_probe.py). What the second layer adds is what every further layer adds; the rest is embedding and head. So the
forecast follows the code that will run, whatever it keeps, drops or recomputes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from strop.generation.sampler import MAX_ELEMENTS
from strop.models import Checkpointing, LoraConfig
from strop.models.cache import BLOCK
from strop.models.config import ModelConfig
from strop.models.footprint import (
    adapter_matrices,
    cache_bytes,
    layer_matrices,
    num_layer_parameters,
    num_parameters,
    num_recomputed,
    recorded_bytes,
    training_flops,
)
from strop.models.fused import can_pack
from strop.optim import eight_bit
from strop.types import Segment

ALLOCATOR_SHARE = 0.2
"""Of the activations, added for freed blocks that the C library keeps and cannot use for others: 0.05 to 0.45 of them
were measured, half of the runs below 0.15 (benchmarks/results/forecast.md)."""
PAGE = 4096
"""Bytes that a moment takes when the first of its numbers is written (optim/own_pages.py)."""


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """The sampling of one step.

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
class Learner:
    """A network that learns, as far as its cost depends on it."""

    model: ModelConfig
    output: Literal["logprobs", "scores", "logprobs and values"] = "logprobs"
    """A language model, one with a scalar head instead, or, PPO's shared trunk, with a value head beside its own."""
    with_entropy: bool = False
    lora: LoraConfig | None = None
    checkpointing: Checkpointing = "some"
    is_8bit: bool = False
    """Whether [optimizer] state = "8bit"."""
    seen_tokens: frozenset[int] | None = None
    """Those whose rows of the embedding ever get a gradient; None = all. With a scalar head no others do."""

    @property
    def trained_in_a_layer(self) -> list[int]:
        """Entries of one layer's parameters that learn; those of one that learns as a whole come as one number."""
        if self.lora is None:
            return [num_layer_parameters(self.model)]
        return adapter_matrices(self.model, rank=self.lora.rank, target_modules=self.lora.target_modules)

    @property
    def num_weights(self) -> int:
        """Parameters in the compute dtype: all but an adapter's."""
        head = 0
        if self.output == "scores":
            head = self.model.hidden_size * (1 if self.model.tie_embeddings else 1 - self.model.vocab_size)
        return num_parameters(self.model) + head

    @property
    def num_trained(self) -> int:
        return self.num_weights if self.lora is None else self.model.num_layers * sum(self.trained_in_a_layer)

    @property
    def num_recomputed(self) -> int:
        """Last layers that keep less than the first ones. An adapter on the MLP keeps gate and up in all."""
        has_mlp = self.lora is not None and {"gate_proj", "up_proj", "down_proj"} & {*self.lora.target_modules}
        return num_recomputed(self.model) if self.checkpointing == "some" and not has_mlp else 0


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One step of a stage, as far as its cost depends on it."""

    learner: Learner
    """The policy, or the only model."""
    critic: Learner | None = None
    """PPO's own critic, which trains on the policy's micro-batches after it."""
    dtype: torch.dtype
    in_int8: bool = False
    """Whether matrix products are in 8 bits, beside a dtype of bfloat16."""
    micro_batch: tuple[Segment, ...]
    """The largest one."""
    num_labels: int
    """Positions of it that get logits, or a score."""
    tokens_per_step: int
    """Packed positions that are trained on in one step, over all its updates."""
    tokens_per_update: int
    num_updates: int = 1
    frozen_tokens: int = 0
    """Positions that get a forward pass of the learner only: for old and for reference logprobs."""
    value_tokens: int = 0
    """Positions of which an own critic is asked the values before the updates."""
    has_reference: bool = False
    """Whether a second model is kept: with an adapter it is the base, and costs only its own adapter."""
    loaded_copies: int = 0
    """Sets of the learner's weights that live while the run is set up, and no longer."""
    file_bytes: int = 0
    """Size of the weights on disk, which are mapped while they are read; 0 = a new model."""
    reward_bytes: int = 0
    """Weights of the reward models and judges that compute in this process."""
    rollout: Rollout | None = None
    recorded_tokens: int = 0
    """Positions that the first update of a step has from the rollout, where there are kernels: see recording.py."""
    has_kernels: bool = False
    """Whether the C++ kernels do the work: then a master is the weight and 2 bytes, the gradients of a single
    micro-batch stay in bfloat16, and the packed weights of a rollout include the head."""
    assumptions: tuple[str, ...] = ()
    """What could not be known and was supposed instead, in words."""

    @property
    def learners(self) -> dict[str, Learner]:
        """By the name of their phase."""
        if self.critic is None:
            return {"update": self.learner}
        return {"update": self.learner, "critic's update": self.critic}

    @property
    def dtype_name(self) -> str:
        """As in a config."""
        return "int8" if self.in_int8 else str(self.dtype).removeprefix("torch.")

    @property
    def micro_tokens(self) -> int:
        return sum(map(len, self.micro_batch))

    @property
    def accumulates(self) -> bool:
        """Whether an update has more than one micro-batch, so that gradients wait while activations are made."""
        return self.tokens_per_update > self.micro_tokens

    def gradient_bytes(self, learner: Learner) -> float:
        """Per entry that learns."""
        is_narrow = self.has_kernels and learner.lora is None and not self.accumulates
        return 2.0 if is_narrow else 4.0


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Of a small model; bytes are on top of weights, masters and moments, and of gradients that wait."""

    kept_bytes: int
    """What the forward pass leaves for the backward pass."""
    head_peak_bytes: int
    """Peak until the gradient reaches the last layer."""
    tail_peak_bytes: int
    """Peak from there to the end of the backward pass."""
    train_seconds: float = 0.0
    forward_seconds: float = 0.0
    decode_seconds: float = 0.0
    """One step of all slots, sampler included."""
    prefill_seconds: float = 0.0
    """All prompts of a step."""


@dataclass(frozen=True, kw_only=True)
class Layers:
    """What was measured for one learner."""

    one: Measured
    two: Measured
    """With one and with two layers of the first kind."""
    last: Measured | None = None
    """With one layer of the last kind, which keeps less; None where all are alike."""

    def at(self, name: str, learner: Learner) -> float:
        """A figure of Measured for the whole learner."""
        num_last = learner.num_recomputed
        total = getattr(self.one, name) + (learner.model.num_layers - 1) * self.slope(name)
        if self.last is None:
            return total
        more = getattr(self.last, name) - getattr(self.one, name)
        if name.endswith("_seconds"):
            more = max(0.0, more)  # they compute more: less is a disturbed measurement
        return total + num_last * more

    def slope(self, name: str) -> float:
        """What one more layer of the first kind adds."""
        return max(0.0, getattr(self.two, name) - getattr(self.one, name))

    def moments(self, learner: Learner, layer_gradients: float) -> list[tuple[float, float, float]]:
        """(live bytes, those of kept activations, those of gradients) at every moment that may be the worst.

        layer_gradients: bytes by which the gradients grow with every layer whose backward pass is done; 0 where they
        were all there before. The first moment is the one before the last layer, the others are inside each layer.
        """
        num_layers, num_last = learner.model.num_layers, learner.num_recomputed
        top = self.last or self.one
        kept = self.at("kept_bytes", learner)
        # A small model's figures count its one layer's activations; those of the others come on top.
        found = [(top.head_peak_bytes + kept - top.kept_bytes, kept, 0.0)]
        slope = self.slope("kept_bytes")
        slope_last = slope + (0 if self.last is None else self.last.kept_bytes - self.one.kept_bytes)
        for layer in range(num_layers):
            is_last = self.last is not None and layer >= num_layers - num_last
            small = self.last if is_last and self.last is not None else self.one
            below = min(layer, num_layers - num_last) * slope + max(0, layer - num_layers + num_last) * slope_last
            gradients = (num_layers - 1 - layer) * layer_gradients
            found.append((small.tail_peak_bytes + below + gradients, below, gradients))
        return found


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What was measured here for one Workload."""

    learners: tuple[Layers, ...]
    """In the order of Workload.learners."""
    import_bytes: int
    """Resident size of a process that has imported everything and has no model yet."""
    optimizer_seconds: float
    """Per entry that learns."""


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Bytes by component in each phase of a run, and the seconds of a step by part."""

    phases: dict[str, dict[str, float]]
    seconds: dict[str, float]
    training_gflops: float
    """Useful floating-point operations per second of the learner's updates, in 1e9; 0 without measured times."""

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
    """The arithmetic from few layers to all of them. A run's peak is that of its largest phase."""
    learner, itemsize = workload.learner, workload.dtype.itemsize
    resident = {
        "imports": float(probe.import_bytes),
        "weights": float(learner.num_weights * itemsize),
        "adapter": 4.0 * learner.num_trained * (learner.lora is not None) * (1 + workload.has_reference),
        "reference": float(learner.num_weights * itemsize * (workload.has_reference and learner.lora is None)),
        "critic": 0.0 if workload.critic is None else float(workload.critic.num_weights * itemsize),
        "reward models": float(workload.reward_bytes),
    }
    states = [_state_bytes(workload, each) for each in workload.learners.values()]
    optimizer = {name: sum(state[name] for state in states) for name in ("masters", "moments")}
    loading = {"weights file": workload.file_bytes, "copies": workload.loaded_copies * resident["weights"]}
    phases = {"load": resident | loading}
    if workload.rollout is not None:
        phases["rollout"] = resident | optimizer | _rollout_bytes(workload, workload.rollout)
    for place, name in enumerate(workload.learners):
        phases[name] = resident | optimizer | _update_bytes(workload, probe, place)
    seconds = _seconds(workload, probe)
    flops = training_flops(learner.model, workload.micro_batch, workload.num_labels * (learner.output != "scores"))
    if learner.lora is not None:  # the weights get no gradient: one of three products less
        flops *= 2 / 3
    train_seconds = probe.learners[0].at("train_seconds", learner)
    gflops = flops / train_seconds / 1e9 if train_seconds else 0.0
    return Forecast(phases=phases, seconds=seconds, training_gflops=gflops)


def _state_bytes(workload: Workload, learner: Learner) -> dict[str, float]:
    """Masters and moments of what learns."""
    if learner.lora is not None:  # float32, each its own master
        sizes = learner.trained_in_a_layer
        each = [size * _moment_bytes(learner.is_8bit and size >= eight_bit.MIN_ENTRIES) for size in sizes]
        return {"masters": 0.0, "moments": learner.model.num_layers * sum(each)}
    is_low = workload.dtype.itemsize < 4
    master_bytes = (2.0 if workload.has_kernels else 4.0) if is_low else 0.0
    moment_bytes = _moment_bytes(learner.is_8bit)
    count = learner.num_trained
    masters, moments = master_bytes * count, moment_bytes * count
    if learner.seen_tokens is not None and workload.has_kernels and not learner.is_8bit:
        rows, width = learner.model.vocab_size, learner.model.hidden_size
        masters += _page_bytes(learner.seen_tokens, 2 * width) - 2 * width * rows
        moments += 2 * (_page_bytes(learner.seen_tokens, 4 * width) - 4 * width * rows)
    return {"masters": masters, "moments": moments}


def _moment_bytes(is_8bit: bool) -> float:
    """Per entry: two bytes and two fp32 scales per block. The few norms that stay wide do not show."""
    return 2.0 + 8.0 / eight_bit.BLOCK if is_8bit else 8.0


def _page_bytes(rows: frozenset[int], row_bytes: int) -> int:
    """Memory of an array of which only these rows are ever written."""
    pages: set[int] = set()
    for row in rows:
        pages.update(range(row * row_bytes // PAGE, ((row + 1) * row_bytes - 1) // PAGE + 1))
    return PAGE * len(pages)


def _update_bytes(workload: Workload, probe: Probe, place: int) -> dict[str, float]:
    """Gradients, activations, and whatever else lives at the worst moment of a backward pass."""
    learners = list(workload.learners.values())
    learner, layers = learners[place], probe.learners[place]
    gradients = [workload.gradient_bytes(each) * each.num_trained for each in learners]
    # The learners take turns in every micro-batch: with one, only the gradients of those before are there already.
    waiting = sum(gradients) if workload.accumulates else sum(gradients[:place])
    growth = 0.0 if workload.accumulates else workload.gradient_bytes(learner) * sum(learner.trained_in_a_layer)
    live, kept, own = max(layers.moments(learner, growth))
    return {
        "gradients": waiting + own,
        "activations": kept,
        "passing": live - kept - own,
        "allocator": ALLOCATOR_SHARE * layers.at("kept_bytes", learner) + _widened_bytes(workload),
    }


def _widened_bytes(workload: Workload) -> float:
    """The places of the first micro-batch's bfloat16 gradients, which go one by one as their fp32 sums come."""
    if not (workload.has_kernels and workload.accumulates):
        return 0.0
    return 2.0 * sum(each.num_trained for each in workload.learners.values() if each.lora is None)


_PACKED_INT8_BYTES = 1 + 8 / 64
"""Per weight: 8 bits, and a scale and a correction of 4 bytes for each block of 64."""


def _rollout_bytes(workload: Workload, rollout: Rollout) -> dict[str, float]:
    """Cache, packed weights, and what a decode step makes, of which logits and sampler are all but a little."""
    config, dtype, num_recomputed = workload.learner.model, workload.dtype, workload.learner.num_recomputed
    slots = min(rollout.num_slots, max(rollout.num_samples, rollout.eval_samples))
    prompts = min(max(1, rollout.num_slots // 4), max(rollout.num_prompts, rollout.eval_samples))
    length = -(-(rollout.prompt_tokens + rollout.new_tokens) // BLOCK) * BLOCK
    packed = config.num_layers * layer_matrices(config) * can_pack(torch.empty(0, dtype=dtype))
    if workload.has_kernels:
        packed += config.vocab_size * config.hidden_size
    sampler_rows = min(slots, max(1, MAX_ELEMENTS // config.vocab_size))
    return {
        "cache": float(cache_bytes(config, num_slots=slots + prompts, length=length, bytes_per_number=dtype.itemsize)),
        "packed weights": float(packed * (_PACKED_INT8_BYTES if workload.in_int8 else dtype.itemsize)),
        "logits": float(slots * config.vocab_size * dtype.itemsize + 2 * sampler_rows * config.vocab_size * 4),
        "recording": float(workload.has_kernels * workload.recorded_tokens * recorded_bytes(config, num_recomputed)),
    }


def _seconds(workload: Workload, probe: Probe) -> dict[str, float]:
    policy, learners = workload.learner, list(workload.learners.values())
    micro_batches = workload.tokens_per_step / workload.micro_tokens
    seconds = {}
    if workload.rollout is not None:
        rollout = workload.rollout
        rounds = rollout.num_samples / min(rollout.num_slots, rollout.num_samples)
        seconds["prefill"] = probe.learners[0].at("prefill_seconds", policy)
        seconds["decoding"] = rounds * (rollout.new_tokens - 1) * probe.learners[0].at("decode_seconds", policy)
    if workload.frozen_tokens:
        frozen_batches = workload.frozen_tokens / workload.micro_tokens
        seconds["old and reference logprobs"] = frozen_batches * probe.learners[0].at("forward_seconds", policy)
    if workload.critic is not None:
        value_batches = workload.value_tokens / workload.micro_tokens
        seconds["values"] = value_batches * probe.learners[1].at("forward_seconds", workload.critic)
        seconds["critic"] = micro_batches * probe.learners[1].at("train_seconds", workload.critic)
    seconds["forward and backward"] = micro_batches * probe.learners[0].at("train_seconds", policy)
    if workload.has_kernels and workload.recorded_tokens:
        share = workload.recorded_tokens / workload.micro_tokens
        seconds["forward and backward"] -= share * probe.learners[0].at("forward_seconds", policy)
    trained = sum(learner.num_trained for learner in learners)
    seconds["optimizer"] = workload.num_updates * probe.optimizer_seconds * trained
    return seconds


def packed_segments(
    pattern: Sequence[Segment], max_tokens: int, *, max_segments: int | None = None
) -> tuple[Segment, ...]:
    """The pattern, again and again, as long as it fits into max_tokens; at least its first segment."""
    segments: list[Segment] = []
    total = 0
    while pattern and (max_segments is None or len(segments) < max_segments):
        segment = pattern[len(segments) % len(pattern)]
        if segments and total + len(segment) > max_tokens:
            break
        segments.append(segment)
        total += len(segment)
    return tuple(segments)
