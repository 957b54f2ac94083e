"""reasoning-gym as tasks and reward, through its real worker."""

from __future__ import annotations

from pathlib import Path

import pytest

from strop.data.tasks import tasks_from_rows
from strop.evals.suites import load_suite
from strop.rewards.reasoning_gym import ReasoningGymReward, answer_of
from strop.rewards.reasoning_gym_box import BoxedScorer
from strop.rewards.reasoning_gym_text import RUNS_MODEL_TEXT, why_not_run
from strop.rewards.sandbox.box import BoxError, Launcher
from strop.types import Completion, Task

SOURCE = ("seed", "size", "index")
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


def test_a_text_that_is_right_by_accident_is_no_sign_of_a_scorer_that_pays_for_any_text(reward):
    # gsm_symbolic's scorer reads the last number, and the answer to this question is 9: "9**9" is right.
    columns = {"dataset": "gsm_symbolic", "seed": 0, "size": 50, "index": 16}
    task = Task(id="t:1", prompt="?", columns=columns)
    reward.check_tasks([task])
    verdicts = reward.score([task] * 2, [completion("9"), completion("8")])
    assert [verdict.score for verdict in verdicts] == [1.0, 0.0]


def test_puzzle24_wants_the_numbers_of_its_own_question(reward, evaluated_tasks):
    # Its scorer pays for any four numbers that make 24.
    task = next(task for task in evaluated_tasks if task.columns["dataset"] == "puzzle24")
    for text in ("1*3*5 + 9", "6*4*1*1", "(8 - 4)*6*1", "24", f"{task.columns['answer']} + 0"):
        assert reward.score([task], [completion(text)])[0].score == 0.0, text
    assert reward.score([task], [completion(task.columns["answer"])])[0].score == 1.0


def test_questions_whose_own_answer_scores_nothing_are_left_out_of_a_suite():
    # intermediate_integration's answers to these two are unsolved: "3*Integral(x**3*cos(3*x), x) + C".
    with pytest.warns(UserWarning, match=r"2 of 12 questions are left out.*intermediate_integration 5: .*Integral"):
        suite = load_suite("reasoning_gym:intermediate_integration", size=12, seed=0)
    assert [row["index"] for row in suite.rows] == [0, 1, 2, 3, 4, 6, 7, 8, 9, 11]
    # An empty gold, which no completion can give.
    with pytest.warns(UserWarning, match=r"1 of 50 .*ab 18: the gold answer is empty"):
        assert len(load_suite("reasoning_gym:ab", size=50, seed=0).rows) == 49
    with pytest.raises(ValueError, match="no question of reasoning-gym's 'game_of_life_halting' can be judged"):
        load_suite("reasoning_gym:game_of_life_halting", size=5)


def test_a_long_answer_is_read_where_it_is_only_compared(reward):
    columns = {"dataset": "tower_of_hanoi", "seed": 0, "size": 50, "index": 6}
    (row,) = [row for row in load_suite("reasoning_gym:tower_of_hanoi", size=50).rows if row["index"] == 6]
    assert len(row["answer"]) > 4000
    task = Task(id="t:1", prompt="?", columns={**columns, "answer": row["answer"]})
    assert reward.score([task], [completion(row["answer"])])[0].score == 1.0
    assert reward.score([task], [completion("1" * 17_000)])[0].status == "unparsed"


def test_making_a_question_again_is_not_the_answers_time():
    """sokoban takes seconds to draw some of its puzzles, and this reward gives an answer a fraction of one."""
    reward = ReasoningGymReward(num_workers=1, timeout=0.3)
    columns = {"dataset": "sokoban", "seed": 0, "size": 50, "index": 11}
    (verdict,) = reward.score([Task(id="t:1", prompt="?", columns=columns)], [completion("zzz")])
    reward.close()
    assert verdict.status == "wrong" and verdict.milliseconds < 300, verdict


def test_an_answer_to_a_question_that_is_another_one_now_is_masked_and_not_judged(reward, tasks):
    for changed in ({"question": "What is 1 + 1?"}, {"answer": "two"}):
        task = Task(id="t:1", prompt="?", columns={**tasks[0].columns, **changed})
        (verdict,) = reward.score([task], [completion(tasks[0].columns["answer"])])
        assert verdict.status == "infra_error" and verdict.detail.startswith("t:1: made again"), verdict


def test_no_answer_is_unparsed(reward, tasks):
    texts = ["", "  ", "<answer></answer>", "<answer>" + "1" * 17_000]
    verdicts = reward.score(tasks[:4], [completion(text) for text in texts])
    assert [(verdict.score, verdict.status) for verdict in verdicts] == [(0.0, "unparsed")] * 4


def test_the_suite_is_decided_by_its_seed():
    first, again, other = (load_suite("reasoning_gym:chain_sum", size=5, seed=seed) for seed in (1, 1, 2))
    assert list(first.rows) == list(again.rows) and first.rows.content_hash == again.rows.content_hash
    assert list(first.rows) != list(other.rows)


@pytest.fixture(scope="module")
def evaluated_tasks(sandbox_works) -> list[Task]:
    """Two tasks of each dataset whose scorer runs the answer."""
    return tasks_from_rows(load_suite(f"reasoning_gym:{'+'.join(RUNS_MODEL_TEXT)}", size=18, seed=3).rows)


def test_golds_of_the_datasets_that_run_the_answer_score_one_in_their_box(reward, evaluated_tasks):
    assert len(RUNS_MODEL_TEXT) == 9
    reward.check_tasks(evaluated_tasks)
    verdicts = reward.score(evaluated_tasks, [completion(task.columns["answer"]) for task in evaluated_tasks])
    assert [(verdict.score, verdict.status) for verdict in verdicts] == [(1.0, "ok")] * len(evaluated_tasks)


def hostile(flag: Path) -> list[str]:
    touch = f"__import__('os').system('touch {flag}')"
    patch = "__import__('reasoning_gym').games.countdown.CountdownDataset.__dict__"
    return [
        touch,
        f"[{touch}]",
        f"0 if {touch} else 0",
        f"(lambda: {touch})()",
        f"[{touch} for _ in [1]]",
        f"open('{flag}', 'w').write('x')",
        f"exec('open({str(flag)!r}, \\'w\\')')",
        f"f\"{{open('{flag}', 'w')}}\"",
        "().__class__.__base__.__subclasses__()",
        f"setattr({patch}, 'score_answer', lambda *a, **k: 1.0)",
        "[0 for entry['answer'] in ['zzz']]",
        "__import__('sys').exit(0)",
        "__import__('os')._exit(0)",
        "globals().update(float=lambda x: 24, int=lambda x: 24)",
        "N('__import__(\"os\").getcwd()')",
        "sympify('1')",
        "symbols",
        "9**9**9**9",
        "9**(9**9)",
        "9**99999999",
        "(" * 1000 + "1" + ")" * 1000,
        "[" * 90 + "]" * 90,
        "1+" * 1500 + "1",
        "x" * 3000,
        "\x00",
        "lambda: 1",
        "{1: 2}",
        "yield",
        "factorial(99999999)",
        "x.free_symbols",
    ]


def test_hostile_answers_score_nothing_and_do_nothing(reward, evaluated_tasks, tmp_path: Path):
    tmp_path.chmod(0o777)
    flag = tmp_path / "executed"
    for text in hostile(flag):
        chosen = evaluated_tasks[::2]
        verdicts = reward.score(chosen, [completion(text)] * len(chosen))
        for task, verdict in zip(chosen, verdicts, strict=True):
            assert verdict.score == 0.0, (text[:60], task.columns["dataset"], verdict)
            assert verdict.status in ("unparsed", "wrong", "timeout"), (text[:60], task.columns["dataset"], verdict)
    assert not flag.exists()
    reward.check_tasks(evaluated_tasks)  # and the scorers are what they were


def test_an_answer_that_does_not_end_is_killed_with_its_box_and_the_next_is_judged(evaluated_tasks):
    countdown = next(task for task in evaluated_tasks if task.columns["dataset"] == "countdown")
    reward = ReasoningGymReward(num_workers=1, timeout=1.0)
    texts = ["((((9**999)**999)**999)**999)**999", countdown.columns["answer"]]
    verdicts = reward.score([countdown] * 2, [completion(text) for text in texts])
    reward.close()
    assert verdicts[0].score == 0.0 and verdicts[0].status in ("timeout", "killed")
    assert (verdicts[1].score, verdicts[1].status) == (1.0, "ok")


BOX_ATTACK = """
import os, sys
def attempt(name, attack):
    try:
        attack()
    except BaseException as error:
        return
    print(name, file=sys.stderr, flush=True)
def connect():
    import socket
    socket.create_connection(("127.0.0.1", 1), 1)
attempt("read", lambda: open("/etc/passwd").read())
attempt("home", lambda: os.listdir("/root"))
attempt("fork", os.fork)
attempt("socket", connect)
attempt("write", lambda: open({flag!r}, "w"))
attempt("package", lambda: open({package!r} + "/x", "w"))
assert "PATH" not in os.environ and len(os.environ) < 6, os.environ
import reasoning_gym
print("done", file=sys.stderr, flush=True)
"""


def test_the_box_itself_holds_and_sees_nothing_but_the_packages(sandbox_works, tmp_path: Path):
    import reasoning_gym

    tmp_path.chmod(0o777)
    scorer = BoxedScorer(timeout=1.0, start_seconds=60.0, python=None)
    source = BOX_ATTACK.format(flag=str(tmp_path / "x"), package=str(Path(str(reasoning_gym.__file__)).parent))
    path = [str(Path(str(reasoning_gym.__file__)).parents[1])]
    box = Launcher(scorer._settings, source=f"import sys; sys.path += {path!r}\n{source}").start()
    with pytest.raises(BoxError, match=r"ended while starting: done$"):
        box.wait_ready()  # it never says the greeting; its last words are what did not fail
    assert not (tmp_path / "x").exists()
    scorer.close()


def test_without_a_sandbox_they_are_refused(evaluated_tasks, monkeypatch, tmp_path: Path):
    monkeypatch.setenv("PATH", str(tmp_path))
    reward = ReasoningGymReward(num_workers=1)
    for call in (reward.check_tasks, lambda tasks: reward.score(tasks, [completion("1")] * len(tasks))):
        with pytest.raises(ValueError, match=r"no sandbox.*bubblewrap.*unsafe_local"):
            call(evaluated_tasks[:1])
    reward.close()


def test_composite_is_refused(reward):
    with pytest.raises(ValueError, match="composite"):
        load_suite("reasoning_gym:composite")
    with pytest.raises(ValueError, match=r"t:1: .*composite"):
        reward.check_tasks([Task(id="t:1", prompt="?", columns={"dataset": "composite", **dict.fromkeys(SOURCE, 0)})])


def test_unsafe_local_warns_judges_and_still_looks_at_the_answer_first(evaluated_tasks, tmp_path: Path):
    with pytest.warns(UserWarning, match="UNSAFE"):
        reward = ReasoningGymReward(num_workers=1, timeout=1.0, unsafe_local=True)
    countdown = next(task for task in evaluated_tasks if task.columns["dataset"] == "countdown")
    reward.check_tasks([countdown])
    flag = tmp_path / "executed"
    texts = ["9**9**9**9", "zzz", f"__import__('os').system('touch {flag}')", "((((9**999)**999)**999)**999)**999"]
    verdicts = reward.score([countdown] * 4, [completion(text) for text in texts])
    assert [(verdict.score, verdict.status) for verdict in verdicts[:3]] == [(0.0, "wrong")] * 3
    assert verdicts[3].score == 0.0 and verdicts[3].status in ("timeout", "killed")
    assert not flag.exists()
    reward.close()


@pytest.mark.parametrize(
    ("dataset", "answer"),
    [
        ("countdown", "9 + 3*(8 - 2)/4"),
        ("puzzle24", "(3 * 8)*1"),
        ("simple_integration", "-3*x**4/4 + 2*x + C"),
        ("intermediate_integration", "exp(2*x)*sin(3*x)/13 - log(x)**2 + C"),
        ("polynomial_multiplication", "-x**12*y + 4*x - 60"),
        ("binary_matrix", "0 1 1\n1 0 2"),
        ("binary_matrix", "[[0, 1], [1, 0]]"),
        ("n_queens", "_ _ Q _\nQ _ _ _"),
        ("string_insertion", "['A', 'B']"),
        ("string_insertion", "ABCDEAACBDBE"),
        ("spiral_matrix", "3 1 0 2"),
        ("chain_sum", "anything(at).all"),
    ],
)
def test_what_people_write_may_be_scored(dataset, answer):
    assert why_not_run(dataset, answer) is None


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"dataset": "game_of_life_halting", "seed": 0, "size": 2, "index": 0}, "any text at all"),
        ({"dataset": "chain_sum", "seed": 0, "size": 2, "index": 0, "question": "1 + 1?"}, "question is another one"),
        ({"dataset": "rubiks_cube", "seed": 0, "size": 2, "index": 0}, "not 1"),
        ({"dataset": "chain_sum", "seed": 0, "size": 2, "index": 0, "answer": "7"}, "the gold answer is '"),
        ({"dataset": "ab", "seed": 0, "size": 50, "index": 18}, "empty"),
        ({"dataset": "intermediate_integration", "seed": 0, "size": 50, "index": 5}, "scores 0"),
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
