"""Log-probabilities of given labels: from logits, or straight from hidden states without ever holding (R, V) logits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from strop.native import kernels as native
from strop.native.products import input_gradient, linear, weight_gradient

_CPU_BLOCK_ELEMENTS = 1 << 19
"""Elementwise work on a CPU is done in pieces that stay in cache: 2 MB of float32 instead of 50 is 4x faster."""

_VOCAB_STEP = native.STATISTICS_STEP
_MIN_VOCAB_BLOCK = 3 * _VOCAB_STEP
"""Columns of the vocabulary whose gradient is made at a time, if not more."""

_KEPT_BYTES = 1 << 27
"""Logits of no more than this are kept for the backward pass."""


class HeadStatistics(NamedTuple):
    """What linear_logprobs finds out about each row's distribution, all in nats and of shape (R,)."""

    logprobs_R: Tensor
    """Of the label."""
    lse_R: Tensor
    """logsumexp(z)."""
    entropy_R: Tensor | None

    def at(self, rows: slice | Tensor) -> HeadStatistics:
        """Those of some rows: a view for a slice, a copy for row numbers."""
        entropy_R = None if self.entropy_R is None else self.entropy_R[rows]
        return HeadStatistics(self.logprobs_R[rows], self.lse_R[rows], entropy_R)


def linear_logprobs(
    hidden_RD: Tensor,
    weight_VD: Tensor,
    labels_R: Tensor,
    *,
    temperature: float = 1.0,
    bias_V: Tensor | None = None,
    softcap: float | None = None,
    chunk_size: int = 256,
    with_entropy: bool = False,
    known: HeadStatistics | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Log-probability (nats) of each row's label under the LM head, and the entropy of that distribution on request.

        z = cap(hidden @ weight.T + bias) / temperature,   cap(x) = softcap * tanh(x / softcap)
        logprobs_R = z[label] - logsumexp(z),              entropy_R = -sum_v p_v log p_v

    The full (R, V) logits do not exist where they are large: the forward pass walks over chunk_size rows at a time and
    keeps one log-sum-exp per row; the backward pass recomputes logits over blocks of the vocabulary, of at most about
    chunk_size * V numbers, so that a weight gradient is one product over all rows, summed in the matrix product's
    own float32 accumulator. Products run in the inputs' dtype; everything after them, and both results, in float32
    (float64 for float64 inputs). In bfloat16 on a CPU logits of up to 128 MB are kept; the results are the same.

    known are the results of before, for the same inputs and options: nothing is computed but the gradient.

    The trap: pass the temperature the tokens were sampled at, for new, old and reference logprobs alike; otherwise
    ratios differ from 1 before the first update. Labels are already shifted, one per row; leave out the rows that do
    not count instead of masking their results. Both results are differentiable, once.

    R label positions, D width, V vocabulary. Raises ValueError for temperature, softcap or chunk_size <= 0.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be > 0, not {temperature}: the logits are divided by it")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap must be > 0, not {softcap}; None means no cap")
    if chunk_size <= 0:
        raise ValueError(f"chunk_size must be >= 1, not {chunk_size}")
    num_bytes = hidden_RD.shape[0] * weight_VD.shape[0] * hidden_RD.element_size()
    has_gradient = torch.is_grad_enabled() and (hidden_RD.requires_grad or weight_VD.requires_grad)
    keeps_logits = known is None and has_gradient and _has_kernels(hidden_RD, softcap) and num_bytes <= _KEPT_BYTES
    apply = cast(Callable[..., tuple[Tensor, Tensor | None]], _LinearLogprobs.apply)  # pyright: ignore[reportUnknownMemberType]
    return apply(
        hidden_RD, weight_VD, labels_R, bias_V, temperature, softcap, chunk_size, with_entropy, known, keeps_logits
    )


@torch.no_grad()
def head_statistics(
    logits_RV: Tensor,
    labels_R: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    with_entropy: bool = False,
) -> HeadStatistics:
    """linear_logprobs from logits that exist, without gradient: equal to the bit if the logits are."""
    results = _new_statistics(logits_RV, labels_R.shape[0], with_entropy)
    _write_statistics(results, logits_RV, labels_R.contiguous(), temperature, softcap)
    return results


@torch.no_grad()
def linear_self_certainty(
    hidden_RD: Tensor,
    weight_VD: Tensor,
    *,
    temperature: float = 1.0,
    bias_V: Tensor | None = None,
    softcap: float | None = None,
    chunk_size: int = 256,
) -> Tensor:
    """How far each row's next-token law is from uniform, in nats, float32: KL(U || p) (Kang et al. 2025, eq. 5).

        -(1/V) sum_v log(V p_v) = logsumexp(z) - mean(z) - log V,    z as in linear_logprobs

    0 for a uniform law and without upper bound. Unlike the entropy it asks how unlikely the unlikely tokens are: two
    laws that are sure of one token have the same entropy, 0, but not the same self-certainty. A reward, so without
    gradient. R label positions, V vocabulary. Raises ValueError for temperature <= 0.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be > 0, not {temperature}: the logits are divided by it")
    results = [hidden_RD.new_empty(0, dtype=torch.float32)]
    for start in range(0, hidden_RD.shape[0], chunk_size):
        logits_RV = linear(hidden_RD[start : start + chunk_size], weight_VD, bias_V).float()
        z_RV = _cap_and_cool_(logits_RV, temperature, softcap)
        results.append(z_RV.logsumexp(-1) - z_RV.mean(-1) - math.log(z_RV.shape[-1]))
    return torch.cat(results)


def logprobs_from_logits(logits_RV: Tensor, labels_R: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Log-probability (nats) of each label under softmax(logits / temperature), in float32 at least.

    The plain definition, for logits that exist anyway (one decoding step, small vocabularies). Any leading shape.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be > 0, not {temperature}: the logits are divided by it")
    scaled_RV = logits_RV.to(torch.promote_types(logits_RV.dtype, torch.float32)) / temperature
    return torch.log_softmax(scaled_RV, dim=-1).gather(-1, labels_R.unsqueeze(-1)).squeeze(-1)


def _new_statistics(like: Tensor, num_rows: int, with_entropy: bool) -> HeadStatistics:
    exact = torch.promote_types(like.dtype, torch.float32)
    logprobs_R, lse_R, entropy_R = (like.new_empty(num_rows, dtype=exact) for _ in range(3))
    return HeadStatistics(logprobs_R, lse_R, entropy_R if with_entropy else None)


def _write_statistics(
    results: HeadStatistics, logits_RV: Tensor, labels_R: Tensor, temperature: float, softcap: float | None
) -> None:
    num_rows, num_columns = logits_RV.shape
    if _has_kernels(logits_RV, softcap):
        native.head_statistics(logits_RV, num_columns, num_columns, labels_R, *results, 1 / temperature)
        return
    block_rows = _block_rows(num_rows, num_columns, logits_RV.device)
    for start in range(0, num_rows, block_rows):
        rows = slice(start, start + block_rows)
        label_column = labels_R[rows].unsqueeze(1)
        z = _cap_and_cool_(logits_RV[rows].to(results.lse_R.dtype, copy=True), temperature, softcap)
        log_p = torch.log_softmax(z, dim=-1)
        label_log_p = log_p.gather(1, label_column)
        results.logprobs_R[rows] = label_log_p.squeeze(1)
        results.lse_R[rows] = (z.gather(1, label_column) - label_log_p).squeeze(1)
        if results.entropy_R is not None:
            results.entropy_R[rows] = -(log_p.exp() * log_p).sum(-1)


def _has_kernels(x: Tensor, softcap: float | None) -> bool:
    return softcap is None and native.has_kernels(x)


def _block_rows(num_rows: int, num_columns: int, device: torch.device) -> int:
    return max(1, _CPU_BLOCK_ELEMENTS // num_columns if device.type == "cpu" else num_rows)


def _cap_and_cool_(logits: Tensor, temperature: float, softcap: float | None) -> Tensor:
    if softcap is not None:
        logits.div_(softcap).tanh_().mul_(softcap)
    return logits if temperature == 1.0 else logits.div_(temperature)


def _head_into(buffer: Tensor, hidden_RD: Tensor, weight_VD: Tensor, bias_V: Tensor | None) -> Tensor:
    """hidden @ weight.T + bias, written into reused memory: fresh pages for every chunk cost as much as the product."""
    num_rows, num_columns = hidden_RD.shape[0], weight_VD.shape[0]
    logits_RV = buffer[: num_rows * num_columns].view(num_rows, num_columns)
    linear(hidden_RD, weight_VD, out=logits_RV)
    return logits_RV if bias_V is None else logits_RV.add_(bias_V)


def _vocab_blocks(num_rows: int, num_columns: int, chunk_size: int) -> list[slice]:
    """The columns whose gradient is made at a time.

    A quarter of the forward pass's piece: there memory is at its largest. But hidden states are arranged anew for every
    piece, which with narrow ones costs as much as the products.
    """
    width = max(_MIN_VOCAB_BLOCK, chunk_size * num_columns // max(4 * num_rows, 1)) // _VOCAB_STEP * _VOCAB_STEP
    return [slice(left, min(left + width, num_columns)) for left in range(0, num_columns, width)]


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_RD: Tensor,
        weight_VD: Tensor,
        labels_R: Tensor,
        bias_V: Tensor | None,
        temperature: float,
        softcap: float | None,
        chunk_size: int,
        with_entropy: bool,
        known: HeadStatistics | None,
        keeps_logits: bool,
    ) -> tuple[Tensor, Tensor | None]:
        num_rows, num_columns = hidden_RD.shape[0], weight_VD.shape[0]
        labels_R = labels_R.contiguous()
        kept = None
        if known is None and keeps_logits:
            kept = hidden_RD.new_empty(num_rows * num_columns)
            native.use_large_pages(kept)
            blocks = _vocab_blocks(num_rows, num_columns, chunk_size)
            for columns in blocks:
                place = kept[num_rows * columns.start :]
                _head_into(place, hidden_RD, weight_VD[columns], None if bias_V is None else bias_V[columns])
            known = _new_statistics(hidden_RD, num_rows, with_entropy)
            native.head_statistics(kept, num_columns, blocks[0].stop, labels_R, *known, 1 / temperature)
        elif known is None:
            known = _new_statistics(hidden_RD, num_rows, with_entropy)
            buffer = hidden_RD.new_empty(min(chunk_size, num_rows) * num_columns)
            for start in range(0, num_rows, chunk_size):
                rows = slice(start, start + chunk_size)
                logits_RV = _head_into(buffer, hidden_RD[rows], weight_VD, bias_V)
                _write_statistics(known.at(rows), logits_RV, labels_R[rows], temperature, softcap)
        logprobs_R, lse_R, entropy_R = known
        ctx.save_for_backward(hidden_RD, weight_VD, labels_R, bias_V, lse_R, entropy_R)
        ctx.set_materialize_grads(False)
        ctx.temperature, ctx.softcap, ctx.chunk_size, ctx.kept = temperature, softcap, chunk_size, kept
        return logprobs_R, entropy_R

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_logprobs_R: Tensor | None, grad_entropy_R: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """d logprob / dz = onehot(label) - p,   d entropy / dz = -p * (log p + entropy)."""
        hidden_RD, weight_VD, labels_R, bias_V, lse_R, entropy_R = ctx.saved_tensors
        num_rows, num_columns = hidden_RD.shape[0], weight_VD.shape[0]
        if grad_logprobs_R is None:
            grad_logprobs_R = torch.zeros_like(lse_R)
        needs_hidden, needs_weight, _, needs_bias = ctx.needs_input_grad[:4]
        grad_hidden_RD = torch.zeros_like(hidden_RD, dtype=lse_R.dtype) if needs_hidden else None
        grad_weight_VD = torch.empty_like(weight_VD) if needs_weight else None
        grad_bias_V = torch.empty_like(bias_V) if needs_bias else None

        blocks = _vocab_blocks(num_rows, num_columns, ctx.chunk_size)
        kept, ctx.kept = ctx.kept, None  # overwritten: another backward pass would compute it
        buffer = hidden_RD.new_empty(num_rows * blocks[0].stop) if kept is None else kept
        block_rows = _block_rows(num_rows, blocks[0].stop, hidden_RD.device)
        for columns in blocks:
            left, width = columns.start, columns.stop - columns.start
            if kept is None:
                bias = None if bias_V is None else bias_V[columns]
                grad_logits = _head_into(buffer, hidden_RD, weight_VD[columns], bias)
            else:
                grad_logits = kept[num_rows * left :][: num_rows * width].view(num_rows, width)
            if _has_kernels(grad_logits, ctx.softcap):
                entropy_and_grad = None if grad_entropy_R is None else (entropy_R, grad_entropy_R.contiguous())
                native.head_gradient_(
                    grad_logits,
                    labels_R,
                    lse_R,
                    grad_logprobs_R.contiguous(),
                    entropy_and_grad,
                    left,
                    1 / ctx.temperature,
                )
            else:
                for top in range(0, num_rows, block_rows):
                    rows = slice(top, top + block_rows)
                    block = grad_logits[rows]
                    block.copy_(
                        _grad_logits(
                            _cap_and_cool_(block.to(lse_R.dtype), ctx.temperature, ctx.softcap),
                            labels_R[rows] - left,
                            lse_R[rows],
                            grad_logprobs_R[rows],
                            None if grad_entropy_R is None else (entropy_R[rows], grad_entropy_R[rows]),
                            ctx.temperature,
                            ctx.softcap,
                        )
                    )
            if grad_hidden_RD is not None:
                grad_hidden_RD += input_gradient(grad_logits, weight_VD[columns])
            if grad_weight_VD is not None:
                weight_gradient(grad_logits, hidden_RD, out=grad_weight_VD[columns])
            if grad_bias_V is not None:
                grad_bias_V[columns] = grad_logits.sum(0, dtype=lse_R.dtype)
        grad_hidden = None if grad_hidden_RD is None else grad_hidden_RD.to(hidden_RD.dtype)
        return grad_hidden, grad_weight_VD, None, grad_bias_V, *(None,) * 6


def _grad_logits(
    z: Tensor,
    local_labels_R: Tensor,
    lse_R: Tensor,
    grad_logprobs_R: Tensor,
    entropy_and_grad_R: tuple[Tensor, Tensor] | None,
    temperature: float,
    softcap: float | None,
) -> Tensor:
    """Gradient with respect to the raw logits of one block; overwrites z. A label outside the block adds nothing."""
    slope = None if softcap is None else 1.0 - (z * (temperature / softcap)).square_()
    log_p = z.sub_(lse_R.unsqueeze(1))
    if entropy_and_grad_R is None:
        grad = log_p.exp_().mul_(-grad_logprobs_R.unsqueeze(1))
    else:
        entropy_R, grad_entropy_R = entropy_and_grad_R
        weight = (log_p + entropy_R.unsqueeze(1)).mul_(grad_entropy_R.unsqueeze(1)).add_(grad_logprobs_R.unsqueeze(1))
        grad = log_p.exp_().mul_(weight).neg_()
    is_here_R = (local_labels_R >= 0) & (local_labels_R < z.shape[1])
    column = local_labels_R.clamp(0, z.shape[1] - 1).unsqueeze(1)
    grad.scatter_add_(1, column, torch.where(is_here_R, grad_logprobs_R, 0).unsqueeze(1))
    if slope is not None:
        grad.mul_(slope)
    return grad if temperature == 1.0 else grad.div_(temperature)
