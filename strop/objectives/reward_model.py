"""Losses that turn preferences into scores. A score is one number per completion, read at its last real token.

All are blind to an offset common to a prompt's completions: only differences are learnt. Group baselines cancel that
offset, PPO's critic and a fixed score threshold do not.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from strop.objectives.aggregate import zero_masked


def bradley_terry_loss(
    chosen_scores_B: Tensor,
    rejected_scores_B: Tensor,
    *,
    margin_B: Tensor | None = None,
    centring_coef: float = 0.0,
) -> Tensor:
    """Negative log-likelihood that chosen beats rejected, one value per pair (Bradley and Terry 1952).

        -log sigmoid(chosen - rejected - margin) + centring_coef * (chosen + rejected)^2

    The margin grows with how clear the preference was (Llama 2, eq. 2). Centring (about 0.01; Eisenstein et al. 2023)
    pulls the SUM of the two scores to 0 and leaves their difference alone. log 2 when the scores are equal.
    """
    difference_B = chosen_scores_B - rejected_scores_B
    if margin_B is not None:
        difference_B = difference_B - margin_B
    loss_B = -logsigmoid(difference_B)
    if centring_coef != 0.0:
        loss_B = loss_B + centring_coef * (chosen_scores_B + rejected_scores_B).square()
    return loss_B


def kwise_loss(
    scores_PK: Tensor,
    mask_PK: Tensor | None = None,
    *,
    ranks_PK: Tensor | None = None,
    count_ties: bool = True,
    margin_P: Tensor | None = None,
    centring_coef: float = 0.0,
) -> Tensor:
    """Mean Bradley-Terry loss over all pairs of one prompt's ranking, shape (P,) (InstructGPT, eq. 1).

        -1 / C(K, 2) * sum_{i < j} log sigmoid(score_i - score_j - margin)

    scores_PK is sorted from best to worst. All pairs of a prompt belong to one element: the same pairs shuffled over
    batches as if independent overfit within an epoch. Not Plackett-Luce: the gradients differ.
    mask_PK (bool) is for rankings of unequal length; a prompt with fewer than two completions gives 0.
    Without ranks_PK there are no ties. With it (sorted, equal = tie) a tied pair is half a win each way,
    -(log sigmoid(d) + log sigmoid(-d)) / 2, which is least at d = 0, and has no margin; without count_ties it is no
    pair. margin_P and centring_coef are those of bradley_terry_loss, which K = 2 is.
    """
    scores_PK = zero_masked(scores_PK, mask_PK)
    difference_PKK = scores_PK.unsqueeze(2) - scores_PK.unsqueeze(1)
    tied_PKK = None if ranks_PK is None else ranks_PK.unsqueeze(2) == ranks_PK.unsqueeze(1)
    shifted_PKK = difference_PKK if margin_P is None else difference_PKK - margin_P[:, None, None]
    loss_PKK = -logsigmoid(shifted_PKK)
    if tied_PKK is not None:
        even_PKK = -(logsigmoid(difference_PKK) + logsigmoid(-difference_PKK)) / 2
        loss_PKK = torch.where(tied_PKK, even_PKK, loss_PKK)
    is_pair_KK = torch.ones(loss_PKK.shape[1:], dtype=torch.bool, device=scores_PK.device).triu(diagonal=1)
    is_pair_PKK = is_pair_KK.expand_as(loss_PKK)
    if mask_PK is not None:
        is_pair_PKK = is_pair_PKK & mask_PK.unsqueeze(2) & mask_PK.unsqueeze(1)
    if tied_PKK is not None and not count_ties:
        is_pair_PKK = is_pair_PKK & ~tied_PKK
    num_pairs_P = is_pair_PKK.sum((1, 2)).clamp(min=1)
    loss_P = zero_masked(loss_PKK, is_pair_PKK).sum((1, 2)) / num_pairs_P
    return loss_P + centring_coef * pair_centring(scores_PK, mask_PK) if centring_coef else loss_P


def pair_centring(scores_PK: Tensor, mask_PK: Tensor | None = None) -> Tensor:
    """Mean of (score_i + score_j)^2 over all pairs of a prompt, shape (P,): what centring_coef weighs."""
    is_real_PK = torch.ones_like(scores_PK, dtype=torch.bool) if mask_PK is None else mask_PK
    scores_PK = zero_masked(scores_PK, mask_PK)
    is_pair_PKK = (is_real_PK.unsqueeze(2) & is_real_PK.unsqueeze(1)).triu(diagonal=1)
    squares_PKK = (scores_PK.unsqueeze(2) + scores_PK.unsqueeze(1)).square()
    return zero_masked(squares_PKK, is_pair_PKK).sum((1, 2)) / is_pair_PKK.sum((1, 2)).clamp(min=1)


def plackett_luce_loss(scores_PK: Tensor, mask_PK: Tensor | None = None, *, ranks_PK: Tensor | None = None) -> Tensor:
    """Negative log-likelihood of a whole ranking, shape (P,): the best is drawn first, then the best of the rest.

        sum_i [logsumexp(score_i, ..., score_K) - score_i]          (Plackett 1975, Luce 1959)

    scores_PK is sorted from best to worst. For K = 2 it is the Bradley-Terry loss. mask_PK (bool) is for rankings of
    unequal length; masked entries take part in no sum.
    With ranks_PK (sorted, equal = tie) each member of a tie is drawn against the whole tie and all behind it, which is
    Breslow's (1974) form of the sum over the orders that the tie leaves open. Masked entries have the largest rank.
    """
    scores_PK = zero_masked(scores_PK, mask_PK)
    remaining_PK = scores_PK if mask_PK is None else torch.where(mask_PK, scores_PK, -torch.inf)
    tail_PK = torch.logcumsumexp(remaining_PK.flip(-1), dim=-1).flip(-1)
    if ranks_PK is not None:
        first_PK = torch.searchsorted(ranks_PK.contiguous(), ranks_PK.contiguous())  # where each one's tie begins
        tail_PK = tail_PK.gather(-1, first_PK)
    return zero_masked(tail_PK - scores_PK, mask_PK).sum(-1)
