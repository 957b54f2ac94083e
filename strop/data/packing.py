"""Examples -> PackedBatch, where the label shift happens, and which examples share a batch.

T is the number of label positions; an example of n tokens takes n - 1 of them.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from strop.types import PackedBatch, Segment

WINDOW = 2048
"""Documents packed together. A larger one fills batches a little better and ties a document's company to its length."""


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


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Bins of item numbers, each holding at most `capacity` in sum: best-fit-decreasing.

    Longest first, each into the fullest bin that still takes it: at most 11/9 of the optimal number of bins (+1).
    Items inside a bin are in the order of their numbers.
    """
    bins: list[list[int]] = []
    free: list[tuple[int, int]] = []
    for item in sorted(range(len(lengths)), key=lambda item: -lengths[item]):
        length = lengths[item]
        assert length <= capacity, (item, length, capacity)
        place = bisect_left(free, (length, 0))
        if place < len(free):
            left, chosen = free.pop(place)
        else:
            left, chosen = capacity, len(bins)
            bins.append([])
        bins[chosen].append(item)
        if left > length:
            insort(free, (left - length, chosen))
    return [sorted(items) for items in bins]


def pack_in_windows(order: np.ndarray, lengths: np.ndarray, capacity: int) -> list[np.ndarray]:
    """All items of `order`, window after window, in bins of at most `capacity`.

    The emptiest bin of a window joins the next window, so that only an epoch's last batches may be far from full.
    """
    bins: list[np.ndarray] = []
    carried = order[:0]
    for start in range(0, len(order), WINDOW):
        window = np.concatenate([carried, order[start : start + WINDOW]])
        packed = [window[items] for items in best_fit(lengths[window].tolist(), capacity)]
        carried = order[:0]
        if start + WINDOW < len(order):
            emptiest = min(range(len(packed)), key=lambda index: int(lengths[packed[index]].sum()))
            carried = packed.pop(emptiest)
        bins.extend(packed)
    return bins
