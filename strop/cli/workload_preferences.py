"""What one step of DPO and of the reward model does, for the forecast of `strop doctor --recipe`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from strop.data import Comparison
    from strop.stages.forecast import Workload
    from strop.types import PackedBatch, Segment, Tree


def reward_model(config: Any, runs_dir: Path) -> Workload:
    """One step on whole comparisons, through a scalar head."""
    from strop.cli.workload import checkpoint, computed_in, file_bytes, learner_of
    from strop.data.formats import COMPARED
    from strop.models.heads import is_scalar_folder, pack_scored
    from strop.stages.forecast import Workload

    model, folder = checkpoint(config.init_from, runs_dir)
    seen = None
    assumptions: tuple[str, ...] = ()
    if Path(config.data).exists():
        comparisons = _comparisons(config, folder, COMPARED, keep_ties=config.ties == "half")
        largest, step_tokens = largest_micro_batch(
            comparisons, pack_scored, config.batch_size, config.micro_batch_tokens
        )
        segments, num_labels = largest.segments, int(largest.loss_mask_T.sum())
        texts = (ids for one in comparisons for ids in (one.prompt_ids, *(answer.token_ids for answer in one.answers)))
        seen = frozenset(token for ids in texts for token in ids)
    else:
        segments, step_tokens = assumed_pairs(config, last_is_label=False)
        num_labels = sum(len(segment.branches) for segment in segments)
        assumptions = (f"{config.data} is not there yet: pairs of max_length, half of it the prompt",)
    return Workload(
        learner=learner_of(config, model, output="scores", seen_tokens=seen),
        **computed_in(config),
        micro_batch=tuple(segments),
        num_labels=num_labels,
        tokens_per_step=step_tokens,
        tokens_per_update=step_tokens,
        # A language model becomes a scalar one by a copy.
        loaded_copies=int(not is_scalar_folder(folder)),
        file_bytes=file_bytes(folder),
        assumptions=assumptions,
    )


def dpo(config: Any, runs_dir: Path) -> Workload:
    """One step on whole comparisons; online the policy answers first. Offline the reference is gone by then."""
    from strop.cli.workload import checkpoint, computed_in, file_bytes, learner_of
    from strop.cli.workload_rollouts import prompts, reward_bytes
    from strop.data import pack_completions
    from strop.data.formats import COMPARED
    from strop.stages.dpo_config import SINGLE
    from strop.stages.forecast import Rollout, Workload, packed_segments
    from strop.types import Segment

    model, folder = checkpoint(config.init_from, runs_dir)
    rollout, assumptions = None, ()
    if config.is_online:
        prompt_tokens, _, notes = prompts(config, config.online.tasks, folder)
        new_tokens = config.sampling.max_new_tokens
        size = config.online.group_size
        rollout = Rollout(
            num_prompts=config.batch_size, group_size=size, prompt_tokens=prompt_tokens, new_tokens=new_tokens,
            num_slots=config.online.num_slots,
        )  # fmt: skip
        num_answers = 2 if config.online.pairs == "best_worst" else size
        tree = Segment(trunk=prompt_tokens - 1, branches=(new_tokens,) * num_answers)
        segments = packed_segments([tree], config.micro_batch_tokens, max_segments=config.batch_size)
        step_tokens = config.batch_size * len(tree)
        num_labels = sum(sum(segment.branches) for segment in segments)
        assumptions = (*notes, "every answer runs to sampling.max_new_tokens, and no prompt's answers tie")
    elif Path(config.data).exists():
        accepted = (*COMPARED, "prompt/completion/label") if config.loss in SINGLE else COMPARED
        comparisons = _comparisons(config, folder, accepted, keep_ties=False)
        largest, step_tokens = largest_micro_batch(
            comparisons, pack_completions, config.batch_size, config.micro_batch_tokens
        )
        segments, num_labels = largest.segments, int(largest.loss_mask_T.sum())
    else:
        segments, step_tokens = assumed_pairs(config, last_is_label=True)
        num_labels = sum(sum(segment.branches) for segment in segments)
        assumptions = (f"{config.data} is not there yet: pairs of max_length, half of it the prompt",)
    passes = int(config.keeps_reference) + 2 * int(config.loss == "kto")
    return Workload(
        learner=learner_of(config, model),
        **computed_in(config),
        micro_batch=tuple(segments),
        num_labels=num_labels,
        tokens_per_step=step_tokens,
        tokens_per_update=step_tokens,
        frozen_tokens=passes * step_tokens,
        has_reference=config.keeps_reference,
        file_bytes=file_bytes(folder),
        reward_bytes=reward_bytes(config.rewards, runs_dir),
        rollout=rollout,
        assumptions=assumptions,
    )


def largest_micro_batch(
    comparisons: Sequence[Comparison],
    pack: Callable[[Iterable[Tree]], PackedBatch],
    batch_size: int,
    max_tokens: int,
) -> tuple[PackedBatch, int]:
    """(the largest micro-batch of an epoch in file order, positions of an average step)."""
    from strop.data import split_packed

    batches = [comparisons[start : start + batch_size] for start in range(0, len(comparisons), batch_size)]
    micro_batches = [split_packed(pack(one.tree for one in batch), max_tokens) for batch in batches]
    sizes = [sum(len(micro.token_ids_T) for micro in own) for own in micro_batches]
    whole = [size for size, batch in zip(sizes, batches, strict=True) if len(batch) == len(batches[0])]
    largest = max((micro for own in micro_batches for micro in own), key=lambda micro: len(micro.token_ids_T))
    return largest, round(sum(whole) / len(whole))


def assumed_pairs(config: Any, *, last_is_label: bool) -> tuple[tuple[Segment, ...], int]:
    """(a micro-batch, positions of a step) of pairs as long as allowed. last_is_label: only a label, and no input."""
    from strop.stages.forecast import packed_segments
    from strop.types import Segment

    prompt = max(1, config.max_length // 2)
    answer = config.max_length - prompt
    segment = Segment(trunk=prompt - last_is_label, branches=(answer, answer))
    segments = packed_segments([segment], config.micro_batch_tokens, max_segments=config.batch_size)
    return segments, config.batch_size * len(segment)


def _comparisons(config: Any, folder: Path, accepted: Sequence[Any], *, keep_ties: bool) -> Sequence[Comparison]:
    from strop.cli.workload import load_tokenizer
    from strop.data import comparisons_from_rows, load_rows

    return comparisons_from_rows(
        load_rows(config.data), load_tokenizer(folder), accepted=accepted, max_length=config.max_length,
        on_too_long=config.on_too_long, keep_ties=keep_ties,
    )  # fmt: skip
