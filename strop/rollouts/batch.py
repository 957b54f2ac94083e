"""The training batch of the RL stage: the only place where ragged completions become rectangular.

Shape suffixes: B completions, T label positions of the longest completion, P prompts, G group.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from strop.types import Completion, PackedBatch, Segment


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutBatch:
    """Completions of prompts, rows of one prompt next to each other, and what the losses want to know of each token.

    Example: two samples of the prompt (5, 6, 7), one sample of (5, 9):
    prompts=((5, 6, 7), (5, 9)), prompt_of_row=(0, 0, 1), completions=((8, 2), (9, 9, 2), (4, 2)).

    Every (B, T) tensor belongs to the label at its position; beyond a row's end response_mask_BT is False and the
    value is never read.
    """

    prompts: tuple[tuple[int, ...], ...]
    prompt_of_row: tuple[int, ...]
    completions: tuple[tuple[int, ...], ...]
    recorded_rows: tuple[tuple[int, ...], ...]
    """Completion.recorded_rows of each row; empty without a Recording."""
    recorded_labels: tuple[tuple[int, ...], ...]
    """The same of Completion.recorded_labels."""
    response_mask_BT: Tensor
    """bool: True = sampled by the policy (the stop token included)."""
    sampling_logprobs_BT: Tensor
    """float32, from the engine."""
    advantages_BT: Tensor | None = None
    old_logprobs_BT: Tensor | None = None
    """float32, from the trainer before this batch's updates."""
    ref_logprobs_BT: Tensor | None = None
    values_BT: Tensor | None = None
    """float32, from the critic before this batch's updates: what it expects before the token is sampled."""
    returns_BT: Tensor | None = None
    """What the critic should have expected."""

    def __len__(self) -> int:
        return len(self.completions)

    def replace(self, **fields: Tensor | None) -> RolloutBatch:
        return dataclasses.replace(self, **fields)  # pyright: ignore[reportArgumentType]

    def select(self, rows: Sequence[int]) -> RolloutBatch:
        """These rows only, trimmed to their own longest completion."""
        width = max((len(self.completions[row]) for row in rows), default=0)
        index = torch.tensor(list(rows), dtype=torch.int64)
        tensors = {
            field.name: None if (value := getattr(self, field.name)) is None else value[index.to(value.device), :width]
            for field in dataclasses.fields(self)
            if field.name.endswith("_BT")
        }
        return dataclasses.replace(
            self,
            prompt_of_row=tuple(self.prompt_of_row[row] for row in rows),
            completions=tuple(self.completions[row] for row in rows),
            recorded_rows=tuple(self.recorded_rows[row] for row in rows),
            recorded_labels=tuple(self.recorded_labels[row] for row in rows),
            **tensors,
        )

    def split(self, max_tokens: int) -> Iterator[RolloutBatch]:
        """Micro-batches of at most max_tokens packed tokens (a single row may exceed it).

        A group too large for one micro-batch is cut, and its prompt is computed once for each piece.
        """
        rows: list[int] = []
        tokens = 0
        for row, (prompt, completion) in enumerate(zip(self.prompt_of_row, self.completions, strict=True)):
            is_new_tree = not rows or self.prompt_of_row[rows[-1]] != prompt
            cost = len(completion) + (len(self.prompts[prompt]) - 1 if is_new_tree else 0)
            if rows and tokens + cost > max_tokens:
                yield self.select(rows)
                rows, cost, tokens = [], len(completion) + len(self.prompts[prompt]) - 1, 0
            rows.append(row)
            tokens += cost
        if rows:
            yield self.select(rows)

    def packed(self) -> PackedBatch:
        """The rows as trees: each prompt (but its last token) once, its completions as branches.

        loss_mask_T is True in the order in which response_mask_BT is read row by row, so that
        `values_BT[response_mask_BT] = values_T[loss_mask_T]` carries per-token results back.
        """
        token_ids: list[int] = []
        labels: list[int] = []
        recorded_rows: list[int] = []
        recorded_labels: list[int] = []
        mask_parts: list[Tensor] = []
        segments: list[Segment] = []
        device = self.response_mask_BT.device
        row = 0
        while row < len(self):
            prompt = self.prompts[self.prompt_of_row[row]]
            last = row
            while last < len(self) and self.prompt_of_row[last] == self.prompt_of_row[row]:
                last += 1
            token_ids.extend(prompt[:-1])
            labels.extend(prompt[1:])
            recorded_rows.extend(self.recorded_rows[row][: len(prompt) - 1])
            mask_parts.append(torch.zeros(len(prompt) - 1, dtype=torch.bool, device=device))
            for index in range(row, last):
                completion = self.completions[index]
                token_ids.extend((prompt[-1], *completion[:-1]))
                labels.extend(completion)
                recorded_rows.extend(self.recorded_rows[index][len(prompt) - 1 :])
                recorded_labels.extend(self.recorded_labels[index])
                mask_parts.append(self.response_mask_BT[index, : len(completion)])
            segments.append(
                Segment(
                    trunk=len(prompt) - 1, branches=tuple(len(self.completions[index]) for index in range(row, last))
                )
            )
            row = last
        loss_mask_T = torch.cat(mask_parts)
        has_labels = len(recorded_labels) == sum(map(len, self.completions)) == int(loss_mask_T.sum())
        return PackedBatch(
            token_ids_T=torch.tensor(token_ids, dtype=torch.int64, device=device),
            labels_T=torch.tensor(labels, dtype=torch.int64, device=device),
            loss_mask_T=loss_mask_T,
            segments=tuple(segments),
            recorded_rows_T=torch.tensor(recorded_rows, device=device) if len(recorded_rows) == len(labels) else None,
            recorded_labels_R=torch.tensor(recorded_labels, device=device) if has_labels else None,
        )


def collate_rollouts(
    prompts_P: Sequence[Sequence[int]],
    groups_PG: Sequence[Sequence[Completion]],
    *,
    device: torch.device | str = "cpu",
) -> RolloutBatch:
    """Groups of completions as one RolloutBatch, row p * G + g for equal groups; empty completions are refused.

    Raises ValueError for a completion without tokens, which has no position to learn from.
    """
    rows = [(prompt, completion) for prompt, group in enumerate(groups_PG) for completion in group]
    width = max((len(completion.token_ids) for _, completion in rows), default=0)
    response_mask_BT = torch.zeros(len(rows), width, dtype=torch.bool)
    sampling_logprobs_BT = torch.zeros(len(rows), width)
    for row, (prompt, completion) in enumerate(rows):
        if not completion.token_ids:
            raise ValueError(f"a completion of prompt {prompt} has no tokens: max_new_tokens must be at least 1")
        length = len(completion.token_ids)
        response_mask_BT[row, :length] = True
        sampling_logprobs_BT[row, :length] = torch.tensor(completion.sampling_logprobs)
    return RolloutBatch(
        prompts=tuple(tuple(prompt) for prompt in prompts_P),
        prompt_of_row=tuple(prompt for prompt, _ in rows),
        completions=tuple(completion.token_ids for _, completion in rows),
        recorded_rows=tuple(completion.recorded_rows for _, completion in rows),
        recorded_labels=tuple(completion.recorded_labels for _, completion in rows),
        response_mask_BT=response_mask_BT.to(device),
        sampling_logprobs_BT=sampling_logprobs_BT.to(device),
    )


def minibatch_rows(batch: RolloutBatch, num_prompts: int, shuffle: torch.Generator) -> list[list[int]]:
    """Rows of each update, whole groups in random order; 0 prompts = one update with all rows."""
    prompts = sorted(set(batch.prompt_of_row))
    order = [prompts[index] for index in torch.randperm(len(prompts), generator=shuffle).tolist()]
    size = num_prompts or len(order)
    parts = [set(order[start : start + size]) for start in range(0, len(order), size)]
    return [[row for row, prompt in enumerate(batch.prompt_of_row) if prompt in part] for part in parts]
