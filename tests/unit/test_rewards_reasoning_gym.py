"""reasoning-gym as tasks and reward, through its real worker."""

from __future__ import annotations

from pathlib import Path

import pytest

from strop.data.tasks import tasks_from_rows
from strop.evals.suites import load_suite
from strop.rewards.reasoning_gym import RUNS_MODEL_TEXT, ReasoningGymReward, answer_of
from strop.types import Completion, Task

NAMES = "chain_sum+leg_counting+spell_backward+gsm_symbolic+fraction_simplification+prime_factorization"


def completion(text: str) -> Completion:
    return Completion(token_ids=(1,), sampling_logprobs=(0.0,), finish_reason="stop", text=text)


@pytest.fixture(scope="module")
def reward():
    reward = ReasoningGymReward(num_workers=1, timeout=2.0)
    yield reward
    reward.close()


@pytest.fixture(scope="module")
def tasks() -> list[Task]:
    return tasks_from_rows(load_suite(f"reasoning_gym:{NAMES}", size=30, seed=5).rows)


def test_gold_answers_score_one_on_every_row(reward, tasks):
    reward.check_tasks(tasks)
    for template in ("<answer>{}</answer>", "It is <answer> 1 </answer>, no: <answer>\n{} </answer>.", "{}"):
        verdicts = reward.score(tasks, [completion(template.format(task.columns["answer"])) for task in tasks])
        assert [(verdict.score, verdict.status) for verdict in verdicts] == [(1.0, "ok")] * len(tasks)


@pytest.mark.parametrize("partial", [False, True])
def test_an_irrelevant_answer_scores_nothing_also_where_reasoning_gym_pays_for_any_text(tasks, partial):
    reward = ReasoningGymReward(num_workers=1, partial=partial)
    for text in ["zzz", "I do not know.", "9**9**9**9", "<answer>" + "(" * 200, "1,2;3", "\x00", "None"]:
        verdicts = reward.score(tasks, [completion(text)] * len(tasks))
        assert [(verdict.score, verdict.status) for verdict in verdicts] == [(0.0, "wrong")] * len(tasks), text
    reward.close()


def test_no_answer_is_unparsed(reward, tasks):
    texts = ["", "  ", "<answer></answer>", "<answer>" + "1" * 5000]
    verdicts = reward.score(tasks[:4], [completion(text) for text in texts])
    assert [(verdict.score, verdict.status) for verdict in verdicts] == [(0.0, "unparsed")] * 4


def test_the_suite_is_decided_by_its_seed():
    first, again, other = (load_suite("reasoning_gym:chain_sum", size=5, seed=seed) for seed in (1, 1, 2))
    assert list(first.rows) == list(again.rows) and first.rows.content_hash == again.rows.content_hash
    assert list(first.rows) != list(other.rows)


def test_datasets_that_run_the_answer_as_code_are_refused(tmp_path: Path):
    assert len(RUNS_MODEL_TEXT) == 10
    for name in RUNS_MODEL_TEXT:
        with pytest.raises(ValueError, match="Python code"):
            load_suite(f"reasoning_gym:{name}")
    countdown = Task(id="t:1", prompt="?", columns={"dataset": "countdown", "seed": 0, "size": 5, "index": 0})
    reward = ReasoningGymReward(num_workers=1)
    flag = tmp_path / "executed"
    code = f"__import__('os').system('touch {flag}')"
    for call in (lambda: reward.check_tasks([countdown]), lambda: reward.score([countdown], [completion(code)])):
        with pytest.raises(ValueError, match=r"t:1: .*unsafe_local"):
            call()
    assert not flag.exists()
    reward.close()


def test_with_unsafe_local_a_power_tower_is_killed_and_the_next_answer_judged():
    countdown = Task(id="t:1", prompt="?", columns={"dataset": "countdown", "seed": 0, "size": 5, "index": 0})
    reward = ReasoningGymReward(num_workers=1, timeout=1.0, unsafe_local=True)
    reward.check_tasks([countdown])
    verdicts = reward.score([countdown] * 2, [completion("9**9**9**9"), completion("zzz")])
    assert [(verdict.score, verdict.status) for verdict in verdicts] == [(0.0, "timeout"), (0.0, "wrong")]
    reward.close()


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"dataset": "game_of_life_halting", "seed": 0, "size": 2, "index": 0}, "any text at all"),
        ({"dataset": "chain_sum", "seed": 0, "size": 2, "index": 0, "question": "1 + 1?"}, "question is another one"),
        ({"dataset": "rubiks_cube", "seed": 0, "size": 2, "index": 0}, "not 1"),
        ({"dataset": "chain_sum", "seed": 0}, "lacks size, index"),
    ],
)
def test_tasks_that_cannot_be_judged_name_their_row(reward, columns, reason):
    with pytest.raises(ValueError, match=r"^t:9: ") as caught:
        reward.check_tasks([Task(id="t:9", prompt="?", columns=columns)])
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("chess", "no suite 'chess'"),
        ("metamat:ql", "did you mean 'metamath'"),
        ("metamath", "say which, as metamath:ql"),
        ("reasoning_gym:chainsum", "did you mean 'chain_sum'"),
        ("reasoning_gym:rubiks_cube", "no gold answer"),
    ],
)
def test_a_suite_that_is_not_there_names_the_nearest(name, reason):
    with pytest.raises(ValueError, match=reason):
        load_suite(name)


def test_the_last_answer_counts():
    assert answer_of("<answer>1</answer> <answer>2</answer> 3") == "2"
    assert answer_of("<answer>1") == "1"
    assert answer_of("4") == "4"
