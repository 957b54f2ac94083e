"""TRL's own reward functions run unchanged: by name, in their process, with the numbers that TRL gives."""

from __future__ import annotations

from strop.rewards.load import load_reward
from strop.types import Completion, Task

TEXTS = ["<think>It is half.</think>\\boxed{\\frac{1}{2}}", "\\boxed{0.5}", "\\boxed{1/3}", "half half half half", ""]
SOLUTIONS = ["$\\frac{1}{2}$", "$\\frac{1}{2}$", "$\\frac{1}{2}$", "$\\frac{1}{2}$", "no math here"]


def through_strop(spec: str) -> list[float | None]:
    tasks = [
        Task(id=f"t:{number}", prompt=({"role": "user", "content": "1/2?"},), columns={"solution": solution})
        for number, solution in enumerate(SOLUTIONS)
    ]
    completions = [
        Completion(token_ids=(5, 6, 7) * number, sampling_logprobs=(0.0,) * 3 * number, finish_reason="stop", text=text)
        for number, text in enumerate(TEXTS, start=1)
    ]
    reward = load_reward(spec)
    verdicts = reward.score(tasks, completions)
    reward.close()
    return [verdict.score for verdict in verdicts]


def test_functions_named_by_text_give_trls_numbers():
    from trl.rewards import accuracy_reward, think_format_reward

    completions = [[{"role": "assistant", "content": text}] for text in TEXTS]
    accuracy = accuracy_reward(completions=completions, solution=SOLUTIONS)
    assert accuracy[:4] == [1.0, 1.0, 0.0, 0.0]
    found = through_strop("trl.rewards:accuracy_reward")
    assert found == [0.0 if score is None else score for score in accuracy]
    form = think_format_reward(completions=completions)
    assert sum(form) == 1.0 and through_strop("trl.rewards:think_format_reward") == form


def test_a_function_that_reads_token_ids_gives_trls_numbers(tmp_path):
    from trl.rewards import get_soft_overlong_punishment

    path = tmp_path / "mine.py"
    path.write_text(
        "from trl.rewards import get_soft_overlong_punishment\nshort = get_soft_overlong_punishment(12, 6)\n"
    )
    ids = [[5, 6, 7] * number for number in range(1, 6)]
    expected = get_soft_overlong_punishment(12, 6)(completion_ids=ids)
    assert len(set(expected)) == 3
    assert through_strop(f"{path}:short") == expected
