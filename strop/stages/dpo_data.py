"""DPO's rows as comparisons, and the foreign answers of which KTO makes its baseline."""

from __future__ import annotations

from collections.abc import Sequence

from strop.data import Comparison, Comparisons, Rows, comparisons_from_rows
from strop.data.comparisons import Answer
from strop.data.formats import COMPARED
from strop.stages.compared import check_fits
from strop.stages.dpo_config import SINGLE, Config
from strop.tokenizer import Tokenizer


def read_comparisons(rows: Rows, tokenizer: Tokenizer, max_positions: int, config: Config) -> Comparisons:
    """The rows as comparisons, checked against the settings."""
    accepted = (*COMPARED, "prompt/completion/label") if config.loss in SINGLE else COMPARED
    comparisons = comparisons_from_rows(
        rows, tokenizer, accepted=accepted, max_length=config.max_length, on_too_long=config.on_too_long
    )
    check_fits(comparisons, max_positions=max_positions, micro_batch_tokens=config.micro_batch_tokens)
    labels = {comparison.label for comparison in comparisons}
    if None in labels and len(labels) > 1:
        raise ValueError(f"{rows.source}: pairs and single answers with a label are mixed: use one of them")
    if None not in labels and len(labels) == 1:
        raise ValueError(
            f'{rows.source}: every label is {str(labels.pop()).lower()}, but loss = "{config.loss}" tells wanted from '
            "unwanted answers: add some of the other kind"
        )
    return comparisons


def mismatched(comparisons: Sequence[Comparison], *, max_tokens: int) -> list[Comparison]:
    """Every prompt with the best answer to another one, of which KTO's baseline is made.

    The next comparison with another prompt lends its answer, cut where both would exceed max_tokens. ValueError when
    all prompts are the same.
    """
    if len({comparison.prompt_ids for comparison in comparisons}) < 2:
        raise ValueError(
            'loss = "kto" measures its baseline on answers to other prompts, but all prompts are the same: add others'
        )
    found: list[Comparison] = []
    for place, comparison in enumerate(comparisons):
        other = place + 1
        while comparisons[other % len(comparisons)].prompt_ids == comparison.prompt_ids:
            other += 1
        answer, room = comparisons[other % len(comparisons)].answers[0], max_tokens - len(comparison.prompt_ids)
        answer = Answer(token_ids=answer.token_ids[:room], mask=answer.mask[:room])
        found.append(
            Comparison(where=comparison.where, prompt_ids=comparison.prompt_ids, answers=(answer,), ranks=(0,))
        )
    return found
