"""Verdicts while others still decode: the same scores as afterwards, asked early, each text once."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from strop.generation import Engine
from strop.models import load_model
from strop.rewards.base import WeightedRewards
from strop.rewards.load import load_rewards
from strop.rewards.overlap import JudgingTime, Scoring
from strop.rollouts.groups import roll_out
from strop.tokenizer import Tokenizer
from strop.types import Completion, SamplingParams, Task, Verdict

TASKS = [Task(id=f"t:{number}", prompt="?", columns={"answer": str(number)}) for number in range(4)]


def completion(text: str) -> Completion:
    return Completion(token_ids=(5, 2), sampling_logprobs=(0.0, 0.0), finish_reason="stop", text=text)


class Watched:
    """Scores the length of a text after a while, and remembers when and in which thread it was asked for what."""

    def __init__(self, *, num_parallel: int, seconds: float = 0.0) -> None:
        self.name = "watched"
        self.num_parallel = num_parallel
        self.asked: list[tuple[str, float, str]] = []
        self._seconds = seconds

    def score(self, tasks: Sequence[Task], completions: Sequence[Completion]) -> list[Verdict]:
        for one in completions:
            self.asked.append((one.text, time.perf_counter(), threading.current_thread().name))
            time.sleep(self._seconds)
        return [Verdict(score=float(len(one.text))) for one in completions]

    def close(self) -> None: ...


def test_what_comes_in_out_of_order_is_scored_as_one_batch_would_be() -> None:
    texts = ["0", r"\boxed{1}", "2 or 3", r"\boxed{4}"]
    answers = [completion(text) for text in texts]
    with load_rewards(["math", {"name": "length", "target_tokens": 2, "width": 4, "weight": 0.5}]) as rewards:
        expected = rewards.score(TASKS, answers)
        with Scoring(rewards) as scoring:
            for place in (2, 0, 3, 1):
                scoring.add(place, TASKS[place], answers[place])
            found = scoring.finish()
    assert [one.reward for one in found] == [one.reward for one in expected] == [1.5, 1.5, 0.5, 0.5]
    assert [list(one.parts) for one in found] == [["math", "length"]] * 4
    assert scoring.time.num_verdicts == 8 and scoring.time.wait_seconds <= scoring.time.judging_seconds


def test_a_completion_is_judged_while_others_are_still_to_come_and_equal_texts_once() -> None:
    reward = Watched(num_parallel=1)
    with Scoring(WeightedRewards([(reward, 1.0)])) as scoring:
        scoring.add(1, TASKS[0], completion("aa"))
        scoring.add(0, TASKS[0], completion("aa"))
        deadline = time.monotonic() + 10
        while not reward.asked and time.monotonic() < deadline:
            time.sleep(0.001)
        generated = time.perf_counter()
        scoring.add(2, TASKS[1], completion("aa"))  # of another task: another question
        scores = scoring.finish()
    assert [one.reward for one in scores] == [2.0] * 3
    assert [text for text, _, _ in reward.asked] == ["aa", "aa"]
    assert scoring.time.num_verdicts == 3 and scoring.time.metrics(1.0)["verdicts_shared"] == 1
    assert reward.asked[0][1] < generated and reward.asked[0][2].startswith("score-watched")


def test_a_reward_that_cannot_be_asked_early_sees_one_batch_at_the_end() -> None:
    reward = Watched(num_parallel=0)
    with Scoring(WeightedRewards([(reward, 1.0)])) as scoring:
        for place in range(3):
            scoring.add(place, TASKS[place], completion("a" * place))
        assert not reward.asked
        assert [one.reward for one in scoring.finish()] == [0.0, 1.0, 2.0]
    assert {thread for _, _, thread in reward.asked} == {threading.current_thread().name}
    assert scoring.time.num_open == 3 and scoring.time.num_shared == 0


def test_the_wait_is_what_comes_after_the_last_completion() -> None:
    reward = Watched(num_parallel=1, seconds=0.05)
    with Scoring(WeightedRewards([(reward, 1.0)])) as scoring:
        for place in range(4):
            scoring.add(place, TASKS[place], completion("a" * place))
        time.sleep(0.12)  # decoding goes on: two are judged meanwhile
        scoring.finish()
    time_spent = scoring.time
    assert 0.05 < time_spent.wait_seconds < time_spent.judging_seconds - 0.1
    assert 1 <= time_spent.num_open <= 2
    metrics = (time_spent + JudgingTime(wait_seconds=1.0)).metrics(step_seconds=10.0)
    assert metrics["time/reward_wait_share"] == pytest.approx((1.0 + time_spent.wait_seconds) / 10.0)


def test_an_error_in_a_thread_reaches_the_stage_and_leaves_no_thread() -> None:
    class Broken(Watched):
        def score(self, tasks: Sequence[Task], completions: Sequence[Completion]) -> list[Verdict]:
            raise ValueError("t:0: no gold")

    with pytest.raises(ValueError, match="no gold"), Scoring(WeightedRewards([(Broken(num_parallel=2), 1.0)])) as it:
        it.add(0, TASKS[0], completion("a"))
        it.finish()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("score-")]


def test_too_many_infra_errors_stop_the_run_as_they_do_afterwards() -> None:
    class Dead(Watched):
        def score(self, tasks: Sequence[Task], completions: Sequence[Completion]) -> list[Verdict]:
            return [Verdict(score=0.0, status="infra_error", detail="the sandbox is gone")] * len(tasks)

    rewards = WeightedRewards([(Dead(num_parallel=2), 1.0)])
    with pytest.raises(RuntimeError, match="the sandbox is gone"), Scoring(rewards) as scoring:
        for place in range(4):
            scoring.add(place, TASKS[place], completion("a" * place))
        scoring.finish()


def test_a_rollout_asks_before_its_last_completion_is_there(tiny_folder: Path) -> None:
    tokenizer = Tokenizer.load(tiny_folder)
    engine = Engine(load_model(tiny_folder), tokenizer, num_slots=2)
    reward = Watched(num_parallel=1)
    prompts = [tuple(tokenizer.encode_prompt(task.prompt)) for task in TASKS]
    groups, judging = roll_out(
        engine,
        WeightedRewards([(reward, 1.0)]),
        TASKS,
        prompts,
        group_size=3,
        sampling=SamplingParams(max_new_tokens=12),
        seed=0,
    )
    ended = time.perf_counter() - judging.wait_seconds
    assert sum(when < ended for _, when, _ in reward.asked) > len(reward.asked) / 2
    for group in groups:
        assert group.rewards == [float(len(one.text)) for one in group.completions]
