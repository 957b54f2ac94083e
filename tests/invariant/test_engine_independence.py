"""A completion depends on its request and on nothing else: neighbours, slots, order, or what ran before."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from strop.generation import Engine
from strop.generation.run import PREFILL_TOKENS
from strop.models.cache import BLOCK, KVCache
from strop.models.config import ModelConfig
from strop.models.decoder import Decoder, init_model
from strop.tokenizer import Tokenizer, train_bpe
from strop.types import Completion, Request, SamplingParams

CONFIG = ModelConfig(
    vocab_size=300,
    hidden_size=32,
    intermediate_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_position_embeddings=4096,
)


class CountingDecoder(Decoder):
    """Ours, and how many prompts and tokens each prefill had."""

    prefills: list[list[int]]

    def prefill(
        self,
        prompts: Sequence[Sequence[int]],
        cache: KVCache,
        slots: Sequence[int],
        starts: Sequence[int] | None = None,
    ) -> torch.Tensor:
        self.prefills.append([len(prompt) for prompt in prompts])
        return super().prefill(prompts, cache, slots, starts)


@pytest.fixture
def model() -> CountingDecoder:
    return make_model(seed=0)


def make_model(*, seed: int) -> CountingDecoder:
    model = CountingDecoder(CONFIG)
    model.load_state_dict(init_model(CONFIG, seed=seed).state_dict())
    model.prefills = []
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)  # far from uniform, so that context decides
    return model


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(["the cat sat on the mat"], 290)


def width(engine: Engine) -> int:
    """How many positions of each slot a decode step reads."""
    assert isinstance(engine._cache, KVCache)
    return engine._cache.keys.shape[3]


def mixed_requests() -> list[Request]:
    stops = (3, 4, *range(50, 62))
    return [
        Request(
            prompt_ids=tuple((7 * index + 3 * place) % 300 for place in range(1 + 5 * index % 13)),
            sampling=SamplingParams(
                max_new_tokens=(60, 4, 21)[index % 3],
                temperature=(1.0, 0.8)[index % 2],
                top_k=(0, 50)[index // 4 % 2],
                stop_token_ids=stops,
            ),
            num_samples=1 + index % 4,
            seed=1000 + index,
        )
        for index in range(9)
    ]


def assert_same(actual: list[list[Completion]], expected: list[list[Completion]]) -> None:
    """Token for token; logprobs up to the rounding of kernels for other batch sizes."""
    assert [[c.token_ids for c in group] for group in actual] == [[c.token_ids for c in group] for group in expected]
    for mine, theirs in zip(actual, expected, strict=True):
        for one, other in zip(mine, theirs, strict=True):
            assert (one.text, one.finish_reason) == (other.text, other.finish_reason)
            assert one.sampling_logprobs == pytest.approx(other.sampling_logprobs, abs=2e-5)


def test_neighbours_slots_and_order_do_not_matter(model: CountingDecoder, tokenizer: Tokenizer) -> None:
    requests = mixed_requests()
    alone = [Engine(model, tokenizer).generate([request])[0] for request in requests]
    assert {completion.finish_reason for group in alone for completion in group} == {"stop", "length"}
    assert len({completion.token_ids for group in alone for completion in group}) == sum(map(len, alone))
    for num_slots in (1, 3, 64):
        assert_same(Engine(model, tokenizer, num_slots=num_slots).generate(requests), alone)
    assert_same(Engine(model, tokenizer, num_slots=5).generate(requests[::-1])[::-1], alone)


def test_a_sample_depends_on_its_index_and_seed_only(model: CountingDecoder, tokenizer: Tokenizer) -> None:
    """The first samples of a larger group are the smaller group; another seed gives others; a longer one goes on."""
    engine = Engine(model, tokenizer)

    def run(num_samples: int, seed: int, max_new_tokens: int) -> list[tuple[int, ...]]:
        sampling = SamplingParams(max_new_tokens=max_new_tokens)
        request = Request(prompt_ids=(1, 2, 3), sampling=sampling, num_samples=num_samples, seed=seed)
        return [completion.token_ids for completion in engine.generate([request])[0]]

    assert run(8, 5, 10)[:3] == run(3, 5, 10)
    assert [tokens[:10] for tokens in run(3, 5, 30)] == run(3, 5, 10)
    assert not set(run(8, 5, 10)) & set(run(8, 6, 10))


def test_the_same_call_gives_the_same_bits(model: CountingDecoder, tokenizer: Tokenizer) -> None:
    engine = Engine(model, tokenizer, num_slots=4)
    first = engine.generate(mixed_requests())
    assert engine.generate(mixed_requests()) == first
    assert Engine(model.to(torch.bfloat16), tokenizer, num_slots=4).generate(mixed_requests()) == Engine(
        model, tokenizer, num_slots=4
    ).generate(mixed_requests())


def test_a_call_sees_nothing_of_earlier_weights_and_prompts(model: CountingDecoder, tokenizer: Tokenizer) -> None:
    requests = mixed_requests()
    engine = Engine(model, tokenizer, num_slots=4)
    long = Request(prompt_ids=tuple(range(200)), sampling=SamplingParams(max_new_tokens=30), num_samples=6)
    engine.generate([long])
    other = make_model(seed=1)
    model.load_state_dict(other.state_dict())
    assert_same(engine.generate(requests), Engine(other, tokenizer, num_slots=4).generate(requests))


def test_an_interrupted_call_leaves_nothing_behind(model: CountingDecoder, tokenizer: Tokenizer) -> None:
    engine = Engine(model, tokenizer, num_slots=4)
    requests = [Request(prompt_ids=(1, 2), sampling=SamplingParams(max_new_tokens=5))]
    before = engine.generate(requests)
    long = Request(prompt_ids=tuple(range(200)), sampling=SamplingParams(max_new_tokens=30), num_samples=6)
    calls = 0

    def interrupt(request_index: int, sample_index: int, token_id: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 4 * 29 + 1:  # every slot is filled to its end
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.generate([long], on_token=interrupt)
    widths = []
    assert_same(engine.generate(requests, on_token=lambda *_: widths.append(width(engine))), before)
    assert set(widths) == {BLOCK}  # its long sequences are not dragged along


@pytest.mark.parametrize("num_slots", [1, 3, 8, 32])
def test_a_group_shares_one_prefill(model: CountingDecoder, tokenizer: Tokenizer, num_slots: int) -> None:
    """However many slots there are, and though the samples of a group start at different times."""
    engine = Engine(model, tokenizer, num_slots=num_slots)
    requests = mixed_requests()
    groups = engine.generate(requests)
    prompt_lengths = [len(request.prompt_ids) for request in requests]
    assert [length for prefill in model.prefills for length in prefill] == prompt_lengths
    assert len(model.prefills) == -(-len(requests) // max(1, num_slots // 4))
    lengths = [len(completion.token_ids) for group in groups for completion in group]
    stats = engine.stats
    assert stats.prefill_tokens == sum(prompt_lengths)
    assert stats.completion_tokens == sum(lengths)
    # The first token comes from the prompt, and no slot decodes for a finished sample.
    assert stats.decode_tokens == sum(length - 1 for length in lengths)
    if num_slots == 32:
        assert stats.decode_steps == max(lengths) - 1


def test_a_prefill_keeps_to_its_token_budget(model: CountingDecoder, tokenizer: Tokenizer) -> None:
    lengths = [PREFILL_TOKENS // 2, PREFILL_TOKENS // 2, 1, PREFILL_TOKENS + 100, 5, 5]
    requests = [
        Request(prompt_ids=tuple(i % 300 for i in range(length)), sampling=SamplingParams(max_new_tokens=2))
        for length in lengths
    ]
    Engine(model, tokenizer, num_slots=48).generate(requests)
    assert model.prefills == [[512, 512], [1], [PREFILL_TOKENS + 100], [5, 5]]


def test_a_long_queue_runs_through_few_slots(model: CountingDecoder, tokenizer: Tokenizer) -> None:
    engine = Engine(model, tokenizer, num_slots=6)
    sampling = SamplingParams(max_new_tokens=8, stop_token_ids=tuple(range(60)))
    requests = [
        Request(prompt_ids=(index % 300, index % 7), sampling=sampling, num_samples=3, seed=index)
        for index in range(60)
    ]
    finished: dict[tuple[int, int], Completion] = {}
    tokens: dict[tuple[int, int], list[int]] = {}

    def on_finished(request_index: int, sample_index: int, completion: Completion) -> None:
        assert (request_index, sample_index) not in finished
        assert tokens[request_index, sample_index] == list(completion.token_ids)
        finished[request_index, sample_index] = completion

    def on_token(request_index: int, sample_index: int, token_id: int) -> None:
        tokens.setdefault((request_index, sample_index), []).append(token_id)

    groups = engine.generate(requests, on_finished=on_finished, on_token=on_token)
    assert [[finished[index, k] for k in range(3)] for index in range(60)] == groups
    assert len(finished) == 180
    # Slots are refilled at once: nearly every step gives a token to each.
    assert engine.stats.completion_tokens > 0.95 * 6 * engine.stats.decode_steps
    assert_same(groups[50:], Engine(model, tokenizer).generate(requests[50:]))


def test_memory_follows_the_requests_and_is_reused(model: CountingDecoder, tokenizer: Tokenizer) -> None:
    made: list[tuple[int, int]] = []
    original = model.new_cache

    def counting(*, num_slots: int, max_length: int) -> KVCache:
        made.append((num_slots, max_length))
        return original(num_slots=num_slots, max_length=max_length)

    model.new_cache = counting  # type: ignore[method-assign]
    engine = Engine(model, tokenizer, num_slots=16)

    def run(num_prompt: int, max_new_tokens: int, num_requests: int) -> None:
        request = Request(prompt_ids=(1,) * num_prompt, sampling=SamplingParams(max_new_tokens=max_new_tokens))
        engine.generate([request] * num_requests)

    run(10, 6, 3)
    run(4, 12, 2)
    assert made == [(6, 15)]
    run(10, 7, 3)
    run(10, 7, 100)
    assert made == [(6, 15), (6, 16), (20, 16)]


def test_the_cache_is_no_wider_than_what_runs_needs(model: CountingDecoder, tokenizer: Tokenizer) -> None:
    """A long prompt, once its samples have ended, does not slow down the short ones that come after it."""
    engine = Engine(model, tokenizer, num_slots=16)
    requests = [
        Request(prompt_ids=(1,) * num_prompt, sampling=SamplingParams(max_new_tokens=max_new_tokens))
        for num_prompt, max_new_tokens in ((10, 2), (300, 2), (5, 40))
    ]
    widths = []
    engine.generate(requests, on_token=lambda *_: widths.append(width(engine)))
    assert (max(widths), widths[-1]) == (320, 64)
