"""Samples that decode together, one token per step; requests come and go between steps."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from strop.generation.rows import Rows
from strop.generation.sampler import RowParams, Sampler, adjusted_logits
from strop.generation.scoring import token_logprobs
from strop.models.cache import KVCache
from strop.models.interface import Cache, CausalLM
from strop.models.recording import Recording
from strop.tokenizer import Tokenizer
from strop.types import Completion, Request, TokenLogprobs

RunFinished = Callable[[Hashable, int, Completion], None]
"""(key of the request, sample_index, completion)"""
RunToken = Callable[[Hashable, int, int, float, "TokenLogprobs | None"], None]
"""(key of the request, sample_index, token_id, sampling_logprob, report or None)"""

PREFILL_TOKENS = 1024
"""Prompts are prefilled together up to this many tokens: enough for fast matrices, and a bound on activations."""


@dataclass(slots=True, kw_only=True)
class EngineStats:
    """The work of one run. A sample's first token comes from its prompt; each other one costs a decode row."""

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


@dataclass(frozen=True, slots=True)
class _Prompt:
    """One that is prefilled."""

    slot: int
    """Of the cache."""
    hidden_1D: Tensor
    recorded_rows: range


class Run:
    """The samples that run (rows [0, n), cache slots [0, n)) and those that wait, in order.

    Prompts are prefilled into the slots behind the running ones, a few at a time, and copied from there for each sample
    that starts. Since samples start in order, all prompts of a batch are done with when the next batch is needed; so
    one prefill serves a group even if its samples start at different times, in memory that does not depend on how many
    requests there are.

    With max_prefill a step prefills at most so many tokens, and those who run get their next token in between, however
    many and long the prompts are that arrive. Prompts longer than that go in piece by piece, cut at multiples of
    max_prefill: where a prompt is cut does not depend on what arrives beside it.

    Made by Engine.generate, which adds everything at once, and by Engine.open for a server. Requests must have passed
    Engine.check.
    """

    def __init__(
        self,
        model: CausalLM,
        tokenizer: Tokenizer,
        *,
        cache: Cache,
        num_slots: int,
        num_prompts: int,
        sampler: Sampler,
        stats: EngineStats,
        on_finished: RunFinished,
        on_token: RunToken | None,
        max_prefill: int | None = None,
        recording: Recording | None = None,
    ) -> None:
        self._model = model
        self._recording = recording
        self._cache = cache
        self._sampler = sampler
        self._stats = stats
        self._on_finished = on_finished
        self._on_token = on_token
        self._requests: dict[Hashable, Request] = {}  # of which some sample waits
        self._waiting: deque[tuple[Hashable, int]] = deque()
        self._prompt_slots = range(num_slots, num_slots + num_prompts)
        self._prompts: dict[Hashable, _Prompt] = {}
        self._max_prefill = max_prefill
        self._partial: tuple[Hashable, int] | None = None  # the prompt in the first prompt slot that is not all there
        self._rows = Rows(tokenizer, num_slots)
        self._params: RowParams | None = None  # None once rows have ended; others only start where rows ended
        self._hidden: list[Tensor] = []  # (n, D) in all: what decides the next token of every running sample

    @property
    def max_rows(self) -> int:
        """Samples that can run at the same time."""
        return self._rows.max_rows

    @property
    def num_running(self) -> int:
        return self._rows.num_rows

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def is_unfinished(self) -> bool:
        return bool(self._rows.num_rows or self._waiting)

    def add(self, requests: Iterable[tuple[Hashable, Request]]) -> None:
        """Let the samples of these (key, request) pairs wait behind those that wait already. Keys must be new."""
        requests = list(requests)
        self._rows.reserve([request for _, request in requests])
        for key, request in requests:
            assert key not in self._requests, f"the key {key!r} is in use"
            self._requests[key] = request
            self._waiting.extend((key, sample_index) for sample_index in range(request.num_samples))

    def cancel(self, key: Hashable) -> int:
        """Forget every sample of a request, running or waiting; returns how many. Their slots are free at once."""
        num_before = len(self._waiting) + self._rows.num_rows
        if self._requests.pop(key, None) is not None:
            self._waiting = deque(one for one in self._waiting if one[0] != key)
            self._close_prompt(key)
        for row in reversed(range(self._rows.num_rows)):
            if self._rows.samples[row].key == key:
                self._rows.drop(row)
                self._free(row)
        return num_before - len(self._waiting) - self._rows.num_rows

    def close(self) -> None:
        """The cache, which others may use, records nothing any more."""
        if self._recording is not None:
            assert isinstance(self._cache, KVCache)
            self._cache.recording = None

    def step(self) -> None:
        """Every running sample gets its next token; waiting ones start in the free slots with their first, once their
        prompt is there.

        Raises FloatingPointError when the model's logits are not finite; the run is then of no more use.
        """
        self._decode()
        self._refill()
        if self._rows.num_rows:
            self._sample()

    def _decode(self) -> None:
        """Feed every running sample its last token."""
        self._hidden = []
        if not self._rows.num_rows:
            return
        started = time.perf_counter()
        tokens_S = torch.from_numpy(self._rows.last_tokens()).to(self._model.device)
        for sample, row in zip(self._rows.samples, self._recorded(self._rows.num_rows), strict=False):
            sample.recorded_rows.append(row)
        self._hidden.append(self._model.decode_step(tokens_S, self._cache))
        self._stats.decode_steps += 1
        self._stats.decode_tokens += self._rows.num_rows
        self._stats.decode_seconds += time.perf_counter() - started

    def _refill(self) -> None:
        """Start waiting samples in the free slots: their first token is decided by their prompt."""
        started = time.perf_counter()
        num_prefilled = 0
        while self._rows.num_rows < self._rows.max_rows and self._waiting:
            key, sample_index = self._waiting[0]
            if key not in self._prompts:
                room = PREFILL_TOKENS if self._max_prefill is None else self._max_prefill - num_prefilled
                if num_prefilled and self._max_prefill is not None and len(self._next_piece(key)) > room:
                    break
                num_prefilled += self._prefill(room)
                if key not in self._prompts:
                    break
            self._waiting.popleft()
            prompt = self._prompts[key]
            request = self._requests[key]
            self._cache.move(prompt.slot, self._rows.start(key, sample_index, request))
            self._rows.samples[-1].recorded_rows.extend(prompt.recorded_rows)
            self._hidden.append(prompt.hidden_1D)
            self._params = None
            if sample_index == request.num_samples - 1:
                del self._requests[key]
                self._close_prompt(key)
        self._stats.prefill_seconds += time.perf_counter() - started

    def _sample(self) -> None:
        """Draw the next token of every running sample, and close those that end with it."""
        started = time.perf_counter()
        rows, device = self._rows, self._model.device
        if self._params is None:
            self._params = RowParams([row.request.sampling for row in rows.samples], device)
        uniforms_S = torch.from_numpy(rows.uniforms()).to(device)
        logits_SV = self._model.logits(torch.cat(self._hidden))
        law_SV = adjusted_logits(logits_SV, self._params, rows.sampled_tokens) if self._params.adjusted else logits_SV
        tokens_S, logprobs_S = self._sampler(law_SV, uniforms_S, self._params)
        tokens, logprobs = tokens_S.cpu().numpy(), logprobs_S.cpu().numpy()
        reports = self._reports(logits_SV, tokens_S) if self._params.has_reports else [None] * rows.num_rows
        if self._recording is not None:
            for sample, number in zip(rows.samples, self._recording.write_head(logits_SV, tokens_S), strict=False):
                sample.recorded_labels.append(number)
        self._stats.sample_seconds += time.perf_counter() - started
        if np.isnan(logprobs).any():
            key = rows.samples[int(np.isnan(logprobs).argmax())].key
            raise FloatingPointError(f"request {key}: the model's logits are not finite; its weights are damaged")
        if self._on_token is not None:
            drawn = zip(rows.samples, tokens.tolist(), logprobs.tolist(), reports, strict=True)
            for row, token, logprob, report in drawn:
                self._on_token(row.key, row.sample_index, token, logprob, report)
        for index, finish_reason in rows.append(tokens, logprobs):
            row, completion = rows.finish(index, finish_reason)
            self._free(index)
            self._stats.completion_tokens += len(completion.token_ids)
            self._on_finished(row.key, row.sample_index, completion)

    def _reports(self, logits_SV: Tensor, tokens_S: Tensor) -> Sequence[TokenLogprobs | None]:
        samples = self._rows.samples
        reports = token_logprobs(logits_SV, tokens_S, [row.request.sampling.top_logprobs for row in samples])
        for row, report in zip(samples, reports, strict=True):
            if report is not None:
                row.token_logprobs.append(report)
        return reports

    def _recorded(self, num_tokens: int) -> range:
        """The rows of the recording for what the model runs next; none without a recording, or once it is full."""
        if self._recording is None:
            return range(0)
        assert isinstance(self._cache, KVCache)
        rows = self._recording.claim(num_tokens)
        self._cache.recording = self._recording if rows else None
        return rows

    def _free(self, row: int) -> None:
        """What Rows.drop has done to a row, done to its cache slot."""
        self._cache.move(self._rows.num_rows, row)
        self._cache.lengths_S[self._rows.num_rows] = 0
        self._params = None

    def _close_prompt(self, key: Hashable) -> None:
        if self._partial is not None and self._partial[0] == key:
            self._partial = None
            self._cache.lengths_S[self._prompt_slots.start] = 0
        if key in self._prompts:
            slot = self._prompts.pop(key).slot
            self._cache.lengths_S[slot] = 0  # no sample needs it any more: a long prompt must not keep decode wide

    def _num_done(self, key: Hashable) -> int:
        """How much of a prompt is prefilled, of those of which more is to come."""
        return self._partial[1] if self._partial is not None and self._partial[0] == key else 0

    def _next_piece(self, key: Hashable) -> Sequence[int]:
        """What is to be prefilled next of a prompt."""
        start = self._num_done(key)
        prompt_ids = self._requests[key].prompt_ids
        return prompt_ids[start:] if self._max_prefill is None else prompt_ids[start : start + self._max_prefill]

    def _prefill(self, room: int) -> int:
        """Replace the stored prompts, whose samples have all started, by the next few that wait; returns their tokens.

        One piece is taken even if it is larger than the room. A prompt of which more is to come is only ever the first.
        """
        assert not self._prompts
        pieces: dict[Hashable, Sequence[int]] = {}
        num_tokens = 0
        for key, request in self._requests.items():  # in the order in which they were added
            piece = self._next_piece(key)
            is_last = self._num_done(key) + len(piece) == len(request.prompt_ids)
            if pieces and (len(pieces) == len(self._prompt_slots) or num_tokens + len(piece) > room or not is_last):
                break
            pieces[key] = piece
            num_tokens += len(piece)
            if not is_last:
                break
        slots = self._prompt_slots[: len(pieces)]
        starts = [self._num_done(key) for key in pieces]
        self._cache.lengths_S[self._prompt_slots.start + (starts[0] > 0) :] = 0
        recorded_rows = self._recorded(num_tokens)
        hidden_PD = self._model.prefill(list(pieces.values()), self._cache, slots, starts)
        self._partial = None
        place_in_all = 0
        for place, (key, piece) in enumerate(pieces.items()):
            num_done = starts[place] + len(piece)
            if num_done == len(self._requests[key].prompt_ids):
                rows = recorded_rows[place_in_all : place_in_all + len(piece)]
                self._prompts[key] = _Prompt(slots[place], hidden_PD[place : place + 1], rows)
            else:
                self._partial = (key, num_done)
            place_in_all += len(piece)
        self._stats.prefill_tokens += num_tokens
        return num_tokens
