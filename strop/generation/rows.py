"""The engine's books on its running samples, one row per cache slot."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np

from strop.generation.sampler import sample_uniforms
from strop.tokenizer import StreamDecoder, Tokenizer
from strop.types import Completion, FinishReason, Request, TokenLogprobs


class StopWatch:
    """Looks for stop strings in the text of a growing sample, whatever tokens or bytes they are spread over."""

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...]) -> None:
        self._stream = StreamDecoder(tokenizer)
        self._stop = stop
        self._overlap = max(map(len, stop)) - 1
        self._tail = ""

    def push(self, token_id: int) -> bool:
        """Whether a stop string is complete once this token's text is there."""
        text = self._tail + self._stream.push(token_id)
        self._tail = text[max(0, len(text) - self._overlap) :]
        return any(stop in text for stop in self._stop)


@dataclass(slots=True)
class RunningSample:
    """What is looked at only when a sample starts or ends."""

    key: Hashable
    """Which request it belongs to."""
    sample_index: int
    request: Request
    watch: StopWatch | None
    token_logprobs: list[TokenLogprobs] = field(default_factory=list)
    recorded_rows: list[int] = field(default_factory=list)
    """Of the tokens that the model has run, the prompt's first."""
    recorded_labels: list[int] = field(default_factory=list)
    """Of the tokens that were sampled."""


class Rows:
    """Token and logprob buffers of the running samples, row i belonging to cache slot i; rows [0, num_rows) are in use.

    Everything done per step is one numpy operation over all rows. Only rows with stop strings, or that end, are visited
    one by one.
    """

    def __init__(self, tokenizer: Tokenizer, num_slots: int) -> None:
        self._tokenizer = tokenizer
        self._num_watches = 0
        self.max_rows = num_slots
        self.samples: list[RunningSample] = []
        self.counts_S = np.zeros(num_slots, dtype=np.int64)
        self._limits_S = np.zeros(num_slots, dtype=np.int64)
        self._stops_SN = np.zeros((num_slots, 0), dtype=np.int64)
        self._uniforms_ST = np.zeros((num_slots, 0))
        self._tokens_ST = np.zeros((num_slots, 0), dtype=np.int64)
        self._logprobs_ST = np.zeros((num_slots, 0), dtype=np.float32)

    def reserve(self, requests: Sequence[Request]) -> None:
        """Make every row wide enough for these requests; before any of them starts."""
        max_new_tokens = max(request.sampling.max_new_tokens for request in requests)
        max_stops = max(len(request.sampling.stop_token_ids) for request in requests)
        self._stops_SN = _widened(self._stops_SN, max_stops, -1)
        self._uniforms_ST = _widened(self._uniforms_ST, max_new_tokens, 0)
        self._tokens_ST = _widened(self._tokens_ST, max_new_tokens, 0)
        self._logprobs_ST = _widened(self._logprobs_ST, max_new_tokens, 0)

    @property
    def num_rows(self) -> int:
        return len(self.samples)

    def start(self, key: Hashable, sample_index: int, request: Request) -> int:
        """Open the row behind the last one; returns its index, which is also the sample's cache slot."""
        row, params = len(self.samples), request.sampling
        watch = StopWatch(self._tokenizer, params.stop) if params.stop else None
        self._num_watches += watch is not None
        self.samples.append(RunningSample(key, sample_index, request, watch))
        self.counts_S[row] = 0
        self._limits_S[row] = params.max_new_tokens
        self._stops_SN[row] = -1
        self._stops_SN[row, : len(params.stop_token_ids)] = params.stop_token_ids
        uniforms = sample_uniforms(request.seed, sample_index, params.max_new_tokens)
        self._uniforms_ST[row, : params.max_new_tokens] = uniforms
        return row

    def uniforms(self) -> np.ndarray:
        """The number that decides each row's next token, float64, (S,)."""
        return self._uniforms_ST[np.arange(self.num_rows), self.counts_S[: self.num_rows]]

    def last_tokens(self) -> np.ndarray:
        return self._tokens_ST[np.arange(self.num_rows), self.counts_S[: self.num_rows] - 1]

    def sampled_tokens(self, row: int) -> np.ndarray:
        """The tokens of a row so far."""
        return self._tokens_ST[row, : self.counts_S[row]]

    def append(self, tokens_S: np.ndarray, logprobs_S: np.ndarray) -> list[tuple[int, FinishReason]]:
        """Add one token to every row; returns (row, finish_reason) of those that end with it, the last row first."""
        rows, counts_S = np.arange(self.num_rows), self.counts_S[: self.num_rows]
        self._tokens_ST[rows, counts_S] = tokens_S
        self._logprobs_ST[rows, counts_S] = logprobs_S
        counts_S += 1
        is_stopped_S = (self._stops_SN[: self.num_rows] == tokens_S[:, None]).any(axis=1)
        for row, sample in enumerate(self.samples if self._num_watches else ()):
            if sample.watch is not None and not is_stopped_S[row]:
                is_stopped_S[row] = sample.watch.push(int(tokens_S[row]))
        is_finished_S = is_stopped_S | (counts_S == self._limits_S[: self.num_rows])
        finished = np.flatnonzero(is_finished_S)[::-1].tolist()
        return [(row, "stop" if is_stopped_S[row] else "length") for row in finished]

    def finish(self, row: int, finish_reason: FinishReason) -> tuple[RunningSample, Completion]:
        """Close a row and put the last one in its place; the caller does the same to the cache slots."""
        sample, count = self.samples[row], int(self.counts_S[row])
        params = sample.request.sampling
        token_ids = tuple(self._tokens_ST[row, :count].tolist())
        text = self._tokenizer.decode(token_ids[:-1] if token_ids[-1] in params.stop_token_ids else token_ids)
        cuts = [text.find(stop) for stop in params.stop if stop in text]
        completion = Completion(
            token_ids=token_ids,
            sampling_logprobs=tuple(self._logprobs_ST[row, :count].tolist()),
            finish_reason=finish_reason,
            text=text[: min(cuts, default=len(text))],
            token_logprobs=tuple(sample.token_logprobs),
            recorded_rows=tuple(sample.recorded_rows),
            recorded_labels=tuple(sample.recorded_labels),
        )
        self.drop(row)
        return sample, completion

    def drop(self, row: int) -> None:
        """As finish, of a row whose completion nobody wants any more."""
        last = self.num_rows - 1
        self._num_watches -= self.samples[row].watch is not None
        self.samples[row] = self.samples[last]
        self.samples.pop()
        if row != last:
            for array in (
                self.counts_S,
                self._limits_S,
                self._stops_SN,
                self._uniforms_ST,
                self._tokens_ST,
                self._logprobs_ST,
            ):
                array[row] = array[last]


def _widened(rows_SN: np.ndarray, width: int, fill: int) -> np.ndarray:
    missing = width - rows_SN.shape[1]
    return rows_SN if missing <= 0 else np.pad(rows_SN, ((0, 0), (0, missing)), constant_values=fill)
