"""The early stop of test-time RL: what it measures without labels, and when it stops."""

from __future__ import annotations

import math

import pytest

from strop.rewards.vote import count_votes
from strop.stages.ttrl_config import HeldOut
from strop.stages.ttrl_watch import Watch, agreement_metrics, check_answers, effective_number
from strop.types import Completion


def group(*texts: str, logprob: float = -0.5) -> list[Completion]:
    return [
        Completion(token_ids=(1, 2), sampling_logprobs=(logprob, logprob), finish_reason="stop", text=text)
        for text in texts
    ]


def test_agreement_with_the_base_is_not_agreement_with_oneself() -> None:
    groups = [group("4", "4", "4", "5"), group("7", "7", "7", "7"), group("1", "what", "2", "1")]
    metrics = agreement_metrics(groups, ["4", "3", None], "auto")
    assert metrics["eval/base_agreement"] == pytest.approx((3 / 4 + 0) / 2)
    assert metrics["eval/self_agreement"] == pytest.approx((3 / 4 + 1 + 2 / 4) / 3)
    assert metrics["eval/distinct_answers"] == pytest.approx(3.0)
    assert metrics["eval/unreadable"] == pytest.approx(1 / 12)
    assert metrics["eval/entropy"] == pytest.approx(0.5)
    assert metrics["eval/mean_length"] == 2
    assert metrics["eval/base_agreement_low"] <= metrics["eval/base_agreement"] <= metrics["eval/base_agreement_high"]


def test_the_effective_number_of_answers() -> None:
    assert effective_number(["a"] * 9) == 1
    assert effective_number(["a", "b", "c", "d"]) == pytest.approx(4)
    assert effective_number(["a", "a", "a", "b"]) == pytest.approx(
        math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    )
    assert effective_number([]) == 0


def look(watch: Watch, step: int, agreement: float, distinct: float, config: HeldOut) -> bool:
    return watch.look(step, {"eval/base_agreement": agreement, "eval/distinct_answers": distinct}, config)


def test_a_healthy_run_is_never_stopped_and_its_best_step_is_remembered() -> None:
    watch, config = Watch(base_answers=["1"]), HeldOut()
    history = [(0, 0.5, 9.0), (10, 0.7, 8.5), (20, 0.8, 8.0), (30, 0.79, 8.2), (40, 0.75, 8.1)]
    assert [look(watch, *row, config) for row in history] == [True, True, True, False, False]
    assert watch.reason == "" and watch.best_step == 20 and watch.alarms == 0


def test_a_policy_that_gives_one_answer_to_everything_is_stopped_after_the_patience() -> None:
    """Its agreement with the base may still be high where the base often gave that answer."""
    watch, config = Watch(base_answers=["1"]), HeldOut(patience=2, min_answers=0.6)
    assert look(watch, 0, 0.5, 9.0, config)
    assert look(watch, 10, 0.6, 8.0, config)
    assert not look(watch, 20, 0.65, 4.0, config), "a step with an alarm is never the best"
    assert watch.reason == ""
    look(watch, 30, 0.66, 3.0, config)
    assert "different majority answers fell from 9.0 to 3.0" in watch.reason
    assert watch.best_step == 10 and watch.best_metrics["eval/base_agreement"] == 0.6


def test_a_policy_that_leaves_its_base_is_stopped_and_one_alarm_alone_is_forgotten() -> None:
    watch, config = Watch(base_answers=["1"]), HeldOut(patience=2, max_drop=0.1)
    for step, agreement in ((0, 0.8), (1, 0.65), (2, 0.75), (3, 0.65)):
        look(watch, step, agreement, 9.0, config)
    assert watch.reason == "" and watch.alarms == 1
    look(watch, 4, 0.6, 9.0, config)
    assert "fell from 0.80 to 0.60" in watch.reason and watch.best_step == 0


def test_it_comes_back_from_a_checkpoint_as_it_was() -> None:
    watch = Watch(base_answers=["1", None], alarms=1, best_step=4, best_metrics={"eval/base_agreement": 0.4})
    assert Watch(**watch.state_dict()) == watch


def test_a_base_without_a_readable_answer_is_refused() -> None:
    with pytest.raises(ValueError, match=r'none of the 8 answers .* answer_pattern = "boxed"'):
        check_answers([count_votes([None] * 4)] * 2, "boxed", 8)
    check_answers([count_votes([None] * 4), count_votes(["1", None])], "boxed", 6)
