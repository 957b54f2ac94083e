"""An fp32 master that shares its upper half with the bf16 parameter made from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from strop.native import kernels as native
from strop.optim import eight_bit
from strop.optim.own_pages import fill_lasting_, lasting_zeros


class SplitMaster:
    """The master of a bf16 parameter p, as p and the 16 bits that rounding to p left over.

        bits(master) = (bits(p) << 16) + rest,    -2^15 <= rest < 2^15

    p is the master rounded to the nearest bf16. The trap: a master exactly between two goes away from zero, not to even
    as torch's cast does, since otherwise one rest would belong to two masters. The parameter may change hands only
    through `step` and `load`; gradient and moments live here as well.
    """

    def __init__(self, parameter: Tensor, *, is_8bit: bool = False) -> None:
        self.is_8bit = is_8bit
        self.rest = lasting_zeros(parameter.shape, torch.int16, parameter.device)
        self.gradient: Tensor | None = None
        """bf16 while it is that of one backward pass, the fp32 sum from the second on."""
        self.moments: dict[str, Tensor] = {}
        """step, exp_avg and exp_avg_sq, from the first update on; those of eight_bit.py where is_8bit."""

    def take_gradient(self, parameter: Tensor) -> None:
        gradient = parameter.grad
        assert gradient is not None, "two optimizers over one parameter: the other one took its gradient"
        parameter.grad = None
        gradient = gradient.to_dense().contiguous() if gradient.is_sparse else gradient.contiguous()
        if self.gradient is None:
            self.gradient = gradient
        else:
            wide = self.wide_gradient()
            assert wide is not None
            native.accumulate_(wide, gradient)

    def wide_gradient(self) -> Tensor | None:
        """The gradient in fp32, where it stays from now on."""
        if self.gradient is not None and self.gradient.dtype != torch.float32:
            self.gradient = self.gradient.float()
        return self.gradient

    def step(
        self,
        parameter: Tensor,
        *,
        lr: float,
        grad_scale: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ) -> None:
        if self.gradient is None:
            return
        options: dict[str, Any] = {"lr": lr, "grad_scale": grad_scale, "betas": betas, "eps": eps}
        options["weight_decay"] = weight_decay if parameter.ndim >= 2 else 0.0
        if self.is_8bit:
            self.moments = self.moments or eight_bit.zeros(parameter)
            eight_bit.split_step_(parameter.detach(), self.rest, self.gradient, self.moments, **options)
            return
        if not self.moments:
            mean, square = (lasting_zeros(parameter.shape, torch.float32, parameter.device) for _ in range(2))
            self.moments = {"step": torch.zeros(()), "exp_avg": mean, "exp_avg_sq": square}
        self.moments["step"] += 1
        native.adamw_(
            parameter.detach(),
            self.rest,
            self.gradient,
            self.moments["exp_avg"],
            self.moments["exp_avg_sq"],
            step=int(self.moments["step"]),
            **options,
        )

    def joined(self, parameter: Tensor) -> Tensor:
        """The master, a new tensor."""
        bits = parameter.detach().view(torch.int16).to(torch.int32).bitwise_left_shift_(16)
        return bits.add_(self.rest).view(torch.float32)

    def load(self, parameter: Tensor, master: Tensor, moments: Mapping[str, Tensor]) -> None:
        """Set the master, and with it the parameter, and the moments."""
        bits = master.to(parameter.device, copy=True).contiguous().view(torch.int32)
        upper = bits.add(1 << 15).bitwise_right_shift_(16)
        parameter.detach().view(torch.int16).copy_(upper)
        fill_lasting_(self.rest, bits.sub_(upper.bitwise_left_shift_(16)).to(torch.int16))
        self.moments = dict(moments)
