"""Examples -> PackedBatch, where the label shift happens, and which examples share a batch.

T is the number of label positions; an example of n tokens takes n - 1 of them.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from strop.types import PackedBatch, Segment, Tree


def pack(documents: Iterable[tuple[np.ndarray, np.ndarray]]) -> PackedBatch:
    """The documents (token ids, loss mask: as the tokenizer made them) end to end, shifted.

        token_ids = ids[:-1]    labels = ids[1:]    loss_mask = mask[1:]

    Each document is a Segment of its own, so that no document attends to another, and positions start at 0 in each.
    """
    token_ids: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    loss_mask: list[np.ndarray] = []
    segments: list[Segment] = []
    for ids, mask in documents:
        assert len(ids) == len(mask) >= 2, (len(ids), len(mask))
        token_ids.append(ids[:-1])
        labels.append(ids[1:])
        loss_mask.append(mask[1:])
        segments.append(Segment(trunk=len(ids) - 1))
    return PackedBatch(
        token_ids_T=torch.from_numpy(np.concatenate(token_ids).astype(np.int64)),
        labels_T=torch.from_numpy(np.concatenate(labels).astype(np.int64)),
        loss_mask_T=torch.from_numpy(np.concatenate(loss_mask)),
        segments=tuple(segments),
    )


def split_packed(batch: PackedBatch, max_tokens: int) -> list[PackedBatch]:
    """The batch as micro-batches of at most max_tokens positions, cut between segments, in order.

    The loss of each is a sum divided by ONE denominator, that of the whole batch: batch.loss_mask_T.sum().
    Raises ValueError for a segment that alone is longer.
    """
    parts: list[list[Segment]] = []
    size = 0
    for segment in batch.segments:
        if len(segment) > max_tokens:
            raise ValueError(
                f"micro_batch_tokens is {max_tokens}, but one example has {len(segment)} label positions; raise it, or "
                "lower max_length"
            )
        if not parts or size + len(segment) > max_tokens:
            parts.append([])
            size = 0
        parts[-1].append(segment)
        size += len(segment)
    lengths = [sum(map(len, segments)) for segments in parts]
    return [
        PackedBatch(token_ids_T=token_ids, labels_T=labels, loss_mask_T=loss_mask, segments=tuple(segments))
        for token_ids, labels, loss_mask, segments in zip(
            batch.token_ids_T.split(lengths),
            batch.labels_T.split(lengths),
            batch.loss_mask_T.split(lengths),
            parts,
            strict=True,
        )
    ]


def fill(order: np.ndarray, lengths: np.ndarray, capacity: int) -> list[np.ndarray]:
    """All items of `order` in runs of at most `capacity` in sum, each as long as it can be: the order is kept.

    Since nothing is padded, a batch that is not quite full costs nothing. Packing by length instead would sort like
    with like: a batch of one source only is a biased sample of the mixture.
    """
    ends = np.cumsum(lengths[order])
    batches: list[np.ndarray] = []
    start = 0
    while start < len(order):
        taken = int(ends[start - 1]) if start else 0
        end = int(np.searchsorted(ends, taken + capacity, side="right"))
        assert end > start, (int(lengths[order[start]]), capacity)
        batches.append(order[start:end])
        start = end
    return batches


def pack_completions(trees: Iterable[Tree]) -> PackedBatch:
    """Prompts with their completions, each prompt once, for log-probabilities of the completions.

    The prompt's last token opens each branch, so that every label belongs to exactly one position (PackedBatch's
    example). loss_mask_T is the completions' own masks, in order.
    """
    token_ids: list[int] = []
    labels: list[int] = []
    loss_mask: list[bool] = []
    segments: list[Segment] = []
    for prompt, completions, masks in trees:
        assert len(prompt) and all(len(completion) for completion in completions), "a prompt or completion is empty"
        token_ids.extend(prompt[:-1])
        labels.extend(prompt[1:])
        loss_mask.extend([False] * (len(prompt) - 1))
        for completion, mask in zip(completions, masks, strict=True):
            token_ids.extend((prompt[-1], *completion[:-1]))
            labels.extend(completion)
            loss_mask.extend(mask)
        segments.append(Segment(trunk=len(prompt) - 1, branches=tuple(map(len, completions))))
    return PackedBatch(
        token_ids_T=torch.tensor(token_ids, dtype=torch.int64),
        labels_T=torch.tensor(labels, dtype=torch.int64),
        loss_mask_T=torch.tensor(loss_mask, dtype=torch.bool),
        segments=tuple(segments),
    )
