"""Attention over packed trees: no token attends outside its own trunk and branch, and no padding reaches a GEMM."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from strop.models.fused import lora_linear
from strop.models.kernel_attention import has_kernels, kernel_attention, kernel_attention_linear
from strop.types import Segment

MAX_PADDING = 1.25
"""Rows may share a call while padding them to the longest costs at most this factor."""

QUERY_BLOCK = 256
"""On a CPU longer rows are cut into query blocks, each a branch whose trunk is all that came before it."""

MAX_QUERIES = 1024
"""Queries of sister branches in one tree on a CPU: it bounds the scores against a long trunk."""

MAX_SCORES = 2**19
"""Attention scores held at a time on a CPU: 2 MiB in float32, so that they stay in the cache between operations."""

MAX_RECOMPUTED_KEYS = 128
"""Where queries see at most so many keys on average, attention's output costs 1 % of a step to compute again, and
that is done instead of keeping it. The cost grows with the keys; the memory saved does not."""

_Item = TypeVar("_Item")


@dataclass(frozen=True)
class _Row:
    """Packed positions [start, start + length) that attend to each other causally, after the positions in context."""

    start: int
    length: int
    context: tuple[range, ...] = ()


@dataclass(frozen=True)
class _Call:
    """P trees of one trunk length U and one branch count G, their branches padded to T tokens.

    A branch's queries see the whole trunk and their own branch up to themselves. Right padding needs no mask of its
    own: causality keeps real queries from seeing it, and what padded queries compute is dropped.
    """

    trunk_PU: Tensor
    branch_PGT: Tensor
    """Packed positions; padding repeats the branch's last one."""
    is_padding_PGT: Tensor | None
    """None where there is none."""
    kept: Tensor | None
    """Indices into the flattened P * G * T that are not padding; None keeps all."""
    positions: Tensor
    """The packed position of each kept one."""
    bias_TT: Tensor
    """0 where attention inside a branch is allowed, -inf elsewhere."""

    def keep(self, rows: Tensor) -> Tensor:
        return rows if self.kept is None else rows.index_select(0, self.kept)


class AttentionPlan:
    """Which packed positions attend to which, worked out once per batch and used by every layer.

    Attention runs on small padded blocks gathered from the packed rows, while all other layers see packed tokens only.

    With only_branches trunks are looked at and do not look: their rows of the output are left as they are, undefined.
    With keeps_output no backward pass computes attention again, however little it would cost.
    """

    def __init__(
        self,
        segments: Sequence[Segment],
        *,
        dtype: torch.dtype,
        device: torch.device,
        only_branches: bool = False,
        keeps_output: bool = False,
    ) -> None:
        self.segments, self._dtype, self._device, self._only_branches = segments, dtype, device, only_branches
        self._keeps_output = keeps_output
        self.num_tokens = sum(map(len, segments))

    @cached_property
    def calls(self) -> list[_Call]:
        trees: dict[tuple[int, int], list[tuple[_Row, ...]]] = defaultdict(list)  # by (trunk length, branch count)
        start = 0
        for segment in self.segments:
            for rows in self._trees(start, segment, QUERY_BLOCK if self._device.type == "cpu" else None):
                trees[sum(map(len, rows[0].context)), len(rows)].append(rows)
            start += len(segment)
        return [
            _call(group, dtype=self._dtype, device=self._device)
            for members in trees.values()
            for group in bucket_by_length(members, lambda rows: max(row.length for row in rows))
        ]

    @cached_property
    def native_rows(self) -> tuple[Tensor, Tensor]:
        """What strop.native.kernels.attention_backward calls rows and segments."""
        rows: list[tuple[int, int, int, int]] = []
        firsts = [0]
        start = 0
        for segment in self.segments:
            whole = self._trees(start, segment, None)
            rows.extend(
                (row.start, row.length, start, segment.trunk if row.context else 0) for tree in whole for row in tree
            )
            start += len(segment)
            if len(rows) > firsts[-1]:
                firsts.append(len(rows))
        return torch.tensor(rows, dtype=torch.int64), torch.tensor(firsts, dtype=torch.int64)

    @cached_property
    def recomputes_output(self) -> bool:
        if self._keeps_output:
            return False
        rows = self.native_rows[0]
        length, trunk = rows[:, 1], rows[:, 3]
        pairs = int((length * trunk + length * (length + 1) // 2).sum())
        return pairs <= MAX_RECOMPUTED_KEYS * self.num_tokens

    def _trees(self, start: int, segment: Segment, query_block: int | None) -> list[tuple[_Row, ...]]:
        trees = _trees(start, segment, query_block)
        return [rows for rows in trees if rows[0].start >= start + segment.trunk] if self._only_branches else trees

    def attend(self, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, scale: float) -> Tensor:
        """Attention outputs, shape (T, N, H). Query heads share key-value heads in consecutive groups of N / K."""
        if has_kernels(q_TNH):
            return kernel_attention(torch.cat([q_TNH, k_TKH, v_TKH], dim=1), None, k_TKH.shape[1], self, scale)
        if q_TNH.device.type == "cpu":
            return _TreeAttention.apply(q_TNH, k_TKH, v_TKH, self.calls, scale)
        return fused_kernel_attention(q_TNH, k_TKH, v_TKH, self.calls, scale)

    def attend_projected_(
        self, qkv_TXH: Tensor, rope: tuple[Tensor, Tensor] | None, num_kv_heads: int, scale: float
    ) -> Tensor:
        """attend on a projection whose X = N + 2K heads are queries, keys and values, the first two still unrotated.

        The projection may be overwritten: nothing else may need it.
        """
        if has_kernels(qkv_TXH):
            return kernel_attention(qkv_TXH, rope, num_kv_heads, self, scale)
        num_rotated = qkv_TXH.shape[1] - num_kv_heads
        qk, v = qkv_TXH.split([num_rotated, num_kv_heads], dim=1)
        if rope is not None:
            qk = rotate(qk, *rope)
        q, k = qk.split([num_rotated - num_kv_heads, num_kv_heads], dim=1)
        return self.attend(q, k, v, scale)

    def attend_linear_(
        self,
        qkv_TXH: Tensor,
        rope: tuple[Tensor, Tensor] | None,
        num_kv_heads: int,
        scale: float,
        weight: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        """attend_projected_, then W x + bias, shape (T, D). What attend_projected_ gives is kept only where making it
        again in the backward pass would take long."""
        has_gradient = torch.is_grad_enabled() and qkv_TXH.requires_grad
        if has_gradient and has_kernels(qkv_TXH) and self.recomputes_output:
            return kernel_attention_linear(qkv_TXH, rope, num_kv_heads, self, scale, weight, bias)
        return lora_linear(self.attend_projected_(qkv_TXH, rope, num_kv_heads, scale).flatten(1), weight, bias, None)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x with each pair (x[i], x[i + H/2]) turned by its angle. x (..., heads, H); cos, sin (..., 1, H), in x's dtype.

    The pairing is Hugging Face's half-split one, so checkpoints need no permutation.
    """
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def bucket_by_length(items: Sequence[_Item], length: Callable[[_Item], int]) -> list[list[_Item]]:
    """Groups of items of like length, shortest first: padding each to its group's longest stays within MAX_PADDING."""
    buckets: list[list[_Item]] = []
    total = 0
    for item in sorted(items, key=length):
        total += length(item)
        if buckets and length(item) * (len(buckets[-1]) + 1) <= MAX_PADDING * total:
            buckets[-1].append(item)
        else:
            buckets.append([item])
            total = length(item)
    return buckets


def _trees(start: int, segment: Segment, query_block: int | None) -> list[tuple[_Row, ...]]:
    """A segment as trees of rows that fit one call each: sisters of like length together, long rows cut into blocks."""
    trunk = range(start, start + segment.trunk)
    branches = []
    position = trunk.stop
    for length in segment.branches:
        branches.append(_Row(position, length, (trunk,) if trunk else ()))
        position += length
    whole = [[_Row(start, segment.trunk)]] if segment.trunk else []
    whole += bucket_by_length([row for row in branches if row.length], lambda row: row.length)
    if not segment.trunk:
        whole = [[row] for rows in whole for row in rows]
    if query_block is None:
        return [tuple(rows) for rows in whole]
    trees = []
    for rows in whole:
        first = [_Row(row.start, min(row.length, query_block), row.context) for row in rows]
        step = max(1, MAX_QUERIES // first[-1].length)  # the last is the longest
        trees.extend(tuple(first[begin : begin + step]) for begin in range(0, len(first), step))
        for row in rows:
            for offset in range(query_block, row.length, query_block):
                before = range(row.start, row.start + offset)
                trees.append((_Row(before.stop, min(row.length - offset, query_block), (*row.context, before)),))
    return trees


def _call(trees: Sequence[tuple[_Row, ...]], *, dtype: torch.dtype, device: torch.device) -> _Call:
    trunk_PU = torch.tensor([[i for part in rows[0].context for i in part] for rows in trees], dtype=torch.int64)
    starts_PG = torch.tensor([[row.start for row in rows] for rows in trees])[..., None]
    lengths_PG = torch.tensor([[row.length for row in rows] for rows in trees])[..., None]
    width = int(lengths_PG.max())
    offset_T = torch.arange(width)
    branch_PGT = starts_PG + offset_T.minimum(lengths_PG - 1)
    is_padding_PGT = offset_T >= lengths_PG
    has_padding = bool(is_padding_PGT.any())
    kept = (~is_padding_PGT).flatten().nonzero().squeeze(1)
    bias_TT = torch.full((width, width), float("-inf"), dtype=_accumulation_dtype(dtype)).triu(1)
    return _Call(
        trunk_PU=trunk_PU.to(device),
        branch_PGT=branch_PGT.to(device),
        is_padding_PGT=is_padding_PGT.to(device) if has_padding else None,
        kept=kept.to(device) if has_padding else None,
        positions=branch_PGT.flatten()[kept].to(device),
        bias_TT=bias_TT.to(device),
    )


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def fused_kernel_attention(q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, calls: Sequence[_Call], scale: float) -> Tensor:
    """The same through torch's fused kernel, which is the fast one on a GPU; trunks are repeated for every branch."""
    output = torch.empty_like(q_TNH)
    for call in calls:
        _, num_branches, width = call.branch_PGT.shape
        rows_BT = call.branch_PGT.view(-1, width)
        q = q_TNH[rows_BT].transpose(1, 2)
        trunk_BU = call.trunk_PU.repeat_interleave(num_branches, dim=0)
        keys_BK = torch.cat([trunk_BU, rows_BT], dim=1)
        k, v = k_TKH[keys_BK].transpose(1, 2), v_TKH[keys_BK].transpose(1, 2)
        if trunk_BU.shape[1]:
            bias = F.pad(call.bias_TT, (trunk_BU.shape[1], 0)).to(q.dtype)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale, enable_gqa=True)
        else:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        output = output.index_copy(0, call.positions, call.keep(out.transpose(1, 2).flatten(0, 1)))
    return output


class _Blocks:
    """Gathers one call's packed rows into contiguous blocks, and scatters results back.

    B = P * K of them, one per tree and key-value head, so that the group's g query heads are rows of one matrix:
    queries (B, G, g * T, H), own keys (B, G, T, H), trunk keys (B, U, H).
    """

    def __init__(self, call: _Call, num_kv_heads: int) -> None:
        self.call, self.num_kv_heads = call, num_kv_heads
        self.num_trees, self.num_branches, self.width = call.branch_PGT.shape

    def queries(self, x_TNH: Tensor) -> Tensor:
        x = x_TNH[self.call.branch_PGT].unflatten(3, (self.num_kv_heads, -1))
        x = x.permute(0, 3, 1, 4, 2, 5).contiguous()
        return x.view(-1, self.num_branches, x.shape[3] * self.width, x.shape[5])

    def own(self, x_TKH: Tensor) -> Tensor:
        return x_TKH[self.call.branch_PGT].permute(0, 3, 1, 2, 4).flatten(0, 1).contiguous()

    def trunk(self, x_TKH: Tensor) -> Tensor:
        return x_TKH[self.call.trunk_PU].permute(0, 2, 1, 3).flatten(0, 1).contiguous()

    def parts(self, q: Tensor) -> list[slice]:
        """Runs of blocks whose scores fit MAX_SCORES."""
        scores = q.shape[1] * q.shape[2] * (self.call.trunk_PU.shape[1] + self.width)
        step = max(1, MAX_SCORES // scores)
        return [slice(begin, begin + step) for begin in range(0, q.shape[0], step)]

    def weights(self, q: Tensor, k: Tensor, k_trunk: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Softmax over trunk and own branch together, as its two parts: (B, G, g * T, U) and (B, G, g * T, T)."""
        num_trunk = k_trunk.shape[1]
        bias_TT = self.call.bias_TT
        scores = bias_TT.new_empty(*q.shape[:3], num_trunk + self.width)
        if num_trunk:
            scores[..., :num_trunk] = _shared(q, k_trunk)
            scores[..., :num_trunk] *= scale
        own = (q @ k.transpose(-1, -2)).unflatten(2, (-1, self.width))
        torch.add(bias_TT, own, alpha=scale, out=scores[..., num_trunk:].unflatten(2, (-1, self.width)))
        weights = scores.softmax(-1)
        return weights[..., :num_trunk], weights[..., num_trunk:]

    def zero_padding(self, x: Tensor) -> None:
        """Zero the rows of padded queries, so that they send no gradient to real keys."""
        if self.call.is_padding_PGT is None:
            return
        is_padding = self.call.is_padding_PGT[:, None, :, None, :, None]
        x.view(self.num_trees, self.num_kv_heads, self.num_branches, -1, self.width, x.shape[-1]).masked_fill_(
            is_padding, 0.0
        )

    def scatter_queries(self, total_TNH: Tensor, x: Tensor) -> None:
        x = x.view(self.num_trees, self.num_kv_heads, self.num_branches, -1, self.width, x.shape[-1])
        rows = x.permute(0, 2, 4, 1, 3, 5).reshape(-1, *total_TNH.shape[1:])
        total_TNH.index_copy_(0, self.call.positions, self.call.keep(rows))

    def add_own(self, total_TKH: Tensor, x: Tensor) -> None:
        x = x.view(self.num_trees, self.num_kv_heads, self.num_branches, self.width, x.shape[-1])
        rows = x.permute(0, 2, 3, 1, 4).reshape(-1, *total_TKH.shape[1:])
        total_TKH.index_add_(0, self.call.positions, self.call.keep(rows).to(total_TKH.dtype))

    def add_trunk(self, total_TKH: Tensor, x: Tensor) -> None:
        if x.shape[1]:
            rows = x.unflatten(0, (self.num_trees, self.num_kv_heads)).transpose(1, 2).reshape(-1, *total_TKH.shape[1:])
            total_TKH.index_add_(0, self.call.trunk_PU.flatten(), rows.to(total_TKH.dtype))


def _shared(x_BGRH: Tensor, trunk_BUH: Tensor) -> Tensor:
    """Products of every branch's rows with the trunk they share: (B, G, R, U), one GEMM for all branches."""
    return torch.bmm(x_BGRH.flatten(1, 2), trunk_BUH.transpose(1, 2)).unflatten(1, x_BGRH.shape[1:3])


def _add_shared(total_BGRH: Tensor, weights_BGRU: Tensor, trunk_BUH: Tensor) -> None:
    if trunk_BUH.shape[1]:
        num_blocks, _, _, width = total_BGRH.shape
        total_BGRH.view(num_blocks, -1, width).baddbmm_(weights_BGRU.flatten(1, 2), trunk_BUH)


def _softmax_gradient(grad: Tensor, weights: Tensor, delta: Tensor, scale: float) -> Tensor:
    """Gradient with respect to q k^T, in the dtype of grad (that of the products)."""
    return ((grad - delta) * weights * scale).to(grad.dtype)


class _TreeAttention(torch.autograd.Function):
    """softmax(q k^T * scale) v over all calls, as batched matrix products; only q, k, v and the output are kept.

    torch's fused CPU kernel needs up to ten times as long for the backward pass of short bf16 rows, and would want the
    trunk repeated for every branch.
    """

    @staticmethod
    def forward(ctx: Any, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, calls: Sequence[_Call], scale: float) -> Tensor:
        v_TKH = v_TKH.contiguous()  # or the whole projection that it is a view of would be kept for backward
        output = q_TNH.new_empty(q_TNH.shape)
        for call in calls:
            blocks = _Blocks(call, k_TKH.shape[1])
            q = blocks.queries(q_TNH)
            out = torch.empty_like(q)
            k, v = blocks.own(k_TKH), blocks.own(v_TKH)
            k_trunk, v_trunk = blocks.trunk(k_TKH), blocks.trunk(v_TKH)
            for part in blocks.parts(q):
                trunk, own = blocks.weights(q[part], k[part], k_trunk[part], scale)
                torch.matmul(own.to(v.dtype), v[part], out=out[part])
                _add_shared(out[part], trunk.to(v.dtype), v_trunk[part])
            blocks.scatter_queries(output, out)
        ctx.save_for_backward(q_TNH, k_TKH, v_TKH, output)
        ctx.calls, ctx.scale = calls, scale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TNH: Tensor) -> tuple[Tensor | None, ...]:
        q_TNH, k_TKH, v_TKH, output_TNH = ctx.saved_tensors
        wide = _accumulation_dtype(q_TNH.dtype)
        # Row sums of (gradient of the weights) * (weights), which softmax's derivative subtracts.
        delta_TN1 = (grad_TNH.to(wide) * output_TNH).sum(-1, keepdim=True)
        dq_TNH = q_TNH.new_empty(q_TNH.shape)
        dk_TKH, dv_TKH = (torch.zeros(k_TKH.shape, dtype=wide) for _ in range(2))
        for call in ctx.calls:
            blocks = _Blocks(call, k_TKH.shape[1])
            q, grad, delta = (blocks.queries(x) for x in (q_TNH, grad_TNH, delta_TN1))
            blocks.zero_padding(grad)
            blocks.zero_padding(delta)
            k, v = blocks.own(k_TKH), blocks.own(v_TKH)
            k_trunk, v_trunk = blocks.trunk(k_TKH), blocks.trunk(v_TKH)
            dq, dk, dv, dk_trunk, dv_trunk = (torch.empty_like(x) for x in (q, k, v, k_trunk, v_trunk))
            for part in blocks.parts(q):
                trunk, own = blocks.weights(q[part], k[part], k_trunk[part], ctx.scale)
                torch.matmul(own.to(v.dtype).transpose(-1, -2), grad[part], out=dv[part])
                own = _softmax_gradient(grad[part] @ v[part].transpose(-1, -2), own, delta[part], ctx.scale)
                torch.matmul(own, k[part], out=dq[part])
                torch.matmul(own.transpose(-1, -2), q[part], out=dk[part])
                if k_trunk.shape[1]:
                    torch.matmul(
                        trunk.to(v.dtype).flatten(1, 2).transpose(-1, -2), grad[part].flatten(1, 2), out=dv_trunk[part]
                    )
                    trunk = _softmax_gradient(_shared(grad[part], v_trunk[part]), trunk, delta[part], ctx.scale)
                    _add_shared(dq[part], trunk, k_trunk[part])
                    torch.matmul(trunk.flatten(1, 2).transpose(-1, -2), q[part].flatten(1, 2), out=dk_trunk[part])
            blocks.scatter_queries(dq_TNH, dq)
            for total, own_grad, trunk_grad in ((dk_TKH, dk, dk_trunk), (dv_TKH, dv, dv_trunk)):
                blocks.add_own(total, own_grad)
                blocks.add_trunk(total, trunk_grad)
        return dq_TNH, dk_TKH.to(k_TKH.dtype), dv_TKH.to(v_TKH.dtype), None, None
