"""The generation engine: many samples decode together, and a slot that finishes is refilled at once."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable, Sequence

import torch

from strop.generation.run import EngineStats, Run, RunFinished, RunToken
from strop.generation.sampler import Sampler
from strop.models.interface import Cache, CausalLM
from strop.models.recording import Recording
from strop.native.freed_memory import give_back_between_phases
from strop.tokenizer import Tokenizer
from strop.types import Completion, Request, TokenLogprobs

OnFinished = Callable[[int, int, Completion], None]
"""(request_index, sample_index, completion)"""
OnToken = Callable[[int, int, int], None]
"""(request_index, sample_index, token_id)"""


class Engine:
    """Samples completions with continuous batching over a fixed number of cache slots.

    A completion is decided by its request alone: not by what runs beside it, by num_slots or by the order of requests.
    (Its uniforms come from the seed and the sample index. What remains is rounding: torch's kernels may round a row
    differently in a batch of another size, which in bfloat16 can tip a token that lies on the edge; the C++ kernels do
    not. The same call gives the same bits.)

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
        recording: Recording | None = None,
    ) -> list[list[Completion]]:
        """The completions of every request: result[request_index][sample_index].

        on_finished is called as soon as a completion ends, in no fixed order; on_token for every token when sampled.
        recording (models/recording.py) takes the model's activations, for the training step that follows.

        Raises ValueError before any work, naming the request, for a prompt that is empty, not of this vocabulary, or
        too long for max_new_tokens to follow, and for sampling parameters out of range. Raises FloatingPointError when
        the model's logits are not finite.
        """
        for index, request in enumerate(requests):
            self.check(request, f"request {index}")
        self.stats = EngineStats()
        if not requests:
            return []
        started = time.perf_counter()
        groups: list[list[Completion | None]] = [[None] * request.num_samples for request in requests]

        def finished(key: Hashable, sample_index: int, completion: Completion) -> None:
            assert isinstance(key, int)
            groups[key][sample_index] = completion
            if on_finished is not None:
                on_finished(key, sample_index, completion)

        def sampled(key: Hashable, sample_index: int, token_id: int, *_: float | TokenLogprobs | None) -> None:
            assert isinstance(key, int) and on_token is not None
            on_token(key, sample_index, token_id)

        run = self._open(
            num_slots=min(self.num_slots, sum(request.num_samples for request in requests)),
            num_prompts=min(self._num_prompts, len(requests)),
            max_length=max(len(request.prompt_ids) + request.sampling.max_new_tokens - 1 for request in requests),
            on_finished=finished,
            on_token=sampled if on_token is not None else None,
            recording=recording,
        )
        run.add(enumerate(requests))
        try:
            with self.model.decoding(run.max_rows):
                while run.is_unfinished:
                    run.step()
        finally:
            run.close()
        self.stats.total_seconds = time.perf_counter() - started
        return [[completion for completion in group if completion is not None] for group in groups]

    def open(
        self, *, on_finished: RunFinished, on_token: RunToken | None = None, max_prefill: int | None = None
    ) -> Run:
        """A run without requests, for a server: they are added to it, and taken out of it, between its steps.

        max_prefill bounds the prompt tokens of a step, so that arrivals do not hold up those who run (see Run).
        It uses all slots, each max_length long, and this engine's cache: one run, or one generate(), at a time. Its
        steps must be taken inside model.decoding(num_slots) and torch.inference_mode().
        """
        self.stats = EngineStats()
        return self._open(
            num_slots=self.num_slots,
            num_prompts=self._num_prompts,
            max_length=self.max_length,
            on_finished=on_finished,
            on_token=on_token,
            max_prefill=max_prefill,
        )

    def release(self) -> None:
        """Give back the memory of the key-value cache, and of a frozen model's packed weights, until the next
        generate(): training wants it in between."""
        self._cache = None
        self.model.release()
        give_back_between_phases()

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

    def check(self, request: Request, name: str) -> None:
        """Raise the ValueError of generate() for a request that cannot be run, calling it by this name."""
        params, num_prompt = request.sampling, len(request.prompt_ids)
        vocab_size = self.model.config.vocab_size
        if not request.prompt_ids:
            raise ValueError(f"{name}: the prompt is empty; give it at least one token (a BOS, say)")
        if min(request.prompt_ids) < 0 or max(request.prompt_ids) >= vocab_size:
            raise ValueError(f"{name}: its prompt has an id outside the model's vocabulary of {vocab_size}")
        if num_prompt + params.max_new_tokens > self.max_length:
            raise ValueError(
                f"{name}: a prompt of {num_prompt} tokens and max_new_tokens={params.max_new_tokens} exceed "
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
            f"presence_penalty={params.presence_penalty} must be finite": math.isfinite(params.presence_penalty),
            f"frequency_penalty={params.frequency_penalty} must be finite": math.isfinite(params.frequency_penalty),
            f"top_logprobs={params.top_logprobs} must be from 0 to {vocab_size}": (
                0 <= (params.top_logprobs or 0) <= vocab_size
            ),
            f"logit_bias needs finite numbers for ids below {vocab_size}": all(
                0 <= token < vocab_size and math.isfinite(bias) for token, bias in params.logit_bias
            ),
        }
        for message, is_met in requirements.items():
            if not is_met:
                raise ValueError(f"{name}: {message}")

    @property
    def _num_prompts(self) -> int:
        return max(1, self.num_slots // 4)

    def _open(
        self,
        *,
        num_slots: int,
        num_prompts: int,
        max_length: int,
        on_finished: RunFinished,
        on_token: RunToken | None,
        max_prefill: int | None = None,
        recording: Recording | None = None,
    ) -> Run:
        return Run(
            self.model,
            self.tokenizer,
            cache=self.cache_for(num_slots=num_slots + num_prompts, max_length=max_length),
            recording=recording,
            num_slots=num_slots,
            num_prompts=num_prompts,
            sampler=self.sampler,
            stats=self.stats,
            on_finished=on_finished,
            on_token=on_token,
            max_prefill=max_prefill,
        )
