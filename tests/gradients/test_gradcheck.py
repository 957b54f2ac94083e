"""Float64 finite differences of every objective, and closed forms for those that stop a gradient on purpose."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from strop.objectives import cross_entropy, kl, logprobs, policy_gradient, preference, reward_model, value
from strop.objectives.aggregate import masked_sum, sequence_mean, token_weights
from strop.objectives.logprobs import linear_logprobs, logprobs_from_logits

MASK_BT = torch.tensor([[1, 1, 0, 1, 0], [0, 1, 1, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)


def draw(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def check(function: Callable[..., Tensor | tuple[Tensor, ...]], *inputs: Tensor) -> None:
    leaves = tuple(x.clone().requires_grad_() for x in inputs)
    assert torch.autograd.gradcheck(function, leaves, eps=1e-6, atol=1e-7, rtol=1e-5)


OLD_BT, ADVANTAGES_BT = -draw(3, 5, seed=1).abs(), draw(3, 5, seed=2)
NEW_BT = OLD_BT + draw(3, 5, seed=3, scale=0.5)  # about half of the ratios lie outside 0.8 .. 1.2

PER_TOKEN: dict[str, Callable[[Tensor], Tensor]] = {
    "clipped": lambda x: policy_gradient.clipped_policy_loss(
        x, OLD_BT, ADVANTAGES_BT, MASK_BT, clip_low=0.2, clip_high=0.28
    ),
    "dual_clip": lambda x: policy_gradient.clipped_policy_loss(
        x, OLD_BT, ADVANTAGES_BT, MASK_BT, clip_low=0.2, clip_high=0.28, dual_clip=1.5
    ),
    "gspo": lambda x: policy_gradient.gspo_loss(x, OLD_BT, ADVANTAGES_BT[:, 0], MASK_BT, clip_low=0.2, clip_high=0.2),
    "sapo": lambda x: policy_gradient.sapo_loss(x, OLD_BT, ADVANTAGES_BT, MASK_BT),
    "reinforce": lambda x: policy_gradient.reinforce_loss(x, ADVANTAGES_BT, MASK_BT),
    "ratio": lambda x: policy_gradient.importance_ratio(x, OLD_BT, MASK_BT),
    "k1": lambda x: kl.kl_k1(x, OLD_BT, MASK_BT),
    "k2": lambda x: kl.kl_k2(x, OLD_BT, MASK_BT),
    "k3": lambda x: kl.kl_k3(x, OLD_BT, MASK_BT),
    "value": lambda x: value.value_loss(x, OLD_BT, ADVANTAGES_BT, MASK_BT, clip=None),
    "value_clipped": lambda x: value.value_loss(x, OLD_BT, ADVANTAGES_BT, MASK_BT, clip=0.2),
    "masked_sum": lambda x: masked_sum(x, MASK_BT, 3, weights_BT=token_weights(MASK_BT, "seq_mean_token_mean")),
    "sequence_mean": lambda x: sequence_mean(x, MASK_BT),
}


@pytest.mark.parametrize("name", sorted(PER_TOKEN))
def test_per_token(name: str) -> None:
    check(PER_TOKEN[name], NEW_BT)


MARGIN_B = draw(4, seed=6).abs()
IS_GOOD_B = torch.tensor([True, False, True, False])
PER_PAIR: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "dpo": lambda c, r: preference.dpo_loss(c, r, beta=0.3),
    "cdpo": lambda c, r: preference.cdpo_loss(c, r, beta=0.3, flip_probability=0.1),
    "robust": lambda c, r: preference.robust_dpo_loss(c, r, beta=0.3, flip_probability=0.1),
    "ipo": lambda c, r: preference.ipo_loss(c, r, beta=0.3),
    "hinge": lambda c, r: preference.hinge_loss(c, r, beta=0.9),
    "kto": lambda c, r: preference.kto_loss(c + r, IS_GOOD_B, 0.3, beta=0.3, undesirable_weight=1.3),
    "orpo": lambda c, r: preference.orpo_loss(-c.abs(), -r.abs(), beta=0.3),
    "simpo": lambda c, r: preference.simpo_loss(c, r, beta=2.0, margin=0.5),
    "apo_zero": lambda c, r: preference.apo_zero_loss(c, r, beta=0.3),
    "apo_down": lambda c, r: preference.apo_down_loss(c, r, beta=0.3),
    "bco": lambda c, r: preference.bco_loss(c, r, beta=0.3, shift=0.2),
    "sppo": lambda c, r: preference.sppo_loss(c, r, beta=0.3),
    "sigmoid_norm": lambda c, r: preference.sigmoid_norm_loss(c, r, 1 + IS_GOOD_B, 3 - IS_GOOD_B.int(), beta=0.3),
    "bradley_terry": lambda c, r: reward_model.bradley_terry_loss(c, r, margin_B=MARGIN_B, centring_coef=0.1),
}


@pytest.mark.parametrize("name", sorted(PER_PAIR))
def test_per_pair(name: str) -> None:
    check(PER_PAIR[name], draw(4, seed=4), draw(4, seed=5))


@pytest.mark.parametrize("loss", [reward_model.kwise_loss, reward_model.plackett_luce_loss])
@pytest.mark.parametrize("mask", [None, MASK_BT])
def test_rankings(loss: Callable[[Tensor, Tensor | None], Tensor], mask: Tensor | None) -> None:
    check(lambda scores: loss(scores, mask), draw(3, 5, seed=7))


# --- the head: several row chunks forward, several vocabulary blocks backward

LABELS_R = torch.tensor([0, 6, 3, 3, 5])


@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear_logprobs(
    with_entropy: bool, softcap: float | None, temperature: float, with_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logprobs, "_VOCAB_STEP", 2)
    monkeypatch.setattr(logprobs, "_MIN_VOCAB_BLOCK", 2)
    monkeypatch.setattr(logprobs, "_CPU_BLOCK_ELEMENTS", 7)

    def both(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, ...]:
        results = linear_logprobs(
            hidden,
            weight,
            LABELS_R,
            temperature=temperature,
            bias_V=bias,
            softcap=softcap,
            chunk_size=2,
            with_entropy=with_entropy,
        )
        return tuple(result for result in results if result is not None)

    inputs = [draw(5, 3, seed=8), draw(7, 3, seed=9)] + ([draw(7, seed=10)] if with_bias else [])
    assert len(both(*inputs)) == 1 + with_entropy
    check(both, *inputs)


def test_linear_logprobs_gradient_of_the_entropy_alone() -> None:
    def entropy(hidden: Tensor, weight: Tensor) -> Tensor:
        result = linear_logprobs(hidden, weight, LABELS_R, chunk_size=2, with_entropy=True)[1]
        assert result is not None
        return result

    check(entropy, draw(5, 3, seed=8), draw(7, 3, seed=9))


def test_linear_cross_entropy() -> None:
    check(
        lambda h, w, b: cross_entropy.linear_cross_entropy(h, w, LABELS_R, bias_V=b, softcap=3.0, chunk_size=2),
        draw(5, 3, seed=8),
        draw(7, 3, seed=9),
        draw(7, seed=10),
    )


def test_logprobs_from_logits() -> None:
    check(lambda logits: logprobs_from_logits(logits, LABELS_R, temperature=0.7), draw(5, 7, seed=11))


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_linear_logprobs_with_one_input_frozen(frozen: str) -> None:
    hidden, weight = draw(5, 3, seed=8), draw(7, 3, seed=9)
    if frozen == "hidden":
        check(lambda w: linear_logprobs(hidden, w, LABELS_R)[0], weight)
    else:
        check(lambda h: linear_logprobs(h, weight, LABELS_R)[0], hidden)


# --- stopped gradients: finite differences do not apply, closed forms do


def grad(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    leaf = at.clone().requires_grad_()
    return torch.autograd.grad(function(leaf).sum(), leaf)[0]


def test_k3_plus_has_the_gradient_of_k2() -> None:
    actual = grad(lambda x: kl.kl_k3_plus(x, OLD_BT, MASK_BT), NEW_BT)
    torch.testing.assert_close(actual, torch.where(MASK_BT, NEW_BT - OLD_BT, 0), rtol=0, atol=1e-14)


def test_cispo_keeps_every_tokens_gradient_with_a_bounded_weight() -> None:
    actual = grad(
        lambda x: policy_gradient.cispo_loss(x, OLD_BT, ADVANTAGES_BT, MASK_BT, ratio_min=0.8, ratio_max=1.2), NEW_BT
    )
    weight = (NEW_BT - OLD_BT).exp().clamp(0.8, 1.2)
    torch.testing.assert_close(actual, torch.where(MASK_BT, -weight * ADVANTAGES_BT, 0), rtol=1e-13, atol=0)
    assert (weight == 1.2).any() and (weight == 0.8).any()


@pytest.mark.parametrize("clip", [0.05, 5.0])
def test_gspo_token_has_gspos_gradient_when_the_advantage_is_constant(clip: float) -> None:
    advantages_B = ADVANTAGES_BT[:, 0]
    expected = grad(
        lambda x: policy_gradient.gspo_loss(x, OLD_BT, advantages_B, MASK_BT, clip_low=clip, clip_high=clip), NEW_BT
    )
    actual = grad(
        lambda x: sequence_mean(
            policy_gradient.gspo_token_loss(x, OLD_BT, advantages_B[:, None], MASK_BT, clip_low=clip, clip_high=clip),
            MASK_BT,
        ),
        NEW_BT,
    )
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)


def test_kto_baseline_is_detached() -> None:
    logratios = draw(4, seed=12).abs().requires_grad_()
    assert not preference.kto_baseline(logratios).requires_grad
    assert preference.kto_baseline(-logratios) == 0
