"""The generation engine: many samples decode together, and a slot that finishes is refilled at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from strop.generation.rows import Rows
from strop.generation.sampler import RowParams, Sampler
from strop.models.interface import Cache, CausalLM
from strop.tokenizer import Tokenizer
from strop.types import Completion, Request

PREFILL_TOKENS = 1024
"""Prompts are prefilled together up to this many tokens: enough for fast matrices, and a bound on activations."""

OnFinished = Callable[[int, int, Completion], None]
"""(request_index, sample_index, completion)"""
OnToken = Callable[[int, int, int], None]
"""(request_index, sample_index, token_id)"""


@dataclass(slots=True, kw_only=True)
class EngineStats:
    """The work of one generate(). A sample's first token comes from its prompt; each other one costs a decode row."""

    prefill_tokens: int = 0
    decode_tokens: int = 0
    """Rows of all decode steps."""
    decode_steps: int = 0
    completion_tokens: int = 0
    prefill_seconds: float = 0.0
    """Prompts: running them, and copying them to the slots of their samples."""
    decode_seconds: float = 0.0
    sample_seconds: float = 0.0
    """LM head, sampler, and waiting for their result."""
    total_seconds: float = 0.0


class Engine:
    """Samples completions with continuous batching over a fixed number of cache slots.

    A completion is decided by its request alone: not by what runs beside it, by num_slots or by the order of requests.
    (Its uniforms come from the seed and the sample index. What remains is rounding: kernels may round a row differently
    in a batch of another size, which in bfloat16 can tip a token that lies on the edge. The same call gives the same
    bits.)

    Parameters are read live, so that a policy in training can be sampled at any moment; of the cache only the memory
    outlives a call.

    Example:
        engine = Engine(model, tokenizer)
        [[completion]] = engine.generate([Request(prompt_ids=(1, 42, 7), sampling=SamplingParams())])
    """

    def __init__(
        self, model: CausalLM, tokenizer: Tokenizer, *, num_slots: int = 32, max_length: int | None = None
    ) -> None:
        """max_length bounds prompt and completion together, in tokens; None means as many as the model has positions.

        The cache holds at most num_slots sequences, and num_slots / 4 prompts of which some samples still wait.
        """
        if num_slots < 1:
            raise ValueError(f"num_slots={num_slots}: at least one sequence must be able to run")
        limit = model.config.max_position_embeddings
        if max_length is not None and max_length > limit:
            raise ValueError(f"max_length={max_length} exceeds the model's {limit} positions")
        self.model = model
        self.tokenizer = tokenizer
        self.num_slots = num_slots
        self.max_length = limit if max_length is None else max_length
        self.stats = EngineStats()
        self.sampler = Sampler()
        self._cache: Cache | None = None
        self._cache_kind: tuple[torch.dtype, torch.device] | None = None

    @torch.inference_mode()
    def generate(
        self,
        requests: Sequence[Request],
        *,
        on_finished: OnFinished | None = None,
        on_token: OnToken | None = None,
    ) -> list[list[Completion]]:
        """The completions of every request: result[request_index][sample_index].

        on_finished is called as soon as a completion ends, in no fixed order; on_token for every token when sampled.

        Raises ValueError before any work, naming the request, for a prompt that is empty, not of this vocabulary, or
        too long for max_new_tokens to follow, and for sampling parameters out of range. Raises FloatingPointError when
        the model's logits are not finite.
        """
        for index, request in enumerate(requests):
            self._check(index, request)
        self.stats = EngineStats()
        if not requests:
            return []
        started = time.perf_counter()
        run = _Run(self, requests, on_finished, on_token)
        with self.model.decoding(run.max_rows):
            while run.is_unfinished:
                run.decode()
                run.refill()
                run.sample()
        self.stats.total_seconds = time.perf_counter() - started
        return [
            [run.finished[index, sample_index] for sample_index in range(request.num_samples)]
            for index, request in enumerate(requests)
        ]

    def release(self) -> None:
        """Give back the memory of the key-value cache until the next generate(): training wants it in between."""
        self._cache = None

    def cache_for(self, *, num_slots: int, max_length: int) -> Cache:
        """The cache of the last call if it is large enough, else a new one; every slot is free."""
        kind = (self.model.dtype, self.model.device)
        cache = self._cache
        if cache is None or kind != self._cache_kind or cache.num_slots < num_slots or cache.max_length < max_length:
            self._cache = cache = None  # the old one goes before the new one comes
            self._cache = cache = self.model.new_cache(num_slots=num_slots, max_length=max_length)
            self._cache_kind = kind
        cache.lengths_S.zero_()
        return cache

    def _check(self, index: int, request: Request) -> None:
        params, num_prompt = request.sampling, len(request.prompt_ids)
        vocab_size = self.model.config.vocab_size
        if not request.prompt_ids:
            raise ValueError(f"request {index}: the prompt is empty; give it at least one token (a BOS, say)")
        if min(request.prompt_ids) < 0 or max(request.prompt_ids) >= vocab_size:
            raise ValueError(f"request {index}: its prompt has an id outside the model's vocabulary of {vocab_size}")
        if num_prompt + params.max_new_tokens > self.max_length:
            raise ValueError(
                f"request {index}: a prompt of {num_prompt} tokens and max_new_tokens={params.max_new_tokens} exceed "
                f"the {self.max_length} tokens of a sequence; shorten the prompt or lower max_new_tokens"
            )
        requirements = {
            f"num_samples={request.num_samples} must be at least 1": request.num_samples >= 1,
            f"max_new_tokens={params.max_new_tokens} must be at least 1": params.max_new_tokens >= 1,
            f"temperature={params.temperature} must be 0 (greedy) or more": 0 <= params.temperature < float("inf"),
            f"top_p={params.top_p} must be above 0 and at most 1": 0 < params.top_p <= 1,
            f"top_k={params.top_k} must be 0 (all) or more": params.top_k >= 0,
            f"min_p={params.min_p} must be from 0 to 1": 0 <= params.min_p <= 1,
            "a stop string must not be empty": all(params.stop),
        }
        for message, is_met in requirements.items():
            if not is_met:
                raise ValueError(f"request {index}: {message}")


class _Run:
    """One call of generate: the samples that run (rows [0, n), cache slots [0, n)) and those that wait, in order.

    Prompts are prefilled into the slots behind the running ones, a few at a time, and copied from there for each sample
    that starts. Since samples start in order, all prompts of a batch are done with when the next batch is needed; so
    one prefill serves a group even if its samples start at different times, in memory that does not depend on how many
    requests there are.
    """

    def __init__(
        self, engine: Engine, requests: Sequence[Request], on_finished: OnFinished | None, on_token: OnToken | None
    ) -> None:
        self._model = engine.model
        self._sampler = engine.sampler
        self._stats = engine.stats
        self._requests = requests
        self._on_finished = on_finished
        self._on_token = on_token
        self._waiting = [(index, k) for index, request in enumerate(requests) for k in range(request.num_samples)]
        self._num_started = 0
        num_slots = min(engine.num_slots, len(self._waiting))
        num_prompts = min(max(1, engine.num_slots // 4), len(requests))
        self._prompt_slots = range(num_slots, num_slots + num_prompts)
        self._num_prefilled = 0
        self._prompts: dict[int, tuple[int, Tensor]] = {}  # request index -> cache slot, hidden state (1, D)
        self._cache = engine.cache_for(
            num_slots=num_slots + num_prompts,
            max_length=max(len(request.prompt_ids) + request.sampling.max_new_tokens - 1 for request in requests),
        )
        self._rows = Rows(engine.tokenizer, requests, num_slots)
        self._params: RowParams | None = None  # None once rows have ended; others only start where rows ended
        self._hidden: list[Tensor] = []  # (n, D) in all: what decides the next token of every running sample
        self.finished: dict[tuple[int, int], Completion] = {}

    @property
    def max_rows(self) -> int:
        """Samples that can run at the same time."""
        return self._rows.max_rows

    @property
    def is_unfinished(self) -> bool:
        return len(self.finished) < len(self._waiting)

    def decode(self) -> None:
        """Feed every running sample its last token."""
        self._hidden = []
        if not self._rows.num_rows:
            return
        started = time.perf_counter()
        tokens_S = torch.from_numpy(self._rows.last_tokens()).to(self._model.device)
        self._hidden.append(self._model.decode_step(tokens_S, self._cache))
        self._stats.decode_steps += 1
        self._stats.decode_tokens += self._rows.num_rows
        self._stats.decode_seconds += time.perf_counter() - started

    def refill(self) -> None:
        """Start waiting samples in the free slots: their first token is decided by their prompt."""
        started = time.perf_counter()
        while self._rows.num_rows < self._rows.max_rows and self._num_started < len(self._waiting):
            index, sample_index = self._waiting[self._num_started]
            if index not in self._prompts:
                self._prefill()
            slot, prompt_hidden_1D = self._prompts[index]
            self._cache.move(slot, self._rows.start(index, sample_index, self._requests[index]))
            self._hidden.append(prompt_hidden_1D)
            self._num_started += 1
            if sample_index == self._requests[index].num_samples - 1:
                self._cache.lengths_S[slot] = 0  # its last sample has started: a long prompt must not keep decode wide
        self._stats.prefill_seconds += time.perf_counter() - started

    def sample(self) -> None:
        """Draw the next token of every running sample, and close those that end with it."""
        started = time.perf_counter()
        rows, device = self._rows, self._model.device
        if self._params is None:
            self._params = RowParams([row.request.sampling for row in rows.samples], device)
        uniforms_S = torch.from_numpy(rows.uniforms()).to(device)
        tokens_S, logprobs_S = self._sampler(self._model.logits(torch.cat(self._hidden)), uniforms_S, self._params)
        tokens, logprobs = tokens_S.cpu().numpy(), logprobs_S.cpu().numpy()
        self._stats.sample_seconds += time.perf_counter() - started
        if np.isnan(logprobs).any():
            index = rows.samples[int(np.isnan(logprobs).argmax())].request_index
            raise FloatingPointError(f"request {index}: the model's logits are not finite; its weights are damaged")
        if self._on_token is not None:
            for row, token in zip(rows.samples, tokens.tolist(), strict=True):
                self._on_token(row.request_index, row.sample_index, token)
        for index, finish_reason in rows.append(tokens, logprobs):
            row, completion = rows.finish(index, finish_reason)
            self._cache.move(rows.num_rows, index)
            self._cache.lengths_S[rows.num_rows] = 0
            self._params = None
            self._stats.completion_tokens += len(completion.token_ids)
            self.finished[row.request_index, row.sample_index] = completion
            if self._on_finished is not None:
                self._on_finished(row.request_index, row.sample_index, completion)

    def _prefill(self) -> None:
        """Replace the stored prompts, whose samples have all started, by the next few."""
        requests = self._requests[self._num_prefilled : self._num_prefilled + len(self._prompt_slots)]
        prompts = [request.prompt_ids for request in requests]
        while len(prompts) > 1 and sum(map(len, prompts)) > PREFILL_TOKENS:
            prompts.pop()
        slots = self._prompt_slots[: len(prompts)]
        self._cache.lengths_S[self._prompt_slots.start :] = 0
        hidden_PD = self._model.prefill(prompts, self._cache, slots)
        self._prompts = {
            self._num_prefilled + place: (slot, hidden_PD[place : place + 1]) for place, slot in enumerate(slots)
        }
        self._num_prefilled += len(prompts)
        self._stats.prefill_tokens += sum(map(len, prompts))
