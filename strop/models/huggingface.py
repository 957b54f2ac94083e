"""Hugging Face's config.json and tensor names <-> ours, for the families that Decoder covers."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from strop.models.config import ModelConfig, RopeScaling
from strop.models.config_json import read_config


@dataclasses.dataclass(frozen=True)
class _Family:
    class_prefix: str
    """LlamaForCausalLM, LlamaForSequenceClassification."""
    biases: Callable[[Any], tuple[bool, bool, bool]]
    """(queries keys and values, attention output, MLP) of a transformers config."""
    qk_norm: bool = False
    fields: Callable[[ModelConfig], dict[str, Any]] = lambda config: {}
    """What this family's config.json says beyond the fields that all share."""


def _same_bias(config: Any) -> tuple[bool, bool, bool]:
    return config.attention_bias, config.attention_bias, getattr(config, "mlp_bias", False)


FAMILIES: dict[str, _Family] = {
    "llama": _Family(
        "Llama", _same_bias, fields=lambda config: {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}
    ),
    "mistral": _Family("Mistral", lambda _: (False, False, False), fields=lambda _: {"sliding_window": None}),
    "qwen2": _Family("Qwen2", lambda _: (True, False, False), fields=lambda _: {"use_sliding_window": False}),
    "qwen3": _Family(
        "Qwen3",
        _same_bias,
        qk_norm=True,
        fields=lambda config: {"attention_bias": config.qkv_bias, "use_sliding_window": False},
    ),
    "smollm3": _Family(
        "SmolLM3",
        _same_bias,
        fields=lambda config: {
            "attention_bias": config.qkv_bias,
            "mlp_bias": config.mlp_bias,
            "use_sliding_window": False,
            # 1 = this layer turns its queries and keys, whatever the name suggests.
            "no_rope_layers": [int(i not in config.layers_without_rope) for i in range(config.num_layers)],
        },
    ),
}
"""By config.json's model_type. SmolLM2 is a Llama."""


def config_from_dict(raw: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
    """The ModelConfig that a config.json describes; fields that it leaves out take its family's defaults.

    Both spellings of the rotary fields are read: rope_parameters, and the older rope_theta with rope_scaling.
    Raises ValueError naming the field and its value for anything that Decoder does not compute: an active sliding
    window, experts, a rotary embedding other than "default" and "llama3", an activation other than SiLU, quantised
    weights. Dropout is never applied, whatever the config says; a warning tells.
    """
    model_type = raw.get("model_type")
    family = FAMILIES.get(str(model_type))
    if family is None:
        raise ValueError(f"{where}: model_type={model_type!r} is not one of {', '.join(FAMILIES)}")
    config: Any = read_config(raw, str(model_type), where)
    _refuse_unsupported(raw, config, where)
    rope = config.rope_parameters
    scaling = None
    if rope["rope_type"] == "llama3":
        names = [field.name for field in dataclasses.fields(RopeScaling)]
        missing = [name for name in names if name not in rope]
        if missing:
            raise ValueError(f"{where}: the llama3 rope_scaling lacks {', '.join(missing)}")
        scaling = RopeScaling(**{name: rope[name] for name in names})
    qkv_bias, output_bias, mlp_bias = family.biases(config)
    layers_without_rope: frozenset[int] = frozenset()
    if model_type == "smollm3":
        has_rope = config.no_rope_layers
        if len(has_rope) < config.num_hidden_layers:
            raise ValueError(
                f"{where}: no_rope_layers has {len(has_rope)} entries for {config.num_hidden_layers} layers"
            )
        layers_without_rope = frozenset(i for i in range(config.num_hidden_layers) if not has_rope[i])
    eos = config.eos_token_id
    return ModelConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        max_position_embeddings=config.max_position_embeddings,
        norm_eps=config.rms_norm_eps,
        rope_theta=float(rope["rope_theta"]),
        rope_scaling=scaling,
        layers_without_rope=layers_without_rope,
        qkv_bias=qkv_bias,
        output_bias=output_bias,
        mlp_bias=mlp_bias,
        qk_norm=family.qk_norm,
        tie_embeddings=config.tie_word_embeddings,
        model_type=str(model_type),
        bos_token_id=config.bos_token_id,
        eos_token_id=eos[0] if isinstance(eos, list) else eos,
        pad_token_id=config.pad_token_id,
    )


def _refuse_unsupported(raw: Mapping[str, Any], config: Any, where: str) -> None:
    def refuse(field: str, value: object, why: str) -> None:
        raise ValueError(f"{where}: {field}={value!r} is not supported: {why}")

    if raw.get("quantization_config"):
        refuse("quantization_config", raw["quantization_config"], "save the model dequantised first")
    if config.hidden_act not in ("silu", "swish"):
        refuse("hidden_act", config.hidden_act, "only silu is")
    for field in ("num_experts", "num_local_experts", "n_routed_experts"):
        if raw.get(field):
            refuse(field, raw[field], "this decoder has no mixture of experts")
    rope = config.rope_parameters
    if rope.get("rope_type") not in ("default", "llama3"):
        refuse("rope_type", rope.get("rope_type"), "only default and llama3 rotary embeddings are")
    partial = rope.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        refuse("partial_rotary_factor", partial, "the whole head is rotated")
    window = getattr(config, "sliding_window", None)
    layer_types = {"sliding_attention"} if config.model_type == "mistral" and window is not None else set()
    layer_types |= set(getattr(config, "layer_types", None) or ())
    if "sliding_attention" in layer_types and window is not None:
        if window < config.max_position_embeddings:
            refuse("sliding_window", window, "every layer attends to everything before it")
        layer_types.remove("sliding_attention")  # as wide as the context: it never cuts anything off
    if layer_types - {"full_attention"}:
        refuse("layer_types", sorted(layer_types), "every layer attends to everything before it")
    if config.attention_dropout:
        warnings.warn(f"{where}: attention_dropout={config.attention_dropout} is not applied", stacklevel=4)


def config_to_dict(config: ModelConfig, *, task: str = "CausalLM") -> dict[str, Any]:
    """A config.json that transformers opens as {Family}For{task}.

    The rotary fields are written in the older spelling, which every version reads; a version that knew only the other
    one would silently fall back to theta 10000. Raises ValueError when the family cannot express the config, say
    qk_norm in a "llama".
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise ValueError(f"model_type={config.model_type!r} is not one of {', '.join(FAMILIES)}")
    scaling = config.rope_scaling
    raw: dict[str, Any] = {
        "architectures": [f"{family.class_prefix}For{task}"],
        "model_type": config.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None if scaling is None else {"rope_type": "llama3", **dataclasses.asdict(scaling)},
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
        **family.fields(config),
    }
    expressed = config_from_dict(raw)
    for field in dataclasses.fields(ModelConfig):
        wanted, got = getattr(config, field.name), getattr(expressed, field.name)
        if wanted != got:
            raise ValueError(f"a {config.model_type} config.json cannot express {field.name}={wanted!r}, only {got!r}")
    return raw


_TOP_NAMES = {"embedding": "model.embed_tokens", "final_norm": "model.norm", "head": "lm_head", "score": "score"}
_LAYER_NAMES = {
    "attention.norm": ("input_layernorm",),
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.output": ("self_attn.o_proj",),
    "attention.q_norm": ("self_attn.q_norm",),
    "attention.k_norm": ("self_attn.k_norm",),
    "mlp.norm": ("post_attention_layernorm",),
    "mlp.gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down": ("mlp.down_proj",),
}


def disk_names(parameter: str, config: ModelConfig) -> list[tuple[str, int | None]]:
    """[(tensor on disk, its number of rows)], stacked in this order to make our parameter; None = all its rows.

    Example: "layers.3.mlp.gate_up.weight" is [("model.layers.3.mlp.gate_proj.weight", I), ("...up_proj.weight", I)].
    """
    parameter = parameter.removeprefix("backbone.")  # of a ScalarModel
    module, kind = parameter.rsplit(".", 1)
    layer = re.fullmatch(r"layers\.(\d+)\.(.+)", module)
    if layer is None:
        return [(f"{_TOP_NAMES[module]}.{kind}", None)]
    names = [f"model.layers.{layer[1]}.{name}.{kind}" for name in _LAYER_NAMES[layer[2]]]
    if layer[2] == "attention.qkv":
        heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        return [(name, count * config.head_dim) for name, count in zip(names, heads, strict=True)]
    return [(name, config.intermediate_size if len(names) > 1 else None) for name in names]
