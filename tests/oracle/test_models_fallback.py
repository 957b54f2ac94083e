"""Other architectures through transformers: the same numbers as transformers itself, packed, cached and saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from strop.models.fallback import FallbackModel
from strop.models.interface import CausalLM
from strop.models.loading import load_model, save_model, weight_hash
from strop.types import PackedBatch, Segment

CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gpt_neox": {
        "vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 64,
    },
    "gemma2": {
        "vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 6, "final_logit_softcapping": 2.0,
        "max_position_embeddings": 64,
    },
    # phi has a bias on its head
    "phi": {
        "vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 64,
    },
    "qwen3_moe": {
        "vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 16, "num_experts": 4,
        "num_experts_per_tok": 2, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 8, "max_position_embeddings": 64,
    },
}  # fmt: skip
SEGMENTS = (
    Segment(trunk=9),
    Segment(trunk=4, branches=(3, 8, 1)),
    Segment(trunk=0, branches=(5,)),
    Segment(trunk=1),
    Segment(trunk=2, branches=(6,)),
)


def theirs(name: str) -> Any:
    torch.manual_seed(0)
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **tokens, **CONFIGS[name]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn(parameter.shape))
    return model.eval()


def load(folder: Path, **options: Any) -> FallbackModel:
    with pytest.warns(UserWarning, match="runs through transformers, several times slower"):
        model = load_model(folder, **options)
    assert isinstance(model, FallbackModel)
    return model


def tree() -> tuple[PackedBatch, list[list[int]]]:
    """A packed batch, and the packed positions of each of its rows when the trunk is written out."""
    rows, start = [], 0
    for segment in SEGMENTS:
        trunk = list(range(start, start + segment.trunk))
        position = start + segment.trunk
        for length in segment.branches:
            rows.append([*trunk, *range(position, position + length)])
            position += length
        if not segment.branches:
            rows.append(trunk)
        start = position
    token_ids = torch.randint(97, (start,), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(token_ids, dtype=torch.bool)
    return PackedBatch(token_ids_T=token_ids, labels_T=token_ids, loss_mask_T=mask, segments=SEGMENTS), rows


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_of_packed_trees(name: str, tmp_path: Path) -> None:
    model = theirs(name)
    model.save_pretrained(tmp_path)
    ours = load(tmp_path)
    assert isinstance(ours, CausalLM)
    batch, rows = tree()
    with torch.no_grad():
        got = ours.logits(ours.hidden(batch))
        for row in rows:
            expected = model(batch.token_ids_T[row][None]).logits[0]
            assert expected.std() > 0.1
            torch.testing.assert_close(got[row], expected, rtol=1e-5, atol=1e-5)
    assert ours.config.vocab_size == 97
    assert ours.config.max_position_embeddings == 64


@pytest.mark.parametrize("name", CONFIGS)
def test_decoding_equals_the_whole_row(name: str, tmp_path: Path) -> None:
    model = theirs(name)
    model.save_pretrained(tmp_path)
    ours = load(tmp_path, frozen=True)
    generator = torch.Generator().manual_seed(2)
    prompts = [torch.randint(97, (length,), generator=generator).tolist() for length in (3, 9)]
    cache = ours.new_cache(num_slots=3, max_length=14)
    ours.prefill([prompts[1][:4]], cache, [1])
    hidden = ours.prefill([prompts[0], prompts[1][4:]], cache, [0, 1], [0, 4])
    cache.move(0, 2)  # slot 2 goes on from the first prompt on its own
    hidden = torch.stack([hidden[0], hidden[1], hidden[0]])
    texts = [list(prompts[0]), list(prompts[1]), list(prompts[0])]
    for _ in range(4):
        with torch.no_grad():
            for text, state in zip(texts, hidden, strict=True):
                expected = model(torch.tensor([text])).logits[0, -1]
                torch.testing.assert_close(ours.logits(state), expected, rtol=1e-5, atol=1e-5)
        tokens = torch.randint(97, (3,), generator=generator)
        hidden = ours.decode_step(tokens, cache)
        for text, token in zip(texts, tokens.tolist(), strict=True):
            text.append(token)
    assert cache.lengths_S.tolist() == [7, 13, 7]
    ours.decode_step(tokens, cache)
    with pytest.raises(ValueError, match="holds 14 tokens per slot; a sequence wants 15"):
        ours.decode_step(tokens, cache)


@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip_with_masters(name: str, tmp_path: Path) -> None:
    theirs(name).save_pretrained(tmp_path / "one")
    masters = load(tmp_path / "one")
    low = load(tmp_path / "one", dtype=torch.bfloat16)
    assert weight_hash(low) != weight_hash(masters)
    save_model(low, tmp_path / "two", weights=dict(masters.named_parameters()))
    assert json.loads((tmp_path / "two" / "config.json").read_text())["dtype"] == "float32"
    again = load(tmp_path / "two")
    assert again.dtype == torch.float32
    assert weight_hash(again) == weight_hash(masters)


def test_dropout_stays_off(tmp_path: Path) -> None:
    theirs("gpt2").save_pretrained(tmp_path)
    ours = load(tmp_path).train()
    assert ours.model.config.resid_pdrop == 0.1
    batch, _ = tree()
    assert torch.equal(ours.hidden(batch), ours.hidden(batch))


def test_gradients_of_a_tree_equal_those_of_its_rows(tmp_path: Path) -> None:
    theirs("gpt2").save_pretrained(tmp_path)
    ours = load(tmp_path, dtype=torch.float64)
    batch, rows = tree()
    weight = torch.randn(len(batch.token_ids_T), 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    (ours.hidden(batch) * weight).sum().backward()
    got = {name: parameter.grad for name, parameter in ours.named_parameters()}
    ours.zero_grad()
    seen: set[int] = set()
    for row in rows:
        counts = torch.tensor([position not in seen for position in row])[:, None]  # a trunk counts once
        seen.update(row)
        hidden = ours.model.base_model(batch.token_ids_T[row][None]).last_hidden_state[0]
        (hidden * weight[row] * counts).sum().backward()
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, rtol=1e-9, atol=1e-9)


def test_logits_computed_another_way_are_refused(tmp_path: Path) -> None:
    sizes = {key: value for key, value in CONFIGS["gemma2"].items() if "soft" not in key and key != "sliding_window"}
    config = AutoConfig.for_model("granite", logits_scaling=4.0, **sizes)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="computes its logits in a way"):
        load_model(tmp_path)


def test_folder_problems_are_named(tmp_path: Path) -> None:
    theirs("gpt2").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "n_layer": 3}))
    with pytest.warns(UserWarning), pytest.raises(ValueError, match=r"missing_keys transformer\.h\.2\."):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "n_layer": 1}))
    with pytest.warns(UserWarning), pytest.raises(ValueError, match=r"unexpected_keys (transformer\.)?h\.1\."):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="quantization_config is not supported"):
        load_model(tmp_path)


def test_what_it_cannot_compute_again_is_refused(tmp_path: Path):
    theirs("gpt2").save_pretrained(tmp_path)
    model = load(tmp_path)
    model.set_checkpointing("some")
    model.set_checkpointing("none")
    with pytest.raises(ValueError, match='gradient_checkpointing = "all" is not supported for GPT2LMHeadModel'):
        model.set_checkpointing("all")
