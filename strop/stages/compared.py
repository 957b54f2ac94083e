"""What the reward model and DPO share: comparisons that fit the model, and their micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from strop.data import Comparison, split_packed
from strop.types import PackedBatch, Tree


def check_fits(comparisons: Sequence[Comparison], *, max_positions: int, micro_batch_tokens: int) -> None:
    """ValueError naming the first comparison that has more tokens than the model positions, or a pass room."""
    for comparison in comparisons:
        longest = len(comparison.prompt_ids) + max(len(answer.token_ids) for answer in comparison.answers)
        if longest > max_positions:
            raise ValueError(
                f"{comparison.where}: prompt and answer have {longest} tokens, but the model has only {max_positions} "
                f"positions: lower max_length to {max_positions}, and say with on_too_long what becomes of longer ones"
            )
        if comparison.num_tokens > micro_batch_tokens:
            raise ValueError(
                f"{comparison.where}: its prompt and {len(comparison.answers)} answers have {comparison.num_tokens} "
                f"tokens, which one pass must hold: raise micro_batch_tokens={micro_batch_tokens}"
            )


def micro_batches(
    comparisons: Sequence[Comparison], pack: Callable[[Iterable[Tree]], PackedBatch], max_tokens: int
) -> Iterator[tuple[PackedBatch, Sequence[Comparison]]]:
    """Packed batches of at most max_tokens, with the comparisons in each: one segment is one comparison."""
    first = 0
    for micro in split_packed(pack(comparison.tree for comparison in comparisons), max_tokens):
        last = first + len(micro.segments)
        yield micro, comparisons[first:last]
        first = last
