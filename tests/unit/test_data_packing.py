"""Packing and splitting: the shift by hand, what fits where, and that nothing is lost on the way."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from strop.data.packing import fill, pack, split_packed
from strop.types import Segment


def document(ids: list[int], counts_from: int) -> tuple[np.ndarray, np.ndarray]:
    return np.array(ids, dtype=np.int32), np.arange(len(ids)) >= counts_from


def test_the_shift_by_hand():
    batch = pack([document([5, 6, 7, 8, 2], 3), document([9, 2], 1)])
    assert batch.token_ids_T.tolist() == [5, 6, 7, 8, 9]
    assert batch.labels_T.tolist() == [6, 7, 8, 2, 2]
    assert batch.loss_mask_T.tolist() == [False, False, True, True, True]
    assert batch.segments == (Segment(trunk=4), Segment(trunk=1))
    assert (batch.token_ids_T.dtype, batch.loss_mask_T.dtype) == (torch.int64, torch.bool)


def test_splitting_by_hand():
    batch = pack([document([1, 2, 3], 0), document([4, 5], 0), document([6, 7, 8, 9], 2)])
    first, second = split_packed(batch, 3)
    assert (first.token_ids_T.tolist(), first.segments) == ([1, 2, 4], (Segment(trunk=2), Segment(trunk=1)))
    assert (second.labels_T.tolist(), second.loss_mask_T.tolist()) == ([7, 8, 9], [False, True, True])
    assert second.segments == (Segment(trunk=3),)
    with pytest.raises(ValueError, match="micro_batch_tokens is 2, but one example has 3 label positions"):
        split_packed(batch, 2)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=40), st.integers(9, 30))
def test_split_parts_fit_and_join_to_the_whole(lengths, max_tokens):
    batch = pack([document(list(range(10 * n, 11 * n + 1)), n // 2) for n in lengths])
    parts = split_packed(batch, max_tokens)
    assert all(len(part.token_ids_T) == sum(map(len, part.segments)) <= max_tokens for part in parts)
    for name in ("token_ids_T", "labels_T", "loss_mask_T"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(batch, name))
    assert tuple(segment for part in parts for segment in part.segments) == batch.segments


def test_fill_opens_a_batch_only_when_the_next_item_does_not_fit():
    runs = fill(np.array([3, 0, 1, 2]), np.array([4, 6, 5, 5]), 10)
    assert [run.tolist() for run in runs] == [[3, 0], [1], [2]]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=200), st.integers(50, 120))
def test_fill_keeps_the_order_and_wastes_no_room(lengths, capacity):
    order = np.random.default_rng(0).permutation(len(lengths))
    sizes = np.array(lengths)
    runs = fill(order, sizes, capacity)
    assert np.concatenate(runs).tolist() == order.tolist()
    for run, following in zip(runs, [*runs[1:], None], strict=True):
        assert sizes[run].sum() <= capacity
        assert following is None or sizes[run].sum() + sizes[following[0]] > capacity
