"""A row's hidden states depend on nothing but that row: not on its neighbours, the packing, the trunk it shares, or
whether it came token by token."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from strop.models import attention
from strop.models.attention import AttentionPlan, bucket_by_length, fused_kernel_attention
from strop.models.config import ModelConfig, RopeScaling
from strop.models.decoder import Decoder, init_model
from strop.models.fused import can_pack
from strop.models.loading import weight_hash
from strop.types import PackedBatch, Segment

CONFIG = ModelConfig(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_layers=3,
    num_heads=6,
    num_kv_heads=2,
    head_dim=8,
    qkv_bias=True,
    qk_norm=True,
    layers_without_rope=frozenset({1}),
    model_type="qwen3",
)
LAYOUTS = {
    "one token": (Segment(trunk=1),),
    "rows of one token": (Segment(trunk=1), Segment(trunk=1), Segment(trunk=1)),
    "very different lengths": tuple(Segment(trunk=n) for n in (1, 30, 2, 17, 3, 16, 1)),
    "a tree": (Segment(trunk=5, branches=(3, 1, 7)),),
    "no trunk": (Segment(trunk=0, branches=(4,)), Segment(trunk=0, branches=(6, 2))),
    "many branches": (Segment(trunk=3, branches=(1,) * 40),),
    "empty branches": (Segment(trunk=3, branches=(0, 2, 0)), Segment(trunk=2, branches=(0,))),
    "trees alike": tuple(Segment(trunk=4, branches=(n, n + 1)) for n in (5, 6, 5, 1)),
    "everything": (
        Segment(trunk=9),
        Segment(trunk=6, branches=(2, 11, 2, 20)),
        Segment(trunk=0, branches=(9, 3)),
        Segment(trunk=1, branches=(1,)),
        Segment(trunk=14, branches=(4, 4)),
        Segment(trunk=1),
    ),
}


@pytest.fixture(params=["as shipped", "small blocks"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with limits so low that rows are cut into query blocks, trees into parts and calls into chunks."""
    if request.param == "small blocks":
        monkeypatch.setattr(attention, "QUERY_BLOCK", 4)
        monkeypatch.setattr(attention, "MAX_QUERIES", 8)
        monkeypatch.setattr(attention, "MAX_SCORES", 100)


def make_model(dtype: torch.dtype = torch.float32) -> Decoder:
    model = init_model(CONFIG, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.to(dtype)


def make_batch(segments: tuple[Segment, ...]) -> tuple[PackedBatch, list[list[int]]]:
    """A packed batch, and the packed positions of each of its rows when the trunk is written out."""
    rows, start = [], 0
    for segment in segments:
        trunk = list(range(start, start + segment.trunk))
        position = start + segment.trunk
        for length in segment.branches:
            rows.append([*trunk, *range(position, position + length)])
            position += length
        if not segment.branches:
            rows.append(trunk)
        start = position
    token_ids = torch.randint(CONFIG.vocab_size, (start,), generator=torch.Generator().manual_seed(2))
    return packed(token_ids, segments), rows


def packed(token_ids: Tensor, segments: tuple[Segment, ...]) -> PackedBatch:
    mask = torch.ones_like(token_ids, dtype=torch.bool)
    return PackedBatch(token_ids_T=token_ids, labels_T=token_ids, loss_mask_T=mask, segments=segments)


def alone(model: Decoder, token_ids: Tensor) -> Tensor:
    return model.hidden(packed(token_ids, (Segment(trunk=len(token_ids)),)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.usefixtures("blocks")
def test_rows_in_a_pack_are_as_alone(layout: str) -> None:
    model = make_model()
    batch, rows = make_batch(LAYOUTS[layout])
    with torch.no_grad():
        hidden = model.hidden(batch)
        assert hidden.std() > 0.1
        for row in rows:
            torch.testing.assert_close(hidden[row], alone(model, batch.token_ids_T[row]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.usefixtures("blocks")
def test_gradients_through_a_shared_trunk_are_those_of_separate_rows(layout: str) -> None:
    model = make_model(torch.float64)
    batch, rows = make_batch(LAYOUTS[layout])
    weight = torch.randn(len(batch.token_ids_T), CONFIG.hidden_size, generator=torch.Generator().manual_seed(3))
    (model.hidden(batch) * weight).sum().backward()
    got = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    seen: set[int] = set()
    for row in rows:
        counts = torch.tensor([position not in seen for position in row])[:, None]  # a trunk counts once
        seen.update(row)
        (alone(model, batch.token_ids_T[row]) * weight[row] * counts).sum().backward()
    assert seen == set(range(len(batch.token_ids_T)))
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            got[name], parameter.grad, rtol=1e-9, atol=1e-9, msg=lambda text, n=name: f"{n} {text}"
        )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.usefixtures("blocks")
def test_cpu_attention_equals_the_fused_kernel(layout: str) -> None:
    """Two implementations, one law: values and gradients, for the same plan."""
    segments = LAYOUTS[layout]
    plan = AttentionPlan(segments, dtype=torch.float64, device=torch.device("cpu"))
    generator = torch.Generator().manual_seed(4)
    q, k, v, weight = (
        torch.randn(plan.num_tokens, heads, 8, dtype=torch.float64, generator=generator) for heads in (6, 2, 2, 6)
    )
    results = []
    for attend in (plan.attend, lambda q, k, v, scale: fused_kernel_attention(q, k, v, plan.calls, scale)):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        output = attend(*leaves, 0.4)
        (output * weight).sum().backward()
        results.append([output, *(leaf.grad for leaf in leaves)])
    for ours, kernel in zip(*results, strict=True):
        torch.testing.assert_close(ours, kernel, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_gradients_are_near_the_exact_ones(dtype: torch.dtype) -> None:
    segments = LAYOUTS["everything"]
    plan = AttentionPlan(segments, dtype=dtype, device=torch.device("cpu"))
    generator = torch.Generator().manual_seed(4)
    tensors = [torch.randn(plan.num_tokens, heads, 8, generator=generator).to(dtype) for heads in (6, 2, 2, 6)]
    results = []
    for cast in (dtype, torch.float64):
        *leaves, weight = (x.detach().to(cast) for x in tensors)
        leaves = [leaf.requires_grad_() for leaf in leaves]
        exact = AttentionPlan(segments, dtype=cast, device=torch.device("cpu"))
        output = exact.attend(*leaves, 0.4)
        (output * weight).sum().backward()
        results.append([output.detach(), *(leaf.grad for leaf in leaves)])
    bound = 2e-6 if dtype == torch.float32 else 2e-2  # bf16 keeps 8 bits; a few roundings in a row
    for ours, exact in zip(*results, strict=True):
        assert ours.dtype == dtype
        assert float((ours.double() - exact).norm() / exact.norm()) < bound


def test_decoding_token_by_token_equals_the_whole_row() -> None:
    model = make_model()
    generator = torch.Generator().manual_seed(5)
    prompts = [torch.randint(61, (length,), generator=generator).tolist() for length in (1, 40, 6)]
    cache = model.new_cache(num_slots=4, max_length=80)
    hidden = model.prefill(prompts, cache, [0, 1, 2])
    cache.move(2, 3)  # two go on from the third prompt
    texts = [*map(list, prompts), list(prompts[2])]
    hidden = torch.cat([hidden, hidden[2:]])
    with torch.no_grad():
        for step in range(30):
            for text, state in zip(texts, hidden, strict=True):
                torch.testing.assert_close(state, alone(model, torch.tensor(text))[-1], rtol=1e-5, atol=1e-5)
            if step == 10:  # the longest finishes: the last takes its slot
                cache.move(3, 1)
                texts[1] = texts.pop()
            if step == 15:  # a free slot, dirty from before, is filled again with a shorter prompt
                fresh = torch.randint(61, (2,), generator=generator).tolist()
                model.prefill([fresh], cache, [3])
                texts.append(fresh)
            tokens = torch.randint(61, (len(texts),), generator=generator)
            hidden = model.decode_step(tokens, cache)
            for text, token in zip(texts, tokens.tolist(), strict=True):
                text.append(token)


def test_prefill_is_hidden_at_the_last_position() -> None:
    model = make_model()
    batch, rows = make_batch(LAYOUTS["very different lengths"])
    prompts = [batch.token_ids_T[row].tolist() for row in rows]
    cache = model.new_cache(num_slots=len(prompts), max_length=32)
    got = model.prefill(prompts, cache, list(range(len(prompts))))
    with torch.no_grad():
        expected = model.hidden(batch)[[row[-1] for row in rows]]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert cache.lengths_S.tolist() == [len(prompt) for prompt in prompts]


@pytest.mark.parametrize("cut", [1, 7, 16, 300])
def test_a_prompt_in_pieces_is_the_prompt_in_one(cut: int) -> None:
    """Its last piece beside the first of another, over a dirty slot; rows longer than a block of queries too."""
    model = make_model()
    generator = torch.Generator().manual_seed(5)
    long, short = (torch.randint(61, (length,), generator=generator).tolist() for length in (cut + 30, 11))
    whole = model.new_cache(num_slots=2, max_length=400)
    expected = model.prefill([short, long], whole, [0, 1])
    cache = model.new_cache(num_slots=3, max_length=400)
    model.prefill([[5] * 200], cache, [2])
    model.prefill([long[:cut]], cache, [2])
    middle = cut + 19
    model.prefill([long[cut:middle]], cache, [2], [cut])
    assert cache.lengths_S.tolist() == [0, 0, middle]
    got = model.prefill([short, long[middle:]], cache, [0, 2], [0, middle])
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert cache.lengths_S.tolist() == [11, 0, cut + 30]
    for mine, theirs in ((cache.keys, whole.keys), (cache.values, whole.values)):
        for slot, other, length in ((0, 0, 11), (2, 1, cut + 30)):
            torch.testing.assert_close(mine[:, slot, :, :length], theirs[:, other, :, :length], rtol=1e-5, atol=1e-5)


def test_padding_stays_within_its_bound() -> None:
    generator = torch.Generator().manual_seed(6)
    for _ in range(50):
        lengths = torch.randint(
            1, 60, (int(torch.randint(1, 30, (), generator=generator)),), generator=generator
        ).tolist()
        buckets = bucket_by_length(lengths, int)
        assert sorted(length for bucket in buckets for length in bucket) == sorted(lengths)
        for bucket in buckets:
            assert max(bucket) * len(bucket) <= attention.MAX_PADDING * sum(bucket)
    assert len(bucket_by_length([8] * 100, int)) == 1


def test_a_long_trunk_is_scored_against_few_queries_at_a_time() -> None:
    plan = AttentionPlan((Segment(trunk=700, branches=(300,) * 12),), dtype=torch.float32, device=torch.device("cpu"))
    for call in plan.calls:
        _, num_branches, width = call.branch_PGT.shape
        assert width <= attention.QUERY_BLOCK
        assert num_branches * width <= attention.MAX_QUERIES


@pytest.mark.parametrize("scaling", [None, RopeScaling(
    factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
)])  # fmt: skip
def test_bf16_model_keeps_exact_angles(scaling: RopeScaling | None) -> None:
    """At position 8003 anything rounded to bf16 before the cosine would be off by whole turns."""
    fields = {name: getattr(CONFIG, name) for name in CONFIG.__slots__} | {"rope_scaling": scaling}
    model = init_model(ModelConfig(**fields), seed=0)
    positions = torch.tensor([0, 1, 17, 8003])
    exact = [x.clone() for x in model._rope(positions)]
    frequencies = 10000.0 ** -(torch.arange(4, dtype=torch.float64) / 4)
    if scaling is None:
        angles = positions[:, None].double() * frequencies
        torch.testing.assert_close(exact[0][:, 0, :4].double(), angles.cos(), rtol=0, atol=1e-3)  # fp32 at 8003
        torch.testing.assert_close(exact[1][:, 0, 4:].double(), angles.sin(), rtol=0, atol=1e-3)
    for low, high in zip(model.to(torch.bfloat16)._rope(positions), exact, strict=True):
        assert low.dtype == torch.bfloat16
        assert torch.equal(low, high.to(torch.bfloat16))


def test_fresh_weights() -> None:
    config = ModelConfig(
        vocab_size=512, hidden_size=128, intermediate_size=256, num_layers=8, num_heads=4, num_kv_heads=2, head_dim=32,
        qkv_bias=True, tie_embeddings=False,
    )  # fmt: skip
    model = init_model(config, seed=0)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        elif name.endswith("bias"):
            assert not parameter.any(), name
        else:
            parameter = parameter.detach()
            std = 0.02 / math.sqrt(16) if name.endswith(("attention.output.weight", "mlp.down.weight")) else 0.02
            noise = std / math.sqrt(parameter.numel())
            assert abs(float(parameter.std()) - std) < 4 * noise, name
            assert abs(float(parameter.mean())) < 4 * noise, name
            assert float(parameter.abs().max()) > 3 * std, name
    weights = [parameter.detach().flatten()[:1000] for parameter in model.parameters() if parameter.dim() == 2]
    correlations = torch.corrcoef(torch.stack(weights)).fill_diagonal_(0)
    assert float(correlations.abs().max()) < 0.2  # no two matrices are drawn from the same stretch of the generator


def test_fresh_weights_are_decided_by_the_seed_alone() -> None:
    torch.manual_seed(1)
    one = init_model(CONFIG, seed=0)
    torch.manual_seed(2)
    assert weight_hash(init_model(CONFIG, seed=0)) == weight_hash(one)
    assert weight_hash(init_model(CONFIG, seed=1)) != weight_hash(one)
    assert weight_hash(init_model(CONFIG, seed=0, dtype=torch.bfloat16)) == weight_hash(one.to(torch.bfloat16))


def test_hidden_is_the_same_bits_every_time() -> None:
    model = make_model(torch.bfloat16)
    batch, _ = make_batch(LAYOUTS["everything"])
    results = []
    for _ in range(3):
        model.zero_grad()
        hidden = model.hidden(batch)
        hidden.float().square().sum().backward()
        results.append([hidden.detach(), *(parameter.grad for parameter in model.parameters())])
    for again in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], again, strict=True))


@pytest.mark.skipif(not can_pack(torch.zeros(1, dtype=torch.bfloat16)), reason="oneDNN has no bf16 kernels here")
def test_packed_weights_decode_to_the_same_bits_and_follow_the_next_update():
    config = ModelConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16
    )
    model = init_model(config, seed=0, dtype=torch.bfloat16)

    def decoded(rows: int) -> torch.Tensor:
        cache = model.new_cache(num_slots=rows, max_length=8)
        model.prefill([[1, 2, 3 + row] for row in range(rows)], cache, range(rows))
        return torch.stack([model.decode_step(torch.arange(rows) + step, cache) for step in range(3)])

    for rows in (1, 5, 32):
        plain = decoded(rows)
        with model.decoding(rows):
            assert model.layers[0].mlp.down.packed is not None
            assert torch.equal(decoded(rows), plain)
        assert model.layers[0].mlp.down.packed is None
    with torch.no_grad():
        model.layers[0].mlp.down.weight.mul_(3)
    with model.decoding(5):
        assert not torch.equal(decoded(5), plain[:, :5])
        packed = decoded(5)
    assert torch.equal(packed, decoded(5))
