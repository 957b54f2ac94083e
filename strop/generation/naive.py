"""The oracle of the engine: the whole sequence through the model for every token, the textbook sampler, no cache."""

from __future__ import annotations

import torch
from torch import Tensor

from strop.generation.sampler import sample_uniforms
from strop.models.interface import CausalLM
from strop.tokenizer import Tokenizer
from strop.types import Completion, PackedBatch, Request, SamplingParams, Segment, TokenLogprobs


@torch.no_grad()
def naive_generate(model: CausalLM, tokenizer: Tokenizer, request: Request) -> list[Completion]:
    """What Engine.generate must return for this request, O(length^2) per sample; for tests and for reading."""
    params = request.sampling
    completions = []
    for sample_index in range(request.num_samples):
        token_ids: list[int] = []
        logprobs: list[float] = []
        reports: list[TokenLogprobs] = []
        finish_reason, text = "length", ""
        for uniform in sample_uniforms(request.seed, sample_index, params.max_new_tokens):
            sequence_T = torch.tensor([*request.prompt_ids, *token_ids], device=model.device)
            batch = PackedBatch(
                token_ids_T=sequence_T,
                labels_T=sequence_T,
                loss_mask_T=torch.zeros_like(sequence_T, dtype=torch.bool),
                segments=(Segment(trunk=len(sequence_T)),),
            )
            logits_V = model.logits(model.hidden(batch)[-1]).double()
            law_V = naive_adjustments(logits_V, token_ids, params)
            probabilities_V = naive_distribution(law_V, params)
            cumulative_V = probabilities_V.cumsum(0)
            token = int(torch.searchsorted(cumulative_V, float(uniform) * cumulative_V[-1], right=True))
            token_ids.append(token)
            logprobs.append(float(probabilities_V[token].log()))
            if params.top_logprobs is not None:
                model_V = logits_V.log_softmax(0)
                likeliest = model_V.sort(descending=True, stable=True).indices[: params.top_logprobs].tolist()
                top = tuple((one, float(model_V[one])) for one in likeliest)
                reports.append(TokenLogprobs(token_id=token, logprob=float(model_V[token]), top=top))
            has_stop_token = token in params.stop_token_ids
            text = tokenizer.decode(token_ids[:-1] if has_stop_token else token_ids)
            cuts = [text.find(stop) for stop in params.stop if stop in text]
            if has_stop_token or cuts:
                finish_reason, text = "stop", text[: min(cuts, default=len(text))]
                break
        completions.append(
            Completion(
                token_ids=tuple(token_ids),
                sampling_logprobs=tuple(logprobs),
                finish_reason=finish_reason,
                text=text,
                token_logprobs=tuple(reports),
            )
        )
    return completions


def naive_adjustments(logits_V: Tensor, token_ids: list[int], params: SamplingParams) -> Tensor:
    """The logits after penalties for the tokens sampled so far, and bias."""
    logits_V = logits_V.clone()
    for token in set(token_ids):
        logits_V[token] -= params.presence_penalty + params.frequency_penalty * token_ids.count(token)
    for token, bias in params.logit_bias:
        logits_V[token] += bias
    return logits_V


def naive_distribution(logits_V: Tensor, params: SamplingParams) -> Tensor:
    """The law of the next token after temperature, top-k, top-p and min-p, float64, shape (V,), by sorting."""
    logits_V = logits_V.double()
    if params.temperature == 0:
        return torch.nn.functional.one_hot(logits_V.argmax(), logits_V.shape[0]).double()
    p_V = (logits_V / params.temperature).softmax(0)
    if params.top_k:
        p_V = p_V * (p_V >= p_V.sort(descending=True).values[: params.top_k][-1])
        p_V = p_V / p_V.sum()
    if params.top_p < 1:
        sorted_V = p_V.sort(descending=True).values
        is_kept_V = sorted_V.cumsum(0) - sorted_V < params.top_p
        p_V = p_V * (p_V >= sorted_V[is_kept_V][-1])
    p_V = p_V * (p_V >= params.min_p * p_V.max())
    return p_V / p_V.sum()
