"""How llama.cpp names and arranges what our decoder computes: architectures, tensors, rotary order."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from strop.models import ModelConfig
from strop.models.decoder import rope_frequencies


@dataclass(frozen=True)
class Architecture:
    """One graph of llama.cpp, and what it can express."""

    name: str
    has_qkv_bias: bool | None
    """None: with or without."""
    has_other_bias: bool
    """On the attention's output and in the MLP, with or without."""
    pairs_neighbours: bool
    """Its rotary embedding turns rows 2i and 2i + 1 of a head, where Hugging Face's turns i and i + H / 2."""
    has_rope_scaling: bool = False
    has_qk_norm: bool = False
    no_rope_every: int = 0
    """Layers at which (index + 1) is a multiple of it have no rotary embedding; 0 = none."""


_LLAMA = Architecture("llama", None, True, True, has_rope_scaling=True)
ARCHITECTURES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": Architecture("qwen2", True, False, False),
    "qwen3": Architecture("qwen3", False, False, False, has_qk_norm=True),
    "smollm3": Architecture("smollm3", False, False, True, no_rope_every=4),
}
"""By config.json's model_type."""


def architecture_of(config: ModelConfig) -> Architecture:
    """The graph of llama.cpp that computes this config. ValueError naming the field that none can express."""
    if config.model_type not in ARCHITECTURES:
        raise ValueError(f"model_type {config.model_type!r} cannot be written as GGUF: {', '.join(ARCHITECTURES)} can")
    one = ARCHITECTURES[config.model_type]

    def refuse(field: str, why: str) -> None:
        raise ValueError(
            f"{field}={getattr(config, field)!r} of this {config.model_type} cannot be expressed in GGUF: llama.cpp's "
            f"{one.name} {why}. Export it with --to hf"
        )

    if one.has_qkv_bias is not None and config.qkv_bias != one.has_qkv_bias:
        refuse("qkv_bias", "needs biases there" if one.has_qkv_bias else "has no biases there")
    for field in ("output_bias", "mlp_bias"):
        if getattr(config, field) and not one.has_other_bias:
            refuse(field, "has no biases there")
    if config.qk_norm != one.has_qk_norm:
        refuse("qk_norm", "needs these norms" if one.has_qk_norm else "has no such norms")
    if config.rope_scaling is not None and not one.has_rope_scaling:
        refuse("rope_scaling", "scales no rotary frequencies")
    step = one.no_rope_every
    if config.layers_without_rope != {i for i in range(config.num_layers) if step and (i + 1) % step == 0}:
        refuse("layers_without_rope", f"leaves out every {step}th layer" if step else "turns every layer")
    return one


def hyperparameters(config: ModelConfig, name: str) -> dict[str, int | float]:
    """{key: value} of the architecture `name`; whole numbers are uint32 in the file, others float32."""
    values: dict[str, int | float] = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.norm_eps),
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": float(config.rope_theta),
    }
    return {f"{name}.{key}": value for key, value in values.items()}


_TOP = {"embedding": "token_embd", "final_norm": "output_norm", "head": "output"}
_LAYER = {
    "attention.norm": ("attn_norm",),
    "attention.qkv": ("attn_q", "attn_k", "attn_v"),
    "attention.output": ("attn_output",),
    "attention.q_norm": ("attn_q_norm",),
    "attention.k_norm": ("attn_k_norm",),
    "mlp.norm": ("ffn_norm",),
    "mlp.gate_up": ("ffn_gate", "ffn_up"),
    "mlp.down": ("ffn_down",),
}


def tensors_of(parameter: str, value: Tensor, config: ModelConfig, one: Architecture) -> list[tuple[str, Tensor]]:
    """[(name in GGUF, tensor)] of one of our parameters."""
    module, kind = parameter.rsplit(".", 1)
    layer = re.fullmatch(r"layers\.(\d+)\.(.+)", module)
    if layer is None:
        return [(f"{_TOP[module]}.{kind}", value)]
    names = [f"blk.{layer[1]}.{name}.{kind}" for name in _LAYER[layer[2]]]
    if layer[2] == "attention.qkv":
        heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        pieces = list(value.split([count * config.head_dim for count in heads]))
        if one.pairs_neighbours:
            pieces[:2] = [neighbouring_pairs(piece, config.head_dim) for piece in pieces[:2]]
    else:
        pieces = list(value.chunk(len(names)))
    return list(zip(names, pieces, strict=True))


def neighbouring_pairs(rows: Tensor, head_dim: int) -> Tensor:
    """Rows of a query or key projection (or its bias) with the two of each rotary pair side by side.

    Row i of a head and row i + head_dim / 2 become rows 2i and 2i + 1.
    """
    return rows.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def rope_divisors(config: ModelConfig) -> Tensor | None:
    """What llama.cpp divides each rotary frequency by (its rope_freqs.weight), float32 (H / 2,); None unless scaled."""
    if config.rope_scaling is None:
        return None
    plain = rope_frequencies(config.head_dim, config.rope_theta, None)
    return plain / rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)


def as_float32(value: Tensor) -> Tensor:
    return value.detach().to("cpu", torch.float32).contiguous()
