"""The key-value cache of the generation engine: preallocated, one slot per running completion."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from strop.models.config import ModelConfig

if TYPE_CHECKING:
    from strop.models.recording import Recording

BLOCK = 32
"""Positions per growth step; whole vector registers for the softmax over them."""


class KVCache:
    """Keys and values of every layer for num_slots sequences of at most max_length tokens.

    keys and values have shape (L, S, K, T, H); lengths_S says how many positions of each slot are filled, 0 for a slot
    that is not in use. Running sequences occupy the slots [0, n), so that a decode step works on views and never
    gathers: a finished slot is overwritten by the last running one (move).

    T is not max_length but the longest sequence in use, rounded up (fit): a decode step reads each layer as one
    contiguous block, since a batched matmul over a strided one would first copy it. The memory for max_length is
    reserved once, and touched only as far as sequences really grow.
    """

    def __init__(
        self, config: ModelConfig, *, num_slots: int, max_length: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        self.max_length = max_length
        self.recording: Recording | None = None
        """Where the model's activations go as well, of the rows that the engine has claimed for a step."""
        self._shape = (config.num_layers, num_slots, config.num_kv_heads, config.head_dim)
        row = num_slots * config.num_kv_heads * _round_up(max_length) * config.head_dim
        self._storage = [torch.empty(config.num_layers, row, dtype=dtype, device=device) for _ in range(2)]
        self.lengths_S = torch.zeros(num_slots, dtype=torch.int64, device=device)
        self.keys, self.values = (self._view(storage, 0) for storage in self._storage)

    @property
    def num_slots(self) -> int:
        return self._shape[1]

    def fit(self, length: int) -> None:
        """Make room for sequences of `length` tokens, and give room back when they need less than half of it.

        No slot in use may be longer. Raises ValueError beyond max_length.
        """
        if length > self.max_length:
            raise ValueError(f"the cache holds {self.max_length} tokens per slot; a sequence wants {length}")
        capacity, wanted = self.keys.shape[3], _round_up(length)
        if length <= capacity <= 2 * wanted:
            return
        if length > capacity:  # by a fraction, or sequences that grow token by token would be copied in every block
            wanted = min(max(wanted, _round_up(capacity * 5 // 4)), _round_up(self.max_length))
        kept = min(capacity, wanted)
        views = []
        for storage in self._storage:
            old, new = self._view(storage, capacity), self._view(storage, wanted)
            for layer in range(old.shape[0]):  # one by one: the two layouts share their memory
                prefix = old[layer, :, :, :kept].clone()
                new[layer, :, :, :kept] = prefix
                new[layer, :, :, kept:] = 0  # masked positions are multiplied by 0, which does not clear a NaN
            views.append(new)
        self.keys, self.values = views

    def write(self, layer: int, slot: int, k_TKH: Tensor, v_TKH: Tensor, start: int = 0) -> None:
        """Store keys and values from position `start`, after fit; the caller sets lengths_S after all layers."""
        end = start + k_TKH.shape[0]
        self.keys[layer, slot, :, start:end] = k_TKH.transpose(0, 1)
        self.values[layer, slot, :, start:end] = v_TKH.transpose(0, 1)

    def move(self, source: int, target: int) -> None:
        """Copy one slot over another: to share a prompt among a group, or to close the gap of a finished slot."""
        if source == target:
            return
        length = int(self.lengths_S[source])
        self.keys[:, target, :, :length] = self.keys[:, source, :, :length]
        self.values[:, target, :, :length] = self.values[:, source, :, :length]
        self.lengths_S[target] = length

    def _view(self, storage: Tensor, capacity: int) -> Tensor:
        num_layers, num_slots, num_kv_heads, head_dim = self._shape
        flat = storage[:, : num_slots * num_kv_heads * capacity * head_dim]
        return flat.view(num_layers, num_slots, num_kv_heads, capacity, head_dim)


def _round_up(length: int) -> int:
    return -(-length // BLOCK) * BLOCK
