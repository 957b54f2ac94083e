"""Format and length rewards."""

from __future__ import annotations

import time

import pytest

from strop.rewards.text import FormatReward, OverlongPenalty, TargetLength
from strop.types import Completion, Task

TASK = Task(id="t:1", prompt="?")


def completion(text: str = "", length: int = 1) -> Completion:
    return Completion(token_ids=(1,) * length, sampling_logprobs=(0.0,) * length, finish_reason="stop", text=text)


def scores(reward, completions: list[Completion]) -> list[float]:
    return [verdict.score for verdict in reward.score([TASK] * len(completions), completions)]


def test_the_pattern_must_match_the_whole_completion():
    reward = FormatReward(pattern=r"<think>.*</think>\s*\d+")
    texts = ["<think>a\nb</think> 4", "<think>a</think> 4 apples", "oh <think>a</think> 4", "<think>a</think>4\n", ""]
    verdicts = reward.score([TASK] * 5, [completion(text) for text in texts])
    assert [(verdict.score, verdict.status) for verdict in verdicts] == [(1.0, "ok")] + [(0.0, "wrong")] * 4
    reward.close()


def test_a_pattern_that_backtracks_for_years_is_killed():
    reward = FormatReward(pattern=r"(a|a)*b", timeout=0.3)
    started = time.monotonic()
    bad, good = reward.score([TASK] * 2, [completion("a" * 60), completion("aab")])
    assert (bad.score, bad.status) == (0.0, "timeout")
    assert (good.score, good.status) == (1.0, "ok")
    assert time.monotonic() - started < 3.0
    reward.close()


def test_a_broken_pattern_is_named():
    with pytest.raises(ValueError, match=r"'\(a'.*position 0"):
        FormatReward(pattern="(a")


def test_overlong_penalty_is_dapos():
    reward = OverlongPenalty(max_new_tokens=20480, buffer=4096)
    lengths = [1, 16384, 16385, 17408, 18432, 20479, 20480, 30000]
    expected = [0.0, 0.0, -1 / 4096, -0.25, -0.5, -4095 / 4096, -1.0, -1.0]
    assert scores(reward, [completion(length=length) for length in lengths]) == expected


@pytest.mark.parametrize(("max_new_tokens", "buffer"), [(64, 0), (64, 65), (0, 0), (64, -1)])
def test_an_impossible_buffer_is_refused(max_new_tokens, buffer):
    with pytest.raises(ValueError, match="buffer"):
        OverlongPenalty(max_new_tokens=max_new_tokens, buffer=buffer)


def test_target_length_is_a_tent():
    reward = TargetLength(target_tokens=10, width=4)
    assert scores(reward, [completion(length=length) for length in [10, 9, 11, 12, 6, 14, 5, 100]]) == [
        1.0, 0.75, 0.75, 0.5, 0.0, 0.0, 0.0, 0.0
    ]  # fmt: skip


@pytest.mark.parametrize("options", [{"target_tokens": 0, "width": 1}, {"target_tokens": 1, "width": 0}])
def test_an_impossible_target_is_refused(options):
    with pytest.raises(ValueError, match="above 0"):
        TargetLength(**options)
