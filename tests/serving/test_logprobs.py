"""Logprobs over HTTP, as lm-eval's local-completions asks for them, against transformers in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM


def test_echoed_logprobs_are_those_of_transformers(server: Any, tiny_folder: Path) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 300, (length,), generator=generator).tolist() for length in (2, 17, 40, 99, 5)]
    answer = server.client().completions.create(
        model="tiny", prompt=prompts, echo=True, logprobs=1, max_tokens=1, temperature=0, seed=1234
    )
    for prompt, choice in zip(prompts, sorted(answer.choices, key=lambda one: one.index), strict=True):
        with torch.no_grad():
            laws = theirs(torch.tensor([prompt])).logits[0].log_softmax(-1)
        expected = laws[:-1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0].tolist()
        logprobs: Any = choice.logprobs
        assert len(logprobs.token_logprobs) == len(prompt) + 1 and logprobs.token_logprobs[0] is None
        assert logprobs.token_logprobs[1:-1] == pytest.approx(expected, abs=1e-4)
        assert logprobs.token_logprobs[-1] == pytest.approx(float(laws[-1].max()), abs=1e-4)
        # How lm-eval tells whether greedy decoding would have said the same.
        for law, own, top in zip(laws, logprobs.token_logprobs[1:], logprobs.top_logprobs[1:], strict=True):
            assert max(top.values()) == pytest.approx(float(law.max()), abs=1e-4)
            assert max(top.values()) >= own


def test_streamed_echo_has_the_same_logprobs(server: Any) -> None:
    call: dict[str, Any] = {"model": "tiny", "prompt": "the quick é", "echo": True, "logprobs": 2, "seed": 1, "n": 2}
    whole = server.client().completions.create(**call, max_tokens=10)
    found: list[dict[str, Any]] = [{"text": "", "tokens": [], "logprobs": [], "offsets": []} for _ in range(2)]
    for chunk in server.client().completions.create(**call, max_tokens=10, stream=True):
        one, logprobs = found[chunk.choices[0].index], chunk.choices[0].logprobs
        one["text"] += chunk.choices[0].text
        if logprobs is not None:
            one["tokens"] += logprobs.tokens
            one["logprobs"] += logprobs.token_logprobs
            one["offsets"] += logprobs.text_offset
    for one, choice in zip(found, whole.choices, strict=True):
        logprobs: Any = choice.logprobs
        assert one["text"] == choice.text
        assert (one["tokens"], one["logprobs"]) == (logprobs.tokens, logprobs.token_logprobs)


def test_only_scoring_generates_nothing(server: Any) -> None:
    answer = server.client().completions.create(model="tiny", prompt=[5, 6, 7], echo=True, logprobs=0, max_tokens=0)
    logprobs: Any = answer.choices[0].logprobs
    assert len(logprobs.tokens) == 3 and answer.usage is not None and answer.usage.completion_tokens == 0
