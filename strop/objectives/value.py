"""The critic's regression."""

from __future__ import annotations

import torch
from torch import Tensor

from strop.objectives.aggregate import zero_masked


def value_loss(
    values_BT: Tensor,
    old_values_BT: Tensor,
    returns_BT: Tensor,
    mask_BT: Tensor | None = None,
    *,
    clip: float | None,
) -> Tensor:
    """Half the squared error of the value, the worse of unclipped and clipped, one value per token (Ziegler 2019).

        0.5 * max((v - R)^2, (clip(v, v_old - clip, v_old + clip) - R)^2)

    Like the policy's bound it only removes incentive: a value that already moved past the bound towards its return has
    zero gradient, one that moved away keeps it. The bound is absolute, in units of the return. None: no clipping.
    Returns are advantages + old values, computed before advantages are whitened. Unreduced; 0 where masked.
    """
    values_BT = zero_masked(values_BT, mask_BT)
    returns_BT = zero_masked(returns_BT, mask_BT)
    error_BT = (values_BT - returns_BT).square()
    if clip is None:
        return 0.5 * error_BT
    return 0.5 * torch.maximum(
        error_BT, _clipped_error(values_BT, zero_masked(old_values_BT, mask_BT), returns_BT, clip)
    )


@torch.no_grad()
def value_is_clipped(
    values_BT: Tensor, old_values_BT: Tensor, returns_BT: Tensor, mask_BT: Tensor | None = None, *, clip: float
) -> Tensor:
    """Bool per token: True where value_loss has zero gradient because of the clip. Its mean is the clip fraction."""
    values_BT = zero_masked(values_BT, mask_BT)
    returns_BT = zero_masked(returns_BT, mask_BT)
    clipped_BT = _clipped_error(values_BT, zero_masked(old_values_BT, mask_BT), returns_BT, clip)
    return clipped_BT > (values_BT - returns_BT).square()


@torch.no_grad()
def explained_variance(values_BT: Tensor, returns_BT: Tensor, mask_BT: Tensor) -> float:
    """1 - var(return - value) / var(return) over all counting tokens: 1 is a perfect critic, 0 one that knows no more
    than a constant, below 0 one that does harm. nan when the returns do not vary.

    Pass the returns that were really earned (gae with lambda 1): the critic's own targets contain its values, which
    they then seem to explain.
    """
    values_N, returns_N = values_BT[mask_BT].double(), returns_BT[mask_BT].double()
    variance = float(returns_N.var(correction=0))
    return 1 - float((returns_N - values_N).var(correction=0)) / variance if variance > 0 else float("nan")


def _clipped_error(values_BT: Tensor, old_values_BT: Tensor, returns_BT: Tensor, clip: float) -> Tensor:
    clipped_BT = torch.clamp(values_BT, old_values_BT - clip, old_values_BT + clip)
    return (clipped_BT - returns_BT).square()
