"""A safetensors file, written one tensor at a time."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

_NAMES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.float16: "F16",
    torch.bfloat16: "BF16", torch.int32: "I32", torch.float32: "F32", torch.float64: "F64", torch.int64: "I64",
}  # fmt: skip
"""In the order of safetensors, which lays tensors out from the last of them to the first."""


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write what safetensors.torch.save_file would, byte for byte, without holding all values at a time.

    For a mapping that makes its values when asked, twice: once for shape and dtype, once for the bytes. Format: length
    of the header (8 bytes, little-endian), the header as JSON padded with spaces to a multiple of 8, the bytes.
    """
    layout = {name: (tensor.dtype, list(tensor.shape)) for name, tensor in tensors.items()}
    ranks = {dtype: rank for rank, dtype in enumerate(_NAMES)}
    order = sorted(layout, key=lambda name: (-ranks[layout[name][0]], name))
    header: dict[str, dict[str, object]] = {}
    end = 0
    for name in order:
        dtype, shape = layout[name]
        begin, end = end, end + dtype.itemsize * torch.Size(shape).numel()
        header[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            tensor = tensors[name].detach().cpu().contiguous()
            assert (tensor.dtype, list(tensor.shape)) == layout[name], f"{name} changed while it was saved"
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
