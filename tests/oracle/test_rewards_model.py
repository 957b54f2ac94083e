"""A reward model as a reward: the score that transformers gives the sampled tokens, at the stop token."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from strop.cli.main import main
from strop.models import load_model
from strop.models.heads import add_scalar_head, load_scalar_model, save_scalar_model
from strop.rewards.base import WeightedRewards
from strop.rewards.load import load_reward, load_rewards
from strop.rewards.model import ModelReward
from strop.runs import RunFolder, read_lines
from strop.runs.report import curves, logged_held_out
from strop.tokenizer import Tokenizer, train_bpe
from strop.types import Completion, Task, Verdict

PROMPTS = ["the quick", "cat", "brown fox jumps over"]
STOP = 77
"""Ends a completion here, and is not the tokenizer's EOS."""


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A reward model with a random head over the tiny model."""
    model = add_scalar_head(load_model(tiny_folder, dtype=torch.float32), seed=3)  # type: ignore[arg-type]
    save_scalar_model(model, tmp_path / "rm")
    Tokenizer.load(tiny_folder).save(tmp_path / "rm")
    return tmp_path / "rm"


def set_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def judged(tokenizer: Tokenizer) -> tuple[list[Task], list[Completion]]:
    """Two answers to each prompt, of all lengths; the texts say something else than the tokens, and are not read."""
    tails = [[9, STOP], [5, 6, 7, 8, tokenizer.eos_id], [STOP], [20, 21, 22], [40, 0, 0, 41, STOP], [tokenizer.eos_id]]
    tasks = [Task(id=f"t:{i}", prompt=prompt) for i, prompt in enumerate(PROMPTS) for _ in range(2)]
    completions = [
        Completion(
            token_ids=tuple(tail),  # type: ignore[arg-type]
            sampling_logprobs=(0.0,) * len(tail),
            finish_reason="length" if tail[-1] == 22 else "stop",
            text="something else",
        )
        for tail in tails
    ]
    return tasks, completions


def bound(folder: Path, **options: Any) -> tuple[ModelReward, Tokenizer]:
    tokenizer = Tokenizer.load(folder)
    reward = ModelReward(model=str(folder), **options)
    reward.bind(tokenizer, 128)
    return reward, tokenizer


def their_scores(folder: Path, tasks: list[Task], completions: list[Completion]) -> list[float]:
    """transformers, one unpadded row at a time, whose last position is the last token that was sampled."""
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    model.config.pad_token_id = None
    tokenizer = Tokenizer.load(folder)
    scores = []
    for task, completion in zip(tasks, completions, strict=True):
        ids = [*tokenizer.encode_prompt(task.prompt), *completion.token_ids]
        with torch.no_grad():
            hidden = model.model(torch.tensor([ids])).last_hidden_state[0, -1]
            scores.append(float(model.score(hidden)))
    return scores


def test_the_score_is_transformers_at_the_last_sampled_token(folder: Path) -> None:
    reward, tokenizer = bound(folder)
    tasks, completions = judged(tokenizer)
    expected = their_scores(folder, tasks, completions)
    assert max(expected) - min(expected) > 0.3
    verdicts = reward.score(tasks, completions)
    assert [verdict.score for verdict in verdicts] == pytest.approx(expected, abs=1e-5)
    assert {verdict.status for verdict in verdicts} == {"ok"}


def test_the_stop_token_is_read_and_what_a_text_would_become_is_not(folder: Path) -> None:
    """40 0 0 41 holds the EOS twice in its middle, and one completion has another stop than the EOS at its end."""
    reward, tokenizer = bound(folder)
    tasks, completions = judged(tokenizer)
    whole = [verdict.score for verdict in reward.score(tasks, completions)]
    for index, completion in enumerate(completions):
        if len(completion.token_ids) == 1:
            continue
        cut = Completion(
            token_ids=completion.token_ids[:-1], sampling_logprobs=(0.0,), finish_reason="stop", text=completion.text
        )
        (verdict,) = reward.score([tasks[index]], [cut])
        assert abs(verdict.score - whole[index]) > 1e-3


@pytest.mark.parametrize("micro_batch_tokens", [1, 7, 12, 10_000])
def test_batching_order_and_neighbours_change_nothing(folder: Path, micro_batch_tokens: int) -> None:
    reward, tokenizer = bound(folder, micro_batch_tokens=micro_batch_tokens)
    tasks, completions = judged(tokenizer)
    expected = [reward.score([task], [one])[0].score for task, one in zip(tasks, completions, strict=True)]
    assert [verdict.score for verdict in reward.score(tasks, completions)] == pytest.approx(expected, abs=1e-5)
    order = [4, 0, 3, 5, 1, 2]
    mixed = reward.score([tasks[i] for i in order], [completions[i] for i in order])
    assert [verdict.score for verdict in mixed] == pytest.approx([expected[i] for i in order], abs=1e-5)


def test_zero_and_unit_come_from_the_config_and_weights_add_up(folder: Path) -> None:
    raw, tokenizer = bound(folder)
    tasks, completions = judged(tokenizer)
    scores = [verdict.score for verdict in raw.score(tasks, completions)]
    set_config(folder, strop_reward={"reward_mean": 0.25, "reward_std": 2})
    parts = load_rewards(
        [
            {"name": "model", "model": str(folder), "weight": 0.5},
            {"name": "length", "target_tokens": 2, "width": 2, "weight": 10.0},
        ]
    )
    assert isinstance(parts, WeightedRewards)
    parts.bind(tokenizer, 128)
    lengths = [max(0.0, 1 - abs(len(one.token_ids) - 2) / 2) for one in completions]
    expected = [0.5 * (score - 0.25) / 2 + 10 * length for score, length in zip(scores, lengths, strict=True)]
    assert [one.reward for one in parts.score(tasks, completions)] == pytest.approx(expected, abs=1e-5)


def test_zero_and_unit_outlive_loading_and_saving(folder: Path, tmp_path: Path) -> None:
    set_config(folder, strop_reward={"reward_mean": 0.25, "reward_std": 2.0})
    save_scalar_model(load_scalar_model(folder), tmp_path / "again")
    assert json.loads((tmp_path / "again/config.json").read_text())["strop_reward"]["reward_std"] == 2.0


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ({"reward_mean": 0.1}, "finite numbers reward_mean and reward_std"),
        ({"reward_mean": "0", "reward_std": 1.0}, "finite numbers"),
        ({"reward_mean": math.inf, "reward_std": 1.0}, "finite numbers"),
        ([0.0, 1.0], "finite numbers"),
        ({"reward_mean": 0.0, "reward_std": 0.0}, r"reward_std is 0\.0, but a unit must be above 0"),
    ],
)
def test_a_broken_scale_is_named(folder: Path, stored: Any, message: str) -> None:
    set_config(folder, strop_reward=stored)
    with pytest.raises(ValueError, match=message) as caught:
        load_reward({"name": "model", "model": str(folder)})
    assert "config.json" in str(caught.value)


def test_it_is_frozen(folder: Path) -> None:
    reward, tokenizer = bound(folder)
    reward.score(*judged(tokenizer))
    assert not any(parameter.requires_grad for parameter in reward._model.parameters())


def test_a_model_that_has_gone_wrong_is_an_infra_error_and_no_zero(folder: Path) -> None:
    model = load_scalar_model(folder)
    with torch.no_grad():
        model.score.weight[0, 0] = math.nan
    save_scalar_model(model, folder)
    reward, tokenizer = bound(folder)
    verdict: Verdict = reward.score(*judged(tokenizer))[0]
    assert verdict.status == "infra_error" and "nan" in verdict.detail


def test_what_cannot_be_read_is_refused_before_training(folder: Path, tmp_path: Path) -> None:
    reward, tokenizer = bound(folder)
    with pytest.raises(ValueError, match=r"have 129 tokens together.*only 128 positions: lower sampling"):
        reward.bind(tokenizer, 129)
    other = train_bpe(["completely different words make other tokens"], 290)
    with pytest.raises(ValueError, match="is not the policy's, so that its model would read other words"):
        reward.bind(other, 64)
    with pytest.raises(ValueError, match="micro_batch_tokens=0"):
        ModelReward(model=str(folder), micro_batch_tokens=0)
    with pytest.raises(ValueError, match="there is no folder"):
        ModelReward(model=str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match="needs the option 'model'"):
        load_reward("model")


def test_a_language_model_is_no_reward_model(tiny_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"missing score\.weight"):
        ModelReward(model=str(tiny_folder))


RECIPE = """
from = "tiny"
tasks = "tasks.jsonl"
rewards = [
    { name = "model", options = { model = "rm" } },
    { name = "length", weight = 0.5, options = { target_tokens = 3, width = 3 } },
]
num_steps = 2
prompts_per_step = 4
group_size = 2
dtype = "float32"
sampling = { max_new_tokens = 6 }
optimizer = { lr = 1e-3 }
eval = { tasks = "tasks.jsonl" }
"""


@pytest.fixture
def here(tiny_folder: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STROP_PROGRESS", "off")
    shutil.copytree(tiny_folder, "tiny")
    Path("tasks.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in [*PROMPTS, "dog"]))
    Path("recipe.toml").write_text(RECIPE)
    return tmp_path


@pytest.mark.parametrize("stage", ["ppo", "grpo"])
def test_the_same_recipe_in_ppo_and_in_grpo(here: Path, stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([stage, "recipe.toml"]) == 0
    run = RunFolder.open("runs", "recipe")
    assert run.info["stage"] == stage
    samples = list(read_lines(run.path / "samples.jsonl"))
    for sample in samples:
        parts = sample["parts"]
        expected = parts["model"]["score"] + 0.5 * parts["length"]["score"]
        assert sample["reward"] == pytest.approx(expected, abs=1e-5)
    assert len({sample["parts"]["model"]["score"] for sample in samples}) > 4
    lines = list(read_lines(run.path / "metrics.jsonl"))
    assert "eval/score" in lines[-1] and "eval/pass@1" not in lines[-1], "no answer is right to a reward model"
    held_out = logged_held_out(lines)
    assert held_out is not None and held_out.metric == "score"
    titles = {curve.title for curve in curves(lines)}
    of_ppo = {
        *("variance of the returns that the critic explains", "value loss", "gradient norm of the critic"),
        *("KL to the reference, nats per completion", "reward after penalties for KL and missing EOS"),
    }
    assert titles & of_ppo == (of_ppo if stage == "ppo" else set())
    assert {"held-out score", "share of completions without EOS", "share of tokens clipped from above"} <= titles
    assert "rewards.model" in run.info["data_hashes"]

    # Another model under the same name would make it another run.
    model = load_scalar_model("rm")
    with torch.no_grad():
        model.score.weight.neg_()
    save_scalar_model(model, "rm")
    capsys.readouterr()
    assert main([stage, "recipe.toml", "--resume", "--num-steps", "3"]) == 2
    assert "the content of rewards.model has changed" in capsys.readouterr().err


ONLINE = """
from = "tiny"
rewards = [
    { name = "model", options = { model = "rm" } },
    { name = "length", weight = 0.5, options = { target_tokens = 3, width = 3 } },
]
num_steps = 2
batch_size = 4
dtype = "float32"
eval_tasks = "tasks.jsonl"
online = { tasks = "tasks.jsonl", group_size = 2 }
sampling = { max_new_tokens = 6 }
optimizer = { lr = 1e-3 }
"""


def test_online_dpo_chooses_by_the_same_reward(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("recipe.toml").write_text(ONLINE)
    assert main(["dpo", "recipe.toml"]) == 0
    run = RunFolder.open("runs", "recipe")
    samples = list(read_lines(run.path / "samples.jsonl"))
    for sample in samples:
        parts = sample["parts"]
        expected = parts["model"]["score"] + 0.5 * parts["length"]["score"]
        assert sample["reward"] == pytest.approx(expected, abs=1e-5)
    assert len({sample["parts"]["model"]["score"] for sample in samples}) > 4
    *_, last = read_lines(run.path / "metrics.jsonl")
    assert "eval/score" in last and "eval/pass@1" not in last
    assert "rewards.model" in run.info["data_hashes"]
    capsys.readouterr()
    long = ["--name", "long", "--eval-tasks", "", "--sampling.max-new-tokens", "100", "--micro-batch-tokens", "4096"]
    set_config(Path("rm"), max_position_embeddings=64)
    assert main(["dpo", "recipe.toml", *long]) == 2
    assert "the reward model has only 64 positions" in capsys.readouterr().err


def test_eval_judges_by_a_reward_model(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = '{ name = "model", options = { model = "rm" } }'
    call = ["eval", "tiny", "--tasks", "tasks.jsonl", "--max-new-tokens", "6", "--dtype", "float32", "--output", "out"]
    assert main([*call, "--reward", table]) == 0
    printed = capsys.readouterr().out
    assert "score" in printed and "pass@" not in printed
    rows = [json.loads(line) for line in Path("out").read_text().splitlines()]
    assert len({row["score"] for row in rows}) == len(rows) == 4
    for reward, message in (
        ("model", "reward 'model' needs the option 'model'"),
        ('{ name = "model", option = 3 }', "--reward: unknown key 'option' (did you mean 'options'?)"),
        ('{ name = "model"', "not a TOML table"),
        ('{ name = "model", options = { model = "nothing" } }', "'nothing' is neither a run, a run/step, nor a folder"),
    ):
        assert main([*call, "--reward", reward]) == 2
        assert message in capsys.readouterr().err
    assert main([*call, "--reward", table, "--num-samples", "2", "--k", "2"]) == 2
    assert "there is no pass@k: leave k out" in capsys.readouterr().err


def test_an_unbound_reward_says_so(folder: Path) -> None:
    with pytest.raises(ValueError, match="was never told whose: call bind before score"):
        ModelReward(model=str(folder)).score(*judged(Tokenizer.load(folder)))


def test_a_run_is_found_by_its_name(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A PPO run's checkpoint is a policy, which is no reward model; its critic is a scalar model, and opens by path."""
    assert main(["ppo", "recipe.toml"]) == 0
    Path("recipe.toml").write_text(RECIPE.replace('"rm"', '"recipe"'))
    assert main(["grpo", "recipe.toml", "--name", "again"]) == 2
    assert "missing score.weight" in capsys.readouterr().err
    Path("recipe.toml").write_text(RECIPE.replace('"rm"', '"recipes"'))
    assert main(["grpo", "recipe.toml", "--name", "again"]) == 2
    assert "'recipes' is neither a run, a run/step, nor a folder" in capsys.readouterr().err
