"""The hand-written backward passes: float64 gradcheck, plain autograd as the second opinion, and what they keep."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from strop.models.attention import AttentionPlan
from strop.models.config import ModelConfig
from strop.models.decoder import init_model
from strop.models.fused import norm_linear, recomputed_mlp, rms_norm, swiglu_linear
from strop.models.live_memory import LiveMemory
from strop.types import PackedBatch, Segment

EPS = 1e-2


def leaf(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()


@pytest.mark.parametrize("has_bias", [False, True])
def test_norm_linear(has_bias: bool) -> None:
    inputs = (leaf(5, 6, seed=0), leaf(6, seed=1), leaf(4, 6, seed=2), leaf(4, seed=3) if has_bias else None, EPS)
    assert torch.autograd.gradcheck(norm_linear, inputs)
    x, norm, weight, bias, _ = inputs
    rms = (x.square().mean(-1, keepdim=True) + EPS).sqrt()
    torch.testing.assert_close(norm_linear(*inputs), F.linear(x / rms * norm, weight, bias))


def test_rms_norm() -> None:
    x, weight = leaf(5, 3, 6, seed=0), leaf(6, seed=1)
    assert torch.autograd.gradcheck(rms_norm, (x, weight, EPS))
    rms = (x.square().mean(-1, keepdim=True) + EPS).sqrt()
    torch.testing.assert_close(rms_norm(x, weight, EPS), x / rms * weight)


@pytest.mark.parametrize("has_bias", [False, True])
def test_swiglu_linear(has_bias: bool) -> None:
    inputs = (leaf(5, 8, seed=0), leaf(3, 4, seed=1), leaf(3, seed=2) if has_bias else None)
    assert torch.autograd.gradcheck(swiglu_linear, inputs)
    gate_up, weight, bias = inputs
    gate, up = gate_up[:, :4], gate_up[:, 4:]
    torch.testing.assert_close(swiglu_linear(*inputs), F.linear(gate * gate.sigmoid() * up, weight, bias))


@pytest.mark.parametrize("has_bias", [False, True])
def test_recomputed_mlp(has_bias: bool) -> None:
    biases = (leaf(8, seed=3), leaf(6, seed=4)) if has_bias else (None, None)
    inputs = (leaf(5, 6, seed=0), leaf(6, seed=1), leaf(8, 6, seed=2), biases[0], leaf(6, 4, seed=5), biases[1], EPS)
    assert torch.autograd.gradcheck(recomputed_mlp, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recomputed_mlp_is_that_which_keeps_gate_and_up_to_the_bit(dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(0)
    shapes = ((50, 64), (64,), (256, 64), (64, 128))
    leaves = [torch.randn(shape, generator=random).to(dtype).requires_grad_() for shape in shapes]
    x, norm, gate_up, down = leaves
    out_grad = torch.randn(50, 64, generator=random).to(dtype)

    def run(forward) -> tuple[int, list[Tensor]]:
        with LiveMemory() as memory:
            y = forward()
            kept = memory.live_bytes
            gradients = torch.autograd.grad(y, leaves, out_grad)
        return kept, [y.detach(), *gradients]

    def plain() -> Tensor:
        return swiglu_linear(norm_linear(x, norm, gate_up, None, EPS), down, None)

    kept, ours = run(lambda: recomputed_mlp(x, norm, gate_up, None, down, None, EPS))
    kept_plainly, theirs = run(plain)
    assert all(map(torch.equal, ours, theirs))
    assert kept == 50 * 64 * x.itemsize, "the result and nothing else"
    assert kept_plainly == kept + 50 * 256 * x.itemsize


def test_tree_attention() -> None:
    segments = (Segment(trunk=3, branches=(2, 4, 1)), Segment(trunk=4), Segment(trunk=0, branches=(2,)))
    plan = AttentionPlan(segments, dtype=torch.float64, device=torch.device("cpu"))
    q, k, v = (leaf(plan.num_tokens, heads, 4, seed=heads) for heads in (4, 2, 2))
    assert torch.autograd.gradcheck(lambda q, k, v: plan.attend(q, k, v, 0.5), (q, k, v))
    # The definition, one query at a time.
    outputs = []
    positions = [(list(range(3)), list(range(i + 1))) for i in range(3)]
    visible = [seen for _, seen in positions]
    for start, length in ((3, 2), (5, 4), (9, 1)):
        visible += [[0, 1, 2, *range(start, start + i + 1)] for i in range(length)]
    visible += [list(range(10, 10 + i + 1)) for i in range(4)] + [[14], [14, 15]]
    for t, seen in enumerate(visible):
        heads = [(q[t, n] @ k[seen, n // 2].T * 0.5).softmax(-1) @ v[seen, n // 2] for n in range(4)]
        outputs.append(torch.stack(heads))
    torch.testing.assert_close(plan.attend(q, k, v, 0.5), torch.stack(outputs))


@pytest.mark.parametrize("frozen", ["norm", "weight", "x"])
def test_frozen_inputs_take_no_gradient(frozen: str) -> None:
    x, norm, weight = leaf(5, 6, seed=0), leaf(6, seed=1), leaf(4, 6, seed=2)
    expected = torch.autograd.grad(norm_linear(x, norm, weight, None, EPS).square().sum(), (x, norm, weight))
    tensors = {"x": x, "norm": norm, "weight": weight}
    tensors[frozen].requires_grad_(False)
    norm_linear(x, norm, weight, None, EPS).square().sum().backward()
    for name, gradient in zip(tensors, expected, strict=True):
        if name == frozen:
            assert tensors[name].grad is None
        else:
            torch.testing.assert_close(tensors[name].grad, gradient)


def kept_bytes_per_token(config: ModelConfig, dtype: torch.dtype, *, is_recomputed: bool) -> float:
    """Bytes of storage that backward keeps for one more layer, without parameters."""
    lengths = (20, 33, 7)
    token_ids = torch.zeros(sum(lengths), dtype=torch.int64)
    batch = PackedBatch(
        token_ids_T=token_ids,
        labels_T=token_ids,
        loss_mask_T=token_ids == 0,
        segments=tuple(Segment(trunk=length) for length in lengths),
    )
    totals = []
    for num_layers in (1, 3):
        fields = {name: getattr(config, name) for name in config.__slots__} | {"num_layers": num_layers}
        model = init_model(ModelConfig(**fields), seed=0, dtype=dtype)
        for layer in model.layers:
            layer.mlp.is_recomputed = is_recomputed
        storages: dict[int, Any] = {}

        def keep(tensor: Tensor, storages: dict[int, Any] = storages) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model.hidden(batch)
        parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        totals.append(sum(storage.nbytes() for pointer, storage in storages.items() if pointer not in parameters))
    return (totals[1] - totals[0]) / 2 / sum(lengths)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("is_recomputed", [False, True])
def test_a_layer_keeps_no_more_than_it_must(dtype: torch.dtype, qk_norm: bool, is_recomputed: bool) -> None:
    config = ModelConfig(
        vocab_size=16, hidden_size=48, intermediate_size=80, num_layers=1, num_heads=6, num_kv_heads=2, head_dim=8,
        qk_norm=qk_norm,
    )  # fmt: skip
    inputs = 2 * 48
    queries_keys_values, output, gate_up = (6 + 2 + 2) * 8, 6 * 8, 0 if is_recomputed else 2 * 80
    before_norm = (6 + 2 + 2) * 8 if qk_norm else 0  # the norms keep the projection that they read
    expected = (inputs + queries_keys_values + output + gate_up + before_norm) * dtype.itemsize
    assert kept_bytes_per_token(config, dtype, is_recomputed=is_recomputed) == expected
