"""A rollout's own activations, from which the training step on the same weights has its forward pass.

Rollouts and trainer compute the same bits (docs/speed.md), so that the first update after a rollout would make all of
it again. What is recorded of a token and layer is what cannot be had cheaply: queries, keys and values, what attention
and MLP add to the stream, and gate and up where the layer would keep them too (Checkpointing); of a sampled token, what
the LM head made of it. The backward pass computes attention's output again, and gate and up where they are missing.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from strop.models.config import ModelConfig
from strop.models.footprint import recorded_widths
from strop.models.fused import Linear
from strop.models.native import can_decode, has_packed_head
from strop.native.kernels import use_large_pages
from strop.objectives.logprobs import HeadStatistics, head_statistics

if TYPE_CHECKING:
    from strop.models.decoder import Decoder


@dataclass(frozen=True, slots=True)
class RecordedLayer:
    """One layer's part, of the tokens of a packed batch. All of it may be overwritten."""

    projection_TE: Tensor
    """Queries, keys and values, E = (N + 2 K) H, the first two rotated."""
    attended_TD: Tensor
    mlp_TD: Tensor
    gate_up_TI: Tensor
    """(T, 0) in a layer that computes them again."""


_PARTS = ("projection", "attended", "mlp", "gate_up")
"""In the order of RecordedLayer."""


class RecordPointers(ctypes.Structure):
    """Record of decode.cpp."""

    _fields_ = [(name, ctypes.c_void_p) for name in _PARTS]


class Recording:
    """Room for max_rows tokens, in the order in which the engine runs them; layers() empties it.

    A rollout that needs more rows is not recorded: `is_complete` is then False and its memory is free.
    """

    def __init__(self, model: Decoder, max_rows: int, temperature: float) -> None:
        """temperature is that at which the training step will take its logprobs."""
        self._layers = [_room(model.config, max_rows, layer.mlp.is_recomputed, model.dtype) for layer in model.layers]
        self._max_rows = max_rows
        self._first = self._end = 0
        self.is_complete = True
        self.temperature = temperature
        self._records_head = has_packed_head(model)
        self._heads: list[HeadStatistics] = []
        self._num_labels = 0
        arrays = [
            (ctypes.c_void_p * len(part))(*(x.data_ptr() if x.numel() else None for x in part))
            for part in zip(*self._layers, strict=True)
        ]
        self._arrays = arrays
        self.pointers = RecordPointers(*(ctypes.addressof(array) for array in arrays))

    @property
    def first_row(self) -> int:
        """Where the model writes: the first of the rows that were claimed last."""
        return self._first

    def claim(self, count: int) -> range:
        """The rows of the next `count` tokens that the model will run; an empty range once there is no room."""
        if self._end + count > self._max_rows:
            self.is_complete = False
            self._layers, self._heads = [], []
        if not self.is_complete:
            return range(0)
        self._first, self._end = self._end, self._end + count
        return range(self._first, self._end)

    def write(self, layer: int, **parts: Tensor) -> None:
        """Some of the parts of one layer, for the rows that were claimed last."""
        for name, values in parts.items():
            room = self._layers[layer][_PARTS.index(name)]
            if room.shape[1]:
                room[self._first : self._end] = values

    def write_head(self, logits_SV: Tensor, labels_S: Tensor) -> range:
        """Keep what a training step wants to know of the laws from which these labels were drawn; returns the labels'
        numbers, an empty range where nothing is kept."""
        if not (self.is_complete and self._records_head):
            return range(0)
        self._heads.append(head_statistics(logits_SV, labels_S, temperature=self.temperature, with_entropy=True))
        first, self._num_labels = self._num_labels, self._num_labels + len(labels_S)
        return range(first, self._num_labels)

    def head(self, numbers_R: Tensor) -> HeadStatistics:
        """What write_head kept, in the order of these numbers, int64."""
        logprobs, lse, entropy = (torch.cat(part) for part in zip(*self._heads, strict=True))
        return HeadStatistics(logprobs, lse, entropy).at(numbers_R)

    def layers(self, rows_T: Tensor) -> Iterator[RecordedLayer]:
        """Every layer's part in the order of rows_T, int64; the room is freed on the way."""
        assert self.is_complete and self._layers, "a recording serves one forward pass"
        self._layers.reverse()
        while self._layers:
            yield RecordedLayer(*(part.index_select(0, rows_T) for part in self._layers.pop()))


def _room(config: ModelConfig, max_rows: int, is_recomputed: bool, dtype: torch.dtype) -> list[Tensor]:
    """Of one layer, in the order of _PARTS."""
    widths = recorded_widths(config, is_recomputed)
    # One block, which large pages fill better than four.
    block = torch.empty(max_rows * sum(widths), dtype=dtype)
    use_large_pages(block)
    parts = block.split([max_rows * width for width in widths])
    return [part.view(max_rows, width) for part, width in zip(parts, widths, strict=True)]


def new_recording(model: Any, max_rows: int, temperature: float) -> Recording | None:
    """A Recording for this model, or None where rollouts and trainer do not compute the same bits, or where the
    backward pass needs more than is recorded (norms of queries and keys, an adapter, every layer computed again)."""
    from strop.models.decoder import Decoder

    if not isinstance(model, Decoder) or not can_decode(model) or model.config.qk_norm:
        return None
    has_adapter = any(isinstance(module, Linear) and module.adapter is not None for module in model.modules())
    if has_adapter or any(layer.is_recomputed for layer in model.layers):
        return None
    return Recording(model, max_rows, temperature)
