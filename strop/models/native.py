"""The decode step as one C++ call: how a Decoder's weights and cache are handed to strop/native/decode.cpp."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from strop.models.cache import KVCache
from strop.models.config import ModelConfig
from strop.models.fused import Linear
from strop.native import products
from strop.native.build import library
from strop.native.kernels import use_large_pages

if TYPE_CHECKING:
    from strop.models.decoder import MLP, Attention, Decoder

_LANES = 16
_GROUP = 2 * _LANES
_SIDE_BY_SIDE = (_GROUP, _LANES)
"""Stride and second of a packed weight (`pack` in decode.cpp) whose groups are neighbours. Those of gate and up have 16
of either."""
_ALIGNMENT = 64
_POINTERS = (
    *("attention_norm", "qkv", "qkv_bias", "q_norm", "k_norm", "output", "output_bias"),
    *("mlp_norm", "gate_up", "gate_up_bias", "down", "down_bias"),
)


class _Layer(ctypes.Structure):
    _fields_ = [*((name, ctypes.c_void_p) for name in _POINTERS), ("has_rope", ctypes.c_int64)]


class _Shape(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("num_layers", "D", "N", "K", "H", "I")),
        *((name, ctypes.c_float) for name in ("eps", "scale")),
    ]


class NativeDecode:
    """A decoder's weights, arranged for the C++ decode step: a second copy, as of now."""

    def __init__(self, model: Decoder, room: Tensor | None = None) -> None:
        """room is that of a NativeDecode of before, to be used again where it is large enough."""
        assert can_decode(model)
        config = model.config
        kernels = library()
        assert kernels is not None
        self._kernels = kernels
        self._shape = _Shape(
            num_layers=config.num_layers,
            D=config.hidden_size,
            N=config.num_heads,
            K=config.num_kv_heads,
            H=config.head_dim,
            I=config.intermediate_size,
            eps=config.norm_eps,
            scale=config.head_dim**-0.5,
        )
        weights = [module.weight for module in model.modules() if isinstance(module, Linear)]
        has_head = has_packed_head(model)
        weights += [model.lm_head_weight] if has_head else []
        self._suffix = "8" if products.are_in_int8() else ""
        # One block for all: the system takes all of it back at once, and can map it in large pages.
        num_bytes = _ALIGNMENT + sum(map(self._packed_bytes, weights))
        if room is None or room.nbytes < num_bytes:
            room = torch.empty(num_bytes, dtype=torch.uint8)
            use_large_pages(room)
        self.room = room
        self._unused = room[-room.data_ptr() % _ALIGNMENT :]
        self._tensors: list[Tensor] = []  # what the pointers point to
        self._arranged: list[Linear] = []
        self._layers = (_Layer * config.num_layers)(
            *(self._layer(layer.attention, layer.mlp) for layer in model.layers)
        )
        self._final_norm = self._kept(model.final_norm.weight)
        self._vocab_size = config.vocab_size
        self._head = self._packed(model.lm_head_weight) if has_head else None

    def step(self, x_SD: Tensor, rope: tuple[Tensor, Tensor], cache: KVCache, lengths_S: Tensor) -> Tensor:
        """Hidden states (S, D) after the final norm; writes each slot's keys and values at position lengths_S.

        x_SD are the tokens' embeddings, overwritten. The cache must have room, and lengths_S is not advanced.
        """
        hidden_SD = torch.empty_like(x_SD)
        cos_SH, sin_SH = (angles.view(x_SD.shape[0], -1) for angles in rope)
        layer_stride = cache.keys.stride(0)
        recording = cache.recording
        assert layer_stride == cache.values.stride(0) and cache.keys[0].is_contiguous() and x_SD.is_contiguous()
        self._kernel("strop_decode_step")(
            ctypes.byref(self._shape),
            self._layers,
            ctypes.c_void_p(self._final_norm),
            *map(ctypes.c_int64, (x_SD.shape[0],)),
            *(ctypes.c_void_p(tensor.data_ptr()) for tensor in (x_SD, hidden_SD, cache.keys, cache.values)),
            *map(ctypes.c_int64, (layer_stride, cache.keys.shape[3])),
            *(ctypes.c_void_p(tensor.data_ptr()) for tensor in (lengths_S, cos_SH, sin_SH)),
            None if recording is None else ctypes.byref(recording.pointers),
            *map(ctypes.c_int64, (0 if recording is None else recording.first_row, torch.get_num_threads())),
        )
        return hidden_SD

    def logits(self, hidden_SD: Tensor) -> Tensor | None:
        """(S, V), or None for a vocabulary that does not fill the registers."""
        if self._head is None:
            return None
        num_rows, width = hidden_SD.shape
        logits_SV = hidden_SD.new_empty(num_rows, self._vocab_size)
        hidden_SD = hidden_SD.contiguous()
        self._kernel("strop_packed_product")(
            ctypes.c_void_p(hidden_SD.data_ptr()),
            ctypes.c_void_p(self._head),
            ctypes.c_void_p(logits_SV.data_ptr()),
            *map(ctypes.c_int64, (num_rows, width, self._vocab_size // _GROUP, torch.get_num_threads())),
        )
        return logits_SV

    def close(self) -> None:
        """No Linear uses the arranged weights any more."""
        for linear in self._arranged:
            linear.arranged = None

    def _product(
        self, x_TI: Tensor, packed: int, bias_O: Tensor | None, num_columns: int, layout: tuple[int, int]
    ) -> Tensor:
        """x W^T + bias, (T, O), from a packed weight."""
        num_rows, width = x_TI.shape
        y_TO = x_TI.new_empty(num_rows, num_columns)
        x_TI = x_TI.contiguous()
        self._kernel("strop_gemm_packed")(
            ctypes.c_void_p(x_TI.data_ptr()),
            ctypes.c_void_p(packed),
            None if bias_O is None else ctypes.c_void_p(bias_O.data_ptr()),
            ctypes.c_void_p(y_TO.data_ptr()),
            *map(ctypes.c_int64, (num_rows, num_columns, width, *layout)),
            ctypes.c_int(torch.get_num_threads()),
        )
        return y_TO

    def _layer(self, attention: Attention, mlp: MLP) -> _Layer:
        q_norm, k_norm = attention.q_norm, attention.k_norm
        return _Layer(
            attention_norm=self._kept(attention.norm.weight),
            qkv=self._linear(attention.qkv),
            qkv_bias=self._kept(attention.qkv.bias),
            q_norm=self._kept(None if q_norm is None else q_norm.weight),
            k_norm=self._kept(None if k_norm is None else k_norm.weight),
            output=self._linear(attention.output),
            output_bias=self._kept(attention.output.bias),
            mlp_norm=self._kept(mlp.norm.weight),
            gate_up=self._linear(mlp.gate_up, (_LANES, mlp.gate_up.out_features // 2)),
            gate_up_bias=self._kept(mlp.gate_up.bias),
            down=self._linear(mlp.down),
            down_bias=self._kept(mlp.down.bias),
            has_rope=attention.has_rope,
        )

    def _kernel(self, name: str) -> Any:
        return getattr(self._kernels, name + self._suffix)

    def _packed_bytes(self, weight: Tensor) -> int:
        num_columns, width = weight.shape
        count = self._kernel("strop_packed_bytes")
        count.restype = ctypes.c_int64
        return count(*map(ctypes.c_int64, (num_columns // _GROUP, width)))

    def _kept(self, tensor: Tensor | None) -> int | None:
        if tensor is None:
            return None
        self._tensors.append(tensor.detach().contiguous())
        return self._tensors[-1].data_ptr()

    def _linear(self, linear: Linear, layout: tuple[int, int] = _SIDE_BY_SIDE) -> int:
        """A Linear's packed weight, which its own products without gradient use as well from now on, where they are the
        same to the bit: without an adapter, which is merged here and is not there."""
        packed = self._packed(linear.merged_weight(), layout)
        if linear.adapter is None and linear.in_features % _GROUP == 0 and linear.out_features % _GROUP == 0:
            bias = linear.bias if linear.bias is None else linear.bias.detach().contiguous()
            linear.arranged = lambda x_TI: self._product(x_TI, packed, bias, linear.out_features, layout)
            self._arranged.append(linear)
        return packed

    def _packed(self, weight: Tensor, layout: tuple[int, int] = _SIDE_BY_SIDE) -> int:
        """The weight in groups of 32 output columns: see `pack` in decode.cpp."""
        num_columns, width = weight.shape
        num_bytes = self._packed_bytes(weight)
        packed, self._unused = self._unused[:num_bytes], self._unused[num_bytes:]
        weight = weight.detach().contiguous()
        self._kernel("strop_pack")(
            *(ctypes.c_void_p(tensor.data_ptr()) for tensor in (weight, packed)),
            *map(ctypes.c_int64, (num_columns // _GROUP, width, *layout, torch.get_num_threads())),
        )
        self._tensors.append(packed)
        return packed.data_ptr()


def check_int8(model: Any, where: object = "", *, has_head: bool = True) -> None:
    """ValueError where this process computes in int8 and the model cannot: some of its products would be in bf16.

    `where` it is from, for the message. What does not compute in bf16 on the CPU is none of int8's.
    """
    from strop.models.decoder import Decoder

    if not products.are_in_int8() or model.dtype != torch.bfloat16 or model.device.type != "cpu":
        return
    if not isinstance(model, Decoder):
        prefix = f"{where}: " if where else ""
        raise ValueError(
            f'{prefix}dtype="int8" is not supported for models that run through transformers: use "bfloat16"'
        )
    check_int8_widths(model.config, where, has_head=has_head)


def check_int8_widths(config: ModelConfig, where: object = "", *, has_head: bool = True) -> None:
    """ValueError for a model that does not fill the registers of the 8-bit kernels, naming the widths that do not."""
    widths = {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "head_dim": config.head_dim,
        "the width of all queries, keys and values": _qkv_width(config),
        "vocab_size": config.vocab_size if has_head else 0,
    }
    if wrong := [f"{name} ({width})" for name, width in widths.items() if width % _GROUP]:
        raise ValueError(
            f'{where}{": " if where else ""}dtype="int8" needs {", ".join(wrong)} to be '
            f'{"multiples" if len(wrong) > 1 else "a multiple"} of {_GROUP}: use "bfloat16"'
        )


def can_decode(model: Decoder) -> bool:
    """Whether this model on this machine has a C++ decode step: bf16 on a CPU, and widths that fill its registers."""
    config = model.config
    is_bf16_on_cpu = model.dtype == torch.bfloat16 and model.device.type == "cpu"
    fits = all(width % _GROUP == 0 for width in (config.hidden_size, config.head_dim, _qkv_width(config)))
    return is_bf16_on_cpu and fits and config.intermediate_size % _LANES == 0 and library() is not None


def has_packed_head(model: Decoder) -> bool:
    """Whether a NativeDecode makes the logits: from the kernels of training, so that they are the same to the bit."""
    return model.config.vocab_size % _GROUP == 0


def _qkv_width(config: ModelConfig) -> int:
    return (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
