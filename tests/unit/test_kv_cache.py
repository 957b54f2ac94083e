"""The cache's layout changes under its contents; these must not."""

from __future__ import annotations

import pytest
import torch

from strop.models.cache import BLOCK, KVCache
from strop.models.config import ModelConfig

CONFIG = ModelConfig(
    vocab_size=16, hidden_size=16, intermediate_size=16, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=4
)


def test_growing_and_shrinking_keeps_every_slot_and_shows_no_stale_memory() -> None:
    cache = KVCache(CONFIG, num_slots=3, max_length=5 * BLOCK - 3, dtype=torch.float32, device="cpu")
    for storage in cache._storage:
        storage.fill_(float("nan"))
    lengths = [BLOCK - 4, 7, BLOCK]
    expected: dict[tuple[int, int], torch.Tensor] = {}
    cache.fit(max(lengths))
    for slot, length in enumerate(lengths):
        for layer in range(3):
            k_TKH, v_TKH = torch.randn(2, length, 2, 4)
            cache.write(layer, slot, k_TKH, v_TKH)
            expected[layer, slot] = torch.stack([k_TKH, v_TKH]).transpose(1, 2)
        cache.lengths_S[slot] = length
    capacities = []
    for wanted in (BLOCK + 1, 3 * BLOCK, 5 * BLOCK - 3, 2 * BLOCK + 1, 2 * BLOCK, BLOCK):
        cache.fit(wanted)
        capacities.append(cache.keys.shape[3])
        for layer in range(3):
            assert cache.keys[layer].is_contiguous()
            for slot, length in enumerate(lengths):
                stored = torch.stack([cache.keys[layer, slot], cache.values[layer, slot]])
                assert torch.equal(stored[:, :, :length], expected[layer, slot])
                assert stored.isfinite().all()
    # Room is given back only when less than half of it is needed, so that a length at an edge does not copy each step.
    assert capacities == [2 * BLOCK, 3 * BLOCK, 5 * BLOCK, 5 * BLOCK, 2 * BLOCK, 2 * BLOCK]
    cache.move(2, 0)
    assert torch.equal(cache.keys[1, 0, :, : lengths[2]], expected[1, 2][0])
    assert cache.lengths_S.tolist() == [lengths[2], *lengths[1:]]


def test_a_sequence_longer_than_the_cache_is_refused() -> None:
    cache = KVCache(CONFIG, num_slots=1, max_length=40, dtype=torch.float32, device="cpu")
    cache.fit(40)
    with pytest.raises(ValueError, match="holds 40 tokens per slot; a sequence wants 41"):
        cache.fit(41)


def test_growing_token_by_token_copies_a_number_of_times_that_grows_slower_than_the_sequence() -> None:
    def copies(max_length: int) -> int:
        cache = KVCache(CONFIG, num_slots=1, max_length=max_length, dtype=torch.float32, device="cpu")
        capacities = []
        for length in range(1, max_length + 1):
            cache.fit(length)
            assert length <= cache.keys.shape[3] <= -(-max_length // BLOCK) * BLOCK
            capacities.append(cache.keys.shape[3])
        return len(set(capacities))

    assert copies(8192) - copies(4096) <= 5
