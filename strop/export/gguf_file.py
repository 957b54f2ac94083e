"""A model and its tokenizer as one GGUF file, tensor by tensor, so that memory never holds the weights twice."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor

from strop.export.gguf_layout import (
    Architecture,
    architecture_of,
    as_float32,
    hyperparameters,
    rope_divisors,
    tensors_of,
)
from strop.export.gguf_tokenizer import gguf_tokenizer
from strop.export.target import check_float16
from strop.models import CausalLM, Decoder
from strop.tokenizer import Tokenizer

GGUF_DTYPES = {
    "f32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "f16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bf16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
"""--dtype -> how matrices are stored, and what the file calls itself. Vectors are float32 in all of them."""


def write_gguf(model: CausalLM, tokenizer: Tokenizer, path: Path, *, dtype: str, name: str) -> tuple[str, ...]:
    """Write the file; returns in what llama.cpp will differ from what is computed here, for people to read.

    Raises ValueError, before anything is written, for a model, tokenizer or dtype that GGUF cannot express.
    """
    if not isinstance(model, Decoder):
        raise ValueError("a model that runs through transformers cannot be written as GGUF: export it with --to hf")
    config = model.config
    architecture = architecture_of(config)
    described = gguf_tokenizer(tokenizer, config.vocab_size)
    kind, file_type = GGUF_DTYPES[dtype]
    if dtype == "f16":
        check_float16(model)
    for tensor_name, tensor in _tensors(model, architecture):
        block = gguf.GGML_QUANT_SIZES[_kind(tensor, kind)][0]
        if tensor.shape[-1] % block:
            raise ValueError(
                f"{tensor_name} has rows of {tensor.shape[-1]} values, which {dtype} cannot store in blocks of "
                f"{block}: use --dtype f16, bf16 or f32"
            )
    writer = gguf.GGUFWriter(path, architecture.name)
    writer.add_name(name)
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, value in hyperparameters(config, architecture.name).items():
        (writer.add_uint32 if isinstance(value, int) else writer.add_float32)(key, value)  # pyright: ignore
    for key, value in described.fields.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    for tensor_name, tensor in _tensors(model, architecture):
        stored = _kind(tensor, kind)
        block, block_bytes = gguf.GGML_QUANT_SIZES[stored]
        size = tensor.numel() // block * block_bytes
        writer.add_tensor_info(tensor_name, tuple(tensor.shape), np.dtype(np.float32), size, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, tensor in _tensors(model, architecture):
        writer.write_tensor_data(gguf.quantize(as_float32(tensor).numpy(), _kind(tensor, kind)))
    writer.close()
    return described.notes


def as_stored(model: Decoder, dtype: str) -> None:
    """Make the model's float32 weights those that a file of this dtype holds."""
    model.float()
    with torch.no_grad():
        for parameter in model.parameters():
            kind = _kind(parameter, GGUF_DTYPES[dtype][0])
            stored = gguf.quantize(as_float32(parameter).numpy(), kind)
            parameter.copy_(torch.from_numpy(gguf.dequantize(stored, kind)).view_as(parameter))


def _kind(tensor: Tensor, kind: gguf.GGMLQuantizationType) -> gguf.GGMLQuantizationType:
    """llama.cpp wants vectors (norms, biases, rotary divisors) in float32 whatever the matrices are."""
    return gguf.GGMLQuantizationType.F32 if tensor.ndim == 1 else kind


def _tensors(model: Decoder, architecture: Architecture) -> Iterator[tuple[str, Tensor]]:
    divisors = rope_divisors(model.config)
    if divisors is not None:
        yield "rope_freqs.weight", divisors
    for name, parameter in model.named_parameters():
        yield from tensors_of(name, parameter.detach(), model.config, architecture)
