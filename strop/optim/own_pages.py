"""What lives as long as the run (moments, the low halves of masters), in pages of its own."""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

_SMALLEST = 1 << 16
"""Bytes from which on a mapping is worth while."""


def lasting_zeros(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros that take memory page by page, as they are first written.

    Not from the C library's heap, where activations come and go: what stays there for ever keeps the free memory around
    it in pieces. A page that was only read is the system's one page of zeros. On a GPU, and on systems without such
    mappings, they are torch's zeros.
    """
    size = shape.numel() * dtype.itemsize
    if device.type != "cpu" or size < _SMALLEST or not hasattr(mmap, "MAP_ANONYMOUS"):
        return torch.zeros(shape, dtype=dtype, device=device)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype).view(shape)


def fill_lasting_(target: Tensor, values: Tensor) -> Tensor:
    """Copy values into what lasting_zeros made; pages whose bits are the same already stay unwritten."""
    values = values.to(target.device)
    for old, new in zip(_pieces(target), _pieces(values), strict=True):
        if not torch.equal(old, new):
            old.copy_(new)
    return target


def _pieces(tensor: Tensor) -> tuple[Tensor, ...]:
    # As bytes: -0 equals 0 otherwise.
    return tensor.reshape(-1).view(torch.uint8).split(_SMALLEST)
