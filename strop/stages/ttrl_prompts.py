"""Which prompts a test-time RL run trains on, and which only watch it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from strop.runs import generator
from strop.stages.ttrl_config import MIN_HELD_OUT, Config
from strop.types import Task


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """What is trained on and what is held out, without any column: a reward has no label to read."""

    training: list[Task]
    held_out: list[Task]


def split(tasks: Sequence[Task], held_out: Sequence[Task] | None, config: Config) -> tuple[list[Task], list[Task]]:
    """(training, held out), without a prompt in common.

    ValueError where too few are left of either, or where held_out.tasks has a prompt that is trained on.
    """
    wanted = config.held_out.num_prompts
    if held_out is None:
        # By prompt, not by row: a prompt that comes twice must not be on both sides.
        distinct = list(dict.fromkeys(map(prompt_key, tasks)))
        order = torch.randperm(len(distinct), generator=generator(config.seed, "held_out")).tolist()
        first = {prompt_key(task): task for task in reversed(tasks)}
        held_out = [first[distinct[index]] for index in sorted(order[:wanted])]
        set_aside = {prompt_key(task) for task in held_out}
        training = [task for task in tasks if prompt_key(task) not in set_aside]
        if len(distinct) <= wanted:
            raise ValueError(
                f"{config.tasks} has {len(distinct)} different prompts, of which held_out.num_prompts={wanted} would "
                "be set aside: nothing is left to train on; give more prompts, lower it, or name held_out.tasks"
            )
        return training, held_out
    if len(held_out) < MIN_HELD_OUT:
        raise ValueError(
            f"{config.held_out.tasks} has {len(held_out)} prompts; an early stop needs at least {MIN_HELD_OUT} that "
            "are not trained on"
        )
    held_out = list(held_out[:wanted])
    where = {prompt_key(task): task.id for task in tasks}
    for task in held_out:
        if prompt_key(task) in where:
            raise ValueError(
                f"{task.id}: this held-out prompt is trained on ({where[prompt_key(task)]}), so that it says "
                "nothing about a collapse: take it out of one of the files"
            )
    return list(tasks), held_out


def prompt_key(task: Task) -> str:
    """Equal for equal prompts; messages cannot be compared by hash."""
    return task.prompt if isinstance(task.prompt, str) else json.dumps(task.prompt, sort_keys=True)


def unlabelled(tasks: Sequence[Task]) -> list[Task]:
    return [dataclasses.replace(task, columns={}) for task in tasks]
