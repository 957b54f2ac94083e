"""LoRA: the base's weights stay as they are, and what is learned is a low-rank change to each (Hu et al. 2021, eq. 3).

    y = x W^T + scale * (x A^T) B^T,    scale = alpha / rank, or alpha / sqrt(rank) (rsLoRA, Kalajdzievski 2023)

The decoder's projections are fused; their adapter keeps one A and one B per projection that PEFT knows by name, so that
adapters.py can write its folders.
Shape suffixes: T tokens, D inputs, E outputs, R ranks of all parts together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from strop.models.decoder import Decoder
from strop.models.fused import Linear
from strop.models.huggingface import disk_names
from strop.models.interface import CausalLM
from strop.models.recording import Recording
from strop.types import PackedBatch

TARGET_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Which projections get an adapter, and of what size."""

    rank: int = 8
    """Rows of A and columns of B (r in PEFT)."""
    alpha: float = 16.0
    """The change is scaled by alpha / rank."""
    target_modules: tuple[str, ...] = TARGET_MODULES
    """Of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj; in every layer."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead, which keeps large ranks learning (Kalajdzievski 2023)."""
    dropout: float = 0.0
    """Only 0: the policy that samples and the one that learns must be the same function."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"lora.rank={self.rank} must be at least 1")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ValueError(f"lora.alpha={self.alpha} must be above 0 and finite")
        if self.dropout != 0:
            raise ValueError(f"lora.dropout={self.dropout} is not supported: leave it out, or set it to 0")
        if not self.target_modules:
            raise ValueError(f"lora.target_modules is empty: name some of {', '.join(TARGET_MODULES)}")
        unknown = [name for name in self.target_modules if name not in TARGET_MODULES]
        if unknown:
            raise ValueError(f"lora.target_modules: {unknown[0]!r} is not one of {', '.join(TARGET_MODULES)}")
        if len(set(self.target_modules)) < len(self.target_modules):
            raise ValueError(f"lora.target_modules names a module twice: {', '.join(self.target_modules)}")

    def scale(self, *, rank: int, alpha: float) -> float:
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank


class AdapterPart(nn.Module):
    """A (rank, D) and B (E, rank) of one projection, whose outputs begin at row `start` of the fused one."""

    def __init__(self, A: Tensor, B: Tensor, *, start: int, scale: float) -> None:
        super().__init__()
        self.A = nn.Parameter(A)
        self.B = nn.Parameter(B)
        self.start = start
        self.scale = scale


class Adapter(nn.Module):
    """The adapted projections of one fused Linear, by their names in PEFT. Rows of no projection do not change."""

    def __init__(self, parts: Mapping[str, AdapterPart], out_features: int) -> None:
        super().__init__()
        for name, part in sorted(parts.items(), key=lambda item: item[1].start):
            self.add_module(name, part)
        self.out_features = out_features

    def parts(self) -> dict[str, AdapterPart]:
        return {name: cast(AdapterPart, part) for name, part in self.named_children()}

    def matrices(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(down_RD, up_ER) with which all parts are one product, x down^T up^T; up is block diagonal and scaled.

        In the compute dtype, and differentiable with respect to A and B, whose own dtype stays float32.
        """
        parts = list(self.parts().values())
        down_RD = torch.cat([part.A for part in parts]).to(dtype)
        blocks, row = [], 0
        for part in parts:
            blocks += [part.B.new_zeros(part.start - row, 0), part.B * part.scale]
            row = part.start + part.B.shape[0]
        blocks.append(parts[0].B.new_zeros(self.out_features - row, 0))
        return down_RD, torch.block_diag(*(block for block in blocks if block.shape[0])).to(dtype)

    @torch.no_grad()
    def merged(self, weight_ED: Tensor) -> Tensor:
        """W + scale * B A, computed in the adapter's dtype and rounded once to the weight's. A new tensor."""
        merged_ED = weight_ED.detach().clone()
        for part in self.parts().values():
            rows = slice(part.start, part.start + part.B.shape[0])
            base = weight_ED[rows].to(part.A.dtype)  # the weight itself where the dtypes agree: not to be written to
            merged_ED[rows] = torch.addmm(base, part.B, part.A, alpha=part.scale)
        return merged_ED


def adapted_linears(model: Decoder) -> dict[str, Linear]:
    """The Linears that have an adapter, by their name in the model."""
    return {name: linear for name, linear in _linears(model).items() if linear.adapter is not None}


def projections(model: Decoder) -> dict[str, tuple[str, str, slice]]:
    """Hugging Face's module name -> (our Linear, the projection's own name, its rows there), for all of the decoder's.

    Example: "model.layers.3.mlp.up_proj" -> ("layers.3.mlp.gate_up", "up_proj", slice(I, 2 * I))
    """
    found: dict[str, tuple[str, str, slice]] = {}
    for name, linear in _linears(model).items():
        start = 0
        for disk_name, rows in disk_names(f"{name}.weight", model.config):
            module = disk_name.removesuffix(".weight")
            end = linear.out_features if rows is None else start + rows
            found[module] = name, module.rpartition(".")[2], slice(start, end)
            start = end
    return found


def attach(model: Decoder, parts: Mapping[str, tuple[Tensor, Tensor, float]]) -> None:
    """Give the model an adapter, {Hugging Face module: (A, B, scale)}, and freeze everything else.

    The adapters are float32 at least, whatever the base computes in.
    """
    places = projections(model)
    by_linear: dict[str, dict[str, AdapterPart]] = {}
    dtype = torch.promote_types(model.dtype, torch.float32)
    for module, (A, B, scale) in parts.items():
        name, leaf, rows = places[module]
        part = AdapterPart(A.to(model.device, dtype), B.to(model.device, dtype), start=rows.start, scale=scale)
        by_linear.setdefault(name, {})[leaf] = part
    model.requires_grad_(False)
    linears = _linears(model)
    for name, group in by_linear.items():
        linears[name].adapter = Adapter(group, linears[name].out_features)


def fresh_parts(model: Decoder, config: LoraConfig, *, seed: int) -> dict[str, tuple[Tensor, Tensor, float]]:
    """What `attach` takes, at the beginning: A from U(-1/sqrt(D), 1/sqrt(D)) as in PEFT, B zero, so nothing changes."""
    generator = torch.Generator().manual_seed(seed)
    parts: dict[str, tuple[Tensor, Tensor, float]] = {}
    linears = _linears(model)
    for module, (name, leaf, rows) in projections(model).items():
        if leaf in config.target_modules:
            width = linears[name].in_features
            A = (2 * torch.rand(config.rank, width, generator=generator) - 1) / math.sqrt(width)
            B = torch.zeros(rows.stop - rows.start, config.rank)
            parts[module] = A, B, config.scale(rank=config.rank, alpha=config.alpha)
    return parts


def detach(model: Decoder) -> None:
    """Take the adapter away: the base as it was. Nothing is trainable afterwards."""
    for linear in adapted_linears(model).values():
        linear.adapter = None
    model.adapter = None


@torch.no_grad()
def fold(model: Decoder) -> None:
    """Add the adapter to the weights for good, one Linear at a time, in the memory of the base."""
    for linear in adapted_linears(model).values():
        linear.weight.copy_(linear.merged_weight())
    detach(model)


@contextmanager
def merged(model: Decoder) -> Iterator[None]:
    """While it is entered the weights contain the adapter; afterwards the base has its own bits back.

    The base is put aside, not computed back: W + BA - BA is not W in floating point. It costs a second copy of the
    adapted weights.
    """
    aside = {name: (linear.weight.data, linear.adapter) for name, linear in adapted_linears(model).items()}
    linears = _linears(model)
    try:
        for name in aside:
            linears[name].weight.data = linears[name].merged_weight()
            linears[name].adapter = None
        yield
    finally:
        for name, (weight, adapter) in aside.items():
            linears[name].weight.data, linears[name].adapter = weight, adapter


class Reference:
    """The policy's base as a model of its own, or the base with another adapter: no second copy of the weights.

    It shows the parts of a CausalLM that log-probabilities need. Its parameters are those of its own adapter, kept
    apart from the policy's; an adapter whose B are all zero is left out of the computation.
    """

    def __init__(self, policy: Decoder, parts: Mapping[str, tuple[Tensor, Tensor, float]] | None = None) -> None:
        """parts: the reference's adapter, as for `attach`; None = the base alone. Both have the policy's shapes."""
        self._policy = policy
        self._adapters: dict[str, Adapter] = {}
        places = projections(policy)
        given = {(places[module][0], places[module][1]): part for module, part in (parts or {}).items()}
        for name, linear in adapted_linears(policy).items():
            assert linear.adapter is not None
            own: dict[str, AdapterPart] = {}
            for leaf, part in linear.adapter.parts().items():
                A, B, _ = given.get((name, leaf), (torch.zeros_like(part.A), torch.zeros_like(part.B), part.scale))
                A, B = A.to(part.A, copy=True), B.to(part.B, copy=True)
                own[leaf] = AdapterPart(A, B, start=part.start, scale=part.scale)
            self._adapters[name] = Adapter(own, linear.out_features).requires_grad_(False)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name, adapter in self._adapters.items():
            yield from adapter.named_parameters(prefix=f"{name}.adapter")

    @torch.no_grad()
    def hidden(self, batch: PackedBatch) -> Tensor:
        linears = adapted_linears(self._policy)
        is_base = not any(bool(value.any()) for name, value in self.named_parameters() if name.endswith(".B"))
        own = {name: linear.adapter for name, linear in linears.items()}
        try:
            for name, linear in linears.items():
                linear.adapter = None if is_base else self._adapters[name]
            return self._policy.hidden(batch)
        finally:
            for name, linear in linears.items():
                linear.adapter = own[name]

    def hidden_and_head(self, batch: PackedBatch, recording: Recording | None = None) -> tuple[Tensor, Tensor]:
        assert recording is None  # new_recording makes none
        return self.hidden(batch), self._policy.lm_head_weight

    def __getattr__(self, name: str) -> Any:
        return getattr(self._policy, name)


def reference_of(policy: Decoder, parts: Mapping[str, tuple[Tensor, Tensor, float]] | None = None) -> CausalLM:
    return cast(CausalLM, Reference(policy, parts))


def _linears(model: Decoder) -> dict[str, Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Linear)}
