"""GRPO: reinforcement learning without a critic. A group of answers to one prompt is its own baseline.

    act      sample group_size completions per prompt from the policy
    reward   let the rewards judge them
    update   raise the probability of what beat its group, lower the rest

The family (Dr. GRPO, DAPO, GSPO, CISPO, SAPO, RLOO, REINFORCE++ ...) is a choice of advantage, loss, aggregation and
KL, all in Config (grpo_config.py); the loss is in grpo_loss.py, and docs/grpo.md has the table.

Shape suffixes: P prompts, G group, B completions, T label positions.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from strop.data import TaskBatches, load_rows, tasks_from_rows
from strop.generation import Engine
from strop.models import CausalLM, save_model
from strop.models.recording import Recording, new_recording
from strop.native.freed_memory import give_back_between_phases
from strop.objectives.advantages import batch_advantages, group_advantages, leave_one_out_advantages
from strop.objectives.aggregate import (
    sequence_sum,
    step_denominator,
)
from strop.objectives.kl import kl_k1
from strop.objectives.policy_gradient import (
    overlong_penalty,
)
from strop.optim import AdamW, DivergedError, SkippedSteps, optimizer_step
from strop.rewards.base import WeightedRewards
from strop.rewards.load import load_rewards
from strop.rewards.overlap import JudgingTime
from strop.rollouts.averages import Averages, warn_of_engine_gap
from strop.rollouts.batch import RolloutBatch, collate_rollouts, minibatch_rows
from strop.rollouts.groups import Group, roll_out
from strop.rollouts.logprobs import frozen_logprobs
from strop.rollouts.prompts import encode_prompts, longest_prompt
from strop.rollouts.report import rollout_metrics, sample_rows, save_failed_rollout
from strop.runs import Interrupt, Progress, RunFolder, Start, derive_seed, generator, start_run
from strop.stages import held_out
from strop.stages.begin import (
    chosen_dtype,
    in_its_dtype,
    kept_tokenizer,
    load_policy,
    load_reference,
    load_tokenizer,
    located_rewards,
    refresh_reference,
)
from strop.stages.grpo_config import Config
from strop.stages.grpo_loss import micro_loss
from strop.tokenizer import Tokenizer
from strop.types import Task

_CHECK_EVERY = 50
"""Steps 1, 51, 101 ... compute their forward pass in any case, so that engine_gap_exp compares something: where both
sides are the same numbers it is 1 by construction."""


@dataclass(frozen=True, kw_only=True)
class Actors:
    """Everything that one step needs and that outlives it."""

    policy: CausalLM
    reference: CausalLM | None
    tokenizer: Tokenizer
    engine: Engine
    reward: WeightedRewards
    optimizer: AdamW
    prompt_ids: dict[str, tuple[int, ...]]
    """Task id -> the tokens of its prompt."""


def grpo_step(
    actors: Actors, tasks: TaskBatches, config: Config, step: int
) -> tuple[dict[str, float], list[Group], RolloutBatch]:
    """One rollout and its updates; step counts from 1. Returns metrics, the groups, and the batch for samples.jsonl."""
    started = time.perf_counter()
    is_checked = step % _CHECK_EVERY == 1
    records = config.reuse_rollout and not is_checked
    recording = None
    if records:
        recording = new_recording(actors.policy, config.micro_batch_tokens, config.sampling.temperature)
    groups, sampled, judging = sample_groups(actors, tasks, config, step, recording)
    metrics, batch = learn(actors, groups, sampled, judging, config, step, started=started, recording=recording)
    return metrics, groups, batch


def learn(
    actors: Actors,
    groups: list[Group],
    sampled: list[Group],
    judging: JudgingTime,
    config: Config,
    step: int,
    *,
    started: float,
    recording: Recording | None = None,
) -> tuple[dict[str, float], RolloutBatch]:
    """The updates of one rollout: `groups` of all that were `sampled` since `started` (time.perf_counter).

    recording: of the policy's activations while it sampled them; the first update uses it if it is one micro-batch.
    """
    rollout_ended = time.perf_counter()
    batch, counted_B = make_batch(actors, groups, config)
    averages = Averages()
    shuffle = generator(config.seed, "minibatches", step)
    num_updates, num_skipped, norms = 0, 0, []
    for _ in range(config.epochs_per_rollout):
        for rows in minibatch_rows(batch, config.minibatch_prompts, shuffle):
            counted = [row for row in rows if counted_B[row]]
            denominator = step_denominator(
                config.aggregation,
                num_sequences=len(counted),
                num_tokens=sum(len(batch.completions[row]) for row in counted),
                max_tokens=config.sampling.max_new_tokens,
            )
            learning = batch.select(learning_rows(batch, counted, config))
            micro_batches = list(learning.split(config.micro_batch_tokens))
            is_recorded = recording is not None and recording.is_complete and len(micro_batches) == 1
            for micro in micro_batches:
                loss = micro_loss(
                    actors.policy, micro, config, denominator, averages, recording if is_recorded else None
                )
                loss.backward()
            recording = None  # the weights move
            lr = config.optimizer.lr_at(step - 1, config.num_steps)
            report = optimizer_step(actors.optimizer, lr=lr, max_grad_norm=config.optimizer.max_grad_norm)
            num_updates += not report.is_skipped
            # No learning row at all (every group flat) is not a fault of the gradient.
            num_skipped += not math.isfinite(report.grad_norm)
            norms.append(report.grad_norm)
    give_back_between_phases()
    ended = time.perf_counter()
    num_tokens = sum(len(completion.token_ids) for group in sampled for completion in group.completions)
    metrics = rollout_metrics(sampled, actors.reward.names) | judging.metrics(ended - started)
    metrics |= averages.result() | {
        "groups": len(groups),
        "grad_norm": sum(norms) / len(norms),
        "lr": config.optimizer.lr_at(step - 1, config.num_steps),
        "updates": num_updates,
        "skipped": num_skipped,
        "num_tokens": num_tokens,
        "time/step_seconds": ended - started,
        "time/rollout_seconds": rollout_ended - started,
        "time/update_seconds": ended - rollout_ended,
        "time/tokens_per_second": num_tokens / (ended - started),
    }
    return metrics, batch


def sample_groups(
    actors: Actors, tasks: TaskBatches, config: Config, step: int, recording: Recording | None = None
) -> tuple[list[Group], list[Group], JudgingTime]:
    """prompts_per_step groups to train on, all that were sampled for them, and how long verdicts were waited for.

    Dynamic sampling replaces flat groups by new prompts, exactly as many as are missing, so that nothing is left over
    for the next step and a checkpoint between steps holds everything.
    """
    kept: list[Group] = []
    sampled: list[Group] = []
    judging = JudgingTime()
    for sampling_round in range(config.max_sampling_rounds if config.dynamic_sampling else 1):
        missing = config.prompts_per_step - len(kept)
        chosen = [next(tasks)[0] for _ in range(missing)]
        groups, judged_in = roll_out(
            actors.engine,
            actors.reward,
            chosen,
            [actors.prompt_ids[task.id] for task in chosen],
            group_size=config.group_size,
            sampling=config.sampling.params(actors.tokenizer),
            seed=derive_seed(config.seed, "rollout", step, sampling_round),
            recording=recording,
        )
        judging += judged_in
        sampled += groups
        kept += [group for group in groups if not (config.dynamic_sampling and group.is_flat)]
        if len(kept) == config.prompts_per_step:
            break
    actors.engine.release()
    # Where all were flat the step has no update, but samples to show.
    return (kept or sampled[: config.prompts_per_step]), sampled, judging


def make_batch(actors: Actors, groups: Sequence[Group], config: Config) -> tuple[RolloutBatch, list[bool]]:
    """The groups as a batch with advantages, and which rows count: judged, and not masked for being truncated.

    Reference logprobs are taken where the loss or the reward needs them, old ones where updates share a rollout.
    """
    batch = collate_rollouts(
        [group.prompt_ids for group in groups],
        [group.completions for group in groups],
        device=actors.policy.device,
    )
    options = {"temperature": config.sampling.temperature, "max_tokens": config.micro_batch_tokens}
    is_kl_reward = config.kl_coef != 0 and config.kl_placement == "reward"
    if config.updates_share_a_rollout or is_kl_reward:
        batch = batch.replace(old_logprobs_BT=frozen_logprobs(actors.policy, batch, **options))
    if actors.reference is not None:
        batch = batch.replace(ref_logprobs_BT=frozen_logprobs(actors.reference, batch, **options))
    rewards_PG = torch.tensor([group.rewards for group in groups])
    valid_PG = torch.tensor([[score.is_valid for score in group.scores] for group in groups])
    is_truncated_PG = torch.tensor([[c.finish_reason == "length" for c in group.completions] for group in groups])
    if config.overlong_buffer:
        lengths_PG = torch.tensor([[len(completion.token_ids) for completion in group.completions] for group in groups])
        penalty_PG = overlong_penalty(
            lengths_PG, max_length=config.sampling.max_new_tokens, buffer=config.overlong_buffer
        )
        rewards_PG = rewards_PG + config.overlong_weight * penalty_PG
    if is_kl_reward:
        assert batch.old_logprobs_BT is not None and batch.ref_logprobs_BT is not None
        kl_BT = kl_k1(batch.old_logprobs_BT, batch.ref_logprobs_BT, batch.response_mask_BT)
        rewards_PG = rewards_PG - config.kl_coef * sequence_sum(kl_BT, batch.response_mask_BT).view_as(rewards_PG).cpu()
    advantages_PG = compute_advantages(rewards_PG, valid_PG, config)
    advantages_BT = advantages_PG.flatten()[:, None].expand(batch.response_mask_BT.shape).to(actors.policy.device)
    counted_PG = valid_PG & ~is_truncated_PG if config.mask_truncated else valid_PG
    return batch.replace(advantages_BT=advantages_BT), counted_PG.flatten().tolist()


def compute_advantages(rewards_PG: Tensor, valid_PG: Tensor, config: Config) -> Tensor:
    """How much better than expected each completion did, (P, G); 0 for one whose verifier broke."""
    if config.advantage == "leave_one_out":
        return leave_one_out_advantages(rewards_PG, valid_PG)
    if config.advantage == "batch":
        # Of equal rewards whitening leaves a rounding error, which Adam would scale up to a full step.
        if len(rewards_PG[valid_PG].unique()) < 2:
            return torch.zeros_like(rewards_PG)
        return batch_advantages(rewards_PG, valid_PG)
    return group_advantages(rewards_PG, valid_PG, scale=config.advantage_scale)


def learning_rows(batch: RolloutBatch, rows: Sequence[int], config: Config) -> list[int]:
    """Those rows that have a gradient. An advantage of 0 has none, unless a KL or entropy term gives it one.

    Rows left out here stay in the denominator: skipping them saves their forward pass and changes nothing else.
    """
    if (config.kl_coef and config.kl_placement == "loss") or config.entropy_coef:
        return list(rows)
    assert batch.advantages_BT is not None
    has_gradient = (batch.advantages_BT != 0).any(1).tolist()
    return [row for row in rows if has_gradient[row]]


def evaluate(actors: Actors, tasks: Sequence[Task], config: Config) -> dict[str, float]:
    """Held-out figures of the first reward, always with the same seed."""
    return held_out.evaluate(
        actors.engine,
        actors.tokenizer,
        tasks,
        actors.reward,
        sampling=config.sampling,
        num_samples=config.eval.num_samples,
        seed=derive_seed(config.seed, "eval"),
    )


@in_its_dtype
def train(config: Config, *, name: str, runs_dir: Path, resume: bool) -> Path:
    """Reinforce; returns the run folder. Raises ValueError for bad input, DivergedError when updates keep failing."""
    task_rows = load_rows(config.tasks)
    eval_rows = load_rows(config.eval.tasks) if config.eval.tasks else None
    hashes = {"tasks": task_rows.content_hash} | ({"eval": eval_rows.content_hash} if eval_rows is not None else {})
    train_tasks = tasks_from_rows(task_rows)
    eval_tasks = tasks_from_rows(eval_rows)[: config.eval.max_tasks] if eval_rows is not None else []
    rewards, reward_hashes = located_rewards(config.rewards, runs_dir, config.device)
    with load_rewards(rewards) as reward:
        reward.check_tasks([*train_tasks, *eval_tasks])
        start = start_run(
            runs_dir, name, stage="grpo", config=config, init_from=config.init_from, data_hashes=hashes | reward_hashes,
            seed=config.seed, resume=resume, keeps_parent=config.kl_coef != 0,
        )  # fmt: skip
        with start, Interrupt() as interrupt:
            _train(config, start, interrupt, reward, train_tasks, eval_tasks)
    return start.run.path


def _train(
    config: Config,
    start: Start,
    interrupt: Interrupt,
    reward: WeightedRewards,
    train_tasks: Sequence[Task],
    eval_tasks: Sequence[Task],
) -> None:
    run = start.run
    tokenizer = kept_tokenizer(start, lambda: load_tokenizer(start))
    dtype = chosen_dtype(start, config.dtype, config.device)
    policy = load_policy(
        start, config.lora, dtype, config.device, config.seed, checkpointing=config.gradient_checkpointing
    )
    tokenizer.check_fits(policy.config.vocab_size)
    reference = load_reference(start, policy, config.lora, dtype, config.device) if config.kl_coef else None
    limit = policy.config.max_position_embeddings
    prompt_ids = encode_prompts(train_tasks, tokenizer, config.sampling.max_new_tokens, limit)
    eval_ids = encode_prompts(eval_tasks, tokenizer, config.sampling.max_new_tokens, limit)
    reward.bind(tokenizer, longest_prompt(prompt_ids, eval_ids) + config.sampling.max_new_tokens)
    tasks = TaskBatches(train_tasks, batch_size=1, seed=derive_seed(config.seed, "tasks"))
    actors = Actors(
        policy=policy,
        reference=reference,
        tokenizer=tokenizer,
        engine=Engine(policy, tokenizer, num_slots=config.num_slots),
        reward=reward,
        optimizer=config.optimizer.build(policy.named_parameters()),
        prompt_ids=prompt_ids,
    )
    skipped = SkippedSteps(config.optimizer.max_skipped_steps)
    restore(start, actors, tasks, skipped)
    if start.resumed is None:
        print(config.describe(), flush=True)
        if eval_tasks:
            run.log(0, evaluate(actors, eval_tasks, config))
    with Progress("grpo", total_steps=config.num_steps, start_step=start.step) as progress:
        for step in range(start.step + 1, config.num_steps + 1):
            is_last = step == config.num_steps
            try:
                metrics, groups, batch = grpo_step(actors, tasks, config, step)
                if eval_tasks and (is_last or step % config.eval.every == 0):
                    metrics |= evaluate(actors, eval_tasks, config)
            except FloatingPointError as error:
                raise DivergedError(
                    f"step {step}: {error}. If the checkpoint that the run started from is sound, the updates "
                    "broke it: lower optimizer.lr or lengthen the warm-up"
                ) from error
            warn_of_engine_gap(metrics, 'set importance_correction = "token_truncate", or dtype = "float32"')
            run.log(step, metrics | {"epoch": tasks.epoch})
            run.log_samples(step, sample_rows(actors.tokenizer, groups, batch, config.samples_per_step))
            skipped.record(
                bool(metrics["skipped"]),
                lambda groups=groups, batch=batch: save_failed_rollout(run.path, actors.tokenizer, groups, batch),
            )
            if config.reference_refresh_steps and step % config.reference_refresh_steps == 0:
                assert actors.reference is not None
                refresh_reference(actors.reference, actors.policy)
            is_stopped = interrupt.is_requested  # looked at once: a signal after the save is for the next step
            if is_last or step % config.save_every == 0 or is_stopped:
                save(run, step, actors, tasks, skipped, config)
            progress.update(step, {"reward": metrics["reward"], "tokens/s": metrics["time/tokens_per_second"]})
            if is_stopped and not is_last:
                interrupt.exit()


def save(run: RunFolder, step: int, actors: Actors, tasks: TaskBatches, skipped: SkippedSteps, config: Config) -> None:
    """A checkpoint between two steps. No rollout is ever half used there: a step is a rollout with all its updates."""

    def write_model(folder: Path) -> None:
        save_model(actors.policy, folder)
        actors.tokenizer.save(folder)

    tensors = actors.optimizer.state_dict()
    if actors.reference is not None and config.reference_refresh_steps:
        tensors |= {f"reference.{name}": value for name, value in actors.reference.named_parameters()}
    state = {"tasks": tasks.state_dict(), "skipped": skipped.state_dict()}
    run.save_checkpoint(step, write_model, tensors, state, keep_last=config.keep_checkpoints)


def restore(start: Start, actors: Actors, tasks: TaskBatches, skipped: SkippedSteps) -> None:
    """Put back what `save` kept in the run's newest checkpoint, if there is one."""
    saved = start.training_state()
    if saved is None:
        return
    tensors, state = saved
    reference = {name: tensors.pop(name) for name in list(tensors) if name.startswith("reference.")}
    if reference and actors.reference is not None:
        with torch.no_grad():
            for name, parameter in actors.reference.named_parameters():
                parameter.copy_(reference[f"reference.{name}"])
    actors.optimizer.load_state_dict(tensors)
    tasks.load_state_dict(state["tasks"])
    skipped.load_state_dict(state["skipped"])
