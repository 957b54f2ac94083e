"""config.json as we read it against transformers' own classes, which take 80 MB to import and are not used for it."""

from __future__ import annotations

import copy
import subprocess
import sys
from typing import Any

import pytest
from transformers import CONFIG_MAPPING

from strop.models import save_model
from strop.models.config import ModelConfig
from strop.models.config_json import DEFAULTS, read_config
from strop.models.decoder import init_model

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
GIVEN: list[dict[str, Any]] = [
    {},
    {"num_key_value_heads": 4},
    {"num_attention_heads": 8, "hidden_size": 512},
    {"rope_theta": 5e5},
    {"rope_scaling": None, "rope_theta": 2e4},
    {"rope_parameters": {"rope_theta": 3e5, "rope_type": "default"}, "rope_theta": 1e3},
    {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 1024}},
    {"rope_scaling": LLAMA3, "max_position_embeddings": 777},
    {"rope_parameters": LLAMA3, "original_max_position_embeddings": 555},
    {"rope_scaling": {"type": "default"}},
    {"sliding_window": 128},
    {"use_sliding_window": True, "sliding_window": 128, "max_window_layers": 3, "no_rope_layer_interval": 2},
    {"tie_word_embeddings": True, "eos_token_id": [3, 4], "pad_token_id": 9},
    {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu", "attention_dropout": 0.1},
]


@pytest.mark.parametrize("model_type", DEFAULTS)
@pytest.mark.parametrize("given", GIVEN, ids=lambda given: "-".join(given) or "defaults")
def test_fields_equal_transformers(model_type, given):
    theirs = CONFIG_MAPPING[model_type].from_dict(copy.deepcopy({"model_type": model_type, **given}))
    ours = read_config({"model_type": model_type, **given}, model_type, "config.json")
    for name in DEFAULTS[model_type].keys() - {"rope_theta", "rope_scaling", "layer_types", "rope_parameters"}:
        # What a class does not know has no meaning for that family.
        assert getattr(ours, name) == getattr(theirs, name, getattr(ours, name)), name
    known = ours.rope_parameters.keys() - {"type"}
    assert {name: ours.rope_parameters[name] for name in known} == {
        name: theirs.rope_parameters.get(name) for name in known
    }
    slides = "sliding_attention"
    assert (slides in (ours.layer_types or ())) == (slides in (getattr(theirs, "layer_types", None) or ()))


@pytest.mark.parametrize("model_type", ["llama", "smollm3"])
def test_null_means_as_many_heads(model_type):
    given = {"num_key_value_heads": None, "head_dim": None, "model_type": model_type}
    theirs, ours = CONFIG_MAPPING[model_type].from_dict(given), read_config(given, model_type, "config.json")
    assert ours.num_key_value_heads == theirs.num_key_value_heads == ours.num_attention_heads
    assert ours.head_dim == ours.hidden_size // ours.num_attention_heads


@pytest.mark.parametrize(
    "given",
    [
        {"vocab_size": "many"},
        {"hidden_size": None},
        {"num_hidden_layers": 2.5},
        {"num_attention_heads": 7},
        {"rms_norm_eps": "small"},
        {"rope_scaling": "llama3"},
        {"tie_word_embeddings": "yes"},
    ],
)
def test_what_transformers_refuses_is_refused(given):
    with pytest.raises(Exception):  # noqa: B017 its own kinds of error
        CONFIG_MAPPING["llama"].from_dict(given)
    with pytest.raises(ValueError, match=f"here/config.json is not a valid llama config: .*{next(iter(given))}="):
        read_config(given, "llama", "here/config.json")


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({"vocab_size": "many"}, "a whole number above 0. Correct"),
        ({"eos_token_id": "two"}, "a whole number or a list of them, or null"),
        ({"rms_norm_eps": "small"}, "a number"),
        ({"tie_word_embeddings": "yes"}, "true or false"),
        ({"rope_scaling": "llama3"}, "an object, or null"),
        ({"layer_types": "full_attention"}, "a list of texts, or null"),
    ],
)
def test_a_refusal_says_what_is_wanted(given, wanted):
    with pytest.raises(ValueError, match=f"{next(iter(given))}=.*; it must be {wanted}"):
        read_config(given, "llama", "here/config.json")


def test_loading_a_model_imports_neither_transformers_models_nor_a_compiler(tmp_path):
    config = ModelConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=8
    )
    save_model(init_model(config, seed=0), tmp_path)
    code = (
        "import sys\n"
        "from strop.models import load_model\n"
        "from strop.models.heads import add_scalar_head\n"
        "add_scalar_head(load_model(sys.argv[1]), seed=0)\n"
        "print([name for name in ('sympy', 'accelerate', 'torch._dynamo', 'transformers.modeling_utils') "
        "if name in sys.modules])"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "[]"
