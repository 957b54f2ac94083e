"""The values that cross rooms. Frozen, without behaviour beyond what is derived from their own fields."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

FinishReason = Literal["stop", "length"]
VerdictStatus = Literal["ok", "wrong", "unparsed", "timeout", "killed", "infra_error"]

Message = Mapping[str, Any]
"""One chat turn in the field's format: {"role": "user", "content": "2 + 2 = ?"}."""

Tree = tuple[Sequence[int], Sequence[Sequence[int]], Sequence[Sequence[bool]]]
"""A prompt's tokens, its completions' tokens, and which of those count: ((5, 6, 7), ((8, 2), (9, 9, 2)), ...)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One thing to solve: what the policy sees, and what the rewards may look at.

    Example: Task(id="train.jsonl:7", prompt=({"role": "user", "content": "2 + 2 = ?"},), columns={"answer": "4"})
    """

    id: str
    """Where it came from ("file:line"), so that an error or a sample can name it."""
    prompt: str | tuple[Message, ...]
    """Plain text, or messages that the chat template renders."""
    columns: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Every other column of the row (answer, tests, ...). The policy never sees these."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """What the player to move sees of a game.

    Example: Observation(text="nim, player 0\\n(0): 1 3\\nmove:", player=0, legal=("pile:1, take:1;", ...))
    """

    text: str
    player: int
    legal: tuple[str, ...] | None = None
    """The moves that the rules allow; None where any text is one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Transition:
    """What a move led to.

    Example: Transition(observation=None, rewards=(1.0, -1.0)) ends a game that player 0 has won.
    """

    observation: Observation | None
    """What the next player sees; None at the end."""
    rewards: tuple[float, ...]
    """What each player gets for this move: 0 until the end, in most games."""
    is_illegal: bool = False
    """The move was not allowed, which ended the game."""
    is_truncated: bool = False
    """The end came from a limit and not from the rules."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How one completion is drawn.

    Example: SamplingParams(max_new_tokens=64, temperature=1.0, stop_token_ids=(2,))
    """

    max_new_tokens: int = 256
    temperature: float = 1.0
    """Logits are divided by it; 0 means greedy (and logprob 0 for every token, the limit)."""
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps every token."""
    min_p: float = 0.0
    stop_token_ids: tuple[int, ...] = ()
    """Sampling one of these ends the completion; the token itself is part of it and has a logprob."""
    stop: tuple[str, ...] = ()
    """Strings that end the completion. The text is cut before the string; the sampled tokens are all kept."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of every token that the completion has already."""
    frequency_penalty: float = 0.0
    """Subtracted from it once for each time that the completion has it."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token id, number added to its logit)."""
    top_logprobs: int | None = None
    """Report every sampled token as TokenLogprobs, with so many of the likeliest beside it; None reports nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A prompt for the generation engine, with the seed that alone decides its samples.

    Example: Request(prompt_ids=(1, 42, 7), num_samples=8, sampling=SamplingParams(), seed=17)
    """

    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    num_samples: int = 1
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprobs:
    """The model's own law at one token: of the plain logits, before penalties, bias, temperature and filters.

    Example: TokenLogprobs(token_id=52, logprob=-0.7, top=((52, -0.7), (11, -1.2)))
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """(token id, logprob) of the likeliest tokens, the likeliest first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What the policy sampled for one prompt.

    Example: Completion(token_ids=(52, 2), sampling_logprobs=(-0.7, -0.1), finish_reason="stop", text="4")
    """

    token_ids: tuple[int, ...]
    """Every sampled token, the stop token included."""
    sampling_logprobs: tuple[float, ...]
    """Of the distribution that was really sampled from: after temperature, top-p, top-k and min-p, renormalised."""
    finish_reason: FinishReason
    text: str
    """Without stop tokens, cut before a stop string."""
    token_logprobs: tuple[TokenLogprobs, ...] = ()
    """One per token where SamplingParams.top_logprobs asks for them. Not what it was sampled from: see there."""
    recorded_rows: tuple[int, ...] = ()
    """Where the Recording that Engine.generate was given has the prompt's tokens and these, but for the last."""
    recorded_labels: tuple[int, ...] = ()
    """The numbers under which it has what the LM head made of each of token_ids."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One reward function's word on one completion.

    Example: Verdict(score=0.0, status="wrong", detail="5 != 4", milliseconds=0.8)
    """

    score: float
    """A wrong answer scores 0.0. Meaningless when status is "infra_error": that sample is masked and counted."""
    status: VerdictStatus = "ok"
    detail: str = ""
    milliseconds: float = 0.0
    second_opinion: bool | None = None
    """Whether another, cruder judge calls it right; None where there is none. It never changes the score: how often the
    two disagree is logged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """One tree of tokens inside a packed batch: a trunk, then branches that all continue it.

    A branch attends to the trunk and to itself, never to its sisters, so that a prompt is computed once for the whole
    group that answers it. A plain document is a trunk without branches.

    Example: Segment(trunk=3, branches=(2, 4)) covers 9 packed positions: t t t a a b b b b,
    with position ids 0 1 2 3 4 3 4 5 6.
    """

    trunk: int
    branches: tuple[int, ...] = ()

    def __len__(self) -> int:
        return self.trunk + sum(self.branches)

    def position_ids(self) -> list[int]:
        ids = list(range(self.trunk))
        for length in self.branches:
            ids.extend(range(self.trunk, self.trunk + length))
        return ids


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedBatch:
    """Token rows of any lengths laid end to end, without padding. Already shifted: labels_T[t] follows token_ids_T[t].

    Example, one prompt (5 6 7) with the completions (8 2) and (9 9 2); the prompt's last token opens each branch, so
    that every label belongs to exactly one position:

        segments    (Segment(trunk=2, branches=(2, 3)),)
        token_ids_T  5 6 | 7 8 | 7 9 9
        labels_T     6 7 | 8 2 | 9 9 2
        loss_mask_T  0 0 | 1 1 | 1 1 1
    """

    token_ids_T: Tensor
    """int64, shape (T,)."""
    labels_T: Tensor
    """int64, shape (T,). Where loss_mask_T is False the value is never read."""
    loss_mask_T: Tensor
    """bool, shape (T,): True = this label counts."""
    segments: Sequence[Segment]
    """In packed order; their lengths add up to T."""
    recorded_rows_T: Tensor | None = None
    """int64, shape (T,): where a rollout's Recording has each token."""
    recorded_labels_R: Tensor | None = None
    """int64, one per True of loss_mask_T: the number under which it has the label."""

    def position_ids_T(self) -> Tensor:
        """int64, shape (T,): each token's position inside its own document (or trunk + branch)."""
        ids = [position for segment in self.segments for position in segment.position_ids()]
        return torch.tensor(ids, dtype=torch.int64, device=self.token_ids_T.device)

    def to(self, device: torch.device | str) -> PackedBatch:
        return PackedBatch(
            token_ids_T=self.token_ids_T.to(device),
            labels_T=self.labels_T.to(device),
            loss_mask_T=self.loss_mask_T.to(device),
            segments=self.segments,
            recorded_rows_T=None if self.recorded_rows_T is None else self.recorded_rows_T.to(device),
            recorded_labels_R=None if self.recorded_labels_R is None else self.recorded_labels_R.to(device),
        )
