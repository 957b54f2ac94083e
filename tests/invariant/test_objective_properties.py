"""What must hold of the objectives whatever the numbers: masks, denominators, estimators, optima, definitions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from strop.objectives import advantages, kl, pass_at_k, policy_gradient, preference, reward_model, value
from strop.objectives.aggregate import (
    Aggregation,
    masked_sum,
    sequence_mean,
    sequence_sum,
    step_denominator,
    token_weights,
)
from strop.objectives.cross_entropy import linear_cross_entropy
from strop.objectives.logprobs import linear_logprobs, logprobs_from_logits

SEEDS = st.integers(0, 2**31)
FEW = settings(max_examples=25, deadline=None, derandomize=True)


def draw(generator: torch.Generator, *shape: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, dtype=torch.float64, generator=generator)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ragged_mask(generator: torch.Generator, num_rows: int, width: int) -> Tensor:
    """Holes, a row without any token, and one full row."""
    mask = torch.rand(num_rows, width, generator=generator) < 0.6
    mask[0], mask[-1] = False, True
    return mask


# --- masks: what lies under them is never read

PerToken = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
WITH_GRADIENT: dict[str, PerToken] = {
    "clipped": lambda x, y, a, m: policy_gradient.clipped_policy_loss(x, y, a, m, clip_low=0.2, clip_high=0.2),
    "dual_clip": lambda x, y, a, m: policy_gradient.clipped_policy_loss(
        x, y, a, m, clip_low=0.2, clip_high=0.2, dual_clip=3.0
    ),
    "gspo": lambda x, y, a, m: policy_gradient.gspo_loss(x, y, sequence_mean(a, m), m, clip_low=0.2, clip_high=0.2)[
        :, None
    ].expand_as(x),
    "gspo_token": lambda x, y, a, m: policy_gradient.gspo_token_loss(x, y, a, m, clip_low=0.2, clip_high=0.2),
    "cispo": lambda x, y, a, m: policy_gradient.cispo_loss(x, y, a, m, ratio_max=1.2),
    "sapo": policy_gradient.sapo_loss,
    "reinforce": lambda x, y, a, m: policy_gradient.reinforce_loss(x, a, m),
    "ratio": lambda x, y, a, m: policy_gradient.importance_ratio(x, y, m),
    "k1": lambda x, y, a, m: kl.kl_k1(x, y, m),
    "k2": lambda x, y, a, m: kl.kl_k2(x, y, m),
    "k3": lambda x, y, a, m: kl.kl_k3(x, y, m),
    "k3_plus": lambda x, y, a, m: kl.kl_k3_plus(x, y, m),
    "value": lambda x, y, a, m: value.value_loss(x, y, a, m, clip=0.2),
    "sequence_sum": lambda x, y, a, m: sequence_sum(x, m)[:, None].expand_as(x),
    "kwise": lambda x, y, a, m: reward_model.kwise_loss(x, m)[:, None].expand_as(x),
    "plackett_luce": lambda x, y, a, m: reward_model.plackett_luce_loss(x, m)[:, None].expand_as(x),
}
WITHOUT_GRADIENT: dict[str, PerToken] = {
    "gae": lambda x, y, a, m: torch.stack(advantages.gae(x, y, m, gamma=0.9, gae_lambda=0.8)),
    "whiten": lambda x, y, a, m: advantages.whiten(x, m),
    "token_rewards": lambda x, y, a, m: advantages.token_rewards(1 + torch.arange(5.0), x, m, kl_coef=0.1),
    "group_std": lambda x, y, a, m: advantages.group_advantages(x, m, scale="std"),
    "group_none": lambda x, y, a, m: advantages.group_advantages(x, m, scale="none"),
    "leave_one_out": lambda x, y, a, m: advantages.leave_one_out_advantages(x, m),
    "batch": lambda x, y, a, m: advantages.batch_advantages(x, m),
    "batch_group": lambda x, y, a, m: advantages.batch_advantages(x, m, baseline="group"),
    "tis_token": lambda x, y, a, m: policy_gradient.truncated_importance_weights(x, y, m, level="token", cap=2.0),
    "tis_sequence": lambda x, y, a, m: policy_gradient.truncated_importance_weights(x, y, m, level="sequence", cap=2.0),
    "mis_token": lambda x, y, a, m: policy_gradient.masked_importance_weights(x, y, m, level="token", low=0.5, high=2),
    "mis_sequence": lambda x, y, a, m: policy_gradient.masked_importance_weights(
        x, y, m, level="sequence", low=0.5, high=2
    ),
    "clipped_tokens": lambda x, y, a, m: torch.stack(
        policy_gradient.clipped_tokens(x, y, a, m, clip_low=0.2, clip_high=0.2)
    ),
    "value_is_clipped": lambda x, y, a, m: value.value_is_clipped(x, y, a, m, clip=0.2),
}
JUNK = [0.0, 500.0, -1e30, math.inf, -math.inf, math.nan]


def junk_inputs(junk: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = seeded(3)
    mask = ragged_mask(generator, 5, 7)
    x, y, a = (torch.where(mask, draw(generator, 5, 7).to(dtype), junk) for _ in range(3))
    return x, y, a, mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", sorted(WITH_GRADIENT))
def test_junk_under_the_mask_changes_no_bit_of_loss_or_gradient(name: str, dtype: torch.dtype) -> None:
    def losses_and_gradient(junk: float) -> tuple[Tensor, Tensor]:
        x, y, a, mask = junk_inputs(junk, dtype)
        x.requires_grad_()
        losses = WITH_GRADIENT[name](x, y, a, mask)
        total = masked_sum(losses, mask, 3, weights_BT=token_weights(mask, "seq_mean_token_mean"))
        return losses.detach(), torch.autograd.grad(total, x)[0]

    losses, gradient = losses_and_gradient(JUNK[0])
    assert losses.isfinite().all() and gradient.isfinite().all() and gradient.abs().max() > 1e-3
    for junk in JUNK[1:]:
        junk_losses, junk_gradient = losses_and_gradient(junk)
        assert torch.equal(junk_losses, losses) and torch.equal(junk_gradient, gradient), junk


@pytest.mark.parametrize("name", sorted(WITHOUT_GRADIENT))
def test_junk_under_the_mask_changes_no_bit_of_a_statistic(name: str) -> None:
    expected = WITHOUT_GRADIENT[name](*junk_inputs(JUNK[0], torch.float64))
    mask = junk_inputs(JUNK[0], torch.float64)[-1]
    assert expected.double().isfinite().all() and expected[..., mask].double().abs().max() > 0
    assert (expected[..., ~mask] == 0).all()
    for junk in JUNK[1:]:
        assert torch.equal(WITHOUT_GRADIENT[name](*junk_inputs(junk, torch.float64)), expected), junk


def test_junk_in_one_dimensional_masked_sum_and_its_weights() -> None:
    values = torch.tensor([1.0, math.nan, 3.0], requires_grad=True)
    mask, weights = torch.tensor([True, False, True]), torch.tensor([2.0, math.inf, 1.0])
    loss = masked_sum(values, mask, 10, weights_BT=weights)
    assert loss.item() == 0.5
    assert torch.autograd.grad(loss, values)[0].tolist() == pytest.approx([0.2, 0.0, 0.1])


def test_weights_are_zero_outside_the_mask_also_in_an_empty_row() -> None:
    mask = torch.tensor([[False, False], [True, False], [True, True]])
    assert token_weights(mask, "seq_mean_token_mean").tolist() == [[0.0, 0.0], [1.0, 0.0], [0.5, 0.5]]
    assert token_weights(mask, "token_mean").tolist() == [[0.0, 0.0], [1.0, 0.0], [1.0, 1.0]]


def test_a_mask_of_numbers_is_refused() -> None:
    with pytest.raises(RuntimeError, match="boolean"):
        masked_sum(torch.ones(2), torch.tensor([1, 0]), 1)


@pytest.mark.parametrize("name", ["clipped", "gspo", "gspo_token", "sapo"])
def test_an_overflowing_ratio_of_a_good_token_has_no_gradient_instead_of_nan(name: str) -> None:
    x = torch.tensor([[0.0, 0.0]], requires_grad=True)
    mask = torch.tensor([[True, True]])
    loss = WITH_GRADIENT[name](x, torch.full((1, 2), -500.0), torch.ones(1, 2), mask)
    assert torch.equal(torch.autograd.grad(loss.sum(), x)[0], torch.zeros(1, 2))


# --- at ratio 1 every surrogate is REINFORCE


@given(seed=SEEDS)
@FEW
def test_surrogates_at_ratio_one_have_reinforces_gradient(seed: int) -> None:
    generator = seeded(seed)
    mask = ragged_mask(generator, 4, 6)
    x, a_B1 = draw(generator, 4, 6), draw(generator, 4, 1)

    def gradient(name: str) -> Tensor:
        leaf = x.clone().requires_grad_()
        loss = WITH_GRADIENT[name](leaf, x, a_B1.expand(4, 6), mask)
        loss = masked_sum(loss, mask, 4, weights_BT=token_weights(mask, "seq_mean_token_mean"))
        return torch.autograd.grad(loss, leaf)[0]

    for name in ("clipped", "dual_clip", "gspo_token", "cispo", "sapo", "gspo"):
        torch.testing.assert_close(gradient(name), gradient("reinforce"), rtol=1e-12, atol=1e-14)


# --- one denominator per optimiser step

AGGREGATIONS: list[Aggregation] = ["seq_mean_token_mean", "token_mean", "token_sum_norm", "seq_mean_token_sum"]


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@given(seed=SEEDS, cuts=st.sets(st.integers(1, 7), max_size=4))
@FEW
def test_micro_batches_add_up_to_the_full_batch(aggregation: Aggregation, seed: int, cuts: set[int]) -> None:
    generator = seeded(seed)
    x, y, a = draw(generator, 8, 6), draw(generator, 8, 6), draw(generator, 8, 1)
    mask = ragged_mask(generator, 8, 6)
    denominator = step_denominator(aggregation, num_sequences=8, num_tokens=int(mask.sum()), max_tokens=10)

    def gradient(bounds: list[int]) -> Tensor:
        leaf = x.clone().requires_grad_()
        for rows in (slice(i, j) for i, j in itertools.pairwise(bounds)):
            loss = WITH_GRADIENT["clipped"](leaf[rows], y[rows], a[rows].expand(-1, 6), mask[rows])
            masked_sum(loss, mask[rows], denominator, weights_BT=token_weights(mask[rows], aggregation)).backward()
        assert leaf.grad is not None
        return leaf.grad

    torch.testing.assert_close(gradient([0, *sorted(cuts), 8]), gradient([0, 8]), rtol=1e-12, atol=1e-15)


def test_a_mean_per_micro_batch_is_another_gradient() -> None:
    """The control of the test above: what the convention protects from."""
    lengths, micro_batches = [1, 2, 1, 30, 28, 2], [slice(0, 3), slice(3, 6)]
    mask = torch.arange(30) < torch.tensor(lengths)[:, None]
    x = draw(seeded(0), 6, 30)
    a = draw(seeded(1), 6, 1)

    def gradient(denominators: list[int]) -> Tensor:
        leaf = x.clone().requires_grad_()
        for rows, denominator in zip(micro_batches, denominators, strict=True):
            masked_sum(
                policy_gradient.reinforce_loss(leaf[rows], a[rows], mask[rows]), mask[rows], denominator
            ).backward()
        assert leaf.grad is not None
        return leaf.grad.flatten()

    full, means = gradient([64, 64]), gradient([4, 60])
    assert torch.cosine_similarity(full, means, dim=0) < 0.9


def test_weights_of_every_variant_by_hand() -> None:
    mask = torch.tensor([[True, True, False, False], [True, True, True, True]])
    loss = torch.tensor([[1.0, 1.0, 9.0, 9.0], [3.0, 3.0, 3.0, 3.0]])
    expected = {"seq_mean_token_mean": 2.0, "token_mean": 14 / 6, "token_sum_norm": 14 / 20, "seq_mean_token_sum": 7.0}
    for aggregation in AGGREGATIONS:
        denominator = step_denominator(aggregation, num_sequences=2, num_tokens=6, max_tokens=10)
        actual = masked_sum(loss, mask, denominator, weights_BT=token_weights(mask, aggregation))
        assert actual.item() == pytest.approx(expected[aggregation])


# --- advantages


@given(seed=SEEDS, group_size=st.integers(2, 9))
@FEW
def test_leave_one_out_is_the_mean_of_the_others(seed: int, group_size: int) -> None:
    rewards_PG = draw(seeded(seed), 3, group_size)
    others = torch.stack(
        [rewards_PG[:, [j for j in range(group_size) if j != i]].mean(-1) for i in range(group_size)], -1
    )
    actual = advantages.leave_one_out_advantages(rewards_PG)
    torch.testing.assert_close(actual, rewards_PG - others, rtol=1e-12, atol=1e-13)
    centred = rewards_PG - rewards_PG.mean(-1, keepdim=True)
    torch.testing.assert_close(actual, group_size / (group_size - 1) * centred, rtol=1e-12, atol=1e-13)


@given(seed=SEEDS)
@FEW
def test_a_masked_sample_is_as_if_it_had_not_been_drawn(seed: int) -> None:
    rewards_PG = draw(seeded(seed), 1, 6)
    mask_PG = torch.tensor([[True, False, True, True, False, True]])
    kept = mask_PG[0]
    for function in (
        lambda r, m: advantages.group_advantages(r, m, scale="std", unbiased=True),
        lambda r, m: advantages.group_advantages(r, m, scale="std", unbiased=False),
        lambda r, m: advantages.group_advantages(r, m, scale="none"),
        advantages.leave_one_out_advantages,
        lambda r, m: advantages.batch_advantages(r, m, baseline="group"),
        advantages.whiten,
    ):
        torch.testing.assert_close(
            function(rewards_PG, mask_PG)[:, kept], function(rewards_PG[:, kept], None), rtol=1e-12, atol=1e-13
        )


def test_groups_without_signal_get_exactly_zero() -> None:
    rewards_PG = torch.full((2, 7), 0.1)
    rewards_PG[1] = 5 * torch.rand(7, generator=seeded(4))  # its mean rounds
    only_one_left = torch.tensor([[True] + [False] * 6]).expand(2, 7)
    for actual in (
        advantages.group_advantages(rewards_PG, scale="std", eps=1e-9),
        advantages.leave_one_out_advantages(rewards_PG),
        advantages.batch_advantages(rewards_PG, baseline="group"),
    ):
        assert (actual[0] == 0).all() and actual[1].abs().max() > 1
    assert (advantages.group_advantages(rewards_PG, only_one_left, scale="std") == 0).all()
    assert (advantages.leave_one_out_advantages(rewards_PG, only_one_left) == 0).all()


@pytest.mark.parametrize(
    ("kind", "p", "expected"),
    [("std", 0.05, 2.47), ("std", 0.1, 2.33), ("std", 0.5, 1.86), ("std", 0.9, 2.33)]
    + [("none", p, 0.875) for p in (0.05, 0.5)]
    + [("loo", p, 1.0) for p in (0.05, 0.5)],
)
def test_which_multiple_of_the_policy_gradient_each_baseline_follows(kind: str, p: float, expected: float) -> None:
    """Binary rewards with success rate p, G = 8, all groups enumerated: E[mean_i A_i (R_i - p)] / (p (1 - p))."""
    rewards_PG = torch.tensor([[1.0] * k + [0.0] * (8 - k) for k in range(9)], dtype=torch.float64)
    chance_P = torch.tensor([math.comb(8, k) * p**k * (1 - p) ** (8 - k) for k in range(9)], dtype=torch.float64)
    advantages_PG = {
        "std": advantages.group_advantages(rewards_PG, scale="std", unbiased=False, eps=0.0),
        "none": advantages.group_advantages(rewards_PG, scale="none"),
        "loo": advantages.leave_one_out_advantages(rewards_PG),
    }[kind]
    multiple = (chance_P * (advantages_PG * (rewards_PG - p)).mean(-1)).sum() / (p * (1 - p))
    assert multiple.item() == pytest.approx(expected, abs=0.005 if kind == "std" else 1e-12)


def _gae_definition(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """The O(T^2) sum of equation 16, on a trajectory without holes."""
    deltas = [r + gamma * v_next - v for r, v, v_next in zip(rewards, values, [*values, 0.0][1:], strict=True)]
    return [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, len(deltas))) for t in range(len(deltas))]


@given(seed=SEEDS, gamma=st.sampled_from([1.0, 0.9]), lam=st.sampled_from([0.0, 0.95, 1.0]))
@FEW
def test_gae_is_its_definition_on_the_counting_tokens(seed: int, gamma: float, lam: float) -> None:
    generator = seeded(seed)
    mask = ragged_mask(generator, 4, 9)
    rewards, values = draw(generator, 4, 9), draw(generator, 4, 9)
    actual, returns = advantages.gae(rewards, values, mask, gamma=gamma, gae_lambda=lam)
    for b in range(4):
        expected = _gae_definition(rewards[b, mask[b]].tolist(), values[b, mask[b]].tolist(), gamma, lam)
        assert actual[b, mask[b]].tolist() == pytest.approx(expected, rel=1e-10, abs=1e-12)
    torch.testing.assert_close(returns[mask], (actual + values)[mask], rtol=0, atol=1e-14)


def test_gae_carries_the_outcome_over_tool_tokens() -> None:
    mask = torch.tensor([[True, False, False, True]])
    rewards, values = torch.tensor([[0.0, 7.0, 7.0, 1.0]]), torch.tensor([[0.25, 7.0, 7.0, 0.5]])
    actual, _ = advantages.gae(rewards, values, mask, gamma=1.0, gae_lambda=1.0)
    assert actual.tolist() == [[0.75, 0.0, 0.0, 0.5]]


@given(seed=SEEDS)
@FEW
def test_token_rewards_add_up_to_reward_minus_kl(seed: int) -> None:
    generator = seeded(seed)
    mask = ragged_mask(generator, 4, 6)[1:]
    mask[:, 0] = True
    rewards_B, kl_BT = draw(generator, 3), draw(generator, 3, 6)
    actual = advantages.token_rewards(rewards_B, kl_BT, mask, kl_coef=0.1)
    torch.testing.assert_close(actual.sum(-1), rewards_B - 0.1 * (kl_BT * mask).sum(-1))
    last_B = [row.nonzero()[-1].item() for row in mask]
    bonus = actual + 0.1 * kl_BT * mask
    assert [row.abs().argmax().item() for row in bonus] == last_B


@given(seed=SEEDS)
@FEW
def test_whitening_gives_mean_zero_and_variance_one(seed: int) -> None:
    generator = seeded(seed)
    mask, x = ragged_mask(generator, 5, 6), 3 + 2 * draw(generator, 5, 6)
    whitened = advantages.whiten(x, mask, eps=0.0)[mask]
    assert whitened.mean().item() == pytest.approx(0, abs=1e-12) and whitened.var().item() == pytest.approx(1)
    kept = advantages.whiten(x, mask, shift_mean=False, unbiased=False, eps=0.0)[mask]
    assert kept.mean().item() == pytest.approx(x[mask].mean().item())
    assert kept.var(correction=0).item() == pytest.approx(1)


# --- KL


@pytest.mark.parametrize("estimator", [kl.kl_k1, kl.kl_k3, kl.kl_k3_plus])
def test_monte_carlo_kl_is_within_four_standard_errors(estimator: Callable[[Tensor, Tensor], Tensor]) -> None:
    p = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    q = p.flip(0)
    exact = (p * (p / q).log()).sum()
    samples = torch.multinomial(p, 300_000, replacement=True, generator=seeded(5))
    estimates = estimator(p.log()[samples], q.log()[samples])
    standard_error = estimates.std() / math.sqrt(len(samples))
    assert (estimates.mean() - exact).abs() < 4 * standard_error < 0.02


@given(seed=SEEDS)
@FEW
def test_expected_gradient_of_k2_is_that_of_the_kl(seed: int) -> None:
    generator = seeded(seed)
    theta, ref = draw(generator, 6).requires_grad_(), torch.log_softmax(draw(generator, 6), 0)
    log_p = torch.log_softmax(theta, 0)
    exact = torch.autograd.grad((log_p.exp() * (log_p - ref)).sum(), theta, retain_graph=True)[0]
    for estimator in (kl.kl_k2, kl.kl_k3_plus):
        loss = (log_p.exp().detach() * estimator(log_p, ref)).sum()
        actual = torch.autograd.grad(loss, theta, retain_graph=True)[0]
        torch.testing.assert_close(actual, exact, rtol=1e-10, atol=1e-12)


@given(seed=SEEDS)
@FEW
def test_ratio_times_k3_is_unbiased_for_an_older_policys_tokens(seed: int) -> None:
    generator = seeded(seed)
    old, new, ref = (torch.log_softmax(draw(generator, 6), 0) for _ in range(3))
    estimate = (old.exp() * policy_gradient.importance_ratio(new, old) * kl.kl_k3(new, ref)).sum()
    torch.testing.assert_close(estimate, (new.exp() * (new - ref)).sum(), rtol=1e-10, atol=1e-12)


def test_k3_is_never_negative_in_float32() -> None:
    d = torch.logspace(-8, 0, 4001)
    for ref in (d, -d):
        assert (kl.kl_k3(torch.zeros_like(ref), ref) >= 0).all()
    small = kl.kl_k3(torch.zeros(1), torch.tensor([1e-3]))
    assert small.item() == pytest.approx(5.00167e-7, rel=1e-3)  # float32 keeps 4 digits of d^2 / 2 here


# --- importance weights


@given(seed=SEEDS, clip=st.sampled_from([1e-3, 0.2, 10.0]))
@FEW
def test_gspo_token_has_gspos_value(seed: int, clip: float) -> None:
    generator = seeded(seed)
    mask = ragged_mask(generator, 4, 6)
    x, y, a_B = draw(generator, 4, 6), draw(generator, 4, 6), draw(generator, 4)
    per_sequence = policy_gradient.gspo_loss(x, y, a_B, mask, clip_low=clip, clip_high=clip)
    per_token = policy_gradient.gspo_token_loss(x, y, a_B[:, None], mask, clip_low=clip, clip_high=clip)
    torch.testing.assert_close(sequence_mean(per_token, mask), per_sequence, rtol=1e-12, atol=1e-14)
    assert per_sequence[0] == 0  # the row without tokens


def test_importance_weights_by_hand() -> None:
    log_weights = torch.tensor([[0.5, 1.0, 9.0], [-0.25, -2.0, 0.125], [400.0, 400.0, 0.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True, False], [True, True, True], [True, True, True]])
    sampling = torch.full_like(log_weights, -1.5)
    old = sampling + log_weights
    e, w = math.exp, policy_gradient
    truncated = w.truncated_importance_weights
    assert truncated(old, sampling, mask, level="token", cap=2.0).flatten().tolist() == pytest.approx(
        [e(0.5), 2.0, 0.0, e(-0.25), e(-2.0), e(0.125), 2.0, 2.0, 1.0]
    )
    assert truncated(old, sampling, mask, level="sequence", cap=2.0).flatten().tolist() == pytest.approx(
        [2.0, 2.0, 0.0] + [e(-2.125)] * 3 + [2.0] * 3
    )
    masked = w.masked_importance_weights
    assert masked(old, sampling, mask, level="token", low=0.5, high=2.0).flatten().tolist() == pytest.approx(
        [e(0.5), 0.0, 0.0, e(-0.25), 0.0, e(0.125), 0.0, 0.0, 1.0]
    )
    assert masked(old, sampling, mask, level="sequence", low=0.0, high=5.0).flatten().tolist() == pytest.approx(
        [e(1.5), e(1.5), 0.0] + [e(-2.125)] * 3 + [0.0] * 3
    )


def test_effective_sample_fraction() -> None:
    fraction = policy_gradient.effective_sample_fraction
    assert fraction(torch.full((7,), -900.0)).item() == pytest.approx(1.0)
    assert fraction(torch.tensor([0.0, -torch.inf, -torch.inf, -torch.inf])).item() == pytest.approx(0.25)
    for sigma in (0.1, 0.5):
        log_weights = draw(seeded(6), 200_000, scale=sigma)
        assert fraction(log_weights).item() == pytest.approx(math.exp(-(sigma**2)), rel=0.01)  # sampling error


# --- optima: what the losses converge to


REF = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64).log()
REWARDS = torch.tensor([0.0, 1.0, -0.5, 2.0], dtype=torch.float64)
BETA = 0.7
OPTIMUM = torch.softmax(REF + REWARDS / BETA, 0)


def descend(loss: Callable[[Tensor], Tensor], num_parameters: int = 4) -> Tensor:
    theta = torch.zeros(num_parameters, dtype=torch.float64, requires_grad=True)
    for _ in range(400):
        theta.data -= torch.autograd.grad(loss(theta), theta)[0]
    return theta.detach()


def _bandit(theta: Tensor, kl_in_reward: bool, kl_loss: Callable[[Tensor, Tensor], Tensor] | None) -> Tensor:
    log_p = torch.log_softmax(theta, 0)
    sampled = log_p.detach()
    rewards = REWARDS - BETA * kl.kl_k1(sampled, REF) if kl_in_reward else REWARDS
    loss = policy_gradient.clipped_policy_loss(
        log_p, sampled, rewards - (sampled.exp() * rewards).sum(), clip_low=0.2, clip_high=0.2
    )
    if kl_loss is not None:
        loss = loss + BETA * kl_loss(log_p, REF)
    return (sampled.exp() * loss).sum()


@pytest.mark.parametrize(("kl_in_reward", "kl_loss"), [(True, None), (False, kl.kl_k2), (False, kl.kl_k3_plus)])
def test_a_kl_regularised_bandit_converges_to_the_tilted_reference(kl_in_reward: bool, kl_loss: Any) -> None:
    theta = descend(lambda theta: _bandit(theta, kl_in_reward, kl_loss))
    torch.testing.assert_close(torch.softmax(theta, 0), OPTIMUM, rtol=0, atol=1e-6)


def test_k1_as_a_loss_does_not_regularise() -> None:
    theta = descend(lambda theta: _bandit(theta, False, kl.kl_k1))
    assert torch.softmax(theta, 0)[3] > 0.98 > 0.8 > OPTIMUM[3]


def test_dpo_on_exact_bradley_terry_data_recovers_the_same_policy() -> None:
    beats = torch.sigmoid(REWARDS[:, None] - REWARDS[None, :])  # of i over j

    def loss(theta: Tensor) -> Tensor:
        logratios = torch.log_softmax(theta, 0) - REF
        return (beats * preference.dpo_loss(logratios[:, None], logratios[None, :], beta=BETA)).mean() * 10

    torch.testing.assert_close(torch.softmax(descend(loss), 0), OPTIMUM, rtol=0, atol=1e-6)


def test_reward_models_on_infinite_data_recover_score_differences() -> None:
    beats = torch.sigmoid(REWARDS[:, None] - REWARDS[None, :])
    orders = list(itertools.permutations(range(4)))
    chances = []
    for order in orders:
        strengths = [math.exp(REWARDS[i]) for i in order]
        chances.append(math.prod(strengths[k] / sum(strengths[k:]) for k in range(4)))
    chance_N, orders_NK = torch.tensor(chances, dtype=torch.float64), torch.tensor(orders)
    assert chance_N.sum().item() == pytest.approx(1)

    def pairs(scores: Tensor) -> Tensor:
        return (beats * reward_model.bradley_terry_loss(scores[:, None], scores[None, :])).sum()

    def all_pairs_of_rankings(scores: Tensor) -> Tensor:
        return (chance_N * reward_model.kwise_loss(scores[orders_NK])).sum() * 4

    def rankings(scores: Tensor) -> Tensor:
        return (chance_N * reward_model.plackett_luce_loss(scores[orders_NK])).sum()

    for loss in (pairs, all_pairs_of_rankings, rankings):
        scores = descend(loss)
        torch.testing.assert_close(scores - scores[0], REWARDS - REWARDS[0], rtol=0, atol=1e-6)


@given(flip=st.floats(0, 0.45), seed=SEEDS)
@FEW
def test_robust_dpo_is_unbiased_under_flipped_labels_and_cdpo_is_not(flip: float, seed: int) -> None:
    chosen, rejected = draw(seeded(seed), 2, 3, scale=3.0)
    clean = preference.dpo_loss(chosen, rejected, beta=0.5)

    def expected(loss: Callable[..., Tensor]) -> Tensor:
        straight = loss(chosen, rejected, beta=0.5, flip_probability=flip)
        return (1 - flip) * straight + flip * loss(rejected, chosen, beta=0.5, flip_probability=flip)

    torch.testing.assert_close(expected(preference.robust_dpo_loss), clean, rtol=1e-9, atol=1e-9)
    if flip > 0.1:
        assert (expected(preference.cdpo_loss) - clean).abs().max() > 1e-6


def test_orpo_is_finite_at_probability_one_and_at_underflow() -> None:
    for mean_logprob in (0.0, -1e-9, -200.0):
        x = torch.tensor([mean_logprob], requires_grad=True)
        loss = preference.orpo_loss(x, torch.tensor([-0.5]), beta=0.1)
        assert loss.isfinite().all() and torch.autograd.grad(loss.sum(), x)[0].isfinite().all()


def test_two_completions_make_a_pair() -> None:
    scores_PK = torch.tensor([[1.2, 0.3], [-1.0, 2.0]], dtype=torch.float64)
    pair = reward_model.bradley_terry_loss(scores_PK[:, 0], scores_PK[:, 1])
    torch.testing.assert_close(reward_model.kwise_loss(scores_PK), pair)
    torch.testing.assert_close(reward_model.plackett_luce_loss(scores_PK), pair)


@given(seed=SEEDS)
@FEW
def test_a_masked_completion_is_as_if_it_had_not_been_ranked(seed: int) -> None:
    scores_PK, mask_PK = draw(seeded(seed), 1, 5), torch.tensor([[True, False, True, True, False]])
    for loss in (reward_model.kwise_loss, reward_model.plackett_luce_loss):
        torch.testing.assert_close(loss(scores_PK, mask_PK), loss(scores_PK[:, mask_PK[0]]), rtol=1e-12, atol=1e-13)


# --- the chunked head


def _head(num_rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = seeded(8)
    hidden, weight, bias = draw(generator, num_rows, 8), draw(generator, 4000, 8), draw(generator, 4000)
    labels = torch.randint(4000, (num_rows,), generator=generator)
    return hidden.to(dtype), weight.to(dtype), bias.to(dtype), labels


@pytest.mark.parametrize("num_rows", [1, 40, 400])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_linear_logprobs_equals_the_plain_computation(num_rows: int, softcap: float | None) -> None:
    """400 rows: two row chunks forward, two vocabulary blocks backward, several elementwise pieces inside each."""
    *head, labels = _head(num_rows, torch.float64)
    upstream_logprobs, upstream_entropy = draw(seeded(9), 2, num_rows)

    def run(plain: bool) -> list[Tensor]:
        hidden, weight, bias = (x.clone().requires_grad_() for x in head)
        if plain:
            logits = hidden @ weight.T + bias
            logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
            logprobs = logprobs_from_logits(logits, labels, temperature=0.8)
            log_p = torch.log_softmax(logits / 0.8, -1)
            entropy = -(log_p.exp() * log_p).sum(-1)
        else:
            logprobs, maybe_entropy = linear_logprobs(
                hidden, weight, labels, temperature=0.8, bias_V=bias, softcap=softcap, chunk_size=300, with_entropy=True
            )
            assert maybe_entropy is not None
            entropy = maybe_entropy
        (logprobs @ upstream_logprobs + entropy @ upstream_entropy).backward()
        return [logprobs.detach(), entropy.detach(), *(x.grad for x in (hidden, weight, bias) if x.grad is not None)]

    for actual, expected in zip(run(False), run(True), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-11)


def test_linear_logprobs_in_bfloat16_keeps_float32_results() -> None:
    """The products round to bfloat16, as the model's own do; what follows must not round again."""
    hidden, weight, _, labels = _head(40, torch.bfloat16)
    logprobs, entropy = linear_logprobs(hidden, weight, labels, chunk_size=16, with_entropy=True)
    assert logprobs.dtype == torch.float32 and entropy is not None
    log_p = torch.log_softmax((hidden @ weight.T).double(), -1)
    torch.testing.assert_close(logprobs.double(), log_p.gather(1, labels[:, None])[:, 0], rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(entropy.double(), -(log_p.exp() * log_p).sum(-1), rtol=1e-6, atol=1e-5)


def test_linear_logprobs_sums_a_bfloat16_weight_gradient_in_float32() -> None:
    """The gradient of 512 equal rows is 512 times one row's, to one bfloat16 rounding; summed in bfloat16 it stalls."""
    hidden, weight = torch.ones(512, 4, dtype=torch.bfloat16), torch.zeros(2000, 4, dtype=torch.bfloat16)
    weight.requires_grad_()
    logprobs, _ = linear_logprobs(hidden, weight, torch.zeros(512, dtype=torch.int64), chunk_size=32)
    logprobs.sum().backward()
    assert weight.grad is not None
    row = torch.tensor(-1 / 2000).bfloat16().double()
    torch.testing.assert_close(weight.grad[1:].double(), (512 * row).expand(1999, 4), rtol=2**-8, atol=0)


class LargestTensor(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.numel = max(self.numel, result.numel())
        return result


def test_linear_logprobs_never_holds_the_logits_of_all_rows() -> None:
    hidden, weight, _, labels = _head(512, torch.float32)
    hidden.requires_grad_(), weight.requires_grad_()
    with LargestTensor() as largest:
        logprobs, _ = linear_logprobs(hidden, weight, labels, chunk_size=16)
        logprobs.sum().backward()
    assert 16 * 4000 <= largest.numel <= 512 * 3072  # the backward pass never goes below blocks of 3072 columns
    with LargestTensor() as plain:
        logprobs_from_logits(hidden @ weight.T, labels)
    assert plain.numel >= 512 * 4000


def test_linear_logprobs_of_no_rows() -> None:
    hidden, weight, _, _ = _head(1, torch.float32)
    hidden, weight = hidden[:0].requires_grad_(), weight.requires_grad_()
    logprobs, entropy = linear_logprobs(hidden, weight, torch.zeros(0, dtype=torch.int64), with_entropy=True)
    assert entropy is not None and logprobs.shape == entropy.shape == (0,)
    logprobs.sum().backward()
    assert weight.grad is not None and not weight.grad.any()


def test_cross_entropy_of_an_untrained_head_is_log_vocabulary() -> None:
    hidden, weight, _, labels = _head(6, torch.float32)
    nll = linear_cross_entropy(hidden, torch.zeros_like(weight), labels, chunk_size=4)
    torch.testing.assert_close(nll, torch.full((6,), math.log(4000)))


def test_linear_cross_entropy_is_torchs() -> None:
    hidden, weight, bias, labels = _head(40, torch.float64)
    logits = 3.0 * torch.tanh((hidden @ weight.T + bias) / 3.0)
    actual = linear_cross_entropy(hidden, weight, labels, bias_V=bias, softcap=3.0, chunk_size=16)
    torch.testing.assert_close(actual, torch.nn.functional.cross_entropy(logits, labels, reduction="none"))


def test_a_second_derivative_is_refused_instead_of_wrong() -> None:
    hidden, weight, _, labels = _head(4, torch.float64)
    hidden.requires_grad_()
    logprobs, _ = linear_logprobs(hidden, weight, labels)
    gradient = torch.autograd.grad(logprobs.square().sum(), hidden, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_a_label_outside_the_vocabulary_is_refused() -> None:
    hidden, weight, _, _ = _head(1, torch.float32)
    for label in (-100, 4000):
        with pytest.raises(RuntimeError, match="out of bounds"):
            linear_logprobs(hidden, weight, torch.tensor([label]))


# --- closed forms and refused arguments


@pytest.mark.parametrize("num_correct", [0, 1, 3, 6])
@pytest.mark.parametrize("k", [1, 2, 5, 6])
def test_pass_at_k_is_the_fraction_of_subsets_with_a_right_answer(num_correct: int, k: int) -> None:
    answers = [True] * num_correct + [False] * (6 - num_correct)
    subsets = list(itertools.combinations(answers, k))
    assert pass_at_k.pass_at_k(6, num_correct, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-15)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pass_at_k.pass_at_k(4, 1, 8), "pass@8 needs"),
        (lambda: pass_at_k.pass_at_k(4, 5, 1), "num_correct"),
        (lambda: pass_at_k.bon_kl(0), "n >= 1"),
        (
            lambda: linear_logprobs(torch.ones(1, 1), torch.ones(2, 1), torch.zeros(1).long(), temperature=0),
            "temperature",
        ),
        (lambda: linear_logprobs(torch.ones(1, 1), torch.ones(2, 1), torch.zeros(1).long(), softcap=0), "softcap"),
        (
            lambda: linear_logprobs(torch.ones(1, 1), torch.ones(2, 1), torch.zeros(1).long(), chunk_size=0),
            "chunk_size",
        ),
        (lambda: logprobs_from_logits(torch.ones(1, 2), torch.zeros(1).long(), temperature=0), "temperature"),
        (lambda: advantages.group_advantages(torch.ones(3, 1), scale="none"), "group_size is 1"),
        (lambda: advantages.leave_one_out_advantages(torch.ones(3, 1)), "group_size is 1"),
        (lambda: advantages.whiten(torch.ones(3), torch.tensor([True, False, False])), "at least 2"),
        (lambda: step_denominator("token_sum_norm", num_sequences=1, num_tokens=1), "max_tokens"),
        (lambda: preference.cdpo_loss(torch.ones(1), torch.ones(1), beta=1, flip_probability=0.5), "flip_probability"),
        (lambda: policy_gradient.overlong_penalty(torch.ones(1), max_length=4, buffer=5), "buffer"),
        (lambda: kl.adaptive_kl_coef(0.1, 1, target=0, horizon=1, num_episodes=1), "target"),
        (
            lambda: policy_gradient.clipped_policy_loss(
                torch.ones(1), torch.ones(1), torch.ones(1), clip_low=0.2, clip_high=0.2, dual_clip=1.0
            ),
            "dual_clip",
        ),
    ],
)
def test_impossible_arguments_are_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_explained_variance_is_1_for_a_prophet_0_for_a_constant_and_negative_for_a_liar() -> None:
    returns = draw(seeded(3), 4, 6)
    mask = torch.arange(6) < torch.tensor([[6], [2], [4], [1]])
    junk = torch.where(mask, returns, math.nan)
    assert value.explained_variance(junk, junk, mask) == 1.0
    assert value.explained_variance(junk + 7.0, junk, mask) == pytest.approx(1.0), "a constant error is no variance"
    assert value.explained_variance(torch.full_like(returns, 0.3), junk, mask) == pytest.approx(0.0)
    assert value.explained_variance(-junk, junk, mask) == pytest.approx(-3.0)
    assert math.isnan(value.explained_variance(junk, torch.ones_like(junk), mask))
