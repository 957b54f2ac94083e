"""Rewards for being sure: how sharp the policy's own next-token laws are along a completion. No labels, no answers.

They reward confidence whether or not it is deserved: published runs gain first and then collapse below their start.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Literal

import torch

from strop.models.interface import CausalLM
from strop.models.logprobs import packed_logprobs, packed_self_certainty
from strop.rollouts.batch import RolloutBatch, collate_rollouts
from strop.types import Completion, Task, Verdict


class ConfidenceReward:
    """Mean over a completion's tokens of minus the entropy ("entropy", RENT, Prabhudesai et al. 2025), or of KL(U || p)
    ("self_certainty", INTUITOR, Zhao et al. 2025), in nats and at the sampling temperature.

    The policy as it is now is the judge: a frozen one would be gamed by completions that only it is sure of.
    Completions of one task must stand next to each other.
    """

    def __init__(
        self,
        policy: CausalLM,
        prompt_ids: Mapping[str, tuple[int, ...]],
        *,
        kind: Literal["entropy", "self_certainty"],
        temperature: float,
        micro_batch_tokens: int,
    ) -> None:
        """prompt_ids: task id -> the prompt's tokens, as the policy saw them; micro_batch_tokens bounds the memory."""
        self.name = kind
        self._policy = policy
        self._prompt_ids = prompt_ids
        self._kind = kind
        self._temperature = temperature
        self._micro_batch_tokens = micro_batch_tokens

    @torch.no_grad()
    def score(self, tasks: Sequence[Task], completions: Sequence[Completion]) -> list[Verdict]:
        pairs = zip(tasks, completions, strict=True)
        groups = [(name, [pair[1] for pair in group]) for name, group in groupby(pairs, key=lambda pair: pair[0].id)]
        batch = collate_rollouts(
            [self._prompt_ids[name] for name, _ in groups],
            [group for _, group in groups],
            device=self._policy.device,
        )
        means = [mean for micro in batch.split(self._micro_batch_tokens) for mean in self._means(micro)]
        return [Verdict(score=mean) for mean in means]

    def close(self) -> None:
        """Holds nothing."""

    def _means(self, micro: RolloutBatch) -> list[float]:
        packed = micro.packed()
        if self._kind == "entropy":
            _, entropy_R = packed_logprobs(self._policy, packed, temperature=self._temperature, with_entropy=True)
            assert entropy_R is not None
            values_R = -entropy_R
        else:
            values_R = packed_self_certainty(self._policy, packed, temperature=self._temperature)
        lengths = [len(completion) for completion in micro.completions]
        return [float(values.mean()) for values in values_R.split(lengths)]
