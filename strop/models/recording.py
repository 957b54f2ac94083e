"""A rollout's own activations, from which the training step on the same weights has its forward pass.

Rollouts and trainer compute the same bits (docs/speed.md), so that the first update after a rollout would make all of
it again. What is recorded of a token and layer is what cannot be had cheaply: queries, keys and values, and what
attention and MLP add to the stream. The backward pass computes attention's output, gate and up again.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from strop.models.fused import Linear
from strop.models.native import can_decode

if TYPE_CHECKING:
    from strop.models.decoder import Decoder


@dataclass(frozen=True, slots=True)
class RecordedLayer:
    """One layer's part, of the tokens of a packed batch. All three may be overwritten."""

    projection_TE: Tensor
    """Queries, keys and values, E = (N + 2 K) H, the first two rotated."""
    attended_TD: Tensor
    mlp_TD: Tensor


_PARTS = ("projection", "attended", "mlp")
"""In the order of RecordedLayer."""


class RecordPointers(ctypes.Structure):
    """Record of decode.cpp."""

    _fields_ = [(name, ctypes.c_void_p) for name in _PARTS]


class Recording:
    """Room for max_rows tokens, in the order in which the engine runs them; layers() empties it.

    A rollout that needs more rows is not recorded: `is_complete` is then False and its memory is free.
    """

    def __init__(self, model: Decoder, max_rows: int) -> None:
        config = model.config
        projection = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        widths = (projection, config.hidden_size, config.hidden_size)
        # One block for each layer, which large pages fill better than three.
        blocks = [torch.empty(max_rows * sum(widths), dtype=model.dtype) for _ in range(config.num_layers)]
        sizes = [max_rows * width for width in widths]
        self._layers = [
            [part.view(max_rows, width) for part, width in zip(block.split(sizes), widths, strict=True)]
            for block in blocks
        ]
        self._max_rows = max_rows
        self._first = self._end = 0
        self.is_complete = True
        arrays = [
            (ctypes.c_void_p * config.num_layers)(*(x.data_ptr() for x in part))
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
            self._layers = []
        if not self.is_complete:
            return range(0)
        self._first, self._end = self._end, self._end + count
        return range(self._first, self._end)

    def write(self, layer: int, **parts: Tensor) -> None:
        """Some of the parts of one layer, for the rows that were claimed last."""
        for name, values in parts.items():
            self._layers[layer][_PARTS.index(name)][self._first : self._end] = values

    def layers(self, rows_T: Tensor) -> Iterator[RecordedLayer]:
        """Every layer's part in the order of rows_T, int64; the room is freed on the way."""
        assert self.is_complete and self._layers, "a recording serves one forward pass"
        self._layers.reverse()
        while self._layers:
            yield RecordedLayer(*(part.index_select(0, rows_T) for part in self._layers.pop()))


def new_recording(model: Any, max_rows: int) -> Recording | None:
    """A Recording for this model, or None where rollouts and trainer do not compute the same bits, or where the
    backward pass needs more than is recorded (norms of queries and keys, an adapter, every layer computed again)."""
    from strop.models.decoder import Decoder

    if not isinstance(model, Decoder) or not can_decode(model) or model.config.qk_norm:
        return None
    has_adapter = any(isinstance(module, Linear) and module.adapter is not None for module in model.modules())
    if has_adapter or any(layer.is_recomputed for layer in model.layers):
        return None
    return Recording(model, max_rows)
