"""Endless, resumable iterators of batches. What comes next follows from (seed, epoch) and a position, nothing else.

An epoch's batches are planned when it begins, from lengths alone. The whole state of an iterator is therefore an epoch
and the number of batches of it already given out: {"epoch": 2, "batch": 17, "data": "<hash>"}, where `data` makes sure
that the position is used with the data and settings that it belongs to.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Generic, Self, TypeVar

import numpy as np

from strop.data.examples import Example
from strop.data.packing import fill, pack
from strop.data.shards import TokenShards
from strop.types import PackedBatch, Task

Batch = TypeVar("Batch")

_ORDER, _MIXTURE = 0, 1
"""Purposes of a random generator, so that no two draw the same numbers."""


class Batches(Generic[Batch]):
    """What the iterators below share: endless epochs, each a planned list of batches of item numbers."""

    def __init__(
        self, plan: Callable[[int], Sequence[np.ndarray]], make: Callable[[np.ndarray], Batch], fingerprint: str
    ) -> None:
        self._plan = plan
        self._make = make
        self._fingerprint = fingerprint
        self._planned: tuple[int, Sequence[np.ndarray]] | None = None
        self._batch = 0
        self.epoch = 0
        """Epochs that are complete: the next batch belongs to epoch number `epoch`."""

    @property
    def num_batches_per_epoch(self) -> int:
        """Batches of the epoch that the next batch belongs to; packing may need one more or less in another epoch."""
        return len(self._batches(self.epoch))

    def num_batches(self, num_epochs: int) -> int:
        """Batches of the first num_epochs epochs, exactly: what a schedule needs as its number of steps."""
        return sum(len(self._batches(epoch)) for epoch in reversed(range(num_epochs)))

    def epoch_batches(self, epoch: int = 0) -> Iterator[Batch]:
        """One epoch's batches and then an end, for evaluation; the iterator's own position stays."""
        return map(self._make, self._batches(epoch))

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        batches = self._batches(self.epoch)
        items = batches[self._batch]
        self._batch += 1
        if self._batch == len(batches):
            self.epoch, self._batch = self.epoch + 1, 0
        return self._make(items)

    def state_dict(self) -> dict[str, Any]:
        """The position of the next batch, as plain JSON."""
        return {"epoch": self.epoch, "batch": self._batch, "data": self._fingerprint}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there. ValueError if the data, the batch settings or the seed are not those of the state."""
        if state["data"] != self._fingerprint:
            raise ValueError(
                "the saved data position belongs to other data, another tokenizer, or other batch settings or seed; "
                "resume with those of the run, or start a new run"
            )
        epoch, batch = int(state["epoch"]), int(state["batch"])
        if epoch < 0 or not 0 <= batch < len(self._batches(epoch)):
            raise ValueError(f"the saved data position is out of range: epoch {epoch}, batch {batch}")
        self.epoch, self._batch = epoch, batch

    def _batches(self, epoch: int) -> Sequence[np.ndarray]:
        if self._planned is None or self._planned[0] != epoch:
            self._planned = (epoch, self._plan(epoch))
        return self._planned[1]


class PackedBatches(Batches[PackedBatch]):
    """Endless iterator of PackedBatch over examples; each epoch has every example exactly once, in another order.

    With batch_tokens, an epoch's shuffled examples are packed (packing.py) into batches of at most that many label
    positions. With batch_size, a batch has that many examples, the last of an epoch what is left. Exactly one of the
    two is given. A batch is one optimiser step: split_packed cuts it into micro-batches.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        *,
        batch_tokens: int | None = None,
        batch_size: int | None = None,
        seed: int,
        shuffle: bool = True,
    ) -> None:
        if (batch_tokens is None) == (batch_size is None):
            raise ValueError("give either batch_tokens or batch_size, not both")
        if not examples:
            raise ValueError("there are no examples to make batches of")
        _check_seed(seed)
        self._examples = examples
        lengths = np.array([example.num_labels for example in examples], dtype=np.int64)
        if batch_tokens is not None and lengths.max() > batch_tokens:
            longest = examples[int(lengths.argmax())]
            raise ValueError(
                f"{longest.where}: {longest.num_labels} label positions, but batch_tokens is {batch_tokens}; raise it, "
                "or lower max_length"
            )
        if batch_size is not None and not 0 < batch_size <= len(examples):
            raise ValueError(
                f"batch_size must be between 1 and the number of examples {len(examples)}, got {batch_size}"
            )

        def plan(epoch: int) -> list[np.ndarray]:
            order = epoch_order([len(lengths)], [len(lengths)], seed=seed, epoch=epoch, shuffle=shuffle)
            if batch_size is not None:
                return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
            assert batch_tokens is not None
            return fill(order, lengths, batch_tokens)

        super().__init__(plan, self._pack, _fingerprint(lengths, "packed", batch_tokens, batch_size, seed, shuffle))

    def _pack(self, items: np.ndarray) -> PackedBatch:
        chosen = [self._examples[int(item)] for item in items]
        return pack((example.token_ids, example.loss_mask) for example in chosen)


class PretrainBatches(Batches[PackedBatch]):
    """Endless iterator of PackedBatch over token shards; every label counts.

    A document of n tokens is cut into chunks of at most context_length labels. A chunk's last label is the next
    chunk's first input, so that each of the n - 1 labels occurs exactly once in an epoch. Chunks are shuffled by
    (seed, epoch) and packed into batches of at most batch_tokens; each is a segment of its own.

    With weights (one per source, any positive scale) an epoch has as many labels as the corpus, of which each source
    gives its share: a small source is repeated, a large one goes on in the next epoch where it stopped, and every chunk
    of a source occurs once before any occurs twice.
    """

    def __init__(
        self,
        shards: TokenShards,
        *,
        batch_tokens: int,
        context_length: int,
        seed: int,
        weights: Sequence[float] | None = None,
    ) -> None:
        if context_length < 1:
            raise ValueError(f"context_length must be at least 1, got {context_length}")
        if context_length > batch_tokens:
            raise ValueError(
                f"context_length {context_length} is larger than batch_tokens {batch_tokens}: a full context would not "
                "fit into a batch; raise batch_tokens or lower context_length"
            )
        _check_seed(seed)
        chunks = [_chunks(source.starts, source.lengths, context_length) for source in shards.sources]
        counts = [len(lengths) for _, lengths in chunks]
        for source, count in zip(shards.sources, counts, strict=True):
            if count == 0:
                raise ValueError(
                    f"{source.source}: no document has two tokens, so there is nothing to predict; remove it"
                )
        self._tokens = [source.tokens for source in shards.sources]
        self._starts = np.concatenate([starts for starts, _ in chunks])
        self._lengths = lengths = np.concatenate([lengths for _, lengths in chunks])
        self._first_chunks = np.cumsum([0, *counts])
        self.num_labels = int(lengths.sum())
        """Labels of the corpus: all its tokens but the first of each document."""
        draws = counts if weights is None else _draws(chunks, weights, [source.source for source in shards.sources])

        def plan(epoch: int) -> list[np.ndarray]:
            order = epoch_order(counts, draws, seed=seed, epoch=epoch, shuffle=True)
            return fill(order, lengths, batch_tokens)

        settings = ("pretrain", batch_tokens, context_length, seed, draws, shards.tokenizer_hash)
        hashes = [source.content_hash for source in shards.sources]
        fingerprint = _fingerprint(np.stack([self._starts, lengths]), *settings, *hashes)
        super().__init__(plan, self._pack, fingerprint)

    def _pack(self, items: np.ndarray) -> PackedBatch:
        documents: list[tuple[np.ndarray, np.ndarray]] = []
        for item in items:
            source = int(np.searchsorted(self._first_chunks, item, side="right")) - 1
            begin, num_labels = int(self._starts[item]), int(self._lengths[item])
            ids = np.asarray(self._tokens[source][begin : begin + num_labels + 1])
            documents.append((ids, np.ones(num_labels + 1, dtype=bool)))
        return pack(documents)


class TaskBatches(Batches[tuple[Task, ...]]):
    """Endless iterator of batch_size tasks, no task twice in a batch, in another order each epoch.

    An epoch has len(tasks) // batch_size batches. Shuffled, the tasks left over at its end are others in each epoch;
    unshuffled, the next epoch begins with them, so that none is ever passed over.
    """

    def __init__(self, tasks: Sequence[Task], *, batch_size: int, seed: int, shuffle: bool = True) -> None:
        if not 0 < batch_size <= len(tasks):
            raise ValueError(f"batch_size must be between 1 and the number of tasks {len(tasks)}, got {batch_size}")
        _check_seed(seed)
        self._tasks = tasks
        used = len(tasks) // batch_size * batch_size

        def plan(epoch: int) -> list[np.ndarray]:
            if shuffle:
                order = epoch_order([len(tasks)], [len(tasks)], seed=seed, epoch=epoch, shuffle=True)
            else:
                order = np.roll(np.arange(len(tasks)), -epoch * used)
            return [order[start : start + batch_size] for start in range(0, used, batch_size)]

        ids = np.frombuffer("\0".join(task.id for task in tasks).encode(), dtype=np.uint8)
        super().__init__(plan, self._take, _fingerprint(ids, "tasks", batch_size, seed, shuffle))

    def _take(self, items: np.ndarray) -> tuple[Task, ...]:
        return tuple(self._tasks[int(item)] for item in items)


def epoch_order(counts: Sequence[int], draws: Sequence[int], *, seed: int, epoch: int, shuffle: bool) -> np.ndarray:
    """The item numbers of an epoch: draws[i] of the counts[i] items of source i, whose numbers follow each other.

    Source i is an endless row of its own permutations, of which epoch e takes the places from e * draws[i] on: nothing
    has to be remembered between epochs, and no item comes twice before every other has come once.
    """
    parts: list[np.ndarray] = []
    first_item = 0
    for source, (count, draw) in enumerate(zip(counts, draws, strict=True)):
        first_pass, skipped = divmod(epoch * draw, count)
        last_pass = -(-(epoch + 1) * draw // count)
        passes = [
            np.random.default_rng([seed, _ORDER, source, number]).permutation(count) if shuffle else np.arange(count)
            for number in range(first_pass, last_pass)
        ]
        parts.append(first_item + np.concatenate(passes)[skipped : skipped + draw])
        first_item += count
    order = np.concatenate(parts)
    if shuffle and len(parts) > 1:
        order = np.random.default_rng([seed, _MIXTURE, epoch]).permutation(order)
    return order


def _chunks(starts: np.ndarray, lengths: np.ndarray, context_length: int) -> tuple[np.ndarray, np.ndarray]:
    """(first input, number of labels) of every chunk of documents that begin at `starts` and have `lengths` tokens."""
    labels = lengths - 1
    chunks = -(-labels // context_length)
    document = np.repeat(np.arange(len(labels)), chunks)
    offset = context_length * (np.arange(len(document)) - np.repeat(np.cumsum(chunks) - chunks, chunks))
    return starts[document] + offset, np.minimum(labels[document] - offset, context_length)


def _draws(
    chunks: Sequence[tuple[np.ndarray, np.ndarray]], weights: Sequence[float], sources: Sequence[str]
) -> list[int]:
    if len(weights) != len(chunks) or not all(weight > 0 and np.isfinite(weight) for weight in weights):
        raise ValueError(f"weights must be one positive number per source ({', '.join(sources)}), got {list(weights)}")
    num_labels = [int(lengths.sum()) for _, lengths in chunks]
    budgets = [sum(num_labels) * weight / sum(weights) for weight in weights]
    return [
        max(1, round(budget * len(lengths) / labels))
        for budget, labels, (_, lengths) in zip(budgets, num_labels, chunks, strict=True)
    ]


def _check_seed(seed: int) -> None:
    if seed < 0:
        raise ValueError(f"seed must not be negative, got {seed}")


def _fingerprint(array: np.ndarray, *settings: Any) -> str:
    digest = hashlib.sha256(repr(settings).encode())
    digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
