"""A reward model as a reward: a frozen network that read people's rankings scores prompt and completion."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

import torch

from strop.models.heads import load_scalar_model, pack_scored
from strop.models.reward_scale import read_reward_scale
from strop.tokenizer import Tokenizer
from strop.types import Completion, Task, Verdict

_Tree = tuple[tuple[int, ...], list[tuple[int, ...]], tuple[()]]
"""A prompt's tokens, those of each of its completions, and no masks: a completion was sampled as a whole."""


class ModelReward:
    """(score - mean) / std of a sequence classifier's score, read at the last token that the policy sampled.

    That is the stop token where there is one, whichever it is, and never padding: there is none, since rows are packed
    and a prompt runs once for all its neighbouring completions. It reads the tokens as they were sampled, not their
    text, which would tokenise differently; so its tokenizer must be the policy's (bind checks it). mean and std are
    those of its config.json (models/reward_scale.py). Runs in this process: a network cannot be talked into anything,
    unlike a verifier of text.
    """

    def __init__(
        self,
        *,
        model: str,
        name: str = "model",
        device: str = "cpu",
        micro_batch_tokens: int = 8192,
    ) -> None:
        """model is a folder that reward_model saved, or any Hugging Face sequence classifier with one label.

        It computes in the dtype on disk; in bfloat16 beside a run in int8 its products are in 8 bits too.
        micro_batch_tokens bounds the memory. Raises ValueError.
        """
        if micro_batch_tokens < 1:
            raise ValueError(f"reward {name!r}: micro_batch_tokens={micro_batch_tokens} must be at least 1")
        self.name = name
        self._folder = Path(model)
        self._model = load_scalar_model(self._folder, device=device, frozen=True)
        self._scale = read_reward_scale(self._model.source_config, str(self._folder / "config.json"))
        self._micro_batch_tokens = micro_batch_tokens
        self._tokenizer: Tokenizer | None = None

    def bind(self, tokenizer: Tokenizer, max_length: int) -> None:
        """Take the policy's tokenizer, which makes the prompts' tokens. ValueError where this model cannot read them.

        max_length is the longest prompt and completion together, in tokens.
        """
        is_checked = tokenizer is self._tokenizer
        own = tokenizer if is_checked else Tokenizer.load(self._folder)
        own.check_fits(self._model.config.vocab_size)
        if not is_checked and not tokenizer.has_same_ids(own):
            raise ValueError(
                f"reward {self.name!r}: the tokenizer of {self._folder} is not the policy's, so that its model would "
                "read other words than were sampled: train the reward model from a checkpoint of the policy's family"
            )
        limit = self._model.config.max_position_embeddings
        if max_length > limit:
            raise ValueError(
                f"reward {self.name!r}: prompt and completion may have {max_length} tokens together, but the reward "
                f"model has only {limit} positions: lower sampling.max_new_tokens or shorten the prompts"
            )
        self._tokenizer = tokenizer

    @torch.no_grad()
    def score(self, tasks: Sequence[Task], completions: Sequence[Completion]) -> list[Verdict]:
        if self._tokenizer is None:
            raise ValueError(f"reward {self.name!r} reads tokens and was never told whose: call bind before score")
        trees: list[_Tree] = []
        for _, group in groupby(zip(tasks, completions, strict=True), key=lambda pair: pair[0].id):
            pairs = list(group)
            prompt = tuple(self._tokenizer.encode_prompt(pairs[0][0].prompt))
            trees.append((prompt, [completion.token_ids for _, completion in pairs], ()))
        verdicts: list[Verdict] = []
        for micro in _micro_batches(trees, self._micro_batch_tokens):
            scores_R = self._scale(self._model.scores_R(pack_scored(micro).to(self._model.device)))
            verdicts += [_verdict(score) for score in scores_R.tolist()]
        return verdicts

    def close(self) -> None:
        """Nothing to stop."""


def _verdict(score: float) -> Verdict:
    if math.isfinite(score):
        return Verdict(score=score)
    return Verdict(score=0.0, status="infra_error", detail=f"the reward model's score is {score}")


def _micro_batches(trees: Sequence[_Tree], max_tokens: int) -> Iterator[list[_Tree]]:
    """The trees in order, cut where needed, in batches of at most max_tokens (a single completion may exceed it)."""
    batch: list[_Tree] = []
    size = 0
    for prompt, completions, _ in trees:
        is_new = True
        for completion in completions:
            cost = len(completion) + (len(prompt) if is_new else 0)
            if batch and size + cost > max_tokens:
                yield batch
                batch, size, is_new = [], 0, True
                cost = len(prompt) + len(completion)
            if is_new:
                batch.append((prompt, [], ()))
                is_new = False
            batch[-1][1].append(completion)
            size += cost
    if batch:
        yield batch
