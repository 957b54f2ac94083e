"""The sampling half of `strop rank`: one checkpoint after the other is loaded, and its answers go into the store."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from strop.cli.frozen import ModelArguments, frozen_model, sampling_params

if TYPE_CHECKING:
    from strop.cli.rank import Arguments
    from strop.ranking import PreferenceStore
    from strop.ranking.sampling import ItemReport
    from strop.types import Task

LOOK_SECONDS = 5.0
"""How often active mode looks whether the next batch is due."""


@dataclass(frozen=True, kw_only=True)
class Policy:
    """A checkpoint that answers prompts."""

    id: int
    label: str
    """RUN/STEP or a folder: pinned, so that a run in training cannot change it under our hands."""
    num_samples: int


class Stopped(Exception):
    """The page has been closed while a batch was being sampled."""


def load_tasks(arguments: Arguments) -> list[Task]:
    from strop.data import load_rows, tasks_from_rows

    assert arguments.prompts is not None
    return tasks_from_rows(load_rows(arguments.prompts))


def find_policies(arguments: Arguments, store: PreferenceStore) -> list[Policy]:
    """The newest checkpoint of every --from, now."""
    from strop.ranking.sampling import split_samples
    from strop.runs import resolve

    counts = split_samples(arguments.num_completions, len(arguments.from_))
    policies: list[Policy] = []
    for source, num_samples in zip(arguments.from_, counts, strict=True):
        found = resolve(source, arguments.runs_dir)
        label = source if found.run_name is None else f"{found.run_name}/{found.step}"
        policies.append(Policy(id=store.add_policy(label, found.content_hash), label=label, num_samples=num_samples))
    if len({policy.id for policy in policies}) < len(policies):
        raise ValueError("two of --from are the same checkpoint; name each once, and raise --num-completions")
    return policies


def sample_all(arguments: Arguments, store: PreferenceStore, tasks: Sequence[Task]) -> None:
    """Items of every prompt, and a line about what was left out."""
    report = sample(arguments, store, tasks, find_policies(arguments, store))
    print(f"{report.num_items} items{left_out(report)}")
    if not report.num_items:
        raise ValueError("no prompt got two different answers: raise --temperature, or name another checkpoint")


def sample_batch(
    arguments: Arguments, store: PreferenceStore, tasks: Sequence[Task], check: Callable[[], None] = lambda: None
) -> bool:
    """Active mode's next batch; False when every prompt has answers of the newest checkpoints."""
    from strop.ranking.sampling import next_batch

    policies = find_policies(arguments, store)
    batch = next_batch(store, tasks, [policy.id for policy in policies], arguments.batch_size)
    if not batch:
        return False
    report = sample(arguments, store, batch, policies, check)
    names = ", ".join(policy.label for policy in policies)
    print(f"next batch: {report.num_items} items from {names}{left_out(report)}", flush=True)
    return True


def sample(
    arguments: Arguments,
    store: PreferenceStore,
    tasks: Sequence[Task],
    policies: Sequence[Policy],
    check: Callable[[], None] = lambda: None,
) -> ItemReport:
    """Answers of every policy to every task, then the items; what the store has already is not sampled again."""
    from strop.ranking.sampling import distinct, make_items, sample_responses, sampling_key
    from strop.runs import Progress

    how = ""
    for policy in policies:
        model_arguments = ModelArguments(
            model=policy.label, runs_dir=arguments.runs_dir, dtype=arguments.dtype, device=arguments.device
        )
        with (
            frozen_model(model_arguments) as frozen,
            Progress(f"answers of {policy.label}", total_steps=len(distinct(tasks))) as progress,
        ):

            def on_prompt(num_done: int, progress: Progress = progress) -> None:
                progress.update(num_done, {})
                check()

            sampling = sampling_params(arguments, frozen.tokenizer)
            how = sampling_key(sampling, arguments.seed)
            sample_responses(
                store,
                frozen.engine,
                frozen.tokenizer,
                tasks,
                policy_id=policy.id,
                num_samples=policy.num_samples,
                sampling=sampling,
                seed=arguments.seed,
                on_prompt=on_prompt,
            )
    return make_items(store, tasks, policies=[(policy.id, policy.num_samples) for policy in policies], sampling=how)


@contextmanager
def sampling_in_background(arguments: Arguments, store: PreferenceStore, tasks: Sequence[Task]) -> Iterator[None]:
    """While it is entered, batches are sampled whenever half a batch is left to rank."""
    from strop.ranking.queue import num_open

    stop = threading.Event()

    def check() -> None:
        if stop.is_set():
            raise Stopped

    def work() -> None:
        while not stop.wait(LOOK_SECONDS):
            if num_open(store) > arguments.batch_size // 2:
                continue
            try:
                sample_batch(arguments, store, tasks, check)
            except Stopped:
                return
            except (ValueError, OSError) as error:
                # A checkpoint that its run is just deleting, a full disk: the page stays up, and this is tried again.
                print(f"strop: the next batch was not sampled: {error}", file=sys.stderr, flush=True)

    thread = threading.Thread(target=work, name="sampling", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        if thread.is_alive():
            print("stopping when the prompt in hand is done; Ctrl-C again exits at once", file=sys.stderr)
        thread.join()


def left_out(report: ItemReport) -> str:
    """What sample dropped, as the tail of a sentence."""
    reasons = {
        "answers equal to another": report.num_equal,
        "empty answers": report.num_empty,
        "prompts with fewer than two different answers": report.num_too_few,
    }
    told = ", ".join(f"{count} {reason}" for reason, count in reasons.items() if count)
    return f" (left out: {told})" if told else ""
