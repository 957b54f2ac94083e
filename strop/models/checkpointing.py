"""Activations that are computed again in the backward pass instead of kept (Chen et al. 2016)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Checkpointing = Literal["some", "none", "all"]
"""How much of a forward pass the backward pass computes again instead of finding it kept (Chen et al. 2016); no bit of
a gradient depends on it. "some": what costs little time for its memory, that is attention's output over few keys, and
gate and up of the last layers (num_recomputed). "none": no product and no attention. "all": every layer, of which only
the input is kept."""


def recomputed(run: Callable[[Tensor], Tensor], x_TD: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
    """run(x), of whose activations only x is kept: the backward pass runs it again, with the same result to the bit.

    parameters are all those in run that may need a gradient; torch.utils.checkpoint would find them itself, and import
    torch's compiler for it (80 MB). run must not draw random numbers.
    """
    if not torch.is_grad_enabled():
        return run(x_TD)
    return _Recomputed.apply(run, x_TD, *(parameter for parameter in parameters if parameter.requires_grad))


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: Callable[[Tensor], Tensor], x_TD: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(x_TD, *parameters)
        ctx.run = run
        return run(x_TD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, *parameters = ctx.saved_tensors
        with torch.enable_grad():
            x_TD = x_TD.detach().requires_grad_(ctx.needs_input_grad[1])
            y_TD = ctx.run(x_TD)
        wanted = [x_TD, *parameters] if x_TD.requires_grad else parameters
        gradients = torch.autograd.grad(y_TD, wanted, grad_TD)
        return None, *(() if x_TD.requires_grad else (None,)), *gradients
