"""Our adapters against the peft library: folders opened in both directions, with the same logits, losslessly."""

from __future__ import annotations

import json
import math
import random
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from strop.models.adapters import add_adapter, base_folder, is_adapter
from strop.models.config import ModelConfig
from strop.models.decoder import Decoder, init_model
from strop.models.loading import load_model, save_model
from strop.models.lora import TARGET_MODULES, LoraConfig, adapted_linears
from strop.types import PackedBatch, Segment

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of other libraries that it imports
    import peft

SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    "mistral": {"model_type": "mistral", "sliding_window": None, "num_key_value_heads": 1},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "num_key_value_heads": 4},
    "smollm3": {"model_type": "smollm3", "no_rope_layers": [1, 0, 1]},
}
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers, where peft meets it


def their_base(family: str, folder: Path) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**SIZES, **FAMILIES[family]}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape)
            parameter.copy_(1 + 0.3 * noise if "norm" in name else 0.15 * noise)
    model.save_pretrained(folder)
    return model.eval()


def draw(seed: int) -> tuple[int, float, list[str], bool]:
    """(rank, alpha, target modules, rslora)"""
    rng = random.Random(seed)
    targets = rng.sample(TARGET_MODULES, rng.randint(1, len(TARGET_MODULES)))
    return rng.choice([1, 2, 3, 8]), rng.choice([1, 4, 7.5, 32]), targets, rng.random() < 0.5


@torch.no_grad()
def randomise_adapter(model: Any, scale: float = 2.0) -> None:
    """Away from the beginning, where B is 0 and an adapter that is ignored would not be seen.

    `scale` times B A is then about as large as 0.05: where attention saturates, logits of float32 differ by more
    than their comparison allows, whoever computes them.
    """
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name or ".adapter." in name:
            rank = min(parameter.shape)
            std = math.sqrt(0.05 / scale / math.sqrt(rank))
            parameter.copy_(std * torch.randn(parameter.shape, generator=generator))


IDS = torch.randint(97, (40,), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def our_logits(model: Any) -> torch.Tensor:
    batch = PackedBatch(
        token_ids_T=IDS, labels_T=IDS, loss_mask_T=torch.ones(40, dtype=torch.bool), segments=(Segment(trunk=40),)
    )
    return model.logits(model.hidden(batch))


@torch.no_grad()
def their_logits(model: Any) -> torch.Tensor:
    return model(IDS[None]).logits[0]


def assert_adapted(found: torch.Tensor, expected: torch.Tensor, base: torch.Tensor) -> None:
    assert (expected - base).abs().max() > 0.05, "the adapter does nothing: the comparison says nothing"
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


PATTERNS: list[dict[str, Any]] = [
    {"target_modules": "all-linear", "r": 4, "lora_alpha": 8},
    {"target_modules": r".*\.(1|2)\.(self_attn|mlp)\.(q|down)_proj", "r": 2, "lora_alpha": 5},
    {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0, 2], "r": 2, "lora_alpha": 8},
    {
        "target_modules": ["v_proj", "o_proj"], "r": 2, "lora_alpha": 4, "rank_pattern": {"v_proj": 5},
        "alpha_pattern": {"1.self_attn.o_proj": 6},
    },
]  # fmt: skip


@pytest.mark.parametrize("settings", [*range(6), *PATTERNS], ids=lambda value: str(value)[:24])
@pytest.mark.parametrize("family", FAMILIES)
def test_their_adapter_gives_their_logits_and_is_written_back_as_it_was(
    family: str, settings: int | dict[str, Any], tmp_path: Path
) -> None:
    base = their_base(family, tmp_path / "base")
    plain = their_logits(base)
    if isinstance(settings, int):
        rank, alpha, targets, rslora = draw(settings)
        settings = {"r": rank, "lora_alpha": alpha, "target_modules": targets, "use_rslora": rslora}
    reopened = AutoModelForCausalLM.from_pretrained(tmp_path / "base")  # so that peft knows where the base lies
    theirs = peft.get_peft_model(reopened, peft.LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
    scale = settings["lora_alpha"] / (math.sqrt(settings["r"]) if settings.get("use_rslora") else settings["r"])
    randomise_adapter(theirs, scale)
    theirs.save_pretrained(tmp_path / "theirs")
    expected = their_logits(theirs)
    assert is_adapter(tmp_path / "theirs") and base_folder(tmp_path / "theirs") == tmp_path / "base"
    kept = load_model(tmp_path / "theirs", adapter="keep")
    assert_adapted(our_logits(kept), expected, plain)
    assert_adapted(our_logits(load_model(tmp_path / "theirs")), expected, plain)
    save_model(kept, tmp_path / "ours")
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "ours"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    configs = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("theirs", "ours")]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("family", FAMILIES)
def test_our_adapter_opens_with_peft_and_with_transformers(family: str, seed: int, tmp_path: Path) -> None:
    base = their_base(family, tmp_path / "base")
    plain = their_logits(base)
    rank, alpha, targets, rslora = draw(seed)
    ours = load_model(tmp_path / "base")
    assert isinstance(ours, Decoder)
    config = LoraConfig(rank=rank, alpha=alpha, target_modules=tuple(targets), rslora=rslora)
    add_adapter(ours, config, seed=0, base=tmp_path / "base")
    torch.testing.assert_close(our_logits(ours), plain, rtol=1e-5, atol=1e-5)  # at the beginning it changes nothing
    randomise_adapter(ours, config.scale(rank=rank, alpha=alpha))
    save_model(ours, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    found = our_logits(ours)
    assert_adapted(found, their_logits(theirs), plain)
    assert_adapted(found, their_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()), plain)
    theirs.save_pretrained(tmp_path / "again")
    assert_adapted(our_logits(load_model(tmp_path / "again")), found, plain)


def test_the_gradients_are_peft_s(tmp_path: Path) -> None:
    their_base("qwen3", tmp_path / "base")
    ours = load_model(tmp_path / "base")
    assert isinstance(ours, Decoder)
    add_adapter(ours, LoraConfig(rank=3, alpha=5), seed=0, base=tmp_path / "base")
    randomise_adapter(ours)
    save_model(ours, tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True).eval()
    theirs(IDS[None]).logits[0].square().mean().backward()
    batch = PackedBatch(
        token_ids_T=IDS, labels_T=IDS, loss_mask_T=torch.ones(40, dtype=torch.bool), segments=(Segment(trunk=40),)
    )
    ours.logits(ours.hidden(batch)).square().mean().backward()
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters() if parameter.grad is not None}
    adapters = [linear.adapter for linear in adapted_linears(ours).values()]
    found = {id(parameter): parameter.grad for adapter in adapters if adapter for parameter in adapter.parameters()}
    assert len(expected) == len(found) == 2 * 7 * 3
    for linear_name, linear in adapted_linears(ours).items():
        assert linear.adapter is not None
        layer = linear_name.split(".")[1]
        for leaf, part in linear.adapter.parts().items():
            block = "mlp" if leaf in ("gate_proj", "up_proj", "down_proj") else "self_attn"
            for which, parameter in (("A", part.A), ("B", part.B)):
                name = f"base_model.model.model.layers.{layer}.{block}.{leaf}.lora_{which}.default.weight"
                gradient = expected[name]
                assert gradient is not None and parameter.grad is not None and gradient.abs().max() > 0
                torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)
    assert all(p.grad is None for name, p in ours.named_parameters() if ".adapter." not in name)


def test_low_precision_base_keeps_float32_adapters(tmp_path: Path) -> None:
    save_model(
        init_model(
            ModelConfig(vocab_size=97, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2,
                        head_dim=8),
            seed=0,
        ),
        tmp_path / "base",
    )  # fmt: skip
    ours = load_model(tmp_path / "base", dtype=torch.bfloat16)
    assert isinstance(ours, Decoder)
    add_adapter(ours, LoraConfig(), seed=0, base=tmp_path / "base")
    randomise_adapter(ours)
    dtypes = {(".adapter." in name, parameter.dtype) for name, parameter in ours.named_parameters()}
    assert dtypes == {(False, torch.bfloat16), (True, torch.float32)}
    save_model(ours, tmp_path / "adapter")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.bfloat16).eval()
    exact = our_logits(load_model(tmp_path / "adapter", adapter="keep"))
    plain = our_logits(load_model(tmp_path / "base"))
    assert (plain - exact).abs().max() > 0.5 * exact.abs().max()
    # Each within bfloat16's rounding of the exact logits.
    for logits in (our_logits(ours), their_logits(theirs)):
        assert (logits.float() - exact).abs().max() < 0.05 * exact.abs().max()
