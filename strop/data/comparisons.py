"""Preferences -> token ids: prompts with their answers, best first, and which of them beat which."""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import overload

import numpy as np

from strop.data.batches import Batches, epoch_order
from strop.data.examples import OnTooLong
from strop.data.formats import FeedbackRow, Format, PreferenceRow, Prompt, RankingRow, UnpairedRow, read_feedback
from strop.data.sources import Rows
from strop.tokenizer import Tokenizer
from strop.types import Tree


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A completion as its policy would have produced it: the stop token is its last.

    Example: Answer(token_ids=(8, 2), mask=(True, True))
    """

    token_ids: tuple[int, ...]
    mask: tuple[bool, ...]
    """Which tokens the assistant produced; the others (a tool's reply between its turns) are only read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One prompt's answers from best to worst. It is one element of a batch, whatever their number.

    Example, the third as good as the second: Comparison(where="ranks.jsonl:1", prompt_ids=(5, 6), answers=(a, b, c),
    ranks=(0, 1, 1)). An unpaired answer is alone, with a label instead of a rival.
    """

    where: str
    prompt_ids: tuple[int, ...]
    answers: tuple[Answer, ...]
    ranks: tuple[int, ...]
    """Never decreasing; 0 is best, equal ranks tie."""
    label: bool | None = None
    """Of an unpaired answer: whether it was wanted."""
    weight: float = 1.0
    margin: float | None = None

    @property
    def num_tokens(self) -> int:
        """Packed positions: the prompt once, and every answer."""
        return len(self.prompt_ids) + sum(len(answer.token_ids) for answer in self.answers)

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """(better, worse) places of all answers that do not tie."""
        places = range(len(self.answers))
        return [(i, j) for i in places for j in places if self.ranks[i] < self.ranks[j]]

    @property
    def tree(self) -> Tree:
        return self.prompt_ids, [answer.token_ids for answer in self.answers], [answer.mask for answer in self.answers]


class Comparisons(Sequence[Comparison]):
    """Comparisons, and what became of rows that could not be used whole."""

    def __init__(self, comparisons: Iterable[Comparison], counts: Mapping[str, int] | None = None) -> None:
        self._comparisons = list(comparisons)
        self.counts = dict(counts or {})
        """What was cut or left out, by reason."""

    def __len__(self) -> int:
        return len(self._comparisons)

    @overload
    def __getitem__(self, index: int) -> Comparison: ...
    @overload
    def __getitem__(self, index: slice) -> list[Comparison]: ...
    def __getitem__(self, index: int | slice) -> Comparison | list[Comparison]:
        return self._comparisons[index]


class ComparisonBatches(Batches[tuple[Comparison, ...]]):
    """Endless iterator of batch_size comparisons; each epoch has every one exactly once, in another order.

    The last batch of an epoch is what is left.
    """

    def __init__(self, comparisons: Sequence[Comparison], *, batch_size: int, seed: int, shuffle: bool = True) -> None:
        if not 0 < batch_size <= len(comparisons):
            raise ValueError(
                f"batch_size must be between 1 and the number of comparisons {len(comparisons)}, got {batch_size}"
            )
        self._comparisons = comparisons
        count = len(comparisons)

        def plan(epoch: int) -> list[np.ndarray]:
            order = epoch_order([count], [count], seed=seed, epoch=epoch, shuffle=shuffle)
            return [order[start : start + batch_size] for start in range(0, count, batch_size)]

        digest = hashlib.sha256(repr(("comparisons", batch_size, seed, shuffle)).encode())
        for comparison in comparisons:
            digest.update(repr((comparison.where, comparison.num_tokens)).encode())
        super().__init__(plan, self._take, digest.hexdigest())

    def _take(self, items: np.ndarray) -> tuple[Comparison, ...]:
        return tuple(self._comparisons[int(item)] for item in items)


def comparisons_from_rows(
    rows: Rows,
    tokenizer: Tokenizer,
    *,
    accepted: Sequence[Format],
    max_length: int,
    on_too_long: OnTooLong = "error",
    keep_ties: bool = False,
    annotator_weights: Mapping[str, float] | None = None,
) -> Comparisons:
    """The rows as comparisons whose prompt and answer have at most max_length tokens each time together.

    truncate cuts the end of an answer, never the prompt. A row whose answers are then all the same, or that has no room
    for an answer, says nothing any more: it is left out and counted, as is a ranking of equal answers, and one where
    all answers tie, unless keep_ties. One line on stderr tells. annotator_weights multiply the rows' own weights.

    Raises ValueError naming file:line for a bad row, one that is too long with on_too_long="error", a pair whose
    answers become the same tokens without being cut, an annotator that annotator_weights names and nobody is; and when
    nothing is left.
    """
    if max_length < 2:
        raise ValueError(
            f"max_length must be at least 2 (a token of the prompt and one of the answer), got {max_length}"
        )
    weights, seen = dict(annotator_weights or {}), set[str]()
    counts: dict[str, int] = dict.fromkeys(
        ("alike", "truncated", "too long", "no room after the prompt", "alike once truncated", "all tied"), 0
    )
    comparisons: list[Comparison] = []
    for row in read_feedback(rows, accepted):
        try:
            comparison = encode_comparison(row, tokenizer)
        except ValueError as error:
            raise ValueError(f"{row.where}: {error}") from error
        if row.annotator is not None:
            seen.add(row.annotator)
            weight = comparison.weight * weights.get(row.annotator, 1.0)
            comparison = dataclasses.replace(comparison, weight=weight)
        if isinstance(row, RankingRow) and _are_alike(comparison.answers):
            counts["alike"] += 1  # samples of a policy may well be
            continue
        if isinstance(row, PreferenceRow) and _are_alike(comparison.answers):
            raise ValueError(
                f"{row.where}: the answers become the same tokens, so that nothing sets them apart; remove the row"
            )
        if len(comparison.answers) > 1 and not comparison.pairs and not keep_ties:
            counts["all tied"] += 1
            continue
        if fate := _too_long(comparison, max_length, on_too_long):
            counts[fate] += 1
            if fate != "truncated":
                continue
            comparison = _truncated(comparison, max_length)
            if len(comparison.answers) > 1 and _are_alike(comparison.answers):
                counts["alike once truncated"] += 1
                counts["truncated"] -= 1
                continue
        comparisons.append(comparison)
    counts = {reason: count for reason, count in counts.items() if count}
    told = ", ".join(f"{count} {reason}" for reason, count in counts.items()) or "none"
    if counts:
        print(f"{rows.source}: of {len(rows)} rows (max_length {max_length}): {told}", file=sys.stderr)
    if unknown := sorted(weights.keys() - seen):
        near = get_close_matches(unknown[0], seen, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(sorted(seen)) or 'none'}"
        raise ValueError(f"annotator_weights: no row of {rows.source} is by {unknown[0]!r}; {hint}")
    if not comparisons:
        raise ValueError(f"{rows.source}: no row is left to learn from: of {len(rows)}, {told}")
    if not any(comparison.pairs or comparison.label is not None for comparison in comparisons):
        raise ValueError(f"{rows.source}: in every row all answers tie, so that none is preferred")
    return Comparisons(comparisons, counts)


def encode_comparison(row: FeedbackRow, tokenizer: Tokenizer) -> Comparison:
    """The row's prompt and answers as tokens. ValueError where the template cannot render them."""
    margin = None
    if isinstance(row, UnpairedRow):
        completions, ranks = (row.completion,), (0.0,)
    elif isinstance(row, RankingRow):
        order = sorted(range(len(row.ranks)), key=lambda place: row.ranks[place])  # stable: ties stay in file order
        completions, ranks = tuple(row.completions[i] for i in order), tuple(row.ranks[i] for i in order)
    else:
        completions, ranks, margin = (row.chosen, row.rejected), (0.0, 1.0), row.margin
    prompt_ids = tuple(tokenizer.encode_prompt(row.prompt, tools=row.tools))
    if not prompt_ids:
        raise ValueError("the prompt has no token: give it some text")
    dense = {rank: place for place, rank in enumerate(sorted(set(ranks)))}
    return Comparison(
        where=row.where,
        prompt_ids=prompt_ids,
        answers=tuple(_encode_answer(row, completion, len(prompt_ids), tokenizer) for completion in completions),
        ranks=tuple(dense[rank] for rank in ranks),
        label=row.label if isinstance(row, UnpairedRow) else None,
        weight=row.weight,
        margin=margin,
    )


def _encode_answer(row: FeedbackRow, completion: Prompt, num_prompt: int, tokenizer: Tokenizer) -> Answer:
    ids, mask = tokenizer.encode_prompt_completion(row.prompt, completion, tools=row.tools)
    # A template may go on after the stop token (a newline); a policy that is sampled never does.
    end = max(place for place, counts in enumerate(mask) if counts) + 1
    return Answer(token_ids=tuple(ids[num_prompt:end]), mask=tuple(mask[num_prompt:end]))


def _too_long(comparison: Comparison, max_length: int, on_too_long: OnTooLong) -> str:
    """What becomes of a comparison that is longer than max_length, "" for one that is not."""
    longest = len(comparison.prompt_ids) + max(len(answer.token_ids) for answer in comparison.answers)
    if longest <= max_length:
        return ""
    if on_too_long == "error":
        raise ValueError(
            f"{comparison.where}: prompt and answer have {longest} tokens, but max_length is {max_length}; raise it, "
            'or set on_too_long to "drop" or "truncate"'
        )
    if on_too_long == "drop":
        return "too long"
    room = max_length - len(comparison.prompt_ids)
    has_room = room > 0 and all(any(answer.mask[:room]) for answer in comparison.answers)
    return "truncated" if has_room else "no room after the prompt"


def _truncated(comparison: Comparison, max_length: int) -> Comparison:
    room = max_length - len(comparison.prompt_ids)
    answers = tuple(Answer(token_ids=a.token_ids[:room], mask=a.mask[:room]) for a in comparison.answers)
    return dataclasses.replace(comparison, answers=answers)


def _are_alike(answers: Sequence[Answer]) -> bool:
    return len({answer.token_ids for answer in answers}) == 1
