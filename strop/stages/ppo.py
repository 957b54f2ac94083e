"""PPO: reinforcement learning with a critic, which predicts the reward to come and so says what was better than
expected, token by token.

    act      sample completions from the policy
    reward   judge them; a KL to the start keeps the policy near what it was
    expect   advantage = what came (and is still to come) minus what the critic expected
    update   a few passes over the rollout, each token's probability ratio clipped; the critic learns from the same

Rewards may come from a reward model, verifiers, functions, or a weighted sum, as in GRPO. Settings are in Config
(ppo_config.py), losses in ppo_loss.py, the critic in ppo_critic.py; docs/ppo.md explains them.

Shape suffixes: P prompts, G group, B completions, T label positions.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from strop.data import PackedBatches, TaskBatches, load_rows, sft_examples, tasks_from_rows
from strop.generation import Engine
from strop.models import CausalLM, save_model
from strop.native.freed_memory import give_back_between_phases
from strop.objectives.kl import adaptive_kl_coef
from strop.optim import AdamW, DivergedError, SkippedSteps, StepReport, optimizer_step
from strop.rewards.base import WeightedRewards
from strop.rewards.load import load_rewards
from strop.rollouts.averages import Averages, warn_of_engine_gap
from strop.rollouts.batch import RolloutBatch, minibatch_rows
from strop.rollouts.groups import Group, roll_out
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
)
from strop.stages.ppo_batch import make_batch
from strop.stages.ppo_config import Config
from strop.stages.ppo_critic import Critic, make_critic
from strop.stages.ppo_loss import micro_losses
from strop.stages.supervised import backward_mean_loss, check_lengths
from strop.tokenizer import Tokenizer
from strop.types import Task


@dataclass(frozen=True, kw_only=True)
class Actors:
    """Everything that one step needs and that outlives it."""

    policy: CausalLM
    critic: Critic
    reference: CausalLM | None
    tokenizer: Tokenizer
    engine: Engine
    reward: WeightedRewards
    optimizer: AdamW
    """The policy's, and a value head's."""
    prompt_ids: dict[str, tuple[int, ...]]
    """Task id -> the tokens of its prompt."""


@dataclass(kw_only=True)
class Position:
    """Where a run is, beside its weights and its step."""

    tasks: TaskBatches
    ptx: PackedBatches | None
    kl_coef: float
    """Now; Config.kl_coef at the start."""
    skipped: SkippedSteps

    def state_dict(self) -> dict[str, Any]:
        ptx = None if self.ptx is None else self.ptx.state_dict()
        return {
            "tasks": self.tasks.state_dict(),
            "ptx": ptx,
            "kl_coef": self.kl_coef,
            "skipped": self.skipped.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.tasks.load_state_dict(state["tasks"])
        if self.ptx is not None:
            self.ptx.load_state_dict(state["ptx"])
        self.kl_coef = state["kl_coef"]
        self.skipped.load_state_dict(state["skipped"])


def ppo_step(
    actors: Actors, position: Position, config: Config, step: int
) -> tuple[dict[str, float], list[Group], RolloutBatch]:
    """One rollout and its updates; step counts from 1. Returns metrics, the groups, and the batch for samples.jsonl."""
    started = time.perf_counter()
    chosen = [next(position.tasks)[0] for _ in range(config.prompts_per_step)]
    groups, judging = roll_out(
        actors.engine,
        actors.reward,
        chosen,
        [actors.prompt_ids[task.id] for task in chosen],
        group_size=config.group_size,
        sampling=config.sampling.params(actors.tokenizer),
        seed=derive_seed(config.seed, "rollout", step),
    )
    actors.engine.release()
    rollout_ended = time.perf_counter()
    batch, counted_B, metrics = make_batch(
        actors.policy, actors.critic, actors.reference, groups, config, kl_coef=position.kl_coef
    )
    metrics |= learn(actors, position, config, step, batch, counted_B)
    ended = time.perf_counter()
    num_tokens = sum(map(len, batch.completions))
    rollout = rollout_metrics(groups, actors.reward.names)
    # Groups are no baseline here, and a group of one is always flat.
    metrics |= {name: value for name, value in rollout.items() if not name.startswith("groups_")}
    metrics |= judging.metrics(ended - started) | {
        "lr": config.optimizer.lr_at(step - 1, config.num_steps),
        "num_tokens": num_tokens,
        "time/step_seconds": ended - started,
        "time/rollout_seconds": rollout_ended - started,
        "time/update_seconds": ended - rollout_ended,
        "time/tokens_per_second": num_tokens / (ended - started),
    }
    if config.kl_target is not None and "kl_sequence" in metrics:
        position.kl_coef = adaptive_kl_coef(
            position.kl_coef,
            metrics["kl_sequence"],
            target=config.kl_target,
            horizon=config.kl_horizon,
            num_episodes=sum(counted_B),
        )
    return metrics, groups, batch


def learn(
    actors: Actors, position: Position, config: Config, step: int, batch: RolloutBatch, counted_B: Sequence[bool]
) -> dict[str, float]:
    """All the updates of one rollout; returns what they logged."""
    averages = Averages()
    shuffle = generator(config.seed, "minibatches", step)
    reports: list[tuple[StepReport, StepReport | None]] = []
    ptx_losses: list[float] = []
    trains_policy = step > config.critic.warmup_steps
    for _ in range(config.epochs_per_rollout):
        for rows in minibatch_rows(batch, config.minibatch_prompts, shuffle):
            counted = [row for row in rows if counted_B[row]]
            num_tokens = sum(len(batch.completions[row]) for row in counted)  # of the whole update
            for micro in batch.select(counted).split(config.micro_batch_tokens):
                for loss in micro_losses(
                    actors.policy, actors.critic, micro, config,
                    kl_coef=position.kl_coef, num_tokens=num_tokens, trains_policy=trains_policy, averages=averages,
                ):  # fmt: skip
                    loss.backward()
            if position.ptx is not None and trains_policy:
                ptx_losses.append(ptx_backward(actors.policy, position.ptx, config))
            reports.append(update(actors, config, step))
    give_back_between_phases()
    metrics = averages.result() | update_metrics(reports)
    return metrics | ({"ptx_loss": sum(ptx_losses) / len(ptx_losses)} if ptx_losses else {})


def ptx_backward(policy: CausalLM, batches: PackedBatches, config: Config) -> float:
    """Add the gradient of the next language-modelling batch, on top of PPO's; returns its loss per token."""
    return backward_mean_loss(policy, next(batches), micro_batch_tokens=config.micro_batch_tokens, coef=config.ptx.coef)


def update(actors: Actors, config: Config, step: int) -> tuple[StepReport, StepReport | None]:
    """One optimiser step of the policy, and one of an own critic, each clipped by its own norm."""
    norm = config.optimizer.max_grad_norm
    lr = config.optimizer.lr_at(step - 1, config.num_steps)
    report = optimizer_step(actors.optimizer, lr=lr, max_grad_norm=norm)
    if actors.critic.optimizer is None:
        return report, None
    critic_lr = config.critic_optimizer.lr_at(step - 1, config.num_steps)
    return report, optimizer_step(actors.critic.optimizer, lr=critic_lr, max_grad_norm=norm)


def update_metrics(reports: Sequence[tuple[StepReport, StepReport | None]]) -> dict[str, float]:
    """Gradient norms before clipping, and how many updates were made and refused."""
    of_critic = [report for _, report in reports if report is not None]
    metrics = {
        "grad_norm": sum(report.grad_norm for report, _ in reports) / len(reports),
        "updates": sum(not report.is_skipped for report, _ in reports),
        "skipped": sum(
            not math.isfinite(report.grad_norm) or (critic is not None and not math.isfinite(critic.grad_norm))
            for report, critic in reports
        ),
    }
    if of_critic:
        metrics["critic_grad_norm"] = sum(report.grad_norm for report in of_critic) / len(of_critic)
    return metrics


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
    ptx_rows = load_rows(config.ptx.data) if config.ptx.data else None
    hashes = {"tasks": task_rows.content_hash}
    hashes |= {"eval": eval_rows.content_hash} if eval_rows is not None else {}
    hashes |= {"ptx": ptx_rows.content_hash} if ptx_rows is not None else {}
    train_tasks = tasks_from_rows(task_rows)
    eval_tasks = tasks_from_rows(eval_rows)[: config.eval.max_tasks] if eval_rows is not None else []
    rewards, reward_hashes = located_rewards(config.rewards, runs_dir, config.device)
    with load_rewards(rewards) as reward:
        reward.check_tasks([*train_tasks, *eval_tasks])
        start = start_run(
            runs_dir, name, stage="ppo", config=config, init_from=config.init_from, data_hashes=hashes | reward_hashes,
            seed=config.seed, resume=resume, keeps_parent=config.kl_coef != 0,
        )  # fmt: skip
        with start, Interrupt() as interrupt:
            tokenizer = kept_tokenizer(start, lambda: load_tokenizer(start))
            examples = None
            if ptx_rows is not None:
                examples = sft_examples(ptx_rows, tokenizer, config.ptx.max_length)
            actors = make_actors(config, start, runs_dir, reward, tokenizer, train_tasks, eval_tasks)
            ptx = None
            if examples is not None:
                check_lengths(examples, actors.policy.config.max_position_embeddings)
                seed = derive_seed(config.seed, "ptx")
                ptx = PackedBatches(examples, batch_tokens=config.ptx.batch_tokens, seed=seed)
            position = Position(
                tasks=TaskBatches(train_tasks, batch_size=1, seed=derive_seed(config.seed, "tasks")),
                ptx=ptx,
                kl_coef=config.kl_coef,
                skipped=SkippedSteps(config.optimizer.max_skipped_steps),
            )
            _train(config, start, interrupt, actors, position, eval_tasks)
    return start.run.path


def make_actors(
    config: Config,
    start: Start,
    runs_dir: Path,
    reward: WeightedRewards,
    tokenizer: Tokenizer,
    train_tasks: Sequence[Task],
    eval_tasks: Sequence[Task],
) -> Actors:
    """Policy, critic and reference, and whatever is wrong with them or the prompts found before the first step."""
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
    critic = make_critic(config, start, runs_dir, policy, tokenizer, dtype)
    return Actors(
        policy=policy,
        critic=critic,
        reference=reference,
        tokenizer=tokenizer,
        engine=Engine(policy, tokenizer, num_slots=config.num_slots),
        reward=reward,
        optimizer=config.optimizer.build([*policy.named_parameters(), *critic.head_parameters()]),
        prompt_ids=prompt_ids,
    )


def _train(
    config: Config,
    start: Start,
    interrupt: Interrupt,
    actors: Actors,
    position: Position,
    eval_tasks: Sequence[Task],
) -> None:
    run = start.run
    restore(start, actors, position)
    if start.resumed is None:
        print(config.describe(), flush=True)
        if eval_tasks:
            run.log(0, evaluate(actors, eval_tasks, config))
    with Progress("ppo", total_steps=config.num_steps, start_step=start.step) as progress:
        for step in range(start.step + 1, config.num_steps + 1):
            is_last = step == config.num_steps
            try:
                metrics, groups, batch = ppo_step(actors, position, config, step)
                if eval_tasks and (is_last or step % config.eval.every == 0):
                    metrics |= evaluate(actors, eval_tasks, config)
            except FloatingPointError as error:
                raise DivergedError(
                    f"step {step}: {error}. If the checkpoint that the run started from is sound, the updates "
                    "broke it: lower optimizer.lr or lengthen the warm-up"
                ) from error
            warn_of_engine_gap(metrics, 'set dtype = "float32"')
            run.log(step, metrics | {"epoch": position.tasks.epoch})
            run.log_samples(step, sample_rows(actors.tokenizer, groups, batch, config.samples_per_step))
            position.skipped.record(
                bool(metrics["skipped"]),
                lambda groups=groups, batch=batch: save_failed_rollout(run.path, actors.tokenizer, groups, batch),
            )
            is_stopped = interrupt.is_requested  # looked at once: a signal after the save is for the next step
            if is_last or step % config.save_every == 0 or is_stopped:
                save(run, step, actors, position, config)
            progress.update(step, {"reward": metrics["reward"], "tokens/s": metrics["time/tokens_per_second"]})
            if is_stopped and not is_last:
                interrupt.exit()


def save(run: RunFolder, step: int, actors: Actors, position: Position, config: Config) -> None:
    """A checkpoint between two steps. No rollout is ever half used there: a step is a rollout with all its updates."""

    def write_model(folder: Path) -> None:
        save_model(actors.policy, folder)
        actors.tokenizer.save(folder)
        actors.critic.save(folder)

    tensors = actors.optimizer.state_dict() | actors.critic.training_state()
    run.save_checkpoint(step, write_model, tensors, position.state_dict(), keep_last=config.keep_checkpoints)


def restore(start: Start, actors: Actors, position: Position) -> None:
    """Put back what `save` kept in the run's newest checkpoint, if there is one; weights were loaded already."""
    if saved := start.training_state():
        tensors, state = saved
        of_critic = {name: tensors.pop(name) for name in list(tensors) if name.startswith("critic.")}
        actors.optimizer.load_state_dict(tensors)
        actors.critic.load_training_state(of_critic)
        position.load_state_dict(state)
