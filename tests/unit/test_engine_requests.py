"""Stops, limits and bad requests."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from strop.generation import Engine, naive_generate
from strop.generation.rows import StopWatch
from strop.models.config import ModelConfig
from strop.models.decoder import Decoder, init_model
from strop.tokenizer import Tokenizer, train_bpe
from strop.types import Request, SamplingParams

CONFIG = ModelConfig(
    vocab_size=290,
    hidden_size=32,
    intermediate_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_position_embeddings=100,
)
REQUEST = Request(prompt_ids=(1, 2, 3), sampling=SamplingParams(max_new_tokens=40), num_samples=4, seed=3)


@pytest.fixture(scope="module")
def model() -> Decoder:
    return init_model(CONFIG, seed=0)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Ids 0 to 2 are special, most of the others single bytes."""
    return train_bpe(["the cat sat on the mat"], 270)


def with_sampling(**changes: object) -> Request:
    return replace(REQUEST, sampling=replace(REQUEST.sampling, **changes))  # type: ignore[arg-type]


def test_a_stop_token_is_kept_with_its_logprob_and_not_in_the_text(model: Decoder, tokenizer: Tokenizer) -> None:
    engine = Engine(model, tokenizer)
    free = engine.generate([REQUEST])[0]
    stop = free[1].token_ids[17]
    stopped = engine.generate([with_sampling(stop_token_ids=(299, stop, 0))])[0]
    for before, after in zip(free, stopped, strict=True):
        ends = [before.token_ids.index(token) for token in (stop, 0) if token in before.token_ids]
        length = min(ends) + 1 if ends else 40
        assert after.token_ids == before.token_ids[:length]
        assert after.sampling_logprobs == pytest.approx(before.sampling_logprobs[:length], abs=1e-5)
        assert after.finish_reason == ("stop" if ends else "length")
        assert after.text == tokenizer.decode(before.token_ids[: length - 1] if ends else before.token_ids)
    assert len(stopped[1].token_ids) <= 18


def test_a_stop_token_at_the_last_place_counts_as_stop(model: Decoder, tokenizer: Tokenizer) -> None:
    engine = Engine(model, tokenizer)
    token_ids = engine.generate([REQUEST])[0][0].token_ids
    length = token_ids.index(token_ids[5]) + 1
    for stop_token_ids, finish_reason in (((token_ids[5],), "stop"), ((), "length")):
        request = with_sampling(max_new_tokens=length, stop_token_ids=stop_token_ids)
        completion = engine.generate([request])[0][0]
        assert (completion.token_ids, completion.finish_reason) == (token_ids[:length], finish_reason)


def test_a_stop_string_cuts_the_text_and_keeps_the_tokens(model: Decoder, tokenizer: Tokenizer) -> None:
    """Stop strings taken from what is sampled without them: each spans several single-byte tokens."""
    engine = Engine(model, tokenizer)
    free = engine.generate([REQUEST])[0]
    checked = 0
    for completion in free:
        for start in range(3, 30, 2):
            stop = completion.text[start : start + 3]
            if "\ufffd" in stop:
                continue
            request = with_sampling(stop=("never seen", stop))
            group = engine.generate([request])[0]
            for cut, whole in zip(group, free, strict=True):
                assert cut.text == whole.text.split(stop)[0]
                assert cut.token_ids == whole.token_ids[: len(cut.token_ids)]
                assert cut.finish_reason == ("stop" if stop in whole.text else "length")
                assert (stop in tokenizer.decode(cut.token_ids)) == (stop in whole.text)
                assert stop not in tokenizer.decode(cut.token_ids[:-1])
            checked += 1
    assert checked > 8
    request = with_sampling(stop=(free[0].text[4:6], free[1].text[2:4], "a"), stop_token_ids=(70, 80))
    expected = naive_generate(model, tokenizer, request)
    actual = engine.generate([request])[0]
    assert [(c.text, c.token_ids) for c in actual] == [(c.text, c.token_ids) for c in expected]


@pytest.mark.parametrize(
    ("stop", "text", "fires_after"),
    [
        (("😀",), "a 😀!", "a 😀"),  # four tokens, none of them a character
        (("é 😀 t",), "thé 😀 the cat", "thé 😀 t"),
        (("cat.", "at sat"), "the cat sat", "the cat sat"),
        (("aab",), "aaaab", "aaaab"),  # the beginning of a match may itself be given up
        (("t",), "the cat", "t"),
        (("dog", "zz"), "the cat sat", None),
    ],
)
def test_stop_strings_are_seen_with_their_last_byte(stop: tuple[str, ...], text: str, fires_after: str | None) -> None:
    tokenizer = train_bpe(["no merges"], 259)  # one token per byte
    token_ids = tokenizer.encode(text)
    assert len(token_ids) == len(text.encode())
    watch = StopWatch(tokenizer, stop)
    fired = [watch.push(token) for token in token_ids]
    assert (fired.index(True) + 1 if True in fired else None) == (fires_after and len(fires_after.encode()))


def test_generation_takes_no_gradient_and_leaves_the_weights(model: Decoder, tokenizer: Tokenizer) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    Engine(model, tokenizer).generate([REQUEST])
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_no_request_no_work(model: Decoder, tokenizer: Tokenizer) -> None:
    assert Engine(model, tokenizer).generate([]) == []


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (replace(REQUEST, prompt_ids=()), "request 1: the prompt is empty"),
        (
            replace(REQUEST, prompt_ids=(1,) * 61),
            "request 1: a prompt of 61 tokens and max_new_tokens=40 .* 100 tokens",
        ),
        (replace(REQUEST, prompt_ids=(1, 290)), "request 1: .* outside the model's vocabulary of 290"),
        (replace(REQUEST, prompt_ids=(-1,)), "request 1: .* outside the model's vocabulary of 290"),
        (replace(REQUEST, num_samples=0), "request 1: num_samples=0 must be at least 1"),
        (with_sampling(max_new_tokens=0), "request 1: max_new_tokens=0 must be at least 1"),
        (with_sampling(temperature=-0.1), "request 1: temperature=-0.1 must be 0"),
        (with_sampling(temperature=math.nan), "request 1: temperature=nan must be 0"),
        (with_sampling(top_p=0.0), "request 1: top_p=0.0 must be above 0"),
        (with_sampling(top_k=-1), "request 1: top_k=-1 must be 0"),
        (with_sampling(min_p=1.5), "request 1: min_p=1.5 must be from 0 to 1"),
        (with_sampling(stop=("a", "")), "request 1: a stop string must not be empty"),
    ],
)
def test_a_bad_request_is_named_before_any_work(
    model: Decoder, tokenizer: Tokenizer, request_: Request, message: str
) -> None:
    engine = Engine(model, tokenizer)
    with pytest.raises(ValueError, match=message):
        engine.generate([REQUEST, request_])
    assert engine.stats.prefill_tokens == 0


def test_a_sequence_may_fill_the_model_to_the_last_position(model: Decoder, tokenizer: Tokenizer) -> None:
    request = replace(REQUEST, prompt_ids=(1,) * 60)
    completion = Engine(model, tokenizer).generate([request])[0][0]
    assert len(completion.token_ids) == 40
    with pytest.raises(ValueError, match="request 0: a prompt of 60 tokens and max_new_tokens=40 exceed the 99"):
        Engine(model, tokenizer, max_length=99).generate([request])


def test_an_engine_that_cannot_be_is_refused(model: Decoder, tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="max_length=101 exceeds the model's 100 positions"):
        Engine(model, tokenizer, max_length=101)
    with pytest.raises(ValueError, match="num_slots=0"):
        Engine(model, tokenizer, num_slots=0)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_damaged_weights_are_an_error_not_a_completion(tokenizer: Tokenizer, temperature: float) -> None:
    model = init_model(CONFIG, seed=0)
    with torch.no_grad():
        model.embedding.weight[50] = math.nan
    good = with_sampling(temperature=temperature, max_new_tokens=1)
    with pytest.raises(FloatingPointError, match="request 0: the model's logits are not finite"):
        Engine(model, tokenizer).generate([good])
