"""One DPO step against gradients that transformers and autograd take of whole, unshared rows; and the reference cache.

The optimiser is Adam with an eps so large that its first update is minus the gradient.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM

from strop.data import Comparison, comparisons_from_rows, load_rows
from strop.generation import Engine
from strop.models import load_model, save_model
from strop.optim import OptimizerConfig
from strop.runs import read_lines
from strop.stages import begin, dpo
from strop.stages.dpo import Actors, dpo_step
from strop.stages.dpo_config import Config
from strop.stages.dpo_data import mismatched
from strop.stages.dpo_reference import CACHE, LiveReference
from strop.tokenizer import Tokenizer

SGD = OptimizerConfig(lr=1e6, eps=1e6, beta1=0.0, beta2=0.0, max_grad_norm=float("inf"))
PAIRS = [
    {"prompt": "the quick", "chosen": " brown dog jumps", "rejected": " fox", "weight": 0.5},
    {"prompt": "the lazy dog and", "chosen": " sleeps", "rejected": " the quick cat sleeps"},
    {"prompt": "fox", "chosen": " jumps over", "rejected": " and the dog"},
]
RANKING = [{"prompt": "the quick", "completions": [" fox", " cat sleeps", " dog", " brown"], "ranks": [2, 1, 2, 3]}]
SINGLES = [
    {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
    for row in PAIRS
    for side in ("chosen", "rejected")
]


def write(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def moved_folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy that has gone away from the reference."""
    folder = tmp_path_factory.mktemp("moved") / "model"
    model = load_model(tiny_folder)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=draw))
    save_model(model, folder)
    return folder


def row_logprob(model: Any, prompt: Sequence[int], answer: Sequence[int]) -> Tensor:
    """Summed logprob of one answer, from a row of its own."""
    ids = torch.tensor([[*prompt, *answer]])
    logprobs = torch.log_softmax(model(input_ids=ids).logits[0, :-1], -1)
    return logprobs[range(len(prompt) - 1, ids.shape[1] - 1), ids[0, len(prompt) :]].sum()


def minus_log_sigmoid(x: Tensor) -> Tensor:
    return -logsigmoid(x)


def log_odds(mean: Tensor) -> Tensor:
    return mean - torch.log(1 - torch.exp(mean))


# Each: (chosen logprob, rejected logprob, chosen reference, rejected reference, lengths) -> loss, as in the papers.
PAIR_LOSSES: dict[str, tuple[dict[str, Any], Callable[..., Tensor]]] = {
    "sigmoid": ({}, lambda c, r, rc, rr, n, m: minus_log_sigmoid(0.1 * ((c - rc) - (r - rr)))),
    "cdpo": (
        {"loss": "sigmoid", "flip_probability": 0.2},
        lambda c, r, rc, rr, n, m: 0.8 * minus_log_sigmoid(0.1 * (c - rc - r + rr))
        + 0.2 * minus_log_sigmoid(-0.1 * (c - rc - r + rr)),
    ),
    "robust": (
        {"flip_probability": 0.2},
        lambda c, r, rc, rr, n, m: (
            0.8 * minus_log_sigmoid(0.1 * (c - rc - r + rr)) - 0.2 * minus_log_sigmoid(-0.1 * (c - rc - r + rr))
        )
        / 0.6,
    ),
    "ipo": ({"dpo_beta": 0.2}, lambda c, r, rc, rr, n, m: ((c - rc) / n - (r - rr) / m - 2.5) ** 2),
    "ipo_sum": ({"dpo_beta": 0.2}, lambda c, r, rc, rr, n, m: (c - rc - r + rr - 2.5) ** 2),
    "hinge": ({"dpo_beta": 0.3}, lambda c, r, rc, rr, n, m: torch.relu(1 - 0.3 * (c - rc - r + rr))),
    "sigmoid_norm": ({}, lambda c, r, rc, rr, n, m: minus_log_sigmoid(5 * ((c - rc) / n - (r - rr) / m))),
    "apo_zero": (
        {},
        lambda c, r, rc, rr, n, m: 1 - torch.sigmoid(0.1 * (c - rc)) + torch.sigmoid(0.1 * (r - rr)),
    ),
    "apo_down": (
        {},
        lambda c, r, rc, rr, n, m: torch.sigmoid(0.1 * (c - rc)) + 1 - torch.sigmoid(0.1 * (c - rc - r + rr)),
    ),
    "sppo": ({"dpo_beta": 0.5}, lambda c, r, rc, rr, n, m: (c - rc - 1) ** 2 + (r - rr + 1) ** 2),
    "bco": (
        {},
        lambda c, r, rc, rr, n, m: minus_log_sigmoid(0.1 * (c - rc) - 0.3) + minus_log_sigmoid(0.3 - 0.1 * (r - rr)),
    ),
    "cpo": (
        {"sft_coef": 1.0},
        lambda c, r, rc, rr, n, m: minus_log_sigmoid(0.1 * (c - r)) - c / n,
    ),
    "orpo": ({}, lambda c, r, rc, rr, n, m: -c / n + 0.1 * minus_log_sigmoid(log_odds(c / n) - log_odds(r / m))),
    "simpo": ({}, lambda c, r, rc, rr, n, m: minus_log_sigmoid(2 * (c / n - r / m) - 0.5)),
}  # fmt: skip


def step(
    policy_folder: Path, reference_folder: Path, comparisons: Sequence[Comparison], tmp_path: Path, **options: Any
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """(metrics, minus the change of transformers' weights)."""
    config = Config(init_from="", data="x", num_steps=1, optimizer=SGD, **options)
    policy = load_model(policy_folder, dtype=torch.float64)
    reference = load_model(reference_folder, dtype=torch.float64, frozen=True)
    tokenizer = Tokenizer.load(reference_folder)
    lenders = mismatched(comparisons, max_tokens=100) if config.loss == "kto" else []
    actors = Actors(
        policy=policy,
        reference=LiveReference(reference, config) if config.needs_reference else None,
        tokenizer=tokenizer,
        optimizer=SGD.build(policy.named_parameters()),
        engine=Engine(policy, tokenizer),
        reward=None,
        prompt_ids={},
        lenders={lent.where: lent for lent in lenders},
        bco_shift=0.3 if config.loss == "bco" else 0.0,
    )
    before = AutoModelForCausalLM.from_pretrained(policy_folder, dtype=torch.float64).state_dict()
    metrics = dpo_step(actors, comparisons, config, lr=SGD.lr)
    save_model(policy, tmp_path / "after")
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "after", dtype=torch.float64).state_dict()
    return metrics, {name: before[name] - after[name] for name in before}


def read(folder: Path, tmp_path: Path, rows: Sequence[dict[str, Any]]) -> list[Comparison]:
    source = load_rows(write(tmp_path / "rows.jsonl", rows))
    accepted = ("prompt/chosen/rejected", "prompt/completions/ranks", "prompt/completion/label")
    return list(comparisons_from_rows(source, Tokenizer.load(folder), accepted=accepted, max_length=100))


def check(theirs: Any, total: Tensor, metrics: dict[str, float], moved: dict[str, Tensor]) -> None:
    total.backward()
    assert metrics["loss"] == pytest.approx(total.item(), rel=1e-5)  # transformers' norms are float32
    for name, parameter in theirs.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.any()), name
        scale = float(parameter.grad.abs().max())
        torch.testing.assert_close(
            moved[name], parameter.grad, rtol=1e-3, atol=1e-5 * scale, msg=lambda text, name=name: f"{name}: {text}"
        )


def models(policy_folder: Path, reference_folder: Path) -> tuple[Any, Any]:
    load = AutoModelForCausalLM.from_pretrained
    return load(policy_folder, dtype=torch.float64), load(reference_folder, dtype=torch.float64).requires_grad_(False)


@pytest.mark.parametrize("micro_batch_tokens", [1000, 30])
@pytest.mark.parametrize("name", sorted(PAIR_LOSSES))
def test_the_step_on_pairs(
    tiny_folder: Path, moved_folder: Path, tmp_path: Path, name: str, micro_batch_tokens: int
) -> None:
    options, formula = PAIR_LOSSES[name]
    comparisons = read(tiny_folder, tmp_path, PAIRS)
    metrics, moved = step(
        moved_folder, tiny_folder, comparisons, tmp_path,
        **{"loss": name, "micro_batch_tokens": micro_batch_tokens, "max_length": 28, **options},
    )  # fmt: skip
    theirs, reference = models(moved_folder, tiny_folder)
    total = torch.zeros((), dtype=torch.float64)
    for comparison in comparisons:
        answers = [answer.token_ids for answer in comparison.answers]
        c, r = (row_logprob(theirs, comparison.prompt_ids, answer) for answer in answers)
        rc, rr = (row_logprob(reference, comparison.prompt_ids, answer) for answer in answers)
        total = total + comparison.weight * formula(c, r, rc, rr, *map(len, answers)) / len(comparisons)
    check(theirs, total, metrics, moved)


def test_the_step_on_a_ranking_averages_its_pairs_and_skips_ties(
    tiny_folder: Path, moved_folder: Path, tmp_path: Path
) -> None:
    [ranking] = comparisons = read(tiny_folder, tmp_path, RANKING)
    metrics, moved = step(moved_folder, tiny_folder, comparisons, tmp_path)
    theirs, reference = models(moved_folder, tiny_folder)
    h = [
        row_logprob(theirs, ranking.prompt_ids, answer.token_ids)
        - row_logprob(reference, ranking.prompt_ids, answer.token_ids)
        for answer in ranking.answers
    ]
    pairs = [(0, 1), (0, 2), (0, 3), (1, 3), (2, 3)]  # 1 and 2 tie
    check(theirs, sum(minus_log_sigmoid(0.1 * (h[i] - h[j])) for i, j in pairs) / 5, metrics, moved)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(("name", "rows"), [("kto", "singles"), ("kto", "pairs"), ("bco", "singles")])
def test_the_step_on_single_answers(
    tiny_folder: Path, moved_folder: Path, tmp_path: Path, name: str, rows: str
) -> None:
    data = SINGLES if rows == "singles" else [{**row, "weight": 1.0} for row in PAIRS]
    comparisons = read(tiny_folder, tmp_path, data)
    options = {"desirable_weight": 1.3, "undesirable_weight": 0.7} if name == "kto" else {}
    metrics, moved = step(moved_folder, tiny_folder, comparisons, tmp_path, loss=name, **options)
    theirs, reference = models(moved_folder, tiny_folder)

    def logratio(prompt: Sequence[int], answer: Sequence[int]) -> Tensor:
        return row_logprob(theirs, prompt, answer) - row_logprob(reference, prompt, answer)

    # The next comparison with another prompt lends its (best) answer.
    lent = []
    for place, comparison in enumerate(comparisons):
        rest = [*comparisons[place + 1 :], *comparisons[:place]]
        other = next(other for other in rest if other.prompt_ids != comparison.prompt_ids)
        lent.append(logratio(comparison.prompt_ids, other.answers[0].token_ids).item())
    z = max(0.0, float(np.mean(lent)))
    total, count = torch.zeros((), dtype=torch.float64), 0
    for comparison in comparisons:
        labels = [comparison.label] if rows == "singles" else [True, False]
        for answer, is_good in zip(comparison.answers, labels, strict=True):
            h = logratio(comparison.prompt_ids, answer.token_ids)
            sign = 1 if is_good else -1
            if name == "kto":
                total = total + (1.3 if is_good else 0.7) * (1 - torch.sigmoid(sign * 0.1 * (h - z)))
            else:
                total = total + minus_log_sigmoid(sign * (0.1 * h - 0.3))
            count += 1
    check(theirs, total / count, metrics, moved)
    if name == "kto":
        assert metrics["kto_baseline"] == pytest.approx(z, rel=1e-5)


@pytest.mark.parametrize(
    ("loss", "options", "expected"),
    [
        ("sigmoid", {}, math.log(2)), ("ipo", {}, 25.0), ("hinge", {}, 1.0), ("kto", {}, 0.5), ("apo_zero", {}, 1.0),
        ("bco", {}, 2 * math.log(2)), ("sigmoid", {"flip_probability": 0.1}, math.log(2)),
    ],
)  # fmt: skip
def test_a_run_starts_where_the_policy_is_its_reference_and_asks_it_once(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: Any, options: Any, expected: float
) -> None:
    calls = []
    real = begin.load_model
    monkeypatch.setattr(begin, "load_model", lambda *args, **kwargs: calls.append(args) or real(*args, **kwargs))
    config = Config(
        init_from=str(tiny_folder),
        data=write(tmp_path / "pairs.jsonl", [{**row, "weight": 1.0} for row in PAIRS]),
        num_steps=4,
        batch_size=2,
        loss=loss,
        optimizer=OptimizerConfig(lr=1e-3),
        save_every=2,
        dtype="float32",
        **options,
    )
    run = dpo.train(config, name="run", runs_dir=tmp_path, resume=False)
    lines = list(read_lines(run / "metrics.jsonl"))
    assert lines[0]["loss"] == pytest.approx(expected, abs=1e-4)
    assert lines[-1]["loss"] != pytest.approx(expected, abs=1e-4)
    assert len(calls) == 1, "the reference was loaded beside the policy"
    assert (run / CACHE).is_file()
