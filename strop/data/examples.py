"""Rows -> token ids with a loss mask, for supervised training. Not shifted yet: packing.py does that, once."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, overload

import numpy as np

from strop.data.formats import Format, MessagesRow, SupervisedRow, TextRow, read_supervised
from strop.data.sources import Rows
from strop.tokenizer import Tokenizer

OnTooLong = Literal["error", "drop", "truncate"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Example:
    """One document with the tokens that count.

    Example: Example(where="sft.jsonl:1", token_ids=[5, 6, 7, 8, 2], loss_mask=[0, 0, 0, 1, 1]): prompt 5 6 7, and the
    completion 8 with the EOS 2. The mask is about the token at its own position, as the tokenizer made it.
    """

    token_ids: np.ndarray
    """int32, shape (n,) with n >= 2."""
    loss_mask: np.ndarray
    """bool, shape (n,). loss_mask[0] is never used: nothing predicts the first token."""
    where: str

    @property
    def num_labels(self) -> int:
        """Positions that the example takes in a batch: one less than its tokens."""
        return len(self.token_ids) - 1


class Examples(Sequence[Example]):
    """Examples, and what became of the rows that were too long."""

    def __init__(
        self, examples: Iterable[Example], *, num_dropped: int = 0, num_truncated: int = 0, num_emptied: int = 0
    ) -> None:
        self._examples = list(examples)
        self.num_dropped = num_dropped
        """Left out for their length (on_too_long="drop")."""
        self.num_truncated = num_truncated
        """Cut to max_length and kept."""
        self.num_emptied = num_emptied
        """Left out because no token that counts was within max_length (on_too_long="truncate")."""

    def __len__(self) -> int:
        return len(self._examples)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        return self._examples[index]


def sft_examples(
    rows: Rows,
    tokenizer: Tokenizer,
    max_length: int,
    *,
    on_too_long: OnTooLong = "error",
    format: Format | None = None,
) -> Examples:
    """The rows as examples of at most max_length tokens, in order; text, messages or prompt/completion (formats.py).

    Of text every token counts, and EOS ends it; of a conversation the assistant's turns; of prompt/completion the
    completion. A row longer than max_length is an error, or left out, or cut at its end, as on_too_long says; the
    result counts them, and one line on stderr tells the user.

    Raises ValueError naming file:line for a bad row, a row where no token counts, and when nothing is left.
    """
    if max_length < 2:
        raise ValueError(f"max_length must be at least 2 (a token and its label), got {max_length}")
    if on_too_long not in ("error", "drop", "truncate"):
        raise ValueError(f'on_too_long must be "error", "drop" or "truncate", got {on_too_long!r}')
    examples: list[Example] = []
    num_dropped = num_truncated = num_emptied = 0
    for row in read_supervised(rows, format=format):
        try:
            ids, mask = _encode(row, tokenizer)
        except ValueError as error:
            raise ValueError(f"{row.where}: {error}") from error
        if not any(mask[1:]):
            raise ValueError(f"{row.where}: no token of this row counts in the loss; remove it or check the template")
        if len(ids) > max_length:
            if on_too_long == "error":
                raise ValueError(
                    f"{row.where}: {len(ids)} tokens, but max_length is {max_length}; raise it, or set on_too_long to "
                    '"drop" or "truncate"'
                )
            if on_too_long == "drop":
                num_dropped += 1
                continue
            if not any(mask[1:max_length]):
                num_emptied += 1
                continue
            num_truncated += 1
            ids, mask = ids[:max_length], mask[:max_length]
        examples.append(
            Example(token_ids=np.array(ids, dtype=np.int32), loss_mask=np.array(mask, dtype=bool), where=row.where)
        )
    if num_dropped or num_truncated or num_emptied:
        print(
            f"{rows.source}: of {len(rows)} rows, longer than max_length {max_length}: {num_truncated} truncated, "
            f"{num_dropped} dropped, {num_emptied} dropped because nothing that counts was left",
            file=sys.stderr,
        )
    if not examples:
        raise ValueError(f"{rows.source}: no row fits max_length {max_length}; raise it")
    return Examples(examples, num_dropped=num_dropped, num_truncated=num_truncated, num_emptied=num_emptied)


def require_eos(tokenizer: Tokenizer) -> int:
    """The EOS id; ValueError where there is none, since a model that never sees it never stops."""
    if tokenizer.eos_id is None:
        raise ValueError(
            "the tokenizer has no EOS token, so a model could not learn where a text ends; set its eos_token"
        )
    return tokenizer.eos_id


def _encode(row: SupervisedRow, tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    if isinstance(row, TextRow):
        # As for a prompt: BOS first, where the tokenizer begins texts with it.
        ids = [*tokenizer.encode_prompt(row.text), require_eos(tokenizer)]
        return ids, [True] * len(ids)
    if isinstance(row, MessagesRow):
        return tokenizer.encode_chat(row.messages, tools=row.tools)
    return tokenizer.encode_prompt_completion(row.prompt, row.completion, tools=row.tools)
