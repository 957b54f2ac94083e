"""What one step of GRPO, PPO and test-time RL does, for the forecast of `strop doctor --recipe`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from strop.stages.forecast import Workload
    from strop.types import Segment

ASSUMED_PROMPT = 64
"""Tokens of a prompt where the tasks, or the tokenizer, cannot be read yet."""
MAX_TASKS = 200
"""Prompts looked at for their length."""


def grpo(config: Any, runs_dir: Path) -> Workload:
    """One rollout and its updates."""
    is_kl_reward = config.kl_coef != 0 and config.kl_placement == "reward"
    passes = int(config.updates_share_a_rollout or is_kl_reward) + int(config.kl_coef != 0)
    work = _reinforced(config, runs_dir, frozen_passes=passes)
    model = work.learner.model
    can_record = config.lora is None and config.gradient_checkpointing != "all" and not model.qk_norm
    if config.reuse_rollout and can_record and not work.accumulates:
        work = dataclasses.replace(work, recorded_tokens=work.tokens_per_update)
    if config.dynamic_sampling:
        rounds = "dynamic_sampling finds no flat group: every further round costs one more rollout"
        work = dataclasses.replace(work, assumptions=(rounds, *work.assumptions))
    return work


def ttrl(config: Any, runs_dir: Path) -> Workload:
    """GRPO on group_size completions of the num_votes that are sampled; held-out prompts are its evaluation."""
    planned = grpo(config.as_grpo(), runs_dir)
    assert planned.rollout is not None
    held_out = config.held_out.num_prompts * config.held_out.num_samples
    rollout = dataclasses.replace(planned.rollout, group_size=config.num_votes, eval_samples=held_out)
    return dataclasses.replace(planned, rollout=rollout, recorded_tokens=0)


def ppo(config: Any, runs_dir: Path) -> Workload:
    """GRPO's rollout, and a critic: a network of its own, or a head on the policy's trunk."""
    from strop.cli.workload import checkpoint, learner_of
    from strop.types import Segment

    is_own = config.critic.network == "own"
    passes = int(config.needs_old_logprobs) + int(config.kl_coef != 0) + int(not is_own)
    work = _reinforced(config, runs_dir, frozen_passes=passes)
    if not is_own:
        work = dataclasses.replace(work, learner=dataclasses.replace(work.learner, output="logprobs and values"))
    else:
        model = checkpoint(config.critic.start, runs_dir)[0] if config.critic.start else work.learner.model
        critic = learner_of(dataclasses.replace(config, lora=None), model, output="scores")
        # A policy with an adapter is no start for a critic: its folder is read once more, and the two merged.
        copies = int(config.lora is not None and not config.critic.start)
        values = work.tokens_per_step // config.epochs_per_rollout
        note = "an own critic comes to read every token of the vocabulary"
        work = dataclasses.replace(
            work, critic=critic, loaded_copies=copies, value_tokens=values, assumptions=(*work.assumptions, note)
        )
    if not config.ptx.data:
        return work
    tokens = config.ptx.batch_tokens * work.num_updates
    size = min(config.ptx.batch_tokens, config.micro_batch_tokens)
    if size > work.micro_tokens:
        work = dataclasses.replace(work, micro_batch=(Segment(trunk=size),), num_labels=size)
    return dataclasses.replace(
        work,
        tokens_per_step=work.tokens_per_step + tokens,
        tokens_per_update=work.tokens_per_update + config.ptx.batch_tokens,
    )


def _reinforced(config: Any, runs_dir: Path, *, frozen_passes: int) -> Workload:
    """What GRPO and PPO have in common. frozen_passes: how often the policy or the reference reads a whole rollout."""
    from strop.cli.workload import checkpoint, computed_in, file_bytes, learner_of
    from strop.stages.forecast import Rollout, Workload

    model, folder = checkpoint(config.init_from, runs_dir)
    prompt_tokens, num_eval, assumptions = prompts(config, config.tasks, folder)
    new_tokens, num_prompts = config.sampling.max_new_tokens, config.prompts_per_step
    per_update = config.minibatch_prompts or num_prompts
    micro_batches = rollout_micro_batches(
        prompt_tokens, new_tokens, per_update, config.group_size, config.micro_batch_tokens
    )
    largest = max(micro_batches, key=lambda segments: sum(map(len, segments)))
    update_tokens = sum(len(segment) for segments in micro_batches for segment in segments)
    updates = num_prompts // per_update
    return Workload(
        learner=learner_of(config, model, with_entropy=True),
        **computed_in(config),
        micro_batch=largest,
        num_labels=sum(sum(segment.branches) for segment in largest),
        tokens_per_step=update_tokens * updates * config.epochs_per_rollout,
        tokens_per_update=update_tokens,
        num_updates=updates * config.epochs_per_rollout,
        frozen_tokens=frozen_passes * update_tokens * updates,
        has_reference=config.kl_coef != 0,
        file_bytes=file_bytes(folder),
        reward_bytes=reward_bytes(config.rewards, runs_dir),
        rollout=Rollout(
            num_prompts=num_prompts,
            group_size=config.group_size,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            num_slots=config.num_slots,
            eval_samples=num_eval,
        ),
        assumptions=(
            *assumptions,
            "every completion runs to sampling.max_new_tokens; the verifiers' time and memory are not in it",
        ),
    )


def reward_bytes(rewards: Sequence[Any], runs_dir: Path) -> int:
    """Weights of the reward models and local judges among the rewards, in the dtype on disk, as they compute."""
    from strop.cli.workload import file_bytes
    from strop.runs import resolve

    total = 0
    for reward in rewards:
        options: Mapping[str, Any] = reward.options
        model = options.get("model")
        if reward.name == "model" and isinstance(model, str):
            total += file_bytes(resolve(model, runs_dir).path)
        elif reward.name == "judge" and isinstance(model, str) and Path(model).is_dir():
            total += file_bytes(Path(model))
    return total


def rollout_micro_batches(
    prompt_tokens: int, new_tokens: int, num_prompts: int, group_size: int, max_tokens: int
) -> list[tuple[Segment, ...]]:
    """The micro-batches that RolloutBatch.split makes of completions that all have new_tokens."""
    trunk = prompt_tokens - 1
    micro_batches: list[tuple[Segment, ...]] = []
    current: dict[int, int] = {}  # prompt -> its completions
    total = 0
    for prompt in range(num_prompts):
        for _ in range(group_size):
            cost = new_tokens + (0 if prompt in current else trunk)
            if current and total + cost > max_tokens:
                micro_batches.append(_trees(current, trunk, new_tokens))
                current, total, cost = {}, 0, new_tokens + trunk
            current[prompt] = current.get(prompt, 0) + 1
            total += cost
    micro_batches.append(_trees(current, trunk, new_tokens))
    return micro_batches


def _trees(counts: Mapping[int, int], trunk: int, new_tokens: int) -> tuple[Segment, ...]:
    from strop.types import Segment

    return tuple(Segment(trunk=trunk, branches=(new_tokens,) * count) for count in counts.values())


def prompts(config: Any, tasks: str, folder: Path) -> tuple[int, int, list[str]]:
    """(tokens of a prompt, completions of an evaluation, what had to be assumed)."""
    from strop.cli.workload import load_tokenizer
    from strop.data import load_rows, tasks_from_rows
    from strop.rollouts.prompts import encode_prompt

    if not Path(tasks).exists():
        return ASSUMED_PROMPT, 0, [f"{tasks} is not there yet: prompts of {ASSUMED_PROMPT} tokens"]
    tokenizer = load_tokenizer(folder)
    found = tasks_from_rows(load_rows(tasks))[:MAX_TASKS]
    lengths = [len(encode_prompt(task, tokenizer, 0, 2**62)) for task in found]
    num_eval = 0
    evaluation = getattr(config, "eval", None)
    if evaluation is not None and evaluation.tasks and Path(evaluation.tasks).exists():
        num_eval = min(evaluation.max_tasks, len(load_rows(evaluation.tasks))) * evaluation.num_samples
    return max(2, round(sum(lengths) / len(lengths))), num_eval, []
