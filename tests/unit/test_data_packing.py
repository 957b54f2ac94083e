"""Packing and splitting: the shift by hand, what fits where, and that nothing is lost on the way."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from strop.data import packing
from strop.data.packing import best_fit, pack, pack_in_windows, split_packed
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


def test_best_fit_takes_the_fullest_bin_that_still_has_room():
    # 6 and 5 open bins (4 and 5 left), 4 closes the first, 3 goes to the second (2 left), 2 closes it: two full bins.
    assert sorted(best_fit([2, 3, 4, 5, 6], 10)) == [[0, 1, 3], [2, 4]]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=200), st.integers(50, 120))
def test_best_fit_loses_nothing_and_is_close_to_optimal(lengths, capacity):
    bins = best_fit(lengths, capacity)
    assert sorted(item for items in bins for item in items) == list(range(len(lengths)))
    assert all(sum(lengths[item] for item in items) <= capacity for items in bins)
    # Of two bins that are at most half full, the second would never have been opened.
    assert sum(2 * sum(lengths[item] for item in items) <= capacity for items in bins) <= 1


def test_windows_leave_only_one_batch_of_an_epoch_far_from_full(monkeypatch):
    monkeypatch.setattr(packing, "WINDOW", 64)
    lengths = np.random.default_rng(0).integers(1, 40, size=1000)
    bins = pack_in_windows(np.random.default_rng(1).permutation(1000), lengths, 400)
    assert sorted(np.concatenate(bins).tolist()) == list(range(1000))
    filled = sorted(int(lengths[items].sum()) for items in bins)
    assert filled[-1] <= 400
    assert filled[1] >= 0.9 * 400
