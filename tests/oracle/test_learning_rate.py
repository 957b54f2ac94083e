"""Schedules against transformers' own lambdas and closed forms."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from strop.optim import learning_rate


@pytest.mark.parametrize(
    ("schedule", "make"), [("linear", get_linear_schedule_with_warmup), ("cosine", get_cosine_schedule_with_warmup)]
)
def test_decay_equals_transformers(schedule, make):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    scheduler = make(optimizer, num_warmup_steps=10, num_training_steps=60)
    for step in range(60):
        ours = learning_rate(step, schedule=schedule, peak=3e-4, warmup_steps=10, total_steps=60)
        if step >= 10:
            assert ours == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
        else:  # transformers wastes its first update on a rate of 0: ours is one step ahead of it
            assert ours == pytest.approx(3e-4 * (step + 1) / 10, rel=1e-12)
        optimizer.step()
        scheduler.step()


def test_final_fraction_is_reached_and_held():
    options = {"peak": 2.0, "warmup_steps": 4, "total_steps": 20, "final_fraction": 0.1}
    for schedule in ("linear", "cosine", "wsd"):
        assert learning_rate(20, schedule=schedule, **options) == pytest.approx(0.2)
        assert learning_rate(500, schedule=schedule, **options) == pytest.approx(0.2)
        assert learning_rate(19, schedule=schedule, **options) > 0.2
    assert learning_rate(12, schedule="cosine", **options) == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))
    assert learning_rate(12, schedule="linear", **options) == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))
    assert learning_rate(500, schedule="constant", **options) == 2.0


def test_wsd_is_flat_and_then_falls_by_the_square_root():
    rates = [learning_rate(step, schedule="wsd", peak=1.0, warmup_steps=5, total_steps=100) for step in range(100)]
    assert rates[:5] == [0.2, 0.4, 0.6, 0.8, 1.0]
    assert rates[5:81] == [1.0] * 76
    assert rates[85] == pytest.approx(1 - math.sqrt(5 / 20))
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[80:]))


def test_no_step_has_rate_zero_and_every_length_of_warm_up_is_allowed():
    for warmup in (0, 1, 7):
        rates = [
            learning_rate(step, schedule="linear", peak=1.0, warmup_steps=warmup, total_steps=7) for step in range(7)
        ]
        assert min(rates) > 0 and max(rates) == 1.0
    assert learning_rate(7, schedule="linear", peak=1.0, warmup_steps=7, total_steps=7) == 0.0


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"schedule": "exponential"}, "exponential"),
        ({"warmup_steps": 11}, "warmup_steps"),
        ({"final_fraction": 1.5}, "final_fraction"),
        ({"decay_fraction": -0.1}, "decay_fraction"),
    ],
)
def test_impossible_options_are_refused_by_name(options, named):
    with pytest.raises(ValueError, match=named):
        learning_rate(0, **({"schedule": "wsd", "peak": 1.0, "total_steps": 10} | options))
