"""Which way every objective pushes. A wrong sign trains, and trains the opposite."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from strop.objectives import advantages, cross_entropy, kl, policy_gradient, preference, reward_model, value
from strop.objectives.logprobs import linear_logprobs


def slope(loss: Callable[[Tensor], Tensor], at: float) -> float:
    """d loss / d x: negative means that gradient descent raises x."""
    x = torch.tensor([[at]], dtype=torch.float64, requires_grad=True)
    return torch.autograd.grad(loss(x).sum(), x)[0].item()


def f64(number: float) -> Tensor:
    return torch.tensor([[number]], dtype=torch.float64)


ALL = torch.ones(1, 1, dtype=torch.bool)
SURROGATES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "clipped": lambda x, old, a: policy_gradient.clipped_policy_loss(x, old, a, clip_low=0.2, clip_high=0.2),
    "dual_clip": lambda x, old, a: policy_gradient.clipped_policy_loss(
        x, old, a, clip_low=0.2, clip_high=0.2, dual_clip=3.0
    ),
    "gspo": lambda x, old, a: policy_gradient.gspo_loss(x, old, a[:, 0], ALL, clip_low=0.2, clip_high=0.2),
    "gspo_token": lambda x, old, a: policy_gradient.gspo_token_loss(x, old, a, ALL, clip_low=0.2, clip_high=0.2),
    "cispo": lambda x, old, a: policy_gradient.cispo_loss(x, old, a, ratio_max=1.2),
    "sapo": lambda x, old, a: policy_gradient.sapo_loss(x, old, a),
    "reinforce": lambda x, old, a: policy_gradient.reinforce_loss(x, a),
}
CLIPPED = ["clipped", "dual_clip", "gspo", "gspo_token"]


@pytest.mark.parametrize("name", sorted(SURROGATES))
@pytest.mark.parametrize("log_ratio", [-0.1, 0.0, 0.1])
def test_a_positive_advantage_raises_the_logprob(name: str, log_ratio: float) -> None:
    old = f64(-1.0)
    assert slope(lambda x: SURROGATES[name](x, old, f64(2.0)), -1.0 + log_ratio) < -1
    assert slope(lambda x: SURROGATES[name](x, old, f64(-2.0)), -1.0 + log_ratio) > 1


@pytest.mark.parametrize("name", CLIPPED)
def test_the_clip_stops_only_the_favoured_direction(name: str) -> None:
    above, below, old = -1.0 + 0.3, -1.0 - 0.3, f64(-1.0)
    assert slope(lambda x: SURROGATES[name](x, old, f64(1.0)), above) == 0  # good and already likelier: enough
    assert slope(lambda x: SURROGATES[name](x, old, f64(-1.0)), below) == 0  # bad and already rarer: enough
    assert slope(lambda x: SURROGATES[name](x, old, f64(1.0)), below) < -0.5  # good but rarer: bring it back
    assert slope(lambda x: SURROGATES[name](x, old, f64(-1.0)), above) > 1  # bad but likelier: bring it back


def test_clip_higher_moves_only_the_upper_bound() -> None:
    def loss(x: Tensor, advantage: float) -> Tensor:
        return policy_gradient.clipped_policy_loss(x, f64(0.0), f64(advantage), clip_low=0.2, clip_high=0.5)

    assert slope(lambda x: loss(x, 1.0), 0.3) < -1
    assert slope(lambda x: loss(x, 1.0), 0.5) == 0
    assert slope(lambda x: loss(x, -1.0), -0.3) == 0


def test_clip_low_of_one_or_more_means_no_lower_bound() -> None:
    for clip_low in (1.0, 10.0):
        actual = slope(
            lambda x, low=clip_low: policy_gradient.clipped_policy_loss(
                x, f64(0.0), f64(-1.0), clip_low=low, clip_high=0.2
            ),
            -5.0,
        )
        assert actual == pytest.approx(torch.exp(torch.tensor(-5.0)).item(), rel=1e-6)


def test_dual_clip_bounds_bad_tokens_only() -> None:
    def loss(x: Tensor, advantage: float) -> Tensor:
        return SURROGATES["dual_clip"](x, f64(0.0), f64(advantage))

    assert slope(lambda x: loss(x, -1.0), 1.0) > 2  # r = e < 3
    assert slope(lambda x: loss(x, -1.0), 1.2) == 0  # r = 3.32 > 3
    assert loss(f64(5.0), -1.0).item() == pytest.approx(3.0)


def test_clipped_tokens_reports_exactly_the_zero_gradients() -> None:
    log_ratios = torch.linspace(-0.5, 0.5, 11, dtype=torch.float64).expand(2, 11).clone().requires_grad_()
    old, advantage = torch.zeros(2, 11, dtype=torch.float64), torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    loss = policy_gradient.clipped_policy_loss(log_ratios, old, advantage, clip_low=0.2, clip_high=0.3)
    low, high = policy_gradient.clipped_tokens(
        log_ratios.detach(), old, advantage.expand(2, 11), clip_low=0.2, clip_high=0.3
    )
    assert torch.equal(low | high, torch.autograd.grad(loss.sum(), log_ratios)[0] == 0)
    assert low.sum() == 3 and high.sum() == 3  # -.5 -.4 -.3 of the bad row, .3 .4 .5 of the good one
    assert not low[0].any() and not high[1].any()


def test_sapo_fades_on_both_sides_and_never_to_zero() -> None:
    weights = [-slope(lambda x: SURROGATES["sapo"](x, f64(0.0), f64(1.0)), at) for at in (-1.0, 0.0, 1.0)]
    assert weights[1] == pytest.approx(1.0, abs=1e-14)
    assert 0 < weights[0] < 0.5 and 0 < weights[2] < 2.72 * 0.6


@pytest.mark.parametrize("estimator", [kl.kl_k2, kl.kl_k3, kl.kl_k3_plus])
def test_kl_pulls_towards_the_reference(estimator: Callable[[Tensor, Tensor], Tensor]) -> None:
    assert slope(lambda x: estimator(x, f64(-1.0)), -0.5) > 0.3
    assert slope(lambda x: estimator(x, f64(-1.0)), -1.5) < -0.3
    assert slope(lambda x: estimator(x, f64(-1.0)), -1.0) == 0


def test_k1_is_positive_where_the_policy_likes_a_token_more_than_the_reference() -> None:
    assert kl.kl_k1(f64(-0.5), f64(-1.0)).item() == 0.5


def test_kl_in_the_reward_is_a_cost() -> None:
    rewards = advantages.token_rewards(torch.tensor([2.0]), torch.tensor([[0.5, -0.25]]), ALL.expand(1, 2), kl_coef=0.1)
    torch.testing.assert_close(rewards, torch.tensor([[-0.05, 2.025]]))


def test_the_kl_coefficient_rises_when_the_policy_is_too_far() -> None:
    options = {"target": 6.0, "horizon": 1000.0, "num_episodes": 100}
    assert kl.adaptive_kl_coef(0.1, 6.5, **options) > 0.1 > kl.adaptive_kl_coef(0.1, 5.5, **options)


PAIR_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "dpo": lambda c, r: preference.dpo_loss(c, r, beta=0.1),
    "cdpo": lambda c, r: preference.cdpo_loss(c, r, beta=0.1, flip_probability=0.2),
    "robust": lambda c, r: preference.robust_dpo_loss(c, r, beta=0.1, flip_probability=0.2),
    "ipo": lambda c, r: preference.ipo_loss(c, r, beta=0.1),
    "hinge": lambda c, r: preference.hinge_loss(c, r, beta=0.1),
    "simpo": lambda c, r: preference.simpo_loss(c - 1, r - 1, beta=2.0, margin=0.5),
    "orpo": lambda c, r: preference.orpo_loss(c - 1, r - 1, beta=0.1),
    "apo_zero": lambda c, r: preference.apo_zero_loss(c, r, beta=0.1),
    "bco": lambda c, r: preference.bco_loss(c, r, beta=0.1),
    "sppo": lambda c, r: preference.sppo_loss(c, r, beta=0.1),
    "sigmoid_norm": lambda c, r: preference.sigmoid_norm_loss(c, r, f64(2.0), f64(3.0), beta=0.1),
    "bradley_terry": lambda c, r: reward_model.bradley_terry_loss(c, r),
    "kwise": lambda c, r: reward_model.kwise_loss(torch.cat([c, r], -1)),
    "plackett_luce": lambda c, r: reward_model.plackett_luce_loss(torch.cat([c, r], -1)),
}


@pytest.mark.parametrize("name", sorted(PAIR_LOSSES))
@pytest.mark.parametrize("start", [(0.0, 0.0), (0.3, -0.4), (-0.4, 0.3)])
def test_chosen_rises_and_rejected_falls(name: str, start: tuple[float, float]) -> None:
    chosen, rejected = start
    assert slope(lambda x: PAIR_LOSSES[name](x, f64(rejected)), chosen) < -0.01
    assert slope(lambda x: PAIR_LOSSES[name](f64(chosen), x), rejected) > 0.001


@pytest.mark.parametrize("name", sorted(set(PAIR_LOSSES) - {"sigmoid_norm", "orpo"}))
def test_swapping_the_pair_flips_the_update(name: str) -> None:
    """From equal starts, the step on (a, b) is the negative of the step on (b, a)."""
    start = 0.0
    first = slope(lambda x: PAIR_LOSSES[name](x, f64(start)), start)
    swapped = slope(lambda x: PAIR_LOSSES[name](f64(start), x), start)
    assert first == pytest.approx(-swapped, rel=1e-12) and first < 0


def test_kto_raises_good_and_lowers_bad() -> None:
    def loss(x: Tensor, is_good: bool) -> Tensor:
        return preference.kto_loss(x, torch.tensor([[is_good]]), 0.0, beta=0.1)

    assert slope(lambda x: loss(x, True), 0.0) == pytest.approx(-0.025)
    assert slope(lambda x: loss(x, False), 0.0) == pytest.approx(0.025)


def test_kto_weights_scale_their_own_side() -> None:
    logratios, is_good = torch.tensor([0.0, 0.0]), torch.tensor([True, False])
    loss = preference.kto_loss(logratios, is_good, 0.0, beta=0.1, desirable_weight=2.0, undesirable_weight=3.0)
    assert loss.tolist() == [1.0, 1.5]


def test_apo_down_lowers_both_and_rejected_more() -> None:
    chosen = slope(lambda x: preference.apo_down_loss(x, f64(-2.0), beta=0.5), 0.0)
    rejected = slope(lambda x: preference.apo_down_loss(f64(0.0), x, beta=0.5), -2.0)
    assert 0 < chosen < rejected


def test_a_margin_asks_for_more_and_centring_moves_only_the_sum() -> None:
    def loss(chosen: Tensor, rejected: Tensor, **options: Tensor | float) -> Tensor:
        return reward_model.bradley_terry_loss(chosen, rejected, **options)

    assert slope(lambda x: loss(x, f64(0.0), margin_B=f64(1.0)), 1.0) < slope(lambda x: loss(x, f64(0.0)), 1.0) < 0
    pull_chosen = slope(lambda x: loss(x, f64(1.0), centring_coef=0.1) - loss(x, f64(1.0)), 2.0)
    pull_rejected = slope(lambda x: loss(f64(2.0), x, centring_coef=0.1) - loss(f64(2.0), x), 1.0)
    assert pull_chosen == pytest.approx(0.6) and pull_rejected == pytest.approx(0.6)


def test_the_value_clip_stops_only_a_value_that_ran_ahead_to_its_return() -> None:
    def loss(x: Tensor, returns: float) -> Tensor:
        return value.value_loss(x, f64(0.0), f64(returns), clip=0.2)

    assert slope(lambda x: loss(x, 1.0), 0.1) == pytest.approx(-0.9)
    assert slope(lambda x: loss(x, 1.0), 0.5) == 0
    assert slope(lambda x: loss(x, -1.0), 0.5) == pytest.approx(1.5)


def test_cross_entropy_raises_the_label_and_lowers_the_rest() -> None:
    weight = torch.zeros(4, 1, dtype=torch.float64, requires_grad=True)
    hidden = torch.ones(1, 1, dtype=torch.float64)
    cross_entropy.linear_cross_entropy(hidden, weight, torch.tensor([2])).sum().backward()
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad[:, 0], torch.tensor([0.25, 0.25, -0.75, 0.25], dtype=torch.float64))


def test_a_step_along_the_entropy_gradient_flattens() -> None:
    logits = torch.tensor([[2.0], [0.0], [-1.0]], dtype=torch.float64, requires_grad=True)
    hidden, label = torch.ones(1, 1, dtype=torch.float64), torch.tensor([0])
    _, entropy = linear_logprobs(hidden, logits, label, with_entropy=True)
    assert entropy is not None
    gradient = torch.autograd.grad(entropy.sum(), logits)[0]
    _, after = linear_logprobs(hidden, logits.detach() + 0.1 * gradient, label, with_entropy=True)
    assert after is not None and after > entropy + 1e-3
    assert gradient[0] < 0


def test_better_than_its_group_is_a_positive_advantage() -> None:
    rewards_PG = torch.tensor([[1.0, 0.0, 0.0, 0.0], [5.0, 5.5, 5.5, 6.0]])
    expected = torch.tensor([[1.0, -1.0, -1.0, -1.0], [-1.0, 0.0, 0.0, 1.0]])
    for actual in (
        advantages.group_advantages(rewards_PG, scale="std"),
        advantages.group_advantages(rewards_PG, scale="none"),
        advantages.leave_one_out_advantages(rewards_PG),
        advantages.batch_advantages(rewards_PG, baseline="group"),
    ):
        assert torch.equal(actual.sign(), expected)
    assert torch.equal(advantages.batch_advantages(rewards_PG).sign(), torch.tensor([[-1.0] * 4, [1.0] * 4]))
