"""Bytes of the tensors that live at the same time: what a computation needs, whatever an allocator makes of it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """While entered, counts the storages that operations make, backward passes included, until they are freed.

    Storages that were there before do not count, nor does the scratch memory inside a kernel. Every operation costs
    several times its usual overhead: measure times without it.

    Example:
        with LiveMemory() as memory:
            loss = model(x).sum()
            kept = memory.live_bytes  # what the backward pass needs
            loss.backward()
        memory.peak_bytes
    """

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = 0
        self.peak_bytes = 0

    def reset_peak(self) -> None:
        self.peak_bytes = self.live_bytes

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping | None = None
    ) -> Any:
        kwargs = kwargs or {}
        inputs = {_key(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and _key(leaf) not in inputs:
                self._add(leaf)
        return result

    def _add(self, tensor: Tensor) -> None:
        if tensor.device.type == "meta" or tensor.layout is not torch.strided:
            return
        storage = tensor.untyped_storage()
        size = storage.nbytes()
        self.live_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(storage, self._remove, size)

    def _remove(self, size: int) -> None:
        self.live_bytes -= size


def _key(tensor: Tensor) -> int:
    """The storage's own address in memory: two tensors over one storage share it."""
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else id(tensor)
