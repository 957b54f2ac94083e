"""config.json of a family that Decoder covers, with the family's defaults for what it leaves out.

transformers' own configuration classes would do, but importing one of them imports its models, and with them sympy,
accelerate and torch's compiler: 80 MB of memory and seconds. A test holds every default against those classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

_SHARED: dict[str, Any] = {
    "hidden_act": "silu", "rms_norm_eps": 1e-6, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
    "tie_word_embeddings": False, "num_key_value_heads": None, "head_dim": None, "attention_bias": False,
    "attention_dropout": 0.0, "mlp_bias": False, "rope_theta": 10_000.0, "rope_parameters": None, "rope_scaling": None,
    "use_sliding_window": False, "sliding_window": None, "layer_types": None,
}  # fmt: skip
_LLAMA: dict[str, Any] = {
    "vocab_size": 32_000, "hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_QWEN: dict[str, Any] = {
    "vocab_size": 151_936, "hidden_size": 4096, "intermediate_size": 22_016, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 32_768, "sliding_window": 4096,
    "max_window_layers": 28,
}  # fmt: skip
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": _SHARED | _LLAMA,
    "mistral": _SHARED | _LLAMA | {
        "intermediate_size": 14_336, "num_key_value_heads": 8, "max_position_embeddings": 131_072,
        "sliding_window": 4096,
    },
    "qwen2": _SHARED | _QWEN,
    "qwen3": _SHARED | _QWEN | {"head_dim": 128},
    "smollm3": _SHARED | {
        "vocab_size": 128_256, "hidden_size": 2048, "intermediate_size": 11_008, "num_hidden_layers": 36,
        "num_attention_heads": 16, "num_key_value_heads": 4, "max_position_embeddings": 32_768,
        "pad_token_id": 128_004, "bos_token_id": 128_000, "eos_token_id": 128_001, "tie_word_embeddings": True,
        "rope_theta": 2_000_000.0, "no_rope_layers": None, "no_rope_layer_interval": 4,
    },
}  # fmt: skip
"""By model_type."""

_MAY_BE_NULL = {
    "pad_token_id", "bos_token_id", "eos_token_id", "num_key_value_heads", "head_dim", "rope_parameters",
    "rope_scaling", "sliding_window", "layer_types", "no_rope_layers",
}  # fmt: skip
_LISTS = {"layer_types": str, "no_rope_layers": int, "eos_token_id": int}
_DICTS = {"rope_parameters", "rope_scaling"}
_COUNTS = {
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "max_position_embeddings",
}  # fmt: skip


def read_config(raw: Mapping[str, Any], model_type: str, where: str) -> SimpleNamespace:
    """The fields as attributes, defaults filled in; `rope_parameters` is the one dict that all rotary fields became.

    ValueError naming the field for a value of a wrong type, and for sizes that do not go together.
    """
    fields = DEFAULTS[model_type] | dict(raw)
    for name, default in DEFAULTS[model_type].items():
        if not _is_valid(name, fields[name], default):
            raise ValueError(
                f"{where} is not a valid {model_type} config: {name}={fields[name]!r}; it must be "
                f"{_wanted(name, default)}. Correct the file, or copy it again from where the model came from"
            )
    heads, layers = fields["num_attention_heads"], fields["num_hidden_layers"]
    if fields["hidden_size"] % heads and (model_type == "llama" or fields["head_dim"] is None):
        raise ValueError(
            f"{where} is not a valid {model_type} config: hidden_size={fields['hidden_size']} is not a multiple of "
            f"num_attention_heads={heads}"
        )
    if fields["head_dim"] is None:
        fields["head_dim"] = fields["hidden_size"] // heads
    if fields["num_key_value_heads"] is None:
        fields["num_key_value_heads"] = heads
    if model_type in ("qwen2", "qwen3"):
        if not fields["use_sliding_window"]:
            fields["sliding_window"] = None
        if fields["layer_types"] is None and fields["sliding_window"] is not None:
            slides = [layer >= fields["max_window_layers"] for layer in range(layers)]
            fields["layer_types"] = ["sliding_attention" if slide else "full_attention" for slide in slides]
    if model_type == "smollm3":
        if fields["no_rope_layers"] is None:
            interval = fields["no_rope_layer_interval"]
            fields["no_rope_layers"] = [int((layer + 1) % interval != 0) for layer in range(layers)]
        if fields["layer_types"] is None and fields["use_sliding_window"] and fields["sliding_window"] is not None:
            slides = [not has_rope for has_rope in fields["no_rope_layers"][:layers]]
            fields["layer_types"] = ["sliding_attention" if slide else "full_attention" for slide in slides]
    fields["rope_parameters"] = _rope(fields)
    return SimpleNamespace(**fields | {"model_type": model_type})


def _rope(fields: Mapping[str, Any]) -> dict[str, Any]:
    rope = dict(fields["rope_scaling"] or fields["rope_parameters"] or {})
    if any(isinstance(value, dict) for value in rope.values()):
        return rope  # of each kind of layer its own: without a rope_type, which nobody supports
    rope.setdefault("rope_theta", fields["rope_theta"])
    rope.setdefault("rope_type", rope.get("type", "default"))
    if rope["rope_type"] == "llama3":
        rope.setdefault("original_max_position_embeddings", fields["max_position_embeddings"])
    return rope


def _wanted(name: str, default: Any) -> str:
    """What _is_valid takes, in words."""
    if name in _DICTS:
        kind = "an object"
    elif isinstance(default, bool):
        kind = "true or false"
    elif isinstance(default, str):
        kind = "a text"
    elif isinstance(default, float):
        kind = "a number"
    elif name in _LISTS and name != "eos_token_id":
        kind = f"a list of {'texts' if _LISTS[name] is str else 'whole numbers'}"
    else:
        kind = (
            "a whole number"
            + (" above 0" if name in _COUNTS else "")
            + (" or a list of them" if name in _LISTS else "")
        )
    return kind + (", or null" if name in _MAY_BE_NULL else "")


def _is_valid(name: str, value: Any, default: Any) -> bool:
    if value is None:
        return name in _MAY_BE_NULL
    if name in _DICTS:
        return isinstance(value, dict)
    if isinstance(value, list):
        return name in _LISTS and all(isinstance(item, _LISTS[name]) for item in value)
    if isinstance(default, bool):
        return isinstance(value, bool)
    if isinstance(default, str):
        return isinstance(value, str)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if isinstance(default, float):
        return is_number
    return is_number and isinstance(value, int) and (value > 0 or name not in _COUNTS)
