"""Rewards for being sure against torch's own entropy and KL, over whole logits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from strop.models import load_model
from strop.models.decoder import Decoder
from strop.objectives.logprobs import linear_self_certainty
from strop.rollouts.confidence import ConfidenceReward
from strop.types import Completion, PackedBatch, Segment, Task


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_self_certainty_is_the_kl_from_uniform(temperature: float, softcap: float | None) -> None:
    draw = torch.Generator().manual_seed(0)
    hidden_RD, weight_VD, bias_V = (torch.randn(*shape, generator=draw) for shape in ((9, 6), (50, 6), (50,)))
    logits_RV = hidden_RD @ weight_VD.T + bias_V
    logits_RV = logits_RV if softcap is None else softcap * (logits_RV / softcap).tanh()
    log_p_RV = (logits_RV / temperature).log_softmax(-1)
    uniform_RV = torch.full_like(log_p_RV, 1 / 50)
    expected_R = F.kl_div(log_p_RV, uniform_RV, reduction="none").sum(-1)
    found_R = linear_self_certainty(
        hidden_RD, weight_VD, temperature=temperature, bias_V=bias_V, softcap=softcap, chunk_size=4
    )
    torch.testing.assert_close(found_R, expected_R, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(linear_self_certainty(torch.zeros(2, 6), weight_VD), torch.zeros(2), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["entropy", "self_certainty"])
@pytest.mark.parametrize("max_tokens", [1000, 6])
def test_a_completions_reward_is_the_mean_over_its_own_tokens(tiny_folder: Path, kind: str, max_tokens: int) -> None:
    """Each row alone, without packing, through torch.distributions; the order of rows and tasks is kept."""
    model = load_model(tiny_folder, dtype=torch.float32)
    assert isinstance(model, Decoder)
    prompts = {"a": (5, 6, 7), "b": (9, 3)}
    rows = [("a", (8, 2)), ("a", (9, 9, 2)), ("b", (4,)), ("b", (11, 12, 13, 14))]
    reward = ConfidenceReward(model, prompts, kind=kind, temperature=0.8, micro_batch_tokens=max_tokens)  # type: ignore[arg-type]
    verdicts = reward.score(
        [Task(id=name, prompt="?") for name, _ in rows],
        [
            Completion(token_ids=ids, sampling_logprobs=(-1.0,) * len(ids), finish_reason="stop", text="")
            for _, ids in rows
        ],
    )
    for (name, ids), verdict in zip(rows, verdicts, strict=True):
        tokens = torch.tensor([*prompts[name], *ids[:-1]])
        batch = PackedBatch(
            token_ids_T=tokens,
            labels_T=tokens,
            loss_mask_T=torch.ones_like(tokens, dtype=torch.bool),
            segments=(Segment(trunk=len(tokens)),),
        )
        with torch.no_grad():
            logits_TV = model.logits(model.hidden(batch))[len(prompts[name]) - 1 :] / 0.8
        law = torch.distributions.Categorical(logits=logits_TV)
        uniform = torch.distributions.Categorical(logits=torch.zeros_like(logits_TV))
        expected = -law.entropy() if kind == "entropy" else torch.distributions.kl_divergence(uniform, law)
        assert verdict.score == pytest.approx(float(expected.mean()), abs=1e-4), (name, ids)
