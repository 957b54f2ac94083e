"""Test-time reinforcement learning (TTRL, Zuo et al. 2025): a policy learns from its own majority vote, without labels.

    act      sample num_votes completions per unlabelled prompt
    reward   the answer that most of them give counts as right
    update   GRPO on group_size of them, on an adapter: the base is write-protected
    watch    held-out prompts say whether the policy still answers as its base would vote, and stop a collapse

This is GRPO (stages/grpo.py) with another reward and a watch; so it is the one stage that imports another. Settings are
in Config (ttrl_config.py), the watch in ttrl_watch.py, what labels would say in ttrl_labels.py; docs/ttrl.md explains.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from strop.data import TaskBatches, load_rows, tasks_from_rows
from strop.generation import Engine
from strop.models import CausalLM, load_model, save_model
from strop.models.protect import protect
from strop.optim import DivergedError, SkippedSteps
from strop.rewards.base import Reward, WeightedRewards
from strop.rewards.vote import VoteReward
from strop.rollouts.batch import RolloutBatch
from strop.rollouts.confidence import ConfidenceReward
from strop.rollouts.groups import Group, roll_out
from strop.rollouts.prompts import encode_prompts
from strop.rollouts.report import sample_rows, save_failed_rollout
from strop.runs import Interrupt, Progress, Start, derive_seed, start_run
from strop.stages import grpo
from strop.stages.begin import chosen_dtype, in_its_dtype, kept_tokenizer, load_policy, load_reference, load_tokenizer
from strop.stages.ttrl_config import Config
from strop.stages.ttrl_labels import Labels
from strop.stages.ttrl_prompts import Prompts, split, unlabelled
from strop.stages.ttrl_watch import Watch, agreement_metrics, check_answers, votes_of
from strop.types import Completion, Request, Task


def ttrl_step(
    actors: grpo.Actors, tasks: TaskBatches, labels: Labels, config: Config, step: int
) -> tuple[dict[str, float], list[Group], RolloutBatch]:
    """One vote and its updates; step counts from 1. Returns metrics, the groups trained on, and their batch."""
    started = time.perf_counter()
    chosen = [next(tasks)[0] for _ in range(config.prompts_per_step)]
    voted, judging = roll_out(
        actors.engine,
        actors.reward,
        chosen,
        [actors.prompt_ids[task.id] for task in chosen],
        group_size=config.num_votes,
        sampling=config.sampling.params(actors.tokenizer),
        seed=derive_seed(config.seed, "rollout", step),
    )
    actors.engine.release()
    # Samples of one prompt are exchangeable, so that the first of them are a random sub-sample.
    size = config.group_size
    groups = [
        dataclasses.replace(group, completions=group.completions[:size], scores=group.scores[:size]) for group in voted
    ]
    votes = votes_of([group.completions for group in voted], config.answer_pattern)
    metrics, batch = grpo.learn(actors, groups, voted, judging, config.as_grpo(), step, started=started)
    metrics |= {"majority_share": sum(vote.share for vote in votes) / len(votes)} | labels.votes(voted)
    return metrics, groups, batch


def sample_held_out(
    actors: grpo.Actors, tasks: Sequence[Task], config: Config, *, num_samples: int, purpose: str
) -> list[list[Completion]]:
    """num_samples answers to every held-out prompt; the purpose and the config's seed decide them."""
    sampling = config.sampling.params(actors.tokenizer)
    requests = [
        Request(
            prompt_ids=actors.prompt_ids[task.id],
            sampling=sampling,
            num_samples=num_samples,
            seed=derive_seed(config.seed, purpose, index),
        )
        for index, task in enumerate(tasks)
    ]
    groups = actors.engine.generate(requests)
    actors.engine.release()
    return groups


def measure(
    actors: grpo.Actors, tasks: Sequence[Task], watch: Watch, labels: Labels, config: Config
) -> dict[str, float]:
    """Held-out figures as eval/NAME, always with the same seed."""
    groups = sample_held_out(actors, tasks, config, num_samples=config.held_out.num_samples, purpose="held_out")
    return agreement_metrics(groups, watch.base_answers, config.answer_pattern) | labels.held_out(tasks, groups)


@in_its_dtype
def train(config: Config, *, name: str, runs_dir: Path, resume: bool, reward: Reward | None = None) -> Path:
    """Adapt to unlabelled prompts; returns the run folder, whose newest checkpoint is the result.

    A run that its held-out prompts stop has the checkpoint that agreed best as its newest. `reward` replaces the
    config's, for experiments. Raises ValueError for bad input, DivergedError when updates keep failing.
    """
    task_rows = load_rows(config.tasks)
    held_out_rows = load_rows(config.held_out.tasks) if config.held_out.tasks else None
    hashes = {"tasks": task_rows.content_hash}
    hashes |= {"held_out": held_out_rows.content_hash} if held_out_rows is not None else {}
    tasks = tasks_from_rows(task_rows)
    training, held_out = split(tasks, None if held_out_rows is None else tasks_from_rows(held_out_rows), config)
    labels = Labels(config, [*training, *held_out])
    prompts = Prompts(training=unlabelled(training), held_out=unlabelled(held_out))
    try:
        start = start_run(
            runs_dir, name, stage="ttrl", config=config, init_from=config.init_from, data_hashes=hashes,
            seed=config.seed, resume=resume, keeps_parent=config.kl_coef != 0,
        )  # fmt: skip
        with start, Interrupt() as interrupt:
            actors = make_actors(config, start, prompts, reward)
            _train(config, start, interrupt, actors, prompts, labels)
    finally:
        labels.close()
    return start.run.path


def make_actors(config: Config, start: Start, prompts: Prompts, reward: Reward | None) -> grpo.Actors:
    """Policy, reference and reward, and whatever is wrong with them or the prompts found before the first step."""
    tokenizer = kept_tokenizer(start, lambda: load_tokenizer(start))
    dtype = chosen_dtype(start, config.dtype, config.device)
    policy = load_policy(
        start, config.adapter, dtype, config.device, config.seed, checkpointing=config.gradient_checkpointing
    )
    tokenizer.check_fits(policy.config.vocab_size)
    reference = load_reference(start, policy, config.adapter, dtype, config.device) if config.kl_coef else None
    if not config.all_weights:
        assert isinstance(policy, nn.Module)
        protect(policy, only_frozen=True)
    prompt_ids = encode_prompts(
        [*prompts.training, *prompts.held_out],
        tokenizer,
        config.sampling.max_new_tokens,
        policy.config.max_position_embeddings,
    )
    return grpo.Actors(
        policy=policy,
        reference=reference,
        tokenizer=tokenizer,
        engine=Engine(policy, tokenizer, num_slots=config.num_slots),
        reward=WeightedRewards([(reward or make_reward(config, policy, prompt_ids), 1.0)]),
        optimizer=config.optimizer.build(policy.named_parameters()),
        prompt_ids=prompt_ids,
    )


def make_reward(config: Config, policy: CausalLM, prompt_ids: Mapping[str, tuple[int, ...]]) -> Reward:
    """What the config names: a vote over text, or the policy's own confidence."""
    if config.reward == "majority" or config.reward == "weighted":
        return VoteReward(
            name=config.reward, weighted=config.reward == "weighted", answer_pattern=config.answer_pattern
        )
    return ConfidenceReward(
        policy,
        prompt_ids,
        kind=config.reward,
        temperature=config.sampling.temperature,
        micro_batch_tokens=config.micro_batch_tokens,
    )


def _train(
    config: Config, start: Start, interrupt: Interrupt, actors: grpo.Actors, prompts: Prompts, labels: Labels
) -> None:
    run = start.run
    tasks = TaskBatches(prompts.training, batch_size=1, seed=derive_seed(config.seed, "tasks"))
    skipped = SkippedSteps(config.optimizer.max_skipped_steps)
    if start.resumed is None:
        print(config.describe(), flush=True)
        base = sample_held_out(actors, prompts.held_out, config, num_samples=config.num_votes, purpose="base_vote")
        votes = votes_of(base, config.answer_pattern)
        check_answers(votes, config.answer_pattern, sum(map(len, base)))
        watch = Watch(base_answers=[vote.winner for vote in votes])
        metrics = measure(actors, prompts.held_out, watch, labels, config)
        watch.look(0, metrics, config.held_out)
        run.log(0, metrics)
        save(start, 0, actors, tasks, skipped, watch, config)
    else:
        watch = restore(start, actors, tasks, skipped)
        if watch.reason:
            refuse_to_go_on(start, watch, config)
            return
    with Progress("ttrl", total_steps=config.num_steps, start_step=start.step) as progress:
        for step in range(start.step + 1, config.num_steps + 1):
            is_last = step == config.num_steps
            is_best = False
            try:
                metrics, groups, batch = ttrl_step(actors, tasks, labels, config, step)
                if is_last or step % config.held_out.every == 0:
                    metrics |= measure(actors, prompts.held_out, watch, labels, config)
                    is_best = watch.look(step, metrics, config.held_out)
            except FloatingPointError as error:
                raise DivergedError(
                    f"step {step}: {error}. If the base is sound, the updates broke the adapter: lower optimizer.lr"
                ) from error
            run.log(step, metrics | {"epoch": tasks.epoch})
            run.log_samples(step, sample_rows(actors.tokenizer, groups, batch, config.samples_per_step))
            skipped.record(
                bool(metrics["skipped"]),
                lambda groups=groups, batch=batch: save_failed_rollout(run.path, actors.tokenizer, groups, batch),
            )
            is_stopped = interrupt.is_requested  # looked at once: a signal after the save is for the next step
            if watch.reason:
                stop(start, step, actors, watch)
            if is_last or is_best or watch.reason or step % config.save_every == 0 or is_stopped:
                save(start, step, actors, tasks, skipped, watch, config)
            progress.update(step, {"agreement": metrics["majority_share"], "reward": metrics["reward"]})
            if watch.reason:
                return
            if is_stopped and not is_last:
                interrupt.exit()


def stop(start: Start, step: int, actors: grpo.Actors, watch: Watch) -> None:
    """Put the best checkpoint's weights back, and log what it had been measured to be as this step's last line."""
    print(f"stopped at step {step}: {watch.reason}. The result is the policy of step {watch.best_step}", flush=True)
    put_back(actors.policy, start.run.checkpoint(watch.best_step).path)
    best = {name: value for name, value in watch.best_metrics.items() if name.startswith("eval/")}
    start.run.log(step, best | {"result_of_step": watch.best_step})


@torch.no_grad()
def put_back(policy: CausalLM, folder: Path) -> None:
    """The weights that learn become those of the checkpoint in `folder`."""
    saved = dict(load_model(folder, dtype=policy.dtype, device=policy.device, adapter="keep").named_parameters())
    for name, parameter in policy.named_parameters():
        if parameter.requires_grad:
            parameter.copy_(saved[name])


def refuse_to_go_on(start: Start, watch: Watch, config: Config) -> None:
    """A stopped run is finished. ValueError where --resume asks it for more steps than it had been given."""
    saved = start.training_state()
    assert saved is not None
    if config.num_steps > saved[1]["num_steps"]:
        raise ValueError(
            f"run {start.run.name} was stopped at step {start.step} ({watch.reason}) and does not go on: start a new "
            "run from it, with a lower optimizer.lr or a higher kl_coef"
        )


def save(
    start: Start,
    step: int,
    actors: grpo.Actors,
    tasks: TaskBatches,
    skipped: SkippedSteps,
    watch: Watch,
    config: Config,
) -> None:
    """A checkpoint between two steps; the one that agreed best so far is kept whatever comes after it."""

    def write_model(folder: Path) -> None:
        save_model(actors.policy, folder)
        actors.tokenizer.save(folder)

    state: dict[str, Any] = {
        "tasks": tasks.state_dict(),
        "skipped": skipped.state_dict(),
        "watch": watch.state_dict(),
        "num_steps": config.num_steps,
    }
    start.run.save_checkpoint(
        step,
        write_model,
        actors.optimizer.state_dict(),
        state,
        keep_last=config.keep_checkpoints,
        keep_steps=(watch.best_step,),
    )


def restore(start: Start, actors: grpo.Actors, tasks: TaskBatches, skipped: SkippedSteps) -> Watch:
    """Put back what `save` kept in the run's newest checkpoint; weights were loaded already."""
    saved = start.training_state()
    assert saved is not None
    tensors, state = saved
    actors.optimizer.load_state_dict(tensors)
    tasks.load_state_dict(state["tasks"])
    skipped.load_state_dict(state["skipped"])
    return Watch(**state["watch"])
