"""Every objective against goldens.json: numbers computed elsewhere and checked there by finite differences."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from strop.objectives import advantages, kl, pass_at_k, policy_gradient, preference, reward_model, value
from strop.objectives.aggregate import Aggregation, masked_sum, sequence_sum, step_denominator, token_weights
from strop.objectives.logprobs import linear_logprobs

GOLDENS: dict[str, Any] = json.loads((Path(__file__).parent / "goldens.json").read_text())


def f64(numbers: Any) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def close(actual: Tensor | float, expected: Any, atol: float = 1e-12) -> None:
    actual = actual if isinstance(actual, Tensor) else f64(actual)
    torch.testing.assert_close(actual.to(torch.float64), f64(expected), rtol=0, atol=atol)


# --- KL and policy gradient on a categorical, expectations by enumeration


def test_kl_estimators_in_expectation() -> None:
    golden = GOLDENS["kl"]
    p, q = f64(golden["p"]), f64(golden["q"])
    close((p * kl.kl_k1(p.log(), q.log())).sum(), golden["KL"])
    close((p * kl.kl_k1(p.log(), q.log())).sum(), golden["E_k1"])
    close((p * kl.kl_k2(p.log(), q.log())).sum(), golden["E_k2"])
    close((p * kl.kl_k3(p.log(), q.log())).sum(), golden["E_k3"])
    close((p * kl.kl_k3_plus(p.log(), q.log())).sum(), golden["E_k3"])
    close((p * kl.kl_k1(p.log(), q.log()).abs()).sum(), golden["E_abs"])
    close((p * kl.kl_k3(q.log(), p.log())).sum(), golden["E_k3_FLIPPED_chi2_minus_KL"])


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        (kl.kl_k1, "grad_theta_k1_as_loss_expected"),
        (kl.kl_k2, "grad_theta_KL"),
        (kl.kl_k3, "grad_theta_k3_as_loss_expected"),
        (kl.kl_k3_plus, "grad_theta_KL"),
    ],
)
def test_kl_as_a_loss_expected_gradient(estimator: Any, expected: str) -> None:
    golden = GOLDENS["kl"]
    theta = f64(golden["p"]).log().requires_grad_()
    sampled_as = f64(golden["p"])
    loss = (sampled_as * estimator(torch.log_softmax(theta, 0), f64(golden["q"]).log())).sum()
    close(torch.autograd.grad(loss, theta)[0], golden[expected])


def test_entropy() -> None:
    golden = GOLDENS["kl"]
    hidden = torch.eye(1, dtype=torch.float64)
    _, entropy = linear_logprobs(hidden, f64(golden["p"]).log()[:, None], torch.tensor([0]), with_entropy=True)
    assert entropy is not None
    close(entropy[0], golden["H"])


def test_reinforce_expected_gradient_on_a_bandit() -> None:
    golden = GOLDENS["softmax_bandit"]
    theta, rewards = f64(golden["theta"]).requires_grad_(), f64(golden["r"])
    logprobs = torch.log_softmax(theta, 0)
    probabilities = logprobs.detach().exp()
    close(probabilities, golden["pi"])
    loss = (probabilities * policy_gradient.reinforce_loss(logprobs, rewards)).sum()
    close(-torch.autograd.grad(loss, theta)[0], golden["grad_J"])
    ratio = policy_gradient.importance_ratio(torch.log_softmax(theta, 0), probabilities.log())
    objective = (probabilities * ratio * rewards).sum()
    close(objective.detach(), golden["J"])
    close(torch.autograd.grad(objective, theta)[0], golden["grad_J"])


@pytest.mark.parametrize(("kl_now", "expected"), [(9.0, "kl9_n512"), (3.0, "kl3_n512"), (6.3, "kl6.3_n512")])
def test_adaptive_kl(kl_now: float, expected: str) -> None:
    coef = kl.adaptive_kl_coef(0.15, kl_now, target=6.0, horizon=10000, num_episodes=512)
    close(coef, GOLDENS["adaptive_kl"][expected])


# --- advantages


@pytest.mark.parametrize("num_right", [1, 4])
def test_group_advantages(num_right: int) -> None:
    golden = GOLDENS[f"group_G8_k{num_right}"]
    rewards_PG = f64([[1.0] * num_right + [0.0] * (8 - num_right)])

    def right_and_wrong(advantages_PG: Tensor) -> Tensor:
        assert advantages_PG.unique().numel() == 2
        return advantages_PG[0, [0, -1]]

    group = advantages.group_advantages
    close(right_and_wrong(group(rewards_PG, scale="std", unbiased=True, eps=0.0)), golden["grpo_bessel"])
    close(right_and_wrong(group(rewards_PG, scale="std", unbiased=False, eps=0.0)), golden["grpo_pop"])
    close(right_and_wrong(group(rewards_PG, scale="std", unbiased=True, eps=1e-4)), golden["trl_eps1e4"])
    close(right_and_wrong(group(rewards_PG, scale="none")), golden["dr_grpo"])
    close(right_and_wrong(advantages.leave_one_out_advantages(rewards_PG)), golden["rloo"])


@pytest.mark.parametrize("name", sorted(GOLDENS["zero_std_frac_expected"]))
def test_expected_fraction_of_groups_without_signal(name: str) -> None:
    p, group_size = float(name[1:].split("_G")[0]), int(name.split("_G")[1])
    num_right = range(group_size + 1)  # the order inside a group does not matter: enumerate the count
    rewards_PG = f64([[1.0] * k + [0.0] * (group_size - k) for k in num_right])
    weights_P = f64([math.comb(group_size, k) * p**k * (1 - p) ** (group_size - k) for k in num_right])
    is_dead_P = (advantages.group_advantages(rewards_PG, scale="std") == 0).all(-1)
    close((weights_P * is_dead_P).sum(), GOLDENS["zero_std_frac_expected"][name])


@pytest.mark.parametrize("name", [name for name in GOLDENS if name.startswith("gae_")])
def test_gae(name: str) -> None:
    golden = GOLDENS[name]
    gamma, gae_lambda = (float(part[1:]) for part in name.split("_")[1:])
    mask_BT = torch.ones(1, 3, dtype=torch.bool)
    advantages_BT, returns_BT = advantages.gae(
        f64([golden["r"]]), f64([golden["v"]]), mask_BT, gamma=gamma, gae_lambda=gae_lambda
    )
    close(advantages_BT[0], golden["A"])
    close(returns_BT[0], golden["R"])


def test_whiten() -> None:
    golden, gae = GOLDENS["whiten_gae"], f64([GOLDENS["gae_g1.0_l0.95"]["A"]])
    close(advantages.whiten(gae, eps=1e-8)[0], golden["unbiased"])
    close(advantages.whiten(gae, unbiased=False)[0], golden["biased"])
    close(advantages.whiten(gae, shift_mean=False)[0], golden["noshift_unbiased"])


def test_value_loss() -> None:
    golden = GOLDENS["value_clip_eps.2"]
    values = f64([golden["v"]]).requires_grad_()
    mask = torch.ones(1, 3, dtype=torch.bool)
    old_and_returns = f64([golden["v_old"]]), f64([golden["R"]])
    loss = masked_sum(value.value_loss(values, *old_and_returns, clip=0.2), mask, 3)
    close(loss.detach(), golden["loss"])
    close(torch.autograd.grad(loss, values)[0][0], golden["grad"])
    close(value.value_is_clipped(values, *old_and_returns, clip=0.2).double().mean(), golden["clipfrac"])


# --- reward models and preferences


def test_reward_model_losses() -> None:
    golden = GOLDENS["rm"]
    chosen, rejected = f64([1.2]), f64([0.3])
    close(reward_model.bradley_terry_loss(chosen, rejected)[0], golden["bt_pair_1p2_0p3"])
    close(reward_model.bradley_terry_loss(chosen, rejected, margin_B=f64([0.5]))[0], golden["bt_margin_0p5"])
    for loss_fn, loss_name, grad_name in [
        (reward_model.kwise_loss, "instructgpt_K4_mean_over_6", "grad_K4"),
        (reward_model.plackett_luce_loss, "plackett_luce_nll", "grad_PL"),
    ]:
        scores = f64([golden["scores_best_to_worst"]]).requires_grad_()
        loss = loss_fn(scores)[0]
        close(loss.detach(), golden[loss_name])
        close(torch.autograd.grad(loss, scores)[0][0], golden[grad_name], atol=1e-9)  # goldens by finite differences


def preference_losses() -> dict[str, Tensor | float]:
    given = GOLDENS["pref_in"]
    chosen, rejected = f64([given["lp_c"] - given["ref_c"]]), f64([given["lp_r"] - given["ref_r"]])
    len_c, len_r = f64([given["len_c"]]), f64([given["len_r"]])
    mean_c, mean_r = f64([given["lp_c"]]) / len_c, f64([given["lp_r"]]) / len_r
    both, is_good = torch.cat([chosen, rejected]), torch.tensor([True, False])
    p = preference
    return {
        "dpo": p.dpo_loss(chosen, rejected, beta=0.1),
        "cdpo": p.cdpo_loss(chosen, rejected, beta=0.1, flip_probability=0.1),
        "robust": p.robust_dpo_loss(chosen, rejected, beta=0.1, flip_probability=0.1),
        "hinge": p.hinge_loss(chosen, rejected, beta=0.1),
        "ipo_sum": p.ipo_loss(chosen, rejected, beta=0.1),
        "ipo_avg_TRL": p.ipo_loss(chosen / len_c, rejected / len_r, beta=0.1),
        "apo_zero": p.apo_zero_loss(chosen, rejected, beta=0.1),
        "apo_down": p.apo_down_loss(chosen, rejected, beta=0.1),
        "simpo": p.simpo_loss(mean_c, mean_r, beta=2.0, margin=0.5),
        "orpo_or_term": p.orpo_loss(mean_c, mean_r, beta=0.1) + mean_c,
        "bco_pair_noshift": p.bco_loss(chosen, rejected, beta=0.1),
        "sppo_hard": p.sppo_loss(chosen, rejected, beta=0.1),
        "kto_z0.0": p.kto_loss(both, is_good, 0.0, beta=0.1).mean(0, keepdim=True),
        "kto_z0.4": p.kto_loss(both, is_good, 0.4, beta=0.1).mean(0, keepdim=True),
        "sigmoid_norm": p.sigmoid_norm_loss(chosen, rejected, len_c, len_r, beta=0.1),
    }


@pytest.mark.parametrize("name", sorted(GOLDENS["pref"]))
def test_preference_losses(name: str) -> None:
    close(preference_losses()[name], [GOLDENS["pref"][name]])


def test_dpo_gradient() -> None:
    given = GOLDENS["pref_in"]
    logprob = f64(given["lp_c"]).requires_grad_()
    loss = preference.dpo_loss(logprob - given["ref_c"], f64(given["lp_r"] - given["ref_r"]), beta=0.1)
    close(torch.autograd.grad(loss, logprob)[0], GOLDENS["dpo_grad_lp_c"])


# --- policy gradients


def _pg_token(loss_fn: Any, aggregation: Aggregation, max_tokens: int | None = None, **options: Any) -> Any:
    def loss(logprobs: Tensor, old: Tensor, adv_B1: Tensor, mask: Tensor) -> Tensor:
        per_token = loss_fn(logprobs, old, adv_B1, mask, **options)
        denominator = step_denominator(
            aggregation, num_sequences=len(mask), num_tokens=int(mask.sum()), max_tokens=max_tokens
        )
        return masked_sum(per_token, mask, denominator, weights_BT=token_weights(mask, aggregation))

    return loss


def _pg_gspo(clip_low: float, clip_high: float) -> Any:
    def loss(logprobs: Tensor, old: Tensor, adv_B1: Tensor, mask: Tensor) -> Tensor:
        per_sequence = policy_gradient.gspo_loss(
            logprobs, old, adv_B1[:, 0], mask, clip_low=clip_low, clip_high=clip_high
        )
        return masked_sum(per_sequence, mask.any(-1), len(mask))

    return loss


def _reinforce(logprobs: Tensor, old: Tensor, adv_B1: Tensor, mask: Tensor) -> Tensor:
    return policy_gradient.reinforce_loss(logprobs, adv_B1, mask)


_clipped, _gspo_token = policy_gradient.clipped_policy_loss, policy_gradient.gspo_token_loss
POLICY_GRADIENTS = {
    "pg_ppo_tokenmean": _pg_token(_clipped, "token_mean", clip_low=0.2, clip_high=0.2),
    "pg_grpo": _pg_token(_clipped, "seq_mean_token_mean", clip_low=0.2, clip_high=0.2),
    "pg_dapo": _pg_token(_clipped, "token_mean", clip_low=0.2, clip_high=0.28),
    "pg_dr_grpo_len4": _pg_token(_clipped, "token_sum_norm", max_tokens=4, clip_low=0.2, clip_high=0.2),
    "pg_dual_clip_c3": _pg_token(_clipped, "token_mean", clip_low=0.2, clip_high=0.2, dual_clip=3.0),
    "pg_gspo_.2": _pg_gspo(0.2, 0.2),
    "pg_gspo_3e-4_4e-4": _pg_gspo(3e-4, 4e-4),
    "pg_gspo_token_.2": _pg_token(_gspo_token, "seq_mean_token_mean", clip_low=0.2, clip_high=0.2),
    "pg_cispo_verl_.2": _pg_token(policy_gradient.cispo_loss, "token_mean", ratio_min=0.8, ratio_max=1.2),
    "pg_cispo_onesided_hi4(TRL eps_high=5)": _pg_token(policy_gradient.cispo_loss, "token_mean", ratio_max=5.0),
    "pg_sapo_seqmean": _pg_token(policy_gradient.sapo_loss, "seq_mean_token_mean"),
    "pg_reinforce_seqsum": _pg_token(_reinforce, "seq_mean_token_sum"),
}


@pytest.mark.parametrize("name", [name for name in GOLDENS if name.startswith("pg_") and name != "pg_in"])
def test_policy_gradients(name: str) -> None:
    given, golden = GOLDENS["pg_in"], GOLDENS[name]
    logprobs = f64(given["logprobs"]).requires_grad_()
    mask = torch.tensor(given["mask"], dtype=torch.bool)
    loss = POLICY_GRADIENTS[name](logprobs, f64(given["old_logprobs"]), f64(given["adv"])[:, None], mask)
    atol = 1e-7 if name in ("pg_grpo", "pg_gspo_token_.2", "pg_sapo_seqmean") else 1e-12  # 1/3 as a float32 weight
    close(loss.detach(), golden["loss"], atol)
    close(torch.autograd.grad(loss, logprobs)[0], golden["grad"], atol)


@pytest.mark.parametrize(
    ("logprob", "old", "advantage", "options", "loss", "grad"),
    [
        (-0.7, -0.9, 1.5, {"clip_high": 0.3}, -1.5 * math.exp(0.2), -1.5 * math.exp(0.2)),
        (-0.2, -0.7, 2.0, {"clip_high": 0.3}, -2.6, 0.0),
        (-1.5, -1.0, -1.0, {"clip_high": 0.3}, 0.8, 0.0),
        (-0.4, -1.4, -1.5, {"clip_high": 0.2, "dual_clip": 2.0}, 3.0, 0.0),
    ],
)
def test_clipped_policy_loss_by_hand(
    logprob: float, old: float, advantage: float, options: dict[str, float], loss: float, grad: float
) -> None:
    logprobs = f64([[logprob]]).requires_grad_()
    actual = policy_gradient.clipped_policy_loss(logprobs, f64([[old]]), f64([[advantage]]), clip_low=0.2, **options)
    close(actual.detach(), [[loss]])
    close(torch.autograd.grad(actual.sum(), logprobs)[0], [[grad]])


def test_overlong_penalty() -> None:
    golden = GOLDENS["overlong_soft_20480_4096"]
    lengths = torch.tensor([int(length) for length in golden])
    close(policy_gradient.overlong_penalty(lengths, max_length=20480, buffer=4096), list(golden.values()))


def test_effective_sample_fraction() -> None:
    golden = GOLDENS["ess"]
    close(policy_gradient.effective_sample_fraction(f64(golden["w"]).log()), golden["ess_over_n"])


# --- closed forms


@pytest.mark.parametrize("name", sorted(GOLDENS["pass_at_k"]))
def test_pass_at_k(name: str) -> None:
    num_samples, num_correct, k = (int(part[1:]) for part in name.split("_"))
    close(pass_at_k.pass_at_k(num_samples, num_correct, k), GOLDENS["pass_at_k"][name])


@pytest.mark.parametrize("num_samples", sorted(GOLDENS["bon_kl"], key=int))
def test_bon_kl(num_samples: str) -> None:
    close(pass_at_k.bon_kl(int(num_samples)), GOLDENS["bon_kl"][num_samples])


# --- what every loss is worth before the first update, when policy and reference agree


def test_step_zero() -> None:
    zero = torch.zeros(1, dtype=torch.float64)
    same = f64([-3.0])
    p = preference
    close(p.dpo_loss(zero, zero, beta=0.1), [math.log(2)])
    close(reward_model.bradley_terry_loss(same, same), [math.log(2)])
    close(p.hinge_loss(zero, zero, beta=0.1), [1.0])
    close(p.ipo_loss(zero, zero, beta=0.1), [25.0])
    close(p.kto_loss(zero, torch.tensor([True]), p.kto_baseline(zero), beta=0.1), [0.5])
    close(p.apo_zero_loss(zero, zero, beta=0.1), [1.0])
    close(p.bco_loss(zero, zero, beta=0.1), [2 * math.log(2)])
    for estimator in (kl.kl_k1, kl.kl_k2, kl.kl_k3, kl.kl_k3_plus):
        close(estimator(same, same), [0.0])
    close(policy_gradient.importance_ratio(same, same), [1.0])
    for advantage in (f64([2.0]), f64([-2.0])):
        close(
            policy_gradient.clipped_policy_loss(same, same, advantage, clip_low=0.2, clip_high=0.2),
            (-advantage).tolist(),
        )
        for is_clipped in policy_gradient.clipped_tokens(same, same, advantage, clip_low=0.2, clip_high=0.2):
            assert not is_clipped.any()


def test_on_policy_grpo_loss_is_zero_whatever_the_rewards() -> None:
    advantages_PG = advantages.group_advantages(f64([[1, 0, 0, 1, 0, 0, 0, 0], [0, 1, 1, 1, 1, 1, 1, 1]]), scale="std")
    logprobs_BT = -torch.rand(16, 5, dtype=torch.float64)
    mask_BT = torch.ones(16, 5, dtype=torch.bool)
    loss = policy_gradient.clipped_policy_loss(
        logprobs_BT, logprobs_BT, advantages_PG.reshape(16, 1), clip_low=0.2, clip_high=0.2
    )
    close(masked_sum(loss, mask_BT, 16, weights_BT=token_weights(mask_BT, "seq_mean_token_mean")), 0.0)


def test_sequence_sum_feeds_the_pairs() -> None:
    logprobs_BT = f64([[-1.0, -2.0, 9.0], [-4.0, -0.5, -0.25]])
    mask_BT = torch.tensor([[True, True, False], [False, True, True]])
    close(sequence_sum(logprobs_BT, mask_BT), [-3.0, -0.75])


def test_no_golden_is_left_out() -> None:
    checked = {"kl", "softmax_bandit", "group_G8_k1", "group_G8_k4", "whiten_gae", "value_clip_eps.2", "rm", "pref_in"}
    checked |= {"pref", "dpo_grad_lp_c", "pg_in", "pass_at_k", "bon_kl", "adaptive_kl", "overlong_soft_20480_4096"}
    checked |= {"zero_std_frac_expected", "ess", *POLICY_GRADIENTS, *(n for n in GOLDENS if n.startswith("gae_"))}
    assert set(GOLDENS) - checked == {"puct_c"}  # the tree search's, not an objective
