"""The C++ decode step against the same model in float32, run whole and teacher-forced by the ordinary code."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from strop.models.config import ModelConfig
from strop.models.decoder import Decoder, init_model
from strop.models.lora import LoraConfig, attach, fresh_parts
from strop.models.native import can_decode
from strop.native import build, products
from strop.types import PackedBatch, Segment

SHAPE = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 80, "num_layers": 3}
MODELS = {
    "llama": ModelConfig(**SHAPE, num_heads=2, num_kv_heads=2, head_dim=32),
    "three heads share": ModelConfig(**SHAPE, num_heads=6, num_kv_heads=2, head_dim=64, norm_eps=1e-3),
    "all heads share": ModelConfig(**SHAPE, num_heads=7, num_kv_heads=1, head_dim=32, tie_embeddings=False),
    "qwen2": ModelConfig(**SHAPE, num_heads=4, num_kv_heads=2, head_dim=32, qkv_bias=True, model_type="qwen2"),
    "qwen3": ModelConfig(**SHAPE, num_heads=4, num_kv_heads=2, head_dim=128, qk_norm=True, model_type="qwen3"),
    "every bias": ModelConfig(
        **SHAPE, num_heads=2, num_kv_heads=1, head_dim=96, qkv_bias=True, output_bias=True, mlp_bias=True
    ),
    "smollm3": ModelConfig(**SHAPE, num_heads=4, num_kv_heads=4, head_dim=32, layers_without_rope=frozenset({0, 2})),
}


def make_model(config: ModelConfig) -> Decoder:
    model = init_model(config, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.to(torch.bfloat16)


def needs_kernels() -> None:
    reason = build.why_unavailable()
    if reason is not None and not reason.startswith("there is no C++ compiler"):
        pytest.skip(reason)  # another processor; a missing compiler is a failure
    assert build.library() is not None, reason


def whole(model: Decoder, rows: list[list[int]]) -> list[Tensor]:
    """Hidden states of every position of every row, by the ordinary forward pass."""
    ids = torch.tensor([token for row in rows for token in row])
    batch = PackedBatch(
        token_ids_T=ids,
        labels_T=ids,
        loss_mask_T=torch.ones_like(ids, dtype=torch.bool),
        segments=tuple(Segment(trunk=len(row)) for row in rows),
    )
    return list(model.hidden(batch).detach().float().split([len(row) for row in rows]))


def decoded(model: Decoder, rows: list[list[int]], prompts: list[int]) -> tuple[list[Tensor], list[Tensor]]:
    """Hidden states and logits of the positions after each row's prompt, decoded side by side."""
    steps = len(rows[0]) - prompts[0]
    cache = model.new_cache(num_slots=len(rows) + 1, max_length=max(map(len, rows)))
    model.prefill([row[:n] for row, n in zip(rows, prompts, strict=True)], cache, range(len(rows)))
    hidden, logits = [], []
    for step in range(steps):
        tokens = torch.tensor([row[n + step] for row, n in zip(rows, prompts, strict=True)])
        hidden.append(model.decode_step(tokens, cache))
        logits.append(model.logits(hidden[-1]))
    assert cache.lengths_S[: len(rows)].tolist() == [len(row) for row in rows]
    return [torch.stack(hidden, 1).float(), torch.stack(logits, 1).float()]


@pytest.mark.parametrize("num_rows", [1, 3, 14, 15, 33])
@pytest.mark.parametrize("name", MODELS)
def test_the_step_is_as_near_to_float32_as_torch_in_bfloat16(
    name: str, num_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs_kernels()
    model = make_model(MODELS[name])
    generator = torch.Generator().manual_seed(2)
    prompts = [1 + (5 * row) % 41 for row in range(num_rows)]  # ragged, across the boundaries of 16 and 32 keys
    rows = [torch.randint(0, 96, (length + 9,), generator=generator).tolist() for length in prompts]
    exact = make_model(MODELS[name]).float()
    expected = torch.stack([states[-9:] for states in whole(exact, rows)])
    with model.decoding(num_rows):
        assert model._native is not None
        native, native_logits = decoded(model, rows, prompts)
    assert model._native is None
    plain, _ = decoded(model, rows, prompts)

    def error(states: Tensor) -> float:
        return float((states - expected).norm() / expected.norm())

    assert error(native) < 1.25 * error(plain)
    assert error(native) < 0.03
    # The worst single row too: a fault in one slot must not drown in the others.
    worst = [(states - expected).norm(dim=-1).max() / expected.norm(dim=-1).mean() for states in (native, plain)]
    assert worst[0] < 1.5 * worst[1]
    head = model.lm_head_weight.float()
    torch.testing.assert_close(native_logits, native @ head.T, rtol=0.01, atol=0.02)


def test_a_copy_as_of_now() -> None:
    needs_kernels()
    model = make_model(MODELS["qwen2"])
    rows = [[1, 2, 3, 4, 5, 6]]
    with model.decoding(1):
        before, _ = decoded(model, rows, [2])
        with torch.no_grad():
            model.layers[2].mlp.gate_up.weight.mul_(-1)  # behind the last keys: the prompt stays as it was
        same, _ = decoded(model, rows, [2])
    with model.decoding(1):
        after, _ = decoded(model, rows, [2])
    assert torch.equal(before, same)
    assert not torch.allclose(before, after, atol=0.01)


def test_a_lora_adapter_is_in_the_packed_weights() -> None:
    needs_kernels()
    model = make_model(MODELS["qwen2"])
    parts = fresh_parts(model, LoraConfig(rank=4), seed=0)
    generator = torch.Generator().manual_seed(3)
    for name, (A, B, scale) in parts.items():
        parts[name] = A, 0.2 * torch.randn(B.shape, generator=generator), scale
    rows = [[1, 2, 3, 4, 5, 6]]
    with model.decoding(1):
        base, _ = decoded(model, rows, [2])
    attach(model, parts)
    expected = whole(model, rows)[0][2:]
    with model.decoding(1):
        adapted, _ = decoded(model, rows, [2])
    assert (adapted[0] - expected).norm() < 0.03 * expected.norm() < 0.1 * (base[0] - expected).norm()


def test_bits_do_not_depend_on_the_number_of_threads() -> None:
    needs_kernels()
    model = make_model(MODELS["three heads share"])
    rows = [[row, 2, 3, 4, 5] for row in range(17)]
    results = []
    threads = torch.get_num_threads()
    try:
        for number in (1, 2, 3):
            cache = model.new_cache(num_slots=17, max_length=8)
            torch.set_num_threads(1)
            model.prefill(rows, cache, range(17))  # torch's own products may round differently
            torch.set_num_threads(number)
            with model.decoding(17):
                results.append(model.decode_step(torch.arange(17), cache))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_models_that_it_does_not_fit_decode_as_before() -> None:
    narrow = ModelConfig(**SHAPE, num_heads=4, num_kv_heads=2, head_dim=16)
    assert not can_decode(make_model(narrow))
    assert not can_decode(make_model(MODELS["llama"]).float())
    with make_model(narrow).decoding(2):
        pass


def test_without_a_compiler_the_reason_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_cpu_features", lambda: frozenset(build.REQUIRED))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert build.why_unavailable() == "there is no C++ compiler (install g++)"
    monkeypatch.setenv("STROP_NATIVE", "0")
    assert build.why_unavailable() == "STROP_NATIVE=0 is set"
    monkeypatch.delenv("STROP_NATIVE")
    monkeypatch.setattr(build, "_cpu_features", lambda: frozenset())
    assert build.why_unavailable() == "the CPU lacks avx512_bf16, avx512_vnni, avx512bw, avx512vl"


def test_sources_that_do_not_compile_are_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_kernels()
    (tmp_path / "broken.cpp").write_text("int broken( {")
    monkeypatch.setattr(build, "FOLDER", tmp_path)
    monkeypatch.setattr(build, "_cache_folder", lambda: tmp_path / "cache")
    with pytest.warns(UserWarning, match="do not compile"):
        assert build.library.__wrapped__() is None
    assert subprocess.run(["ls", tmp_path / "cache"], capture_output=True, text=True).stdout == ""


@pytest.mark.parametrize("in_int8", [False, True], ids=["bf16", "int8"])
@pytest.mark.parametrize("name", ["three heads share", "qwen2", "every bias"])
def test_a_prefill_from_the_packed_weights_has_the_same_bits(name: str, in_int8: bool) -> None:
    needs_kernels()
    model = make_model(dataclasses.replace(MODELS[name], intermediate_size=96))
    rows = [[3 + (7 * row + i) % 90 for i in range(9 + 13 * row)] for row in range(7)]

    def prefilled() -> list[Tensor]:
        cache = model.new_cache(num_slots=len(rows), max_length=100)
        hidden = model.prefill(rows, cache, range(len(rows)))
        used = [(x[:, slot, :, : len(row)]) for slot, row in enumerate(rows) for x in (cache.keys, cache.values)]
        return [hidden, *(part.clone() for part in used)]

    with products.int8(in_int8):
        expected = prefilled()
        with model.decoding(len(rows)):
            before = prefilled()
            with torch.no_grad():  # it is a copy as of now
                for parameter in (model.layers[1].mlp.gate_up.weight, model.layers[0].attention.qkv.weight):
                    parameter.neg_()
            assert all(map(torch.equal, prefilled(), before))
        after = prefilled()
    assert all(map(torch.equal, before, expected))
    assert not torch.equal(after[0], expected[0])
