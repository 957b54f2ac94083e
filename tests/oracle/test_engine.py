"""The engine against the naive oracle, transformers.generate and teacher forcing."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from strop.generation import Engine, naive_generate
from strop.models.interface import CausalLM
from strop.models.loading import load_model
from strop.tokenizer import Tokenizer, train_bpe
from strop.types import Completion, PackedBatch, Request, SamplingParams, Segment

VOCAB = 300
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,  # far from uniform, so that context decides
    "rms_norm_eps": 1e-5,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
PROMPTS = [(5, 6, 7), (9,), tuple(range(20, 61)), (5, 6, 7), (250, 3), tuple(range(100, 117))]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(["the cat sat on the mat, and the dog sat on the cat. é😀"] * 3, 290)


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, CausalLM]:
    """The same random weights as a transformers model and as ours."""
    torch.manual_seed(0)
    if request.param == "llama":
        theirs = LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=True))
    else:
        theirs = Qwen3ForCausalLM(Qwen3Config(**SHAPE, tie_word_embeddings=False))
    folder = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(folder)
    return theirs.eval(), load_model(folder)


def assert_same(actual: list[Completion], expected: list[Completion]) -> None:
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.token_ids == theirs.token_ids
        assert (ours.finish_reason, ours.text) == (theirs.finish_reason, theirs.text)
        assert ours.sampling_logprobs == pytest.approx(theirs.sampling_logprobs, abs=1e-5)


def test_greedy_is_transformers_generate_and_naive(
    pair: tuple[PreTrainedModel, CausalLM], tokenizer: Tokenizer
) -> None:
    theirs, ours = pair
    greedy = SamplingParams(temperature=0, max_new_tokens=40)
    requests = [Request(prompt_ids=prompt, sampling=greedy) for prompt in PROMPTS]
    groups = Engine(ours, tokenizer, num_slots=4).generate(requests)
    for request, group in zip(requests, groups, strict=True):
        prompt = torch.tensor([request.prompt_ids])
        expected = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=40)
        assert group[0].token_ids == tuple(expected[0, prompt.shape[1] :].tolist())
        assert group[0].sampling_logprobs == (0.0,) * 40
    assert len({group[0].token_ids[-5:] for group in groups}) > 2  # the weights do not make every prompt end alike
    for index in (0, 2):
        assert_same(groups[index], naive_generate(ours, tokenizer, requests[index]))


def test_sampled_tokens_are_those_of_the_naive_engine(
    pair: tuple[PreTrainedModel, CausalLM], tokenizer: Tokenizer
) -> None:
    """Every filter and kind of stop at once in one batch: ragged prompts, groups, refilled slots."""
    _, model = pair
    params = [
        SamplingParams(max_new_tokens=24),
        SamplingParams(max_new_tokens=1),
        SamplingParams(max_new_tokens=13, temperature=0.7, top_p=0.9),
        SamplingParams(max_new_tokens=20, temperature=1.3, top_k=30, stop_token_ids=(11, 12, *range(40, 60))),
        SamplingParams(max_new_tokens=9, min_p=0.05, stop=("t", "é")),
        SamplingParams(max_new_tokens=17, temperature=0),
    ]
    requests = [
        Request(prompt_ids=prompt, sampling=sampling, num_samples=1 + index % 3, seed=index * 101)
        for index, (prompt, sampling) in enumerate(zip(PROMPTS, params, strict=True))
    ]
    groups = Engine(model, tokenizer, num_slots=5).generate(requests)
    for request, group in zip(requests, groups, strict=True):
        assert_same(group, naive_generate(model, tokenizer, request))
    assert {completion.finish_reason for group in groups for completion in group} == {"stop", "length"}


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_from_the_cache_are_the_teacher_forced_ones(
    pair: tuple[PreTrainedModel, CausalLM], tokenizer: Tokenizer, temperature: float
) -> None:
    """A ragged batch, whose sequences cross the cache's growth steps, scored by one packed forward pass of trees."""
    _, model = pair
    requests = [
        Request(
            prompt_ids=prompt,
            sampling=SamplingParams(max_new_tokens=15 + 14 * index, temperature=temperature, stop_token_ids=(7, 8)),
            num_samples=3,
            seed=index,
        )
        for index, prompt in enumerate(PROMPTS)
    ]
    groups = Engine(model, tokenizer, num_slots=7).generate(requests)
    for request, group in zip(requests, groups, strict=True):
        *trunk, last = request.prompt_ids
        token_ids = [*trunk, *(t for completion in group for t in (last, *completion.token_ids[:-1]))]
        labels = [0] * len(trunk) + [t for completion in group for t in completion.token_ids]
        batch = PackedBatch(
            token_ids_T=torch.tensor(token_ids),
            labels_T=torch.tensor(labels),
            loss_mask_T=torch.arange(len(labels)) >= len(trunk),
            segments=(Segment(trunk=len(trunk), branches=tuple(len(c.token_ids) for c in group)),),
        )
        with torch.no_grad():
            logprobs_TV = (model.logits(model.hidden(batch)) / temperature).double().log_softmax(-1)
        expected = logprobs_TV.gather(1, batch.labels_T[:, None])[len(trunk) :, 0]
        actual = torch.tensor([logprob for completion in group for logprob in completion.sampling_logprobs])
        torch.testing.assert_close(actual.double(), expected, rtol=0, atol=1e-5)
