"""The C++ kernels of a training step against the same formulas in float64, and no further from them than torch is."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from strop.models import attention
from strop.models.attention import AttentionPlan, rotate
from strop.models.config import ModelConfig
from strop.models.decoder import init_model
from strop.models.fused import norm_linear, rms_norm, swiglu_linear, tied_embedding
from strop.models.live_memory import LiveMemory
from strop.models.logprobs import packed_logprobs
from strop.native import build, products
from strop.native import kernels as native
from strop.objectives.logprobs import head_statistics, linear_logprobs
from strop.optim import AdamW, optimizer_step
from strop.optim.split import SplitMaster
from strop.types import PackedBatch, Segment

BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def needs_kernels() -> None:
    reason = build.why_unavailable()
    if reason is not None and not reason.startswith("there is no C++ compiler"):
        pytest.skip(reason)  # another processor; a missing compiler is a failure
    assert build.library() is not None, reason


def random(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(BF16)


def error(result: Tensor, exact: Tensor) -> float:
    return float((result.double() - exact.double()).norm() / exact.double().norm())


def gradients(function, inputs: tuple[Tensor, ...], dtype: torch.dtype) -> list[Tensor]:
    """The output and the gradients of all inputs, for one fixed random gradient of the output."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
    output = function(*leaves)
    output.backward(random(*output.shape, seed=99).to(output.dtype))
    return [output.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def check(function, *inputs: Tensor, monkeypatch: pytest.MonkeyPatch, slack: float = 1.02) -> None:
    """bf16 with kernels is as near to float64 as bf16 without, and is not the same computation."""
    exact = gradients(function, inputs, torch.float64)
    ours = gradients(function, inputs, BF16)
    with monkeypatch.context() as patch:
        patch.setattr(native, "has_kernels", lambda tensor: False)
        plain = gradients(function, inputs, BF16)
    assert len(exact) == len(ours) == len(inputs) + 1
    for mine, other, truth in zip(ours, plain, exact, strict=True):
        assert error(mine, truth) <= max(slack * error(other, truth), 2e-3)


@pytest.mark.parametrize("shape", [(77, 576), (3, 40), (1, 16), (33, 100)])
def test_norms(shape, monkeypatch):
    x, weight = random(*shape, seed=0), 1 + random(shape[1], seed=1, scale=0.1)
    check(lambda x, w: rms_norm(x, w, 1e-5), x, weight, monkeypatch=monkeypatch)
    projection = random(24, shape[1], seed=2, scale=shape[1] ** -0.5)
    check(lambda x, w, p: norm_linear(x, w, p, None, 1e-5), x, weight, projection, monkeypatch=monkeypatch)


@pytest.mark.parametrize("shape", [(77, 96), (5, 10), (1, 32)])
def test_swiglu(shape, monkeypatch):
    rows, width = shape
    gate_up, weight = random(rows, 2 * width, seed=0, scale=2), random(24, width, seed=1, scale=width**-0.5)
    check(lambda g, w: swiglu_linear(g, w, None), gate_up, weight, monkeypatch=monkeypatch)


TREES = {
    "documents": (9, 3, 64, (Segment(trunk=150), Segment(trunk=1), Segment(trunk=33), Segment(trunk=270))),
    "groups": (6, 2, 32, (Segment(trunk=46, branches=(64, 1, 0, 17)), Segment(trunk=70, branches=(80, 80)))),
    "no trunk": (4, 4, 96, (Segment(trunk=0, branches=(7, 8)), Segment(trunk=0), Segment(trunk=5))),
    "all heads share": (7, 1, 128, (Segment(trunk=40, branches=(25,)),)),
}


@pytest.mark.parametrize("has_rope", [False, True])
@pytest.mark.parametrize("tree", TREES)
def test_attention(tree, has_rope, monkeypatch):
    num_heads, num_kv_heads, width, segments = TREES[tree]
    num_tokens = sum(map(len, segments))
    angles = torch.rand(num_tokens, 1, width // 2, generator=torch.Generator().manual_seed(1)) * 6
    angles = torch.cat([angles, angles], dim=-1)
    cos, sin = angles.cos().to(BF16), angles.sin().to(BF16)  # the same numbers in every dtype

    def attend(qkv):
        plan = AttentionPlan(segments, dtype=qkv.dtype, device=qkv.device)
        rope = (cos.to(qkv.dtype), sin.to(qkv.dtype)) if has_rope else None
        return plan.attend_projected_(qkv * 1, rope, num_kv_heads, width**-0.5)

    qkv = random(num_tokens, num_heads + 2 * num_kv_heads, width, seed=0)
    check(attend, qkv, monkeypatch=monkeypatch)
    # Separate queries, keys and values take the same way, with and without a gradient.
    q, k, v = qkv.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    plan = AttentionPlan(segments, dtype=BF16, device=qkv.device)
    if has_rope:
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    assert error(plan.attend(q, k, v, width**-0.5), attend(qkv.double())) < 5e-3


@pytest.mark.parametrize("has_bias", [False, True])
def test_attention_made_again_for_the_backward_pass_is_that_which_was_kept(has_bias, monkeypatch):
    num_heads, num_kv_heads, width, segments = TREES["groups"]
    plans = [AttentionPlan(segments, dtype=BF16, device=torch.device("cpu")) for _ in range(2)]
    qkv = random(plans[0].num_tokens, num_heads + 2 * num_kv_heads, width, seed=0)
    weight, bias = random(48, num_heads * width, seed=1), random(48, seed=2) if has_bias else None
    leaves = [leaf.requires_grad_() for leaf in (qkv, weight, bias) if leaf is not None]
    angles = torch.rand(qkv.shape[0], 1, width, generator=torch.Generator().manual_seed(1)).to(BF16)
    kept, results = [], []
    for plan, max_keys in zip(plans, (10**6, 0), strict=True):
        monkeypatch.setattr(attention, "MAX_RECOMPUTED_KEYS", max_keys)
        with LiveMemory() as memory:
            y = plan.attend_linear_(qkv * 1, (angles, angles), num_kv_heads, 0.2, weight, bias)
            kept.append(memory.live_bytes)
            results.append([y.detach(), *torch.autograd.grad(y.float().square().sum(), leaves)])
    assert all(map(torch.equal, *results))
    outputs, log_sums = qkv.shape[0] * num_heads * width, qkv.shape[0] * num_heads
    assert kept[1] - kept[0] == 2 * outputs + 4 * log_sums, "the output and its log-sum-exp, and nothing else"


@pytest.mark.parametrize("has_entropy", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_head(temperature, has_entropy, monkeypatch):
    hidden, weight = random(77, 64, seed=0), random(1003, 64, seed=1, scale=0.3)
    labels = torch.randint(0, 1003, (77,), generator=torch.Generator().manual_seed(2))

    def results(hidden, weight):
        logprobs, entropy = linear_logprobs(
            hidden, weight, labels, temperature=temperature, with_entropy=has_entropy, chunk_size=30
        )
        return logprobs if entropy is None else torch.stack([logprobs, entropy])

    check(results, hidden, weight, monkeypatch=monkeypatch)


@pytest.mark.parametrize("in_int8", [False, True], ids=["bf16", "int8"])
@pytest.mark.parametrize("has_entropy", [False, True])
def test_kept_logits_and_known_results_change_no_bit(has_entropy, in_int8, monkeypatch):
    hidden, weight = random(77, 64, seed=0), random(8000, 64, seed=1, scale=0.3)
    labels = torch.randint(0, 8000, (77,), generator=torch.Generator().manual_seed(2))

    def run(known=None):
        leaves = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
        options = {"temperature": 0.7, "with_entropy": has_entropy, "chunk_size": 30, "known": known}
        logprobs, entropy = linear_logprobs(*leaves, labels, **options)
        loss = (logprobs * torch.arange(77)).sum() + (0 if entropy is None else 3 * entropy.sum())
        loss.backward(retain_graph=True)
        once = [leaf.grad.clone() for leaf in leaves]
        loss.backward()  # what was kept is used up
        for leaf, gradient in zip(leaves, once, strict=True):
            assert torch.equal(leaf.grad, 2 * gradient)
        return [logprobs, *([entropy] if has_entropy else []), *once]

    with products.int8(in_int8):
        kept = run()
        statistics = head_statistics(products.linear(hidden, weight), labels, temperature=0.7, with_entropy=has_entropy)
        calls = []
        real = native.head_statistics
        monkeypatch.setattr(native, "head_statistics", lambda *options: calls.append(options[2]) or real(*options))
        with_known = run(statistics)
        assert not calls
        monkeypatch.setattr("strop.objectives.logprobs._KEPT_BYTES", 77 * 8000 * 2)
        run()
        assert calls == [3072]  # blocks of the vocabulary
        monkeypatch.setattr("strop.objectives.logprobs._KEPT_BYTES", 77 * 8000 * 2 - 1)
        recomputed = run()
        assert calls[1:] == [8000] * 3  # chunks of rows
    for expected, one, other in zip(recomputed, kept, with_known, strict=True):
        assert torch.equal(one, expected)
        assert torch.equal(other, expected)


def test_head_statistics_are_exact_for_given_logits():
    logits = random(9, 5000, seed=0, scale=5)
    labels = torch.arange(9) * 550
    logprobs, lse, entropy = (torch.empty(9) for _ in range(3))
    native.head_statistics(logits, logits.shape[1], logits.shape[1], labels, logprobs, lse, entropy, 1.25)
    log_p = (logits.double() * 1.25).log_softmax(-1)
    torch.testing.assert_close(logprobs.double(), log_p.gather(1, labels[:, None])[:, 0], rtol=0, atol=2e-6)
    torch.testing.assert_close(lse.double(), (logits.double() * 1.25).logsumexp(-1), rtol=1e-6, atol=0)
    torch.testing.assert_close(entropy.double(), -(log_p.exp() * log_p).sum(-1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("label", [-1, 100])
def test_a_label_outside_the_vocabulary_is_refused(label):
    with pytest.raises(ValueError, match="outside"):
        linear_logprobs(random(2, 16, seed=0), random(100, 16, seed=1), torch.tensor([3, label]))


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_poisoned_logit_shows_in_the_loss(poison):
    logits = random(2, 100, seed=0)
    logits[1, 70] = poison
    logprobs, lse = torch.empty(2), torch.empty(2)
    native.head_statistics(logits, logits.shape[1], logits.shape[1], torch.tensor([3, 3]), logprobs, lse, None, 1.0)
    assert logprobs.isfinite().tolist() == [True, False]


MODEL = ModelConfig(
    vocab_size=320, hidden_size=64, intermediate_size=160, num_layers=3, num_heads=6, num_kv_heads=2, head_dim=32
)


def model_gradients(dtype: torch.dtype, config: ModelConfig = MODEL) -> Tensor:
    model = init_model(config, seed=0, dtype=BF16).to(dtype)
    segments = (Segment(trunk=20, branches=(30, 11)), Segment(trunk=45))
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 320, (106,), generator=generator)
    labels = torch.randint(0, 320, (106,), generator=generator)
    batch = PackedBatch(
        token_ids_T=ids, labels_T=labels, loss_mask_T=torch.ones(106, dtype=torch.bool), segments=segments
    )
    logprobs, _ = packed_logprobs(model, batch)
    (-logprobs.sum() / 106).backward()
    return torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("tie_embeddings", [False, True])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_gradients_of_a_model_are_no_further_from_float64_than_torchs(qk_norm, tie_embeddings, monkeypatch):
    config = replace(MODEL, qk_norm=qk_norm, tie_embeddings=tie_embeddings)
    exact, ours = model_gradients(torch.float64, config), model_gradients(BF16, config)
    monkeypatch.setattr(native, "has_kernels", lambda tensor: False)
    plain = model_gradients(BF16, config)
    assert not torch.equal(ours, plain)
    assert error(ours, exact) <= 1.02 * error(plain, exact)
    assert F.cosine_similarity(ours, exact, dim=0) >= F.cosine_similarity(plain, exact, dim=0) - 1e-5


def test_a_tied_embedding_has_one_gradient_whoever_used_it():
    """Rows that occur several times, rows that only the head sees, and each of the two users alone."""
    ids, weight = torch.tensor([3, 1, 3, 3]), random(6, 16, seed=0)
    for uses_rows, uses_head in ((True, True), (True, False), (False, True)):
        totals = []
        for dtype in (BF16, torch.float64):
            leaf = weight.to(dtype, copy=True).requires_grad_()
            rows, head = tied_embedding(ids, leaf)
            loss = leaf.new_zeros(())
            if uses_rows:
                loss = loss + (rows * random(4, 16, seed=1).to(dtype)).sum()
            if uses_head:
                loss = loss + (head * random(6, 16, seed=2).to(dtype)).sum() + head.sum()
            loss.backward()
            totals.append(leaf.grad)
        assert error(totals[0], totals[1]) < 4e-3


def test_gradients_do_not_depend_on_the_number_of_threads():
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        results.append(model_gradients(BF16))
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[1], results[2])


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_split_masters_equal_torchs_fp32_adamw_to_the_bit(weight_decay):
    start = random(130, 37, seed=0)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.float())
    optimizer = AdamW([("w", ours)], betas=(0.9, 0.95), weight_decay=weight_decay)
    oracle = torch.optim.AdamW([theirs], lr=1e-3, betas=(0.9, 0.95), weight_decay=weight_decay, fused=True)
    for step in range(20):
        gradient = random(130, 37, seed=step + 1)
        (ours * gradient).sum().backward()
        optimizer.step(lr=1e-3, grad_scale=0.5)
        optimizer.zero_grad()
        theirs.grad = gradient.float() * 0.5
        oracle.step()
    state = optimizer.state_dict()
    # torch's kernel handles the last 130 * 37 % 16 entries one by one and may round those otherwise.
    assert torch.equal(state["master.w"].flatten()[:-16], theirs.detach().flatten()[:-16])
    torch.testing.assert_close(state["master.w"], theirs.detach(), rtol=1e-6, atol=0)
    for key in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(state[f"{key}.w"].flatten()[:-16], oracle.state[theirs][key].flatten()[:-16])


def test_every_master_survives_its_split():
    bits = torch.randint(-(2**31), 2**31 - 1, (200_000,), generator=torch.Generator().manual_seed(0), dtype=torch.int64)
    bits[:40_000] = (bits[:40_000] & ~0xFFFF) | 0x8000  # exactly between two bf16 numbers
    master = bits.to(torch.int32).view(torch.float32)
    master = master[master.abs() < 3e38]  # beyond it bf16 has only inf
    parameter = torch.zeros(len(master), dtype=BF16)
    split = SplitMaster(parameter)
    split.load(parameter, master, {})
    assert torch.equal(split.joined(parameter).view(torch.int32), master.view(torch.int32))
    distance = (parameter.double() - master.double()).abs()
    assert torch.all(distance <= (master.to(BF16).double() - master.double()).abs())
    is_tie = (master.view(torch.int32) & 0xFFFF) == 0x8000
    assert torch.equal(parameter[~is_tie], master.to(BF16)[~is_tie])


def test_an_old_checkpoint_with_whole_masters_loads():
    """As torch's path saves it: masters, rounded to even."""
    master = torch.randn(33, 5, generator=torch.Generator().manual_seed(0))
    moments = {"step.w": torch.tensor(3.0), "exp_avg.w": master * 0.1, "exp_avg_sq.w": master.square()}
    parameter = nn.Parameter(master.to(BF16))
    optimizer = AdamW([("w", parameter)])
    optimizer.load_state_dict({"master.w": master, **moments})
    state = optimizer.state_dict()
    assert torch.equal(state["master.w"], master) and torch.equal(parameter.detach(), master.to(BF16))
    assert all(torch.equal(state[key], value) for key, value in moments.items())


def test_one_micro_batch_keeps_bf16_and_a_second_widens():
    parameter = nn.Parameter(random(9, 33, seed=0))
    optimizer = AdamW([("w", parameter)])
    first, second = random(9, 33, seed=1), random(9, 33, seed=2, scale=1e-3)
    (parameter * first).sum().backward()
    kept = optimizer._split["w"].gradient
    assert kept is not None and kept.dtype == BF16
    assert optimizer.grad_norm() == pytest.approx(float(first.double().norm()), rel=1e-6)
    (parameter * second).sum().backward()
    assert torch.equal(optimizer.gradients()[0], first.float() + second.float())
    assert optimizer.grad_norm() == pytest.approx(float((first.double() + second.double()).norm()), rel=1e-6)


def test_clipping_scales_the_gradient():
    gradient = random(64, 3, seed=1)
    results = []
    for scale in (1.0, 0.25):
        parameter = nn.Parameter(random(64, 3, seed=0))
        optimizer = AdamW([("w", parameter)], eps=1e-2)
        (parameter * (gradient * scale)).sum().backward()
        limit = float(gradient.double().norm()) / 4 if scale == 1.0 else float("inf")
        optimizer_step(optimizer, lr=1e-2, max_grad_norm=limit)
        results.append(optimizer.state_dict()["master.w"])
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-7)


def test_without_kernels_bf16_still_trains(monkeypatch):
    monkeypatch.setattr(native, "has_kernels", lambda tensor: False)
    parameter = nn.Parameter(random(9, 33, seed=0))
    optimizer = AdamW([("w", parameter)])
    (parameter * random(9, 33, seed=1)).sum().backward()
    optimizer_step(optimizer, lr=1e-3, max_grad_norm=1.0)
    assert torch.equal(parameter.detach(), optimizer.state_dict()["master.w"].to(BF16))
