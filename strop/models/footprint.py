"""What a decoder costs, counted from its shape alone: parameters, floating-point operations, bytes of cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence

from strop.models.config import ModelConfig
from strop.types import Segment


def num_parameters(config: ModelConfig) -> int:
    """All weights, as a Decoder of this config has them."""
    norms = (2 * config.num_layers + 1) * config.hidden_size
    norms += config.qk_norm * 2 * config.num_layers * config.head_dim
    query_width, key_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    biases = config.qkv_bias * (query_width + 2 * key_width) + config.output_bias * config.hidden_size
    biases += config.mlp_bias * (2 * config.intermediate_size + config.hidden_size)
    embeddings = (1 if config.tie_embeddings else 2) * config.vocab_size * config.hidden_size
    return embeddings + config.num_layers * (layer_matrices(config) + biases) + norms


def num_layer_parameters(config: ModelConfig) -> int:
    """All weights of one layer."""
    return num_parameters(dataclasses.replace(config, num_layers=config.num_layers + 1)) - num_parameters(config)


def layer_matrices(config: ModelConfig) -> int:
    """Entries of one layer's matrices, each of which multiplies every token once."""
    query_width, key_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    attention = (2 * query_width + 2 * key_width) * config.hidden_size
    return attention + 3 * config.intermediate_size * config.hidden_size


def num_recomputed(config: ModelConfig) -> int:
    """How many of the last layers compute the MLP's gate and up again in the backward pass with Checkpointing "some".

    Memory is at its largest when the backward pass begins. What these layers would keep, a third of all activations,
    is missing then, for a tenth more matrix products of a step. It must be the last layers: their gradients come first,
    and would otherwise be added to what the others keep.
    """
    return (config.num_layers - 1) * 4 // 5


def training_flops(config: ModelConfig, segments: Sequence[Segment], num_labels: int) -> float:
    """Floating-point operations that a forward and backward pass over the segments cannot do without.

        3 * (2 * L * matrices * tokens  +  4 * L * N * H * pairs  +  2 * V * D * labels)

    pairs counts (query, key) with key <= query inside a trunk or branch, and every branch token with its whole trunk;
    labels are the positions that get logits. A backward pass costs twice its forward pass (Kaplan et al. 2020,
    appendix B). Not counted: recomputation, norms, softmax, the optimiser. So a rate made of it is one of useful work.
    """
    tokens = sum(map(len, segments))
    pairs = sum(_pairs(segment) for segment in segments)
    layers = 2.0 * layer_matrices(config) * tokens + 4.0 * config.num_heads * config.head_dim * pairs
    return 3.0 * (config.num_layers * layers + 2.0 * config.vocab_size * config.hidden_size * num_labels)


def cache_bytes(config: ModelConfig, *, num_slots: int, length: int, bytes_per_number: int) -> int:
    """Keys and values of num_slots sequences of `length` tokens each."""
    per_token = 2 * config.num_layers * config.num_kv_heads * config.head_dim * bytes_per_number
    return num_slots * length * per_token


def recorded_widths(config: ModelConfig, is_recomputed: bool) -> tuple[int, int, int, int]:
    """Entries that a Recording (recording.py) keeps of one token and layer: queries, keys and values; attention's and
    the MLP's output; gate and up, unless the layer computes them again in the backward pass."""
    projection = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    gate_up = 0 if is_recomputed else 2 * config.intermediate_size
    return projection, config.hidden_size, config.hidden_size, gate_up


def recorded_bytes(config: ModelConfig, num_recomputed: int) -> int:
    """What a Recording keeps of one token in all layers, of which so many compute gate and up again, in bfloat16."""
    kept = (config.num_layers - num_recomputed) * sum(recorded_widths(config, False))
    return 2 * (kept + num_recomputed * sum(recorded_widths(config, True)))


def _pairs(segment: Segment) -> int:
    own = segment.trunk * (segment.trunk + 1) // 2
    return own + sum(length * segment.trunk + length * (length + 1) // 2 for length in segment.branches)


def adapter_matrices(config: ModelConfig, *, rank: int, target_modules: Collection[str]) -> list[int]:
    """Entries of each matrix that a LoRA adapter (lora.py) has in one layer."""
    query_width, key_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    width, inner = config.hidden_size, config.intermediate_size
    shapes = {
        "q_proj": (width, query_width),
        "k_proj": (width, key_width),
        "v_proj": (width, key_width),
        "o_proj": (query_width, width),
        "gate_proj": (width, inner),
        "up_proj": (width, inner),
        "down_proj": (inner, width),
    }
    return [rank * size for name in target_modules for size in shapes[name]]
