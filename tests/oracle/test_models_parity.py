"""Our decoder against transformers: logits at 1e-5 in float32, folders opened in both directions, losslessly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from strop.models.config import ModelConfig, RopeScaling
from strop.models.decoder import Decoder, init_model
from strop.models.heads import add_scalar_head, load_scalar_model, save_scalar_model
from strop.models.huggingface import config_from_dict, config_to_dict
from strop.models.loading import load_model, save_model, weight_hash
from strop.types import PackedBatch, Segment

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,  # of 8 pairs 1 is kept, 2 are blended and 5 are stretched
}
SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "tie_word_embeddings": False},
    "llama-one-kv-head": {"model_type": "llama", "num_key_value_heads": 1, "rms_norm_eps": 1e-3},
    "llama3-rope": {"model_type": "llama", "rope_parameters": LLAMA3},
    "llama-biases": {
        "model_type": "llama", "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "head_dim": 24,
    },
    "mistral": {"model_type": "mistral", "sliding_window": None, "head_dim": 24, "rope_theta": 1e6},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True, "rope_theta": 1e6},
    "qwen3": {"model_type": "qwen3", "head_dim": 32, "tie_word_embeddings": True},
    "qwen3-biases": {"model_type": "qwen3", "head_dim": 8, "attention_bias": True, "num_key_value_heads": 4},
    "smollm3": {"model_type": "smollm3", "num_hidden_layers": 5},  # the fourth layer has no rotary embedding
    "smollm3-explicit": {"model_type": "smollm3", "no_rope_layers": [0, 1, 1], "attention_bias": True},
}  # fmt: skip
LENGTHS = (1, 7, 40, 2, 100)


def packed(rows: list[Tensor]) -> PackedBatch:
    token_ids = torch.cat(rows)
    return PackedBatch(
        token_ids_T=token_ids,
        labels_T=token_ids,
        loss_mask_T=torch.ones_like(token_ids, dtype=torch.bool),
        segments=tuple(Segment(trunk=len(row)) for row in rows),
    )


def random_rows(vocab_size: int = 97) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(vocab_size, (length,), generator=generator) for length in LENGTHS]


def randomise(module: torch.nn.Module) -> None:
    """Every parameter away from its initial value: norms are no longer 1, biases no longer 0."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * noise if "norm" in name else 0.15 * noise)


def theirs(name: str) -> Any:
    fields = {**SIZES, **CONFIGS[name]}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields))
    randomise(model)
    return model.eval()


@torch.no_grad()
def assert_same_logits(ours: Any, model: Any) -> None:
    rows = random_rows()
    got = ours.logits(ours.hidden(packed(rows))).split(list(LENGTHS))
    for row, logits in zip(rows, got, strict=True):
        expected = model(row[None]).logits[0]
        assert expected.std() > 0.1  # else the comparison says nothing
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_their_folder_gives_their_logits(name: str, tmp_path: Path) -> None:
    model = theirs(name)
    model.save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    assert isinstance(ours, Decoder)
    assert_same_logits(ours, model)


@pytest.mark.parametrize("name", CONFIGS)
def test_our_folder_opens_with_transformers(name: str, tmp_path: Path) -> None:
    config = config_from_dict({**SIZES, **CONFIGS[name]})
    ours = init_model(config, seed=0)
    randomise(ours)
    save_model(ours, tmp_path)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert_same_logits(ours, model)
    assert config_from_dict(json.loads((tmp_path / "config.json").read_text())) == config


def test_shards_in_both_directions(tmp_path: Path) -> None:
    model = theirs("qwen2")
    model.save_pretrained(tmp_path / "theirs", max_shard_size="40KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 2
    ours = load_model(tmp_path / "theirs")
    assert_same_logits(ours, model)
    save_model(ours, tmp_path / "ours", max_shard_bytes=40_000)
    files = list((tmp_path / "ours").glob("*.safetensors"))
    assert len(files) > 2
    assert all(file.stat().st_size < 45_000 for file in files)
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    assert_same_logits(ours, again)
    assert weight_hash(load_model(tmp_path / "ours")) == weight_hash(ours)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "llama-biases", "qwen3"])
def test_round_trip_keeps_every_bit_and_every_field(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    theirs(name).to(dtype).save_pretrained(tmp_path / "one")
    config = json.loads((tmp_path / "one" / "config.json").read_text())
    config |= {"eos_token_id": [2, 5], "a_field_of_theirs": {"kept": True}}
    (tmp_path / "one" / "config.json").write_text(json.dumps(config))
    model = load_model(tmp_path / "one")
    assert isinstance(model, Decoder)
    assert model.config.eos_token_id == 2
    save_model(model, tmp_path / "two")
    assert json.loads((tmp_path / "two" / "config.json").read_text()) == config
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("one", "two"))
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert value.dtype == after[key].dtype == dtype
        assert torch.equal(value.view(torch.uint8), after[key].view(torch.uint8)), key
    generation = [json.loads((tmp_path / folder / "generation_config.json").read_text()) for folder in ("one", "two")]
    assert generation[0] == generation[1]


def test_masters_replace_the_low_precision_copy(tmp_path: Path) -> None:
    config = config_from_dict({**SIZES, **CONFIGS["qwen3-biases"]})
    masters = init_model(config, seed=3)
    randomise(masters)
    low = Decoder(config).to(torch.bfloat16)
    low.load_state_dict(masters.state_dict())
    assert weight_hash(low) != weight_hash(masters)
    save_model(low, tmp_path, weights=dict(masters.named_parameters()))
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float32"
    assert weight_hash(load_model(tmp_path)) == weight_hash(masters)
    assert weight_hash(load_model(tmp_path, dtype=torch.bfloat16)) == weight_hash(low)
    with pytest.raises(ValueError, match=r"weights\['head'\] is no parameter of the Decoder"):
        save_model(low, tmp_path, weights={"head": torch.zeros(1)})
    with pytest.raises(ValueError, match="has shape \\(3,\\), not"):
        save_model(low, tmp_path, weights={"final_norm.weight": torch.zeros(3)})


def test_both_spellings_of_the_rotary_fields() -> None:
    scaling = {key: value for key, value in LLAMA3.items() if key != "rope_theta"}
    new = config_from_dict({**SIZES, "model_type": "llama", "rope_parameters": {**scaling, "rope_theta": 5e5}})
    for old in (scaling, {"type" if key == "rope_type" else key: value for key, value in scaling.items()}):
        assert config_from_dict({**SIZES, "model_type": "llama", "rope_theta": 5e5, "rope_scaling": old}) == new
    assert new.rope_theta == 5e5
    assert new.rope_scaling == RopeScaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
    )
    # A reader that knows only the old spelling must find it, or it would silently take theta 10000.
    assert config_to_dict(new)["rope_theta"] == 5e5
    # What a config.json leaves out is its family's own default.
    assert config_from_dict({**SIZES, "model_type": "smollm3"}).rope_theta == 2e6
    assert config_from_dict({**SIZES, "model_type": "llama"}).rope_theta == 1e4


def test_window_that_cuts_nothing_off_is_accepted() -> None:
    wide = {**SIZES, "model_type": "mistral", "sliding_window": 128}
    assert config_from_dict(wide) == config_from_dict({**wide, "sliding_window": None})
    unused = {**SIZES, "model_type": "qwen2", "sliding_window": 8, "use_sliding_window": False}
    assert config_from_dict(unused).num_layers == 2
    above = {**unused, "use_sliding_window": True, "max_window_layers": 2}  # only layers from the second on: none
    assert config_from_dict(above).num_layers == 2


UNSUPPORTED = {
    "hidden_act": ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
    "quantisation": ("llama", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config=.*gptq"),
    "experts": ("llama", {"num_local_experts": 8}, "num_local_experts=8"),
    "linear rope": ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type='linear'"),
    "yarn": ("qwen2", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_type='yarn'"),
    "new rope": ("qwen3", {"rope_parameters": {"rope_type": "spiral"}}, "rope_type='spiral'"),
    "partial rope": ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    "mistral window": ("mistral", {"sliding_window": 16}, "sliding_window=16"),
    "mistral default": ("mistral", {"max_position_embeddings": 32768}, "sliding_window=4096"),
    "qwen window": (
        "qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}, "sliding_window=16",
    ),
    "layer types": ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types=.*sliding"),
    "smollm3 window": ("smollm3", {
        "use_sliding_window": True, "sliding_window": 16, "no_rope_layers": [1, 0],
    }, "sliding_window=16"),
    "family": ("mixtral", {}, "model_type='mixtral' is not one of llama"),
    "type": ("llama", {"hidden_size": "wide"}, "hidden_size"),
    "short nope": ("smollm3", {"no_rope_layers": [1], "layer_types": ["full_attention"] * 2}, "no_rope_layers has 1"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_unsupported_fields_are_named(case: str) -> None:
    model_type, fields, match = UNSUPPORTED[case]
    with pytest.raises(ValueError, match=match):
        config_from_dict({**SIZES, "model_type": model_type, **fields}, "folder/config.json")


def test_dropout_is_not_applied_and_said_so() -> None:
    with pytest.warns(UserWarning, match=r"attention_dropout=0\.1 is not applied"):
        config_from_dict({**SIZES, "model_type": "llama", "attention_dropout": 0.1})


def test_config_that_a_family_cannot_express_is_refused() -> None:
    config = config_from_dict({**SIZES, **CONFIGS["qwen3"]})
    fields = {name: getattr(config, name) for name in config.__slots__}
    with pytest.raises(ValueError, match=r"llama config\.json cannot express qk_norm=True"):
        config_to_dict(ModelConfig(**{**fields, "model_type": "llama"}))


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral", "smollm3"])
def test_scalar_model_opens_as_sequence_classifier(name: str, tmp_path: Path) -> None:
    backbone = init_model(config_from_dict({**SIZES, **CONFIGS[name]}), seed=0)
    randomise(backbone)
    ours = add_scalar_head(backbone, seed=1)
    save_scalar_model(ours, tmp_path)
    model, info = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert model.num_labels == 1
    rows = [row.clamp(min=1) for row in random_rows()]  # 0 is the padding that transformers looks for
    width = max(LENGTHS)
    padded = torch.stack([torch.cat([row, row.new_zeros(width - len(row))]) for row in rows])
    with torch.no_grad():
        expected = model(padded, attention_mask=(padded != 0).long()).logits[:, 0]
        got = ours.scores_R(packed(rows))[torch.tensor(LENGTHS).cumsum(0) - 1]
    assert expected.std() > 0.1
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert weight_hash(load_scalar_model(tmp_path)) == weight_hash(ours)


def test_scalar_model_opens_their_classifier(tmp_path: Path) -> None:
    config = AutoConfig.for_model(**{**SIZES, **CONFIGS["llama"]}, num_labels=1)
    model = AutoModelForSequenceClassification.from_config(config)
    randomise(model)
    model.save_pretrained(tmp_path)
    row = random_rows()[2].clamp(min=1)
    with torch.no_grad():
        got = load_scalar_model(tmp_path, frozen=True).scores_R(packed([row]))[-1]
        torch.testing.assert_close(got, model(row[None]).logits[0, 0], rtol=1e-5, atol=1e-5)
