"""Products in 8 bits against what tile8.h says of them; rollouts against the trainer, which must agree to the bit."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from strop.models import ModelConfig, compute_in, init_model, load_model, save_model
from strop.models.heads import add_scalar_head, load_scalar_model, save_scalar_model
from strop.models.precision import name_of
from strop.native import build, kernels, products
from strop.objectives.logprobs import linear_self_certainty
from strop.rewards.judge_backends import LocalModel
from strop.types import PackedBatch, Segment

BLOCK = 64
HALF_ULP = 2.0**-8
"""Of bfloat16, relative: what rounding once may change."""


@pytest.fixture(autouse=True)
def needs_kernels() -> Iterator[None]:
    reason = build.why_unavailable()
    if reason is not None and not reason.startswith("there is no C++ compiler"):
        pytest.skip(reason)  # another processor; a missing compiler is a failure
    assert build.library() is not None, reason
    yield
    products.set_int8(False)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def rounded(x: Tensor, dim: int) -> Tensor:
    """x as 8 bits would have it: each block of 64 along dim in 255 steps from -max to max, ties to even."""
    x = x.float().transpose(dim, -1)
    blocks = torch.nn.functional.pad(x, (0, -x.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))
    largest = blocks.abs().amax(-1, keepdim=True)
    steps = (blocks * (torch.tensor(127.0) / largest.where(largest > 0, 1.0))).round()  # many lie on an edge
    return (steps.double() * (largest / 127).double()).flatten(-2)[..., : x.shape[-1]].transpose(dim, -1)


def assert_equal_but_for_rounding(actual: Tensor, expected: Tensor, exact: Tensor) -> None:
    """Rounded once from float sums."""
    error = (actual.double() - expected).abs()
    assert (error <= HALF_ULP * expected.abs() + 1e-5 * expected.abs().max()).all()
    # It is no other precision by mistake: as far from the exact product as 8 bits are.
    distance = [float((y.double() - exact).norm() / exact.norm()) for y in (actual, expected)]
    assert distance[1] / 1.5 < distance[0] < 0.02


@pytest.mark.parametrize(
    "shape", [(1, 64, 32), (7, 32, 64), (33, 64, 96), (45, 576, 32), (129, 96, 1536), (333, 1536, 576)], ids=str
)
def test_products_are_those_of_rounded_operands(shape: tuple[int, int, int]) -> None:
    num_tokens, num_inputs, num_outputs = shape
    x, weight = random(num_tokens, num_inputs, seed=1), random(num_outputs, num_inputs, seed=2)
    grad, bias = random(num_tokens, num_outputs, seed=3), random(num_outputs, seed=4)
    with products.int8():
        found = products.linear(x, weight), products.input_gradient(grad, weight), products.weight_gradient(grad, x)
        with_bias = products.linear(x, weight, bias)
    expected = (
        rounded(x, 1) @ rounded(weight, 1).T,
        rounded(grad, 1) @ rounded(weight, 0),
        rounded(grad, 0).T @ rounded(x, 0),
    )
    exact = x.double() @ weight.double().T, grad.double() @ weight.double(), grad.double().T @ x.double()
    for number in range(2 if num_tokens == 1 else 3):  # one token's gradient is exact but for one rounding
        assert_equal_but_for_rounding(found[number], expected[number], exact[number])
    assert_equal_but_for_rounding(with_bias, expected[0] + bias, exact[0] + bias)


def test_a_large_entry_spoils_only_its_own_block() -> None:
    x, weight = random(40, 256, seed=1), random(32, 256, seed=2)
    x[3, 70] = 1000.0
    with products.int8():
        spoilt = products.linear(x, weight)
    small = torch.cat([x[:, :64], x[:, 128:]], 1).double() @ torch.cat([weight[:, :64], weight[:, 128:]], 1).double().T
    error = (spoilt[3].double() - rounded(x[3:4, 64:128], 1)[0] @ rounded(weight[:, 64:128], 1).T - small[3]).abs()
    assert error.max() < 0.05 * spoilt[3].abs().max()
    with products.int8():
        assert torch.equal(products.linear(x[4:], weight), spoilt[4:])


def test_zeros_and_tiny_entries_are_no_trouble() -> None:
    x, weight = torch.zeros(40, 128).bfloat16(), random(32, 128, seed=2)
    x[1] = 1e-38
    with products.int8():
        assert torch.equal(products.linear(x, weight)[0], torch.zeros(32).bfloat16())
        assert products.linear(x, weight).isfinite().all()


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_finite_stays_so(value: float) -> None:
    """A run counts on it to see that its loss has blown up."""
    x, weight, grad = random(40, 128, seed=1), random(32, 128, seed=2), random(40, 32, seed=3)
    x[5, 99] = value
    with products.int8():
        y, dweight = products.linear(x, weight), products.weight_gradient(grad, x)
    assert not y[5].isfinite().any() and y[6].isfinite().all()
    assert not dweight[:, 99].isfinite().any() and dweight[:, 98].isfinite().all()


def test_results_do_not_depend_on_threads_or_on_other_rows() -> None:
    x, weight = random(500, 576, seed=1), random(960, 576, seed=2)
    before = torch.get_num_threads()
    try:
        results = []
        for num_threads in (1, 2, 5):
            torch.set_num_threads(num_threads)
            with products.int8():
                results.append(products.linear(x, weight))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    with products.int8():
        for rows in (1, 8, 33):
            assert torch.equal(products.linear(x[:rows], weight), results[0][:rows])


SHAPE = {"vocab_size": 96, "hidden_size": 96, "intermediate_size": 160, "num_layers": 3}
MODELS = {
    "llama": ModelConfig(**SHAPE, num_heads=2, num_kv_heads=2, head_dim=32),
    "three heads share": ModelConfig(**SHAPE, num_heads=6, num_kv_heads=2, head_dim=64, norm_eps=1e-3),
    "seven heads share": ModelConfig(**SHAPE, num_heads=7, num_kv_heads=1, head_dim=32, tie_embeddings=False),
    "qwen2": ModelConfig(**SHAPE, num_heads=4, num_kv_heads=2, head_dim=32, qkv_bias=True, model_type="qwen2"),
    "qwen3": ModelConfig(**SHAPE, num_heads=4, num_kv_heads=2, head_dim=128, qk_norm=True, model_type="qwen3"),
    "every bias": ModelConfig(
        **SHAPE, num_heads=2, num_kv_heads=1, head_dim=96, qkv_bias=True, output_bias=True, mlp_bias=True
    ),
    "smollm3": ModelConfig(**SHAPE, num_heads=4, num_kv_heads=4, head_dim=32, layers_without_rope=frozenset({0, 2})),
}


@pytest.mark.parametrize("in_int8", [False, True], ids=["bf16", "int8"])
@pytest.mark.parametrize("name", MODELS)
def test_a_rollout_sees_the_trainers_numbers_to_the_bit(name: str, in_int8: bool) -> None:
    """Prefill in two pieces and one decode step per token, against one packed forward pass with gradient."""
    model = init_model(MODELS[name], seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    model = model.to(torch.bfloat16)
    prompts = [
        3 + 7 * row for row in range(17)
    ]  # ragged, across the boundaries of 16, 32 and 64 keys; two or more tiles
    rows = [torch.randint(0, 96, (length + 9,), generator=generator).tolist() for length in prompts]
    with products.int8(in_int8):
        cache = model.new_cache(num_slots=len(rows), max_length=max(map(len, rows)))
        halves = [length // 2 for length in prompts]
        model.prefill([row[:half] for row, half in zip(rows, halves, strict=True)], cache, range(17))
        rests = [row[half:n] for row, half, n in zip(rows, halves, prompts, strict=True)]
        first = model.prefill(rests, cache, range(17), halves)
        steps = [first]
        with model.decoding(len(rows)):
            for step in range(9):
                tokens = torch.tensor([row[n + step] for row, n in zip(rows, prompts, strict=True)])
                steps.append(model.decode_step(tokens, cache))
            logits = model.logits(steps[-1])
        ids = torch.tensor([token for row in rows for token in row])
        batch = PackedBatch(
            token_ids_T=ids,
            labels_T=ids,
            loss_mask_T=torch.ones_like(ids, dtype=torch.bool),
            segments=tuple(Segment(trunk=len(row)) for row in rows),
        )
        trained = model.hidden(batch).detach().split([len(row) for row in rows])
        assert torch.equal(torch.stack(steps, 1), torch.stack([states[-10:] for states in trained]))
        whole = products.linear(torch.cat(trained), model.lm_head_weight.detach())
        last = torch.tensor([len(row) for row in rows]).cumsum(0) - 1
        assert torch.equal(logits, whole[last])


@pytest.mark.parametrize("num_rows", range(1, 17))
def test_a_decode_step_of_any_number_of_rows_gives_the_trainers_numbers(num_rows: int) -> None:
    """From 8 rows on there are two tiles, of one height or of two."""
    model = init_model(MODELS["three heads share"], seed=0, dtype=torch.bfloat16)
    ids = torch.randint(0, 96, (num_rows, 6), generator=torch.Generator().manual_seed(num_rows))
    batch = PackedBatch(
        token_ids_T=ids.flatten(),
        labels_T=ids.flatten(),
        loss_mask_T=torch.ones(ids.numel(), dtype=torch.bool),
        segments=(Segment(trunk=6),) * num_rows,
    )
    with products.int8(), torch.no_grad():
        cache = model.new_cache(num_slots=num_rows, max_length=6)
        model.prefill(ids[:, :5].tolist(), cache, range(num_rows))
        with model.decoding(num_rows):
            hidden = model.decode_step(ids[:, 5], cache)
            logits = model.logits(hidden)
        assert torch.equal(hidden, model.hidden(batch).view(num_rows, 6, -1)[:, 5])
        assert torch.equal(logits, model.logits(hidden))


def test_8_bits_are_near_to_bf16_and_nothing_else() -> None:
    model = init_model(MODELS["three heads share"], seed=0, dtype=torch.bfloat16)
    ids = torch.arange(90)
    batch = PackedBatch(
        token_ids_T=ids, labels_T=ids, loss_mask_T=torch.ones(90, dtype=torch.bool), segments=(Segment(trunk=90),)
    )
    with torch.no_grad():
        plain = model.hidden(batch)
        with products.int8():
            coarse = model.hidden(batch)
        again = model.hidden(batch)
    assert torch.equal(plain, again)
    assert 0.001 < (coarse - plain).float().norm() / plain.float().norm() < 0.05


def test_the_name_says_what_is_computed_in() -> None:
    assert compute_in("int8") == torch.bfloat16 and products.are_in_int8()
    assert name_of(torch.bfloat16) == "int8" and name_of(torch.float32) == "float32"
    assert compute_in("bfloat16") == torch.bfloat16 and not products.are_in_int8()
    assert name_of(torch.bfloat16) == "bfloat16"


def test_where_8_bits_cannot_be_had_it_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match='dtype="int4" is unknown: use "auto", "float32", "bfloat16" or "int8"'):
        compute_in("int4")
    with pytest.raises(ValueError, match="has kernels for the CPU only, not for cuda"):
        compute_in("int8", "cuda")
    narrow = ModelConfig(**SHAPE, num_heads=4, num_kv_heads=2, head_dim=16)
    save_model(init_model(narrow, seed=0), tmp_path)
    with (
        products.int8(),
        pytest.raises(ValueError, match=f"{tmp_path}: .* needs head_dim \\(16\\) to be a multiple of 32"),
    ):
        load_model(tmp_path, dtype=torch.bfloat16)
    with products.int8():
        assert load_model(tmp_path, dtype=torch.float32).dtype == torch.float32  # float32 stays what it is
    monkeypatch.setattr(products, "library", lambda: None)
    monkeypatch.setattr(build, "_compiler", lambda: None)
    with pytest.raises(ValueError, match=r'dtype="int8" cannot be had here: there is no C\+\+ compiler') as refusal:
        compute_in("int8")
    assert "start a new run from its checkpoint" in str(refusal.value)  # a resumed one may not change its dtype
    monkeypatch.setattr(build, "_compiler", lambda: "g++")
    said = "In file a.cpp:\na.cpp:3: error: expected ';'\n  3 | int x\n"
    monkeypatch.setattr(build, "_failure", build._compiler_failure(said))
    with pytest.raises(ValueError, match=r"do not compile \(a\.cpp:3: error: expected ';'\)"):
        compute_in("int8")
    assert not products.are_in_int8()


def test_a_vocabulary_that_is_no_multiple_of_32_is_refused(tmp_path: Path) -> None:
    """The trainer would multiply parts of its head in 8 bits and the rest in 16. A scalar model has no such head."""
    config = dataclasses.replace(MODELS["llama"], vocab_size=100)
    model = init_model(config, seed=0, dtype=torch.bfloat16)
    save_model(model, tmp_path / "model")
    save_scalar_model(add_scalar_head(model, seed=0), tmp_path / "scalar")
    with products.int8():
        with pytest.raises(ValueError, match=r'needs vocab_size \(100\) to be a multiple of 32: use "bfloat16"'):
            load_model(tmp_path / "model")
        with pytest.raises(ValueError, match="vocab_size"):
            init_model(config, seed=0, dtype=torch.bfloat16)
        assert load_scalar_model(tmp_path / "scalar").dtype == torch.bfloat16


def test_a_scalar_model_of_other_widths_is_refused(tmp_path: Path) -> None:
    model = init_model(dataclasses.replace(MODELS["llama"], intermediate_size=144), seed=0, dtype=torch.bfloat16)
    save_scalar_model(add_scalar_head(model, seed=0), tmp_path)
    assert load_scalar_model(tmp_path).dtype == torch.bfloat16
    with products.int8():
        with pytest.raises(
            ValueError, match=f"{tmp_path}: .* needs intermediate_size \\(144\\) to be a multiple of 32"
        ):
            load_scalar_model(tmp_path)
        assert load_scalar_model(tmp_path, dtype=torch.float32).dtype == torch.float32


def test_what_is_not_contiguous_is_in_8_bits_too() -> None:
    x, weight, grad = random(40, 128, seed=1), random(64, 128, seed=2), random(40, 64, seed=3)
    turned = [tensor.T.contiguous().T for tensor in (x, weight, grad)]
    with products.int8():
        assert torch.equal(products.linear(turned[0], turned[1]), products.linear(x, weight))
        assert torch.equal(products.input_gradient(turned[2], turned[1]), products.input_gradient(grad, weight))
        assert torch.equal(products.weight_gradient(turned[2], turned[0]), products.weight_gradient(grad, x))


def test_the_head_is_in_8_bits_wherever_it_is_asked() -> None:
    """Outside of a rollout as in it; and with the gradient that training would take."""
    model = init_model(MODELS["seven heads share"], seed=0, dtype=torch.bfloat16)
    hidden, weight = random(5, 96, seed=1).requires_grad_(), model.lm_head_weight
    with products.int8():
        logits = model.logits(hidden)
        assert torch.equal(logits.detach(), products.linear(hidden.detach(), weight.detach()))
        assert torch.equal(model.logits(hidden[2]), logits[2])
        logits.sum().backward()
        assert hidden.grad is not None
        assert torch.equal(hidden.grad, products.input_gradient(torch.ones_like(logits), weight.detach()))
        law = linear_self_certainty(hidden.detach(), weight.detach())
        z = logits.detach().float()
        assert torch.equal(law, z.logsumexp(-1) - z.mean(-1) - math.log(96))
    assert not torch.equal(model.logits(hidden), logits)


def test_training_gets_back_the_room_of_a_frozen_model() -> None:
    model = init_model(MODELS["llama"], seed=0, dtype=torch.bfloat16).requires_grad_(False)
    with model.decoding(1):
        pass
    assert model._native_room is not None  # kept for the next rollout
    model.release()
    assert model._native_room is None


def test_a_judges_marks_in_8_bits_are_not_those_of_its_cache(tiny_folder: Path, tmp_path: Path) -> None:
    shape = dataclasses.replace(MODELS["llama"], vocab_size=320)
    save_model(init_model(shape, seed=0, dtype=torch.bfloat16), tmp_path)
    for file in tiny_folder.glob("tokenizer*"):
        shutil.copy(file, tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{% for message in messages %}{{ message.content }}{% endfor %}")
    question = [{"role": "user", "content": "How good is it?"}]
    judges, marks = [], []
    for in_int8 in (False, True):
        with products.int8(in_int8):
            judges.append(LocalModel(str(tmp_path)))
            marks += judges[-1].marks([question])
    assert marks[0] != marks[1] and abs(marks[0] - marks[1]) < 0.1
    assert judges[1].identity == judges[0].identity + " in int8"


def test_float32_tensors_are_left_alone() -> None:
    x, weight = random(64, 64, seed=1).float(), random(96, 64, seed=2).float()
    with products.int8():
        torch.testing.assert_close(products.linear(x, weight), x @ weight.T)
    assert kernels.has_kernels(x.bfloat16()) and not kernels.has_kernels(x)
