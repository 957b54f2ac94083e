"""The losses of DPO and its relatives on the answers of one micro-batch.

Shape suffixes: A answers laid end to end, N pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from strop.data import Comparison, pack_completions
from strop.models.interface import CausalLM
from strop.models.logprobs import packed_logprobs
from strop.objectives import preference
from strop.stages.compared import micro_batches
from strop.stages.dpo_config import Config
from strop.types import PackedBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """What the losses want to know of every answer."""

    logprobs_A: Tensor
    """Summed over an answer's own tokens."""
    ref_logprobs_A: Tensor | None
    """The same under the reference; None for a loss without one."""
    lengths_A: Tensor
    """Tokens summed over."""

    @property
    def logratios_A(self) -> Tensor:
        """Without a reference the plain logprobs: every text is equally likely under it."""
        return self.logprobs_A if self.ref_logprobs_A is None else self.logprobs_A - self.ref_logprobs_A

    @classmethod
    def join(cls, parts: Sequence[Answers]) -> Answers:
        """The answers of all micro-batches, detached."""
        refs = [part.ref_logprobs_A for part in parts if part.ref_logprobs_A is not None]
        return cls(
            logprobs_A=torch.cat([part.logprobs_A.detach() for part in parts]),
            ref_logprobs_A=torch.cat(refs) if refs else None,
            lengths_A=torch.cat([part.lengths_A for part in parts]),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Baselines:
    """What is the same for a whole optimiser step."""

    kto: float = 0.0
    """z, from answers under the wrong prompts."""
    bco_shift: float = 0.0
    """Running mean of the rewards."""


def sum_logprobs(logprobs_R: Tensor, comparisons: Sequence[Comparison]) -> tuple[Tensor, Tensor]:
    """(sums, numbers of tokens), each of shape (A,), of packed logprobs in the order of the answers."""
    lengths = [sum(answer.mask) for comparison in comparisons for answer in comparison.answers]
    sums_A = torch.stack([part.sum() for part in logprobs_R.split(lengths)])
    return sums_A, sums_A.new_tensor(lengths)


@torch.no_grad()
def frozen_sums(
    model: CausalLM, comparisons: Sequence[Comparison], *, temperature: float, max_tokens: int
) -> list[np.ndarray]:
    """Every answer's summed logprob without gradient, comparison by comparison: for references and evaluation."""
    sums: list[np.ndarray] = []
    for micro, own in micro_batches(comparisons, pack_completions, max_tokens):
        logprobs_R, _ = packed_logprobs(model, micro.to(model.device), temperature=temperature)
        sums_A, _ = sum_logprobs(logprobs_R, own)
        sums += [part.numpy() for part in sums_A.cpu().split([len(comparison.answers) for comparison in own])]
    return sums


def policy_answers(
    policy: CausalLM,
    micro: PackedBatch,
    comparisons: Sequence[Comparison],
    ref_sums: Sequence[np.ndarray] | None,
    config: Config,
) -> Answers:
    """The answers of a micro-batch under the policy, with gradient."""
    logprobs_R, _ = packed_logprobs(policy, micro.to(policy.device), temperature=config.temperature)
    sums_A, lengths_A = sum_logprobs(logprobs_R, comparisons)
    ref_A = None
    if ref_sums is not None:
        ref_A = torch.from_numpy(np.concatenate(ref_sums)).to(sums_A.device, sums_A.dtype)
    return Answers(logprobs_A=sums_A, ref_logprobs_A=ref_A, lengths_A=lengths_A)


def micro_loss(answers: Answers, comparisons: Sequence[Comparison], baselines: Baselines, config: Config) -> Tensor:
    """The sum over comparisons of weight * mean loss of its pairs (or the loss of its one answer), a scalar."""
    labels = [comparison.label for comparison in comparisons]
    weights = answers.logprobs_A.new_tensor([comparison.weight for comparison in comparisons])
    if None not in labels:
        is_good_A = torch.tensor(labels, dtype=torch.bool, device=weights.device)
        return (weights * single_loss(answers.logratios_A, is_good_A, baselines, config)).sum()
    better, worse, shares, start = [], [], [], 0
    for comparison in comparisons:
        pairs = comparison.pairs
        better += [start + place for place, _ in pairs]
        worse += [start + place for _, place in pairs]
        shares += [comparison.weight / len(pairs)] * len(pairs)
        start += len(comparison.answers)
    index = torch.tensor([better, worse], device=weights.device)
    return (weights.new_tensor(shares) * pair_loss(answers, index[0], index[1], baselines, config)).sum()


def single_loss(logratios_A: Tensor, is_good_A: Tensor, baselines: Baselines, config: Config) -> Tensor:
    """KTO or BCO of single answers, shape (A,)."""
    if config.loss == "bco":
        return preference.bco_unpaired_loss(logratios_A, is_good_A, beta=config.beta, shift=baselines.bco_shift)
    assert config.loss == "kto"
    return preference.kto_loss(
        logratios_A,
        is_good_A,
        baselines.kto,
        beta=config.beta,
        desirable_weight=config.desirable_weight,
        undesirable_weight=config.undesirable_weight,
    )


def pair_loss(answers: Answers, better_N: Tensor, worse_N: Tensor, baselines: Baselines, config: Config) -> Tensor:
    """The loss of every pair, shape (N,). KTO counts a pair as two single answers, so their mean."""
    chosen_N, rejected_N = answers.logratios_A[better_N], answers.logratios_A[worse_N]
    mean_A = answers.logratios_A / answers.lengths_A
    mean_chosen_N, mean_rejected_N = mean_A[better_N], mean_A[worse_N]
    loss, beta, flip = config.loss, config.beta, config.flip_probability
    if loss in ("sigmoid", "cpo"):
        loss_N = preference.cdpo_loss(chosen_N, rejected_N, beta=beta, flip_probability=flip)
    elif loss == "robust":
        loss_N = preference.robust_dpo_loss(chosen_N, rejected_N, beta=beta, flip_probability=flip)
    elif loss == "ipo":
        loss_N = preference.ipo_loss(mean_chosen_N, mean_rejected_N, beta=beta)
    elif loss == "ipo_sum":
        loss_N = preference.ipo_loss(chosen_N, rejected_N, beta=beta)
    elif loss == "hinge":
        loss_N = preference.hinge_loss(chosen_N, rejected_N, beta=beta)
    elif loss == "sigmoid_norm":
        lengths_A = answers.lengths_A
        loss_N = preference.sigmoid_norm_loss(chosen_N, rejected_N, lengths_A[better_N], lengths_A[worse_N], beta=beta)
    elif loss == "apo_zero":
        loss_N = preference.apo_zero_loss(chosen_N, rejected_N, beta=beta)
    elif loss == "apo_down":
        loss_N = preference.apo_down_loss(chosen_N, rejected_N, beta=beta)
    elif loss == "sppo":
        loss_N = preference.sppo_loss(chosen_N, rejected_N, beta=beta)
    elif loss == "bco":
        loss_N = preference.bco_loss(chosen_N, rejected_N, beta=beta, shift=baselines.bco_shift)
    elif loss == "orpo":
        loss_N = preference.orpo_loss(mean_chosen_N, mean_rejected_N, beta=beta)
    elif loss == "simpo":
        loss_N = preference.simpo_loss(mean_chosen_N, mean_rejected_N, beta=beta, margin=config.margin)
    else:
        assert loss == "kto"
        is_good_N = torch.ones_like(better_N, dtype=torch.bool)
        good_N = single_loss(chosen_N, is_good_N, baselines, config)
        loss_N = (good_N + single_loss(rejected_N, ~is_good_N, baselines, config)) / 2
    if config.sft_coef:
        loss_N = loss_N - config.sft_coef * (answers.logprobs_A / answers.lengths_A)[better_N]
    return loss_N


def implicit_rewards(answers: Answers, config: Config) -> Tensor:
    """beta * what the loss compares, shape (A,): the reward whose optimum the policy is (Rafailov 2023, eq. 5)."""
    is_mean = config.loss in ("ipo", "sigmoid_norm", "orpo", "simpo")
    return config.beta * (answers.logratios_A / answers.lengths_A if is_mean else answers.logratios_A)
