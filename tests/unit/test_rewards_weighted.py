"""The weighted sum of rewards, and rewards from a recipe."""

from __future__ import annotations

import math

import pytest

from strop.rewards.base import NO_VERDICT, WeightedRewards
from strop.rewards.config import RewardConfig
from strop.rewards.function import FunctionReward
from strop.rewards.load import load_reward, load_rewards
from strop.rewards.math import MathReward
from strop.rewards.text import FormatReward, OverlongPenalty, TargetLength
from strop.types import Completion, Task, Verdict

OK = Verdict(score=1.0)
ZERO = Verdict(score=0.0, status="wrong")
BROKEN = Verdict(score=0.0, status="infra_error", detail="the sandbox is gone")
KILLED = Verdict(score=0.0, status="killed")


class Fixed:
    """A reward that says what it is told to."""

    def __init__(self, name: str, *verdicts: Verdict) -> None:
        self.name = name
        self.verdicts = list(verdicts)
        self.is_closed = False

    def score(self, tasks, completions) -> list[Verdict]:
        return self.verdicts

    def close(self) -> None:
        self.is_closed = True


def tasks(count: int, **columns) -> list[Task]:
    return [Task(id=f"train.jsonl:{i + 1}", prompt="?", columns=columns) for i in range(count)]


def completions(count: int, text: str = "4") -> list[Completion]:
    return [Completion(token_ids=(5, 2), sampling_logprobs=(0.0, 0.0), finish_reason="stop", text=text)] * count


def test_the_reward_is_the_weighted_sum_and_the_parts_are_kept():
    a, b = Fixed("a", OK, OK, ZERO), Fixed("b", Verdict(score=-0.5), ZERO, KILLED)
    scored = WeightedRewards([(a, 1.0), (b, 0.2)]).score(tasks(3), completions(3))
    assert [s.reward for s in scored] == pytest.approx([0.9, 1.0, 0.0], abs=1e-12)
    assert [s.is_valid for s in scored] == [True] * 3
    assert scored[0].parts == {"a": OK, "b": Verdict(score=-0.5)}
    assert scored[2].parts == {"a": ZERO, "b": KILLED}


def test_an_infra_error_makes_only_its_own_sample_invalid():
    a, b = Fixed("a", OK, OK, OK, OK), Fixed("b", OK, BROKEN, OK, OK)
    scored = WeightedRewards([(a, 1.0), (b, 1.0)]).score(tasks(4), completions(4))
    assert [s.is_valid for s in scored] == [True, False, True, True]
    assert [s.reward for s in scored if s.is_valid] == [2.0] * 3
    assert scored[1].parts["b"] is BROKEN


def test_no_verdict_adds_nothing_and_a_sample_without_any_word_is_invalid():
    a, b = Fixed("a", OK, NO_VERDICT, NO_VERDICT), Fixed("b", NO_VERDICT, OK, NO_VERDICT)
    scored = WeightedRewards([(a, 1.0), (b, 3.0)]).score(tasks(3), completions(3))
    assert [(s.reward, sorted(s.parts), s.is_valid) for s in scored] == [
        (1.0, ["a"], True), (3.0, ["b"], True), (0.0, [], False)
    ]  # fmt: skip


def test_too_many_infra_errors_stop_the_run_and_name_the_first():
    a, b = Fixed("a", *[OK] * 8), Fixed("sandbox", *[OK] * 5, *[BROKEN] * 3)
    with pytest.raises(RuntimeError, match=r"'sandbox' failed on 3 of 8.*the sandbox is gone"):
        WeightedRewards([(a, 1.0), (b, 1.0)]).score(tasks(8), completions(8))
    b.verdicts[5] = OK  # 2 of 8 are not above a quarter
    assert sum(s.is_valid for s in WeightedRewards([(a, 1.0), (b, 1.0)]).score(tasks(8), completions(8))) == 6
    with pytest.raises(RuntimeError):
        WeightedRewards([(a, 1.0), (b, 1.0)], max_infra_error_share=0.2).score(tasks(8), completions(8))


def test_impossible_sums_are_refused():
    with pytest.raises(ValueError, match="two rewards are called 'a'"):
        WeightedRewards([(Fixed("a"), 1.0), (Fixed("b"), 1.0), (Fixed("a"), 1.0)])
    with pytest.raises(ValueError, match="no reward"):
        WeightedRewards([])
    with pytest.raises(ValueError, match=r"'a'.*finite"):
        WeightedRewards([(Fixed("a"), math.nan)])
    with pytest.raises(ValueError, match="max_infra_error_share"):
        WeightedRewards([(Fixed("a"), 1.0)], max_infra_error_share=25)


def test_wrong_results_are_refused():
    with pytest.raises(ValueError, match="'a' returned 1 verdicts for 2"):
        WeightedRewards([(Fixed("a", OK), 1.0)]).score(tasks(2), completions(2))
    with pytest.raises(ValueError, match=r"'a' gave nan on task train\.jsonl:2"):
        WeightedRewards([(Fixed("a", OK, Verdict(score=math.nan)), 1.0)]).score(tasks(2), completions(2))
    with pytest.raises(ValueError, match="2 tasks for 1 completions"):
        WeightedRewards([(Fixed("a", OK), 1.0)]).score(tasks(2), completions(1))


def test_leaving_the_with_block_closes_every_part():
    a, b = Fixed("a"), Fixed("b")
    with WeightedRewards([(a, 1.0), (b, 1.0)]) as rewards:
        assert (rewards.names, rewards.first, a.is_closed) == (("a", "b"), a, False)
    assert a.is_closed and b.is_closed


def test_rewards_of_a_recipe(tmp_path):
    (tmp_path / "mine.py").write_text("def even(completions, **kwargs): return [0.5 for c in completions]\n")
    rewards = load_rewards(
        [
            "math",
            {"name": "format", "pattern": r"\d+", "weight": 0.1},
            {"name": "format", "pattern": r".*!", "label": "shout", "weight": 10.0},
            RewardConfig(name="overlong", weight=2.0, label="long", options={"max_new_tokens": 4, "buffer": 4}),
            {"name": "length", "target_tokens": 3, "width": 2, "weight": 0.01},
            {"name": f"{tmp_path / 'mine.py'}:even", "timeout": 5.0, "weight": 100},
        ]
    )
    (scored,) = rewards.score(tasks(1, answer="4"), completions(1))
    rewards.close()
    assert {name: verdict.score for name, verdict in scored.parts.items()} == {
        "math": 1.0, "format": 1.0, "shout": 0.0, "long": -0.5, "length": 0.5, "even": 0.5
    }  # fmt: skip
    assert scored.reward == pytest.approx(1.0 + 0.1 - 1.0 + 0.005 + 50.0)


def test_a_single_spec_is_a_sum_of_one_that_checks_its_tasks():
    rewards = load_rewards({"name": "math", "answer_column": "solution", "num_workers": 1})
    rewards.check_tasks(tasks(2, solution="x+1"))
    with pytest.raises(ValueError, match=r"train\.jsonl:1"):
        rewards.check_tasks(tasks(1, solution=r"\frac{"))
    rewards.close()


@pytest.mark.parametrize(
    ("spec", "kind"),
    [
        ("math", MathReward),
        ({"name": "format", "pattern": "a"}, FormatReward),
        ({"name": "length", "target_tokens": 1, "width": 1}, TargetLength),
        ({"name": "overlong", "max_new_tokens": 2, "buffer": 1}, OverlongPenalty),
        (RewardConfig(name="overlong", options={"max_new_tokens": 2, "buffer": 1}), OverlongPenalty),
        ("math:sqrt", FunctionReward),
    ],
)
def test_names_and_their_kinds(spec, kind):
    reward = load_reward(spec)
    assert type(reward) is kind
    reward.close()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("maths", "'maths', did you mean 'math'"),
        ("zzz", "'zzz'.*math, .*format, length, overlong.*module:function"),
        ({"name": "math", "anwser_column": "x"}, "'anwser_column', did you mean 'answer_column'"),
        ({"name": "format"}, "needs the option 'pattern'"),
        ({"name": "math:sqrt", "function": "x"}, "no option 'function'"),
        ({"name": "math:sqrt", "timout": 1}, "did you mean 'timeout'"),
        ({"weight": 1.0}, "name is missing"),
        ({"name": "math", "weight": "1"}, "weight must be a number"),
        ({"name": "overlong", "max_new_tokens": "64", "buffer": 8}, "'overlong'.*wrong type"),
        ("no_such_module_anywhere:f", "no_such_module_anywhere"),
        ("math:no_such_function", "no function 'no_such_function'"),
    ],
)
def test_mistakes_in_a_recipe_are_named(spec, message):
    with pytest.raises(ValueError, match=message):
        load_rewards(spec)
