"""Prompts and checkpoints -> items to rank. What has been sampled is kept, so that a call cut short goes on."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from strop.generation import Engine
from strop.ranking.store import PreferenceStore, prompt_id_of, share_of
from strop.rollouts.prompts import encode_prompt
from strop.runs.seeds import derive_seed
from strop.tokenizer import Tokenizer
from strop.types import Completion, Request, SamplingParams, Task


@dataclass(frozen=True, slots=True, kw_only=True)
class ItemReport:
    """What became of the answers of some prompts.

    Example: ItemReport(num_items=38, num_equal=5, num_empty=1, num_too_few=2)
    """

    num_items: int
    num_equal: int
    """Answers left out because the item has one with the same text already."""
    num_empty: int
    """Answers left out because they hold no text."""
    num_too_few: int
    """Prompts left out because fewer than two answers remained: there is nothing to compare."""


def sample_responses(
    store: PreferenceStore,
    engine: Engine,
    tokenizer: Tokenizer,
    tasks: Sequence[Task],
    *,
    policy_id: int,
    num_samples: int,
    sampling: SamplingParams,
    seed: int,
    on_prompt: Callable[[int], None] | None = None,
) -> int:
    """Store num_samples answers of one policy to each prompt and return how many prompts needed the engine.

    A prompt is stored when its last answer ends, all answers at once; one that has them already is not sampled again.
    Which answers a prompt gets is decided by prompt, policy, sampling and seed, not by where an earlier call stopped.
    on_prompt gets the number of prompts done so far.
    """
    how = sampling_key(sampling, seed)
    label = store.query("SELECT label, weights FROM policies WHERE id = ?", policy_id)[0]
    missing = [task for task in distinct(tasks) if _num_stored(store, task, policy_id, how) < num_samples]
    requests = [
        Request(
            prompt_ids=encode_prompt(task, tokenizer, sampling.max_new_tokens, engine.max_length),
            sampling=sampling,
            num_samples=num_samples,
            seed=derive_seed(seed, "rank", prompt_id_of(task.prompt), *label),
        )
        for task in missing
    ]
    ended: dict[int, dict[int, Completion]] = {}
    num_done = len(distinct(tasks)) - len(missing)

    def on_finished(request_index: int, sample_index: int, completion: Completion) -> None:
        nonlocal num_done
        group = ended.setdefault(request_index, {})
        group[sample_index] = completion
        if len(group) < num_samples:
            return
        with store.transaction():
            prompt_id = store.add_prompt(missing[request_index].prompt)
            for index, one in sorted(ended.pop(request_index).items()):
                store.add_response(prompt_id, policy_id, how, index, one.text, one.finish_reason)
        num_done += 1
        if on_prompt is not None:
            on_prompt(num_done)

    engine.generate(requests, on_finished=on_finished)
    return len(missing)


def make_items(
    store: PreferenceStore, tasks: Sequence[Task], *, policies: Sequence[tuple[int, int]], sampling: str
) -> ItemReport:
    """One item per prompt, of the answers that sample_responses stored; policies are (policy_id, num_samples) pairs.

    The order inside an item is decided by the texts, so that it says nothing about who wrote them. Prompts whose
    answers are not all there yet get no item.
    """
    num_items = num_equal = num_empty = num_too_few = 0
    for task in distinct(tasks):
        prompt_id = prompt_id_of(task.prompt)
        found = [
            row
            for policy_id, num_samples in policies
            for row in store.query(
                "SELECT id, text FROM responses WHERE prompt_id = ? AND policy_id = ? AND sampling = ? "
                "AND sample_index < ? ORDER BY sample_index",
                *(prompt_id, policy_id, sampling, num_samples),
            )
        ]
        if len(found) < sum(num_samples for _, num_samples in policies):
            continue
        written = [row for row in found if row["text"].strip()]
        by_text = {row["text"]: row["id"] for row in reversed(written)}
        num_empty += len(found) - len(written)
        num_equal += len(written) - len(by_text)
        if len(by_text) < 2:
            num_too_few += 1
            continue
        texts = sorted(by_text, key=lambda text: share_of(f"{prompt_id} {text}"))
        store.add_item_of(prompt_id, [by_text[text] for text in texts])
        num_items += 1
    return ItemReport(num_items=num_items, num_equal=num_equal, num_empty=num_empty, num_too_few=num_too_few)


def next_batch(store: PreferenceStore, tasks: Sequence[Task], policy_ids: Sequence[int], size: int) -> list[Task]:
    """The prompts to sample next in active mode: those that these policies have not all answered, the prompts with the
    fewest items first, then in the file's order."""
    marks = ", ".join("?" * len(policy_ids))
    answered = {
        row[0]
        for row in store.query(
            f"SELECT prompt_id FROM responses WHERE policy_id IN ({marks}) GROUP BY prompt_id "
            "HAVING count(DISTINCT policy_id) = ?",
            *(*policy_ids, len(set(policy_ids))),
        )
    }
    num_items = dict(tuple(row) for row in store.query("SELECT prompt_id, count(*) FROM items GROUP BY prompt_id"))
    waiting = [task for task in distinct(tasks) if prompt_id_of(task.prompt) not in answered]
    return sorted(waiting, key=lambda task: num_items.get(prompt_id_of(task.prompt), 0))[:size]


def sampling_key(sampling: SamplingParams, seed: int) -> str:
    """How answers were drawn, as it is stored beside each: JSON of the sampling parameters and the seed."""
    return json.dumps({**dataclasses.asdict(sampling), "seed": seed}, sort_keys=True)


def distinct(tasks: Sequence[Task]) -> list[Task]:
    """The tasks without those whose prompt came before."""
    return list({prompt_id_of(task.prompt): task for task in reversed(tasks)}.values())[::-1]


def split_samples(num_completions: int, num_policies: int) -> list[int]:
    """How many of the completions each policy writes, as evenly as can be: 5 over 2 -> [3, 2]."""
    if num_completions < max(2, num_policies):
        raise ValueError(
            f"--num-completions {num_completions}: a ranking needs at least 2, and one from each --from checkpoint"
        )
    return [num_completions // num_policies + (index < num_completions % num_policies) for index in range(num_policies)]


def _num_stored(store: PreferenceStore, task: Task, policy_id: int, how: str) -> int:
    sql = "SELECT count(*) FROM responses WHERE prompt_id = ? AND policy_id = ? AND sampling = ?"
    return store.query(sql, prompt_id_of(task.prompt), policy_id, how)[0][0]
