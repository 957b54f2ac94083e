"""The reward model against transformers: scores of padded batches, and the gradient of a step of whole rankings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from strop.data import Comparison, comparisons_from_rows, load_rows
from strop.data.formats import COMPARED
from strop.models import load_model
from strop.models.heads import add_scalar_head, load_scalar_model, save_scalar_model
from strop.optim import OptimizerConfig
from strop.rewards.model import ModelReward
from strop.runs import read_lines
from strop.stages import reward_model
from strop.stages.reward_model import Config, reward_step
from strop.tokenizer import Tokenizer
from strop.types import Completion, Task

SGD = OptimizerConfig(lr=1e6, eps=1e6, beta1=0.0, beta2=0.0, max_grad_norm=float("inf"))
"""Adam with an eps so large that its first update is minus the gradient."""

RANKINGS = [
    {"prompt": "the quick", "completions": [" fox", " brown dog jumps", " cat"], "ranks": [2, 1, 3], "weight": 0.5},
    {"prompt": "the lazy dog and", "completions": [" sleeps", " the quick cat sleeps"], "ranks": [1, 2]},
    {"prompt": "fox", "completions": [" jumps over", "", " and", " the dog"], "ranks": [1, 2, 2, 5], "annotator": "a"},
]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def rankings(folder: Path, tmp_path: Path) -> list[Comparison]:
    rows = load_rows(write(tmp_path / "ranks.jsonl", RANKINGS))
    tokenizer = Tokenizer.load(folder)
    found = comparisons_from_rows(rows, tokenizer, accepted=COMPARED, max_length=64, annotator_weights={"a": 3.0})
    return list(found)


def pair_loss(better: torch.Tensor, worse: torch.Tensor, is_tied: bool) -> torch.Tensor:
    win = torch.log(1 + torch.exp(worse - better))
    return (win + torch.log(1 + torch.exp(better - worse))) / 2 if is_tied else win


@pytest.mark.parametrize("loss", ["kwise", "pairwise"])
@pytest.mark.parametrize("micro_batch_tokens", [1000, 40])
def test_a_step_is_the_gradient_that_autograd_takes_of_separate_padded_rows(
    tiny_folder: Path, tmp_path: Path, loss: Any, micro_batch_tokens: int
) -> None:
    comparisons = rankings(tiny_folder, tmp_path)
    assert [comparison.weight for comparison in comparisons] == [0.5, 1.0, 3.0]
    model = add_scalar_head(load_model(tiny_folder, dtype=torch.float64), seed=3)  # pyright: ignore[reportArgumentType]
    save_scalar_model(model, tmp_path / "before")
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "before", dtype=torch.float64)
    theirs.config.pad_token_id = 319  # no text here has it
    total = torch.zeros((), dtype=torch.float64)
    num_pairs = sum(len(c.answers) * (len(c.answers) - 1) // 2 for c in comparisons)
    for comparison in comparisons:
        rows = [[*comparison.prompt_ids, *answer.token_ids] for answer in comparison.answers]
        width = max(map(len, rows))
        ids = torch.tensor([row + [319] * (width - len(row)) for row in rows])
        scores = theirs(input_ids=ids, attention_mask=(ids != 319).long()).logits[:, 0]
        places = [(i, j) for i in range(len(rows)) for j in range(i + 1, len(rows))]
        losses = [pair_loss(scores[i], scores[j], comparison.ranks[i] == comparison.ranks[j]) for i, j in places]
        share = len(comparisons) * len(places) if loss == "kwise" else num_pairs
        total = total + comparison.weight * sum(losses) / share
    total.backward()
    optimizer = SGD.build(model.named_parameters())
    config = Config(init_from="", data="", num_steps=1, loss=loss, micro_batch_tokens=micro_batch_tokens, optimizer=SGD)
    metrics = reward_step(model, optimizer, comparisons, config, lr=SGD.lr)
    assert metrics["loss"] == pytest.approx(total.item(), rel=1e-6)  # its norms are float32
    save_scalar_model(model, tmp_path / "after")
    after = AutoModelForSequenceClassification.from_pretrained(tmp_path / "after", dtype=torch.float64).state_dict()
    for name, parameter in theirs.named_parameters():
        assert parameter.grad is not None
        moved = parameter.detach() - after[name]
        torch.testing.assert_close(moved, parameter.grad, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: name + text)
        assert bool(parameter.grad.any()), name


def test_the_checkpoint_gives_the_same_scores_in_transformers(tiny_folder: Path, tmp_path: Path) -> None:
    run = reward_model.train(
        Config(
            init_from=str(tiny_folder),
            data=write(tmp_path / "data.jsonl", RANKINGS),
            num_steps=3,
            batch_size=2,
            max_length=64,
            optimizer=OptimizerConfig(lr=1e-2),
            dtype="float32",
        ),
        name="rm",
        runs_dir=tmp_path,
        resume=False,
    )
    folder = run / "checkpoints/step-000003"
    comparisons = rankings(tiny_folder, tmp_path)
    ours = reward_model.score_all(load_scalar_model(folder), comparisons, max_tokens=1000)
    theirs = AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert theirs.config.num_labels == 1
    assert tokenizer.pad_token_id == theirs.config.pad_token_id not in Tokenizer.load(folder).stop_token_ids
    texts = [row["prompt"] + text + tokenizer.eos_token for row in RANKINGS for text in row["completions"]]
    with torch.no_grad():
        scores = theirs(**tokenizer(texts, padding=True, return_tensors="pt")).logits[:, 0].numpy()
    expected = [score for row, own in zip(RANKINGS, ours, strict=True) for score in in_file_order(row, own)]
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-5)
    scale = theirs.config.strop_reward
    assert scale["reward_mean"] == pytest.approx(float(np.mean(expected)), abs=1e-5)
    assert scale["reward_std"] == pytest.approx(float(np.std(expected)), abs=1e-5)
    losses = [line["loss"] for line in read_lines(run / "metrics.jsonl")]
    assert len(losses) == 3

    # The same checkpoint as a reward: the reference answers have mean 0 and deviation 1, in the order of their scores.
    ended = [completion(text, Tokenizer.load(folder)) for row in RANKINGS for text in row["completions"]]
    tasks = [Task(id=row["prompt"], prompt=row["prompt"]) for row in RANKINGS for _ in row["completions"]]
    reward = ModelReward(model=str(folder))
    reward.bind(Tokenizer.load(tiny_folder), 64)
    normalised = [verdict.score for verdict in reward.score(tasks, ended)]
    np.testing.assert_allclose(normalised, (scores - np.mean(scores)) / np.std(scores), rtol=0, atol=1e-4)
    assert np.mean(scores) != pytest.approx(0, abs=0.01) and np.std(scores) != pytest.approx(1, abs=0.01)


def completion(text: str, tokenizer: Tokenizer) -> Completion:
    ids = (*tokenizer.encode(text), *tokenizer.stop_token_ids[:1])
    return Completion(token_ids=ids, sampling_logprobs=(0.0,) * len(ids), finish_reason="stop", text=text)


def in_file_order(row: dict[str, Any], own: np.ndarray) -> list[float]:
    order = sorted(range(len(row["ranks"])), key=lambda place: row["ranks"][place])
    scores = [0.0] * len(order)
    for score, place in zip(own.tolist(), order, strict=True):
        scores[place] = score
    return scores
