"""The majority vote: who wins, who has no vote, what a vote weighs, and that no label is ever looked at."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from strop.rewards.load import load_reward
from strop.rewards.vote import Vote, VoteReward, count_votes, token_probability
from strop.types import Completion, Task


def completion(text: str, *logprobs: float) -> Completion:
    own = logprobs or (-1.0,)
    return Completion(token_ids=tuple(range(len(own))), sampling_logprobs=own, finish_reason="stop", text=text)


def scores(reward: VoteReward, *texts: str) -> list[float]:
    task = Task(id="t:1", prompt="?")
    return [verdict.score for verdict in reward.score([task] * len(texts), [completion(text) for text in texts])]


def test_the_answer_that_most_give_wins_and_numbers_count_by_value() -> None:
    vote = count_votes(["1/2", "3", "1/2", None])
    assert vote == Vote(winner="1/2", share=0.5, tally={"1/2": 2.0, "3": 1.0})
    assert scores(VoteReward(), "it is 1/2", "so 3", r"\boxed{0.50}", r"\boxed{\frac{1}{2}}") == [1.0, 0.0, 1.0, 1.0]


def test_a_tie_goes_to_the_answer_sampled_first() -> None:
    assert count_votes(["7", "4", "4", "7"]).winner == "7"
    assert count_votes(["4", "7", "4", "7"]).winner == "4"
    assert scores(VoteReward(), "9", "8") == [1.0, 0.0]


def test_what_has_no_answer_has_no_vote_and_no_reward() -> None:
    assert scores(VoteReward(), "no idea", "no idea", "no idea", "5") == [0.0, 0.0, 0.0, 1.0]
    assert count_votes([None, None, None, "5"]).share == 0.25
    verdicts = VoteReward().score([Task(id="t", prompt="?")] * 2, [completion("what"), completion("")])
    assert [(verdict.score, verdict.status) for verdict in verdicts] == [(0.0, "unparsed")] * 2
    assert count_votes([None, None]) == Vote(winner=None, share=0.0, tally={})


def test_a_weighted_vote_counts_the_probability_per_token() -> None:
    # Two unsure completions say 3, one sure completion of four tokens says 8; unweighted 3 would win.
    group = [completion("3", -2.0), completion("3", -2.0), completion("8", -0.1, -0.1, -0.1, -0.1)]
    task = Task(id="t", prompt="?")
    weighted = VoteReward(weighted=True).score([task] * 3, group)
    assert [verdict.score for verdict in weighted] == [0.0, 0.0, 1.0]
    assert [verdict.score for verdict in VoteReward().score([task] * 3, group)] == [1.0, 1.0, 0.0]
    assert token_probability(group[2]) == pytest.approx(math.exp(-0.1))
    share = count_votes(["3", "3", "8"], [token_probability(one) for one in group]).share
    assert share == pytest.approx(math.exp(-0.1) / (math.exp(-0.1) + 2 * math.exp(-2)))


def test_every_prompt_votes_for_itself_wherever_its_completions_stand() -> None:
    first, second = Task(id="a", prompt="?"), Task(id="b", prompt="?")
    tasks = [first, second, first, second, second, first]
    verdicts = VoteReward().score(tasks, [completion(text) for text in ("1", "2", "1", "1", "2", "2")])
    assert [verdict.score for verdict in verdicts] == [1.0, 1.0, 1.0, 0.0, 1.0, 0.0]


class Unreadable(Mapping[str, Any]):
    """Columns that raise when anybody looks."""

    def __getitem__(self, key: str) -> Any:
        raise AssertionError(f"the vote looked at {key}")

    def __iter__(self) -> Iterator[str]:
        raise AssertionError("the vote looked at the columns")

    def __len__(self) -> int:
        raise AssertionError("the vote looked at the columns")


def test_no_column_of_the_task_is_read() -> None:
    task = Task(id="t", prompt="?", columns=Unreadable())
    assert [v.score for v in VoteReward().score([task] * 3, [completion(text) for text in "446"])] == [1.0, 1.0, 0.0]


def test_one_completion_is_no_vote() -> None:
    with pytest.raises(ValueError, match=r"tasks\.jsonl:3: .* several completions .* raise group_size"):
        VoteReward().score([Task(id="tasks.jsonl:3", prompt="?")], [completion("4")])


def test_a_recipe_of_any_stage_can_name_it() -> None:
    reward = load_reward({"name": "vote", "weighted": True, "answer_pattern": "after:####", "label": "agree"})
    assert reward.name == "agree"
    task = Task(id="t", prompt="?")
    verdicts = reward.score([task] * 3, [completion(text) for text in ("#### 4", "4", "5 #### 4")])
    assert [verdict.score for verdict in verdicts] == [1.0, 0.0, 1.0]
    with pytest.raises(ValueError, match="bxed"):
        load_reward({"name": "vote", "answer_pattern": "bxed"})
