"""The decoder-only transformer: one readable file for every supported family.

Shape suffixes: T packed tokens, S cache slots, D hidden width, N query heads, K key-value heads, H head width,
P prompts, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from strop.models.attention import AttentionPlan, rotate
from strop.models.cache import KVCache
from strop.models.checkpointing import Checkpointing, recomputed
from strop.models.config import ModelConfig, RopeScaling
from strop.models.footprint import num_recomputed
from strop.models.fused import (
    Known,
    Linear,
    can_pack,
    gated,
    lora_linear,
    norm_linear,
    recomputed_mlp,
    rms_norm,
    swiglu_linear,
    tied_embedding,
)
from strop.models.interface import Cache
from strop.models.kernel_attention import has_kernels, kernel_attention_linear
from strop.models.native import NativeDecode, can_decode, check_int8
from strop.native import kernels as native
from strop.native.kernels import rotate_
from strop.types import PackedBatch, Segment

if TYPE_CHECKING:
    from strop.models.adapters import AdapterOrigin
    from strop.models.recording import RecordedLayer, Recording


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> Tensor:
    """Angle per position of each rotary pair, float32, shape (head_dim / 2,) (Su et al. 2021, eq. 15).

    Llama 3's scaling divides wavelengths longer than original / low_freq_factor by `factor`, keeps those shorter than
    original / high_freq_factor, and blends in between.
    """
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2, device="cpu").float() / head_dim)
    if scaling is None:
        return frequencies
    wavelengths = 2 * math.pi / frequencies
    original = scaling.original_max_position_embeddings
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = ((original / wavelengths - low) / (high - low)).clamp(0, 1)
    return keep * frequencies + (1 - keep) * frequencies / scaling.factor


class RMSNorm(nn.Module):
    """x / rms(x) * weight, with the mean of squares in float32 (Zhang and Sennrich 2019, eq. 4)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    """Grouped-query attention of the normalised input, with queries, keys and values from one fused projection."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.scale = config.head_dim**-0.5
        self.layer = layer
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.has_rope = layer not in config.layers_without_rope
        width = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        self.qkv = Linear(config.hidden_size, width, bias=config.qkv_bias)
        self.output = Linear(config.num_heads * config.head_dim, config.hidden_size, bias=config.output_bias)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None

    def project(self, x_TD: Tensor, known: Known | None = None) -> Tensor:
        """Queries, keys and values side by side, not yet rotated, (T, N + 2 K, H)."""
        norm, qkv = self.norm, self.qkv
        projected = norm_linear(x_TD, norm.weight, qkv.weight, qkv.bias, norm.eps, qkv.lora(), known)
        return projected.view(x_TD.shape[0], -1, self.head_dim)

    def _rotated_(self, qkv: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """The same heads, queries and keys turned by their angles; in place, and as in training, where there is a
        kernel."""
        num_rotated = self.num_heads + self.num_kv_heads
        if not self.has_rope:
            return qkv
        if has_kernels(qkv):
            rotate_(qkv, *rope, num_heads=num_rotated)
            return qkv
        qk, v = qkv.split([num_rotated, self.num_kv_heads], dim=1)
        return torch.cat([rotate(qk, *rope), v], dim=1)

    def _split(self, qkv: Tensor) -> tuple[Tensor, ...]:
        return qkv.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)

    def _normed_heads(self, qkv: Tensor) -> Tensor:
        if self.q_norm is None or self.k_norm is None:
            return qkv
        q, k, v = self._split(qkv)
        return torch.cat([self.q_norm(q), self.k_norm(k), v], dim=1)

    def forward(
        self, x_TD: Tensor, rope: tuple[Tensor, Tensor], plan: AttentionPlan, recorded: RecordedLayer | None = None
    ) -> Tensor:
        output, own_rope = self.output, rope if self.has_rope else None
        if recorded is not None:
            qkv = self.project(x_TD, Known(recorded.projection_TE))
            options = (qkv, own_rope, self.num_kv_heads, plan, self.scale, output.weight, output.bias)
            return kernel_attention_linear(*options, Known(recorded.attended_TD))
        options = (self._normed_heads(self.project(x_TD)), own_rope, self.num_kv_heads, self.scale)
        if output.adapter is None:
            return plan.attend_linear_(*options, output.weight, output.bias)
        return output(plan.attend_projected_(*options).flatten(1))

    def prefill(
        self, x_TD: Tensor, rope: tuple[Tensor, Tensor], plan: AttentionPlan, cache: KVCache, pieces: Sequence[_Piece]
    ) -> Tensor:
        projected = self.qkv.infer(self.norm(x_TD)).view(x_TD.shape[0], -1, self.head_dim)
        qkv = self._rotated_(self._normed_heads(projected), rope)
        q, k, v = self._split(qkv)
        for piece in pieces:
            cache.write(self.layer, piece.slot, k[piece.rows], v[piece.rows], piece.start)
        if cache.recording is not None:
            cache.recording.write(self.layer, projection=qkv.flatten(1))
        if plan.num_tokens == x_TD.shape[0]:
            return self.output.infer(plan.attend_projected_(qkv, None, self.num_kv_heads, self.scale).flatten(1))
        # Before each piece, the keys and values of its prompt that the cache has already; no query looks from there.
        wide_q, wide_k, wide_v = (x.new_zeros(plan.num_tokens, *x.shape[1:]) for x in (q, k, v))
        for piece in pieces:
            wide_q[piece.wide_rows] = q[piece.rows]
            before = slice(piece.wide_rows.start - piece.start, piece.wide_rows.stop)
            wide_k[before] = cache.keys[self.layer, piece.slot, :, : piece.end].transpose(0, 1)
            wide_v[before] = cache.values[self.layer, piece.slot, :, : piece.end].transpose(0, 1)
        out = plan.attend(wide_q, wide_k, wide_v, self.scale)
        return self.output.infer(torch.cat([out[piece.wide_rows] for piece in pieces]).flatten(1))

    def decode(self, x_SD: Tensor, rope: tuple[Tensor, Tensor], cache: KVCache, step: _DecodeStep) -> Tensor:
        """One query per slot against that slot's cache.

        With a single query a batched matmul beats the fused attention kernel, whose tiles it cannot fill.
        """
        num_slots = x_SD.shape[0]
        qkv = self._normed_heads(self.qkv.decode(self.norm(x_SD)).view(num_slots, -1, self.head_dim))
        q, k, v = self._split(self._rotated_(qkv, rope))
        keys_SKTH, values_SKTH = cache.keys[self.layer, :num_slots], cache.values[self.layer, :num_slots]
        keys_SKTH[step.slots_S, :, step.positions_S] = k
        values_SKTH[step.slots_S, :, step.positions_S] = v
        # One batch entry per slot and key-value head, whose G query heads are the rows of its matrix.
        q_BGH = q.reshape(num_slots * self.num_kv_heads, -1, self.head_dim)
        keys_BTH, values_BTH = keys_SKTH.flatten(0, 1), values_SKTH.flatten(0, 1)
        scores_BGT = torch.baddbmm(step.bias_B1T, q_BGH, keys_BTH.transpose(1, 2), alpha=self.scale)
        return self.output.decode(torch.bmm(scores_BGT.softmax(-1), values_BTH).view(num_slots, -1))


class MLP(nn.Module):
    """down(silu(gate(n)) * up(n)) of the normalised input n, gate and up fused (Shazeer 2020, SwiGLU)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.is_recomputed = False
        """Whether gate and up are computed again in the backward pass; Decoder.set_checkpointing decides."""
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.gate_up = Linear(config.hidden_size, 2 * config.intermediate_size, bias=config.mlp_bias)
        self.down = Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x_TD: Tensor, recorded: RecordedLayer | None = None) -> Tensor:
        fused = self.gate_up
        known = None if recorded is None else Known(recorded.mlp_TD)
        if self.is_recomputed and fused.adapter is None and self.down.adapter is None:
            weights = (self.norm.weight, fused.weight, fused.bias, self.down.weight, self.down.bias)
            return recomputed_mlp(x_TD, *weights, self.norm.eps, known)
        known_gate_up = None if recorded is None else Known(recorded.gate_up_TI)
        options = (self.norm.weight, fused.weight, fused.bias, self.norm.eps, fused.lora())
        gate_up = norm_linear(x_TD, *options, known_gate_up)
        return swiglu_linear(gate_up, self.down.weight, self.down.bias, self.down.lora(), known)

    def prefill(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """(As forward, without gradient; gate and up)."""
        gate_up_TI = self.gate_up.infer(self.norm(x_TD))
        return self.down.infer(gated(gate_up_TI)), gate_up_TI

    def decode(self, x_SD: Tensor) -> Tensor:
        """As forward, for a few rows and without gradient."""
        gate, up = self.gate_up.decode(self.norm(x_SD)).chunk(2, dim=-1)
        return self.down.decode(F.silu(gate).mul_(up))


class Layer(nn.Module):
    """Attention and MLP, each reading the normalised residual stream and adding to it."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention = Attention(config, layer)
        self.mlp = MLP(config)
        self.is_recomputed = False
        """Whether all of it is computed again in the backward pass; Decoder.set_checkpointing decides."""

    def forward(
        self, x_TD: Tensor, rope: tuple[Tensor, Tensor], plan: AttentionPlan, recorded: RecordedLayer | None = None
    ) -> Tensor:
        if self.is_recomputed:
            return recomputed(lambda x_TD: self._forward(x_TD, rope, plan), x_TD, list(self.parameters()))
        return self._forward(x_TD, rope, plan, recorded)

    def _forward(
        self, x_TD: Tensor, rope: tuple[Tensor, Tensor], plan: AttentionPlan, recorded: RecordedLayer | None = None
    ) -> Tensor:
        # In place: nobody else needs the two products, and two more tensors of this size would leave holes in the heap.
        x_TD = self.attention(x_TD, rope, plan, recorded).add_(x_TD)
        return self.mlp(x_TD, recorded).add_(x_TD)


@dataclass(frozen=True, slots=True)
class _Piece:
    """Positions [start, end) of the prompt in a cache slot, and where they lie in one prefill."""

    slot: int
    start: int
    end: int
    rows: slice
    """Of the packed pieces."""
    wide_rows: slice
    """Of the packed pieces with, before each, what its slot holds already."""


class _DecodeStep:
    """What every layer of one decode step shares: where each slot writes, and how far it may look."""

    def __init__(self, cache: KVCache, num_active: int) -> None:
        _, _, num_kv_heads, width, _ = cache.keys.shape
        device = cache.keys.device
        self.positions_S = cache.lengths_S[:num_active]
        self.slots_S = torch.arange(num_active, device=device)
        is_future_ST = torch.arange(width, device=device)[None, :] > self.positions_S[:, None]
        bias_ST = torch.zeros(num_active, width, dtype=cache.keys.dtype, device=device)
        bias_ST.masked_fill_(is_future_ST, float("-inf"))
        self.bias_B1T = bias_ST.repeat_interleave(num_kv_heads, dim=0)[:, None]


class Decoder(nn.Module):
    """A causal language model over packed tokens. It returns hidden states; the caller decides which get a logit.

    Weights of one kind are fused in memory (queries, keys and values; gate and up) and split again on disk.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(
            config.vocab_size, config.hidden_size, _weight=torch.empty(config.vocab_size, config.hidden_size)
        )
        if not self.embedding.weight.is_meta:  # there it would import torch's compiler: 40 MB and a second
            nn.init.normal_(self.embedding.weight)
        layers = nn.ModuleList(Layer(config, index) for index in range(config.num_layers))
        self.layers = cast(Sequence[Layer], layers)
        self.final_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.head_bias: Tensor | None = None
        self.logit_softcap: float | None = None
        self.source_config: dict[str, Any] | None = None
        """config.json and generation_config.json of the folder that it was loaded from, kept for the next one."""
        self.source_generation_config: dict[str, Any] | None = None
        self._native: NativeDecode | None = None
        self._native_room: Tensor | None = None
        self.adapter: AdapterOrigin | None = None
        """Where the LoRA adapter in its Linears belongs (adapters.py); None without one."""
        self.head = None if config.tie_embeddings else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        # Not a buffer: casting the model to bf16 must leave the angles exact.
        self._frequencies_H = rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
        self.set_checkpointing("some")

    def set_checkpointing(self, what: Checkpointing) -> None:
        """How much the backward passes from now on compute again; the gradients stay the same to the bit."""
        first = self.config.num_layers - num_recomputed(self.config)
        for index, layer in enumerate(self.layers):
            layer.is_recomputed = what == "all"
            layer.mlp.is_recomputed = what == "some" and index >= first
        self._keeps_attention = what != "some"

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    @property
    def lm_head_weight(self) -> Tensor:
        """(V, D); the embedding itself when they are tied."""
        return self.embedding.weight if self.head is None else self.head.weight

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V). For training use objectives.linear_logprobs, which spares what it can of it."""
        logits = None if self._native is None else self._native.logits(hidden)
        if logits is None and native.has_kernels(hidden):
            rows = lora_linear(hidden.reshape(-1, hidden.shape[-1]), self.lm_head_weight, None, None)
            logits = rows.view(*hidden.shape[:-1], -1)
        return F.linear(hidden, self.lm_head_weight) if logits is None else logits

    def hidden(self, batch: PackedBatch) -> Tensor:
        """Hidden states after the final norm, shape (T, D); the head turns position t into the law of labels_T[t]."""
        return self._hidden(self.embedding(batch.token_ids_T), batch)

    def hidden_and_head(self, batch: PackedBatch, recording: Recording | None = None) -> tuple[Tensor, Tensor]:
        """(hidden(batch), lm_head_weight), for a loss that uses both: tied weights then have one dense gradient.

        recording: of the rollout that made the batch with the weights of now; the layers' results are taken from it.
        """
        if self.head is not None:
            return self._hidden(self.embedding(batch.token_ids_T), batch, recording), self.head.weight
        x_TD, head_VD = tied_embedding(batch.token_ids_T, self.embedding.weight)
        return self._hidden(x_TD, batch, recording), head_VD

    def _hidden(self, x_TD: Tensor, batch: PackedBatch, recording: Recording | None = None) -> Tensor:
        plan = AttentionPlan(batch.segments, dtype=self.dtype, device=self.device, keeps_output=self._keeps_attention)
        rope = self._rope(batch.position_ids_T())
        if recording is None:
            for layer in self.layers:
                x_TD = layer(x_TD, rope, plan)
        else:
            assert batch.recorded_rows_T is not None
            for layer, recorded in zip(self.layers, recording.layers(batch.recorded_rows_T), strict=True):
                x_TD = layer(x_TD, rope, plan, recorded)
        return self.final_norm(x_TD)

    def new_cache(self, *, num_slots: int, max_length: int) -> KVCache:
        return KVCache(self.config, num_slots=num_slots, max_length=max_length, dtype=self.dtype, device=self.device)

    @torch.no_grad()
    def prefill(
        self,
        prompts: Sequence[Sequence[int]],
        cache: Cache,
        slots: Sequence[int],
        starts: Sequence[int] | None = None,
    ) -> Tensor:
        """Run prompts into their cache slots; returns the last position's hidden state of each, (P, D).

        starts are the tokens of each prompt that its slot holds already, from the prefill before: `prompts` are then
        what comes next of each. None is whole prompts.
        """
        assert isinstance(cache, KVCache)
        pieces: list[_Piece] = []
        place = wide_place = 0
        for prompt, slot, start in zip(prompts, slots, starts or [0] * len(prompts), strict=True):
            size, wide_place = len(prompt), wide_place + start
            rows, wide_rows = slice(place, place + size), slice(wide_place, wide_place + size)
            pieces.append(_Piece(slot, start, start + size, rows, wide_rows))
            place, wide_place = place + size, wide_place + size
        segments = [Segment(trunk=piece.start, branches=(piece.end - piece.start,)) for piece in pieces]
        token_ids_T = torch.tensor([token for prompt in prompts for token in prompt], device=self.device)
        position_ids_T = torch.cat([torch.arange(piece.start, piece.end) for piece in pieces]).to(self.device)
        cache.fit(max(int(cache.lengths_S.max()), *(piece.end for piece in pieces)))
        plan = AttentionPlan(segments, dtype=self.dtype, device=self.device, only_branches=True)
        rope = self._rope(position_ids_T)
        x_TD = self.embedding(token_ids_T)
        for index, layer in enumerate(self.layers):
            attended_TD = layer.attention.prefill(x_TD, rope, plan, cache, pieces)
            x_TD = x_TD + attended_TD
            mlp_TD, gate_up_TI = layer.mlp.prefill(x_TD)
            x_TD = x_TD + mlp_TD
            if cache.recording is not None:
                cache.recording.write(index, attended=attended_TD, mlp=mlp_TD, gate_up=gate_up_TI)
            del gate_up_TI  # the next layer's attention has a use for its room
        for piece in pieces:
            cache.lengths_S[piece.slot] = piece.end
        return self.final_norm(x_TD[torch.tensor([piece.rows.stop - 1 for piece in pieces], device=self.device)])

    @contextmanager
    def decoding(self, num_rows: int) -> Iterator[None]:
        """While it is entered, decode_step works from packed copies of the layers' weights, where that is faster.

        A LoRA adapter is merged into them: two more products per projection and step would cost more than that. They
        are as large as the weights and do not follow updates: enter it for one rollout, not for longer. Where this
        machine has the C++ decode step, that is what uses them.
        """
        if can_decode(self):
            try:
                self._native = NativeDecode(self, self._native_room)
                yield
            finally:
                if self._native is not None:
                    self._native.close()
                # Fresh memory costs as much as filling it; a model in training has a use for that of its own.
                is_frozen = not any(parameter.requires_grad for parameter in self.parameters())
                self._native_room = self._native.room if self._native is not None and is_frozen else None
                self._native = None
            return
        linears = [module for module in self.modules() if isinstance(module, Linear)]
        linears = [linear for linear in linears if can_pack(linear.weight) or linear.adapter is not None]
        try:
            for linear in linears:
                linear.pack(num_rows)
            yield
        finally:
            for linear in linears:
                linear.unpack()

    def release(self) -> None:
        """Give back the room that a frozen model keeps for its packed weights, until the next decoding()."""
        self._native_room = None

    @torch.no_grad()
    def decode_step(self, token_ids_S: Tensor, cache: Cache) -> Tensor:
        """Append one token to each of the slots [0, S) and return their hidden states, (S, D)."""
        assert isinstance(cache, KVCache)
        num_active = token_ids_S.shape[0]
        cache.fit(int(cache.lengths_S.max()) + 1)
        positions_S = cache.lengths_S[:num_active]
        rope = self._rope(positions_S)
        x_SD = self.embedding(token_ids_S)
        if self._native is not None:
            hidden_SD = self._native.step(x_SD, rope, cache, positions_S)
            positions_S += 1
            return hidden_SD
        step = _DecodeStep(cache, num_active)
        for layer in self.layers:
            x_SD = x_SD + layer.attention.decode(x_SD, rope, cache, step)
            x_SD = x_SD + layer.mlp.decode(x_SD)
        positions_S += 1
        return self.final_norm(x_SD)

    def _rope(self, position_ids_T: Tensor) -> tuple[Tensor, Tensor]:
        """(cos, sin), each (T, 1, H) in the model's dtype; angles are computed in float32."""
        angles = position_ids_T[:, None].float() * self._frequencies_H.to(position_ids_T.device)
        angles = torch.cat([angles, angles], dim=-1)[:, None]
        return angles.cos().to(self.dtype), angles.sin().to(self.dtype)


def uninitialised(build: Any, config: ModelConfig, *, dtype: torch.dtype, device: torch.device | str) -> Any:
    """build(config), a module, with room for its parameters and whatever values lay there.

    nn.Module.to_empty does the same through torch's reference operations, which import sympy: 40 MB and a second.
    """
    with torch.device("meta"):
        module = build(config)
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            room = torch.empty(parameter.shape, dtype=dtype, device=device)
            setattr(part, name, nn.Parameter(room, requires_grad=parameter.requires_grad))
    return module


def init_model(config: ModelConfig, *, seed: int, dtype: torch.dtype = torch.float32) -> Decoder:
    """A decoder with fresh weights: N(0, 0.02), and N(0, 0.02 / sqrt(2 L)) for projections into the residual stream.

    The narrower residual projections keep the stream's variance from growing with depth (Radford et al. 2019).
    """
    generator = torch.Generator().manual_seed(seed)
    model = Decoder(config)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            continue
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
            continue
        is_residual = name.endswith(("attention.output.weight", "mlp.down.weight"))
        nn.init.normal_(
            parameter, std=0.02 / math.sqrt(2 * config.num_layers) if is_residual else 0.02, generator=generator
        )
    model = model.to(dtype)
    check_int8(model)
    return model
