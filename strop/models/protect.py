"""Weights in memory that the operating system lets nobody write to."""

from __future__ import annotations

import ctypes
import mmap
import os

import torch
from torch import nn

_PROT_READ = 1
_ALIGNMENT = 64
"""Bytes; tensors start on cache lines, as those of torch do."""


def protect(model: nn.Module, *, only_frozen: bool = False) -> bool:
    """Move the parameters and buffers into pages that are mapped read-only; any write to them then ends the process.

    only_frozen leaves out the parameters that require a gradient: an adapter learns, its base cannot.

    Returns False, having changed nothing, where that cannot be done: off the CPU, or without mprotect. Tied weights
    stay tied. The pages belong to no file, so that a file that changes on disk changes nothing here.
    """
    chosen = (*(value for value in model.parameters() if not (only_frozen and value.requires_grad)), *model.buffers())
    tensors = {id(tensor): tensor for tensor in chosen if tensor.numel()}
    if os.name != "posix" or any(tensor.device.type != "cpu" for tensor in tensors.values()):
        return False
    sizes = {key: -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT for key, tensor in tensors.items()}
    pages = mmap.mmap(-1, max(sum(sizes.values()), 1))
    start = 0
    address = None
    for key, tensor in tensors.items():
        place = torch.frombuffer(pages, dtype=tensor.dtype, count=tensor.numel(), offset=start).view(tensor.shape)
        address = place.data_ptr() - start if address is None else address
        place.copy_(tensor.detach())
        tensor.data = place  # one by one, so that the old memory goes as the new fills
        tensor.requires_grad_(False)
        start += sizes[key]
    if address is None:
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(len(pages)), ctypes.c_int(_PROT_READ)) != 0:
        raise OSError(ctypes.get_errno(), "the weights could not be mapped read-only")
    return True
