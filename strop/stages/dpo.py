"""DPO: preferences straight into the policy, without a reward model. Its data is given, or, online, made by the policy.

    offline   pairs, rankings or single answers with a label, from a file
    online    the policy answers, the rewards choose, and the pairs are used at once

The family (cDPO, IPO, ORPO, SimPO, APO, KTO, BCO ...) is a choice of loss: dpo_config.py, dpo_loss.py, docs/dpo.md. A
prompt with all its answers is one tree of a packed batch, so that it is computed once. What the reference thinks of the
answers never changes: it is computed once, before the first step, and the reference model is let go.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from strop.data import (
    Comparison,
    ComparisonBatches,
    Comparisons,
    Rows,
    TaskBatches,
    load_rows,
    pack_completions,
    tasks_from_rows,
)
from strop.evals.comparisons import length_preference
from strop.generation import Engine
from strop.models import CausalLM, save_model
from strop.optim import AdamW, DivergedError, SkippedSteps, optimizer_step
from strop.rewards.base import WeightedRewards
from strop.rewards.load import load_rewards
from strop.rollouts.groups import Group
from strop.rollouts.prompts import encode_prompts, longest_prompt
from strop.rollouts.report import rollout_metrics
from strop.runs import Interrupt, Progress, Start, derive_seed, start_run
from strop.stages import held_out
from strop.stages.begin import chosen_dtype, in_its_dtype, kept_tokenizer, load_policy, load_tokenizer, located_rewards
from strop.stages.compared import micro_batches
from strop.stages.dpo_config import Config
from strop.stages.dpo_data import mismatched, read_comparisons
from strop.stages.dpo_loss import (
    Answers,
    Baselines,
    frozen_sums,
    micro_loss,
    policy_answers,
)
from strop.stages.dpo_measure import evaluate_preferences, preference_metrics
from strop.stages.dpo_online import sample_comparisons, sample_rows
from strop.stages.dpo_reference import LiveReference, Reference, covers, make_reference
from strop.stages.supervised import save_failed_batch
from strop.tokenizer import Tokenizer
from strop.types import Task

BCO_DECAY = 0.9
"""Of the running mean of BCO's rewards, per step."""


@dataclass(kw_only=True)
class Actors:
    """Everything that one step needs and that outlives it."""

    policy: CausalLM
    reference: Reference | None
    tokenizer: Tokenizer
    optimizer: AdamW
    engine: Engine
    reward: WeightedRewards | None
    prompt_ids: dict[str, tuple[int, ...]]
    """Task id -> the tokens of its prompt."""
    lenders: dict[str, Comparison]
    """Offline KTO: a comparison's place -> its prompt with an answer to another one."""
    prefers_longer: bool | None = None
    """What a judge of lengths alone would have learnt from the training data."""
    bco_shift: float = 0.0


def dpo_step(actors: Actors, batch: Sequence[Comparison], config: Config, *, lr: float) -> dict[str, float]:
    """One optimiser step on whole comparisons; micro-batches share one denominator, the number of comparisons."""
    started = time.perf_counter()
    ref_sums = None if actors.reference is None else actors.reference.sums(batch, "train")
    baselines = Baselines(kto=kto_baseline(actors, batch, config), bco_shift=actors.bco_shift)
    loss_sum, first, parts = 0.0, 0, []
    for micro, comparisons in micro_batches(batch, pack_completions, config.micro_batch_tokens):
        own_ref = None if ref_sums is None else ref_sums[first : first + len(comparisons)]
        answers = policy_answers(actors.policy, micro, comparisons, own_ref, config)
        loss = micro_loss(answers, comparisons, baselines, config) / len(batch)
        loss.backward()
        loss_sum += float(loss.detach())
        parts.append(answers)
        first += len(comparisons)
    report = optimizer_step(actors.optimizer, lr=lr, max_grad_norm=config.optimizer.max_grad_norm)
    seconds = time.perf_counter() - started
    metrics = preference_metrics(batch, Answers.join(parts), baselines, config)
    if config.loss == "bco" and not report.is_skipped:
        actors.bco_shift = BCO_DECAY * actors.bco_shift + (1 - BCO_DECAY) * metrics["reward_mean"]
    if config.loss == "bco":
        metrics["bco_shift"] = baselines.bco_shift
    num_tokens = sum(comparison.num_tokens for comparison in batch)
    return metrics | {
        "loss": loss_sum,
        "grad_norm": report.grad_norm,
        "lr": lr,
        "skipped": float(report.is_skipped),
        "num_comparisons": len(batch),
        "num_tokens": num_tokens,
        "time/update_seconds": seconds,
        "time/step_seconds": seconds,
        "time/tokens_per_second": num_tokens / seconds,
    }


def kto_baseline(actors: Actors, batch: Sequence[Comparison], config: Config) -> float:
    """KTO's z for this step: max(0, mean logratio of answers under other prompts), without gradient."""
    if config.loss != "kto":
        return 0.0
    assert actors.reference is not None
    if config.is_online:
        lent = mismatched(batch, max_tokens=min(config.max_length, config.micro_batch_tokens))
    else:
        lent = [actors.lenders[comparison.where] for comparison in batch]
    options = {"temperature": config.temperature, "max_tokens": config.micro_batch_tokens}
    logratios = np.concatenate(frozen_sums(actors.policy, lent, **options))
    logratios = logratios - np.concatenate(actors.reference.sums(lent, "mismatched"))
    return max(0.0, float(logratios.mean()))


@in_its_dtype
def train(config: Config, *, name: str, runs_dir: Path, resume: bool) -> Path:
    """Learn the preferences; returns the run folder. Raises ValueError for bad input, DivergedError as SkippedSteps."""
    sources = {
        "data": config.data,
        "eval_data": config.eval_data,
        "online.tasks": config.online.tasks,
        "eval_tasks": config.eval_tasks,
    }
    rows = {field: load_rows(source) for field, source in sources.items() if source}
    rewards, reward_hashes = located_rewards(config.rewards, runs_dir, config.device)
    with contextlib.ExitStack() as stack:
        reward = stack.enter_context(load_rewards(rewards)) if rewards else None
        tasks = {
            field: tasks_from_rows(rows[field]) if field in rows else [] for field in ("online.tasks", "eval_tasks")
        }
        tasks["eval_tasks"] = tasks["eval_tasks"][: config.max_eval_tasks]
        if reward is not None:
            reward.check_tasks([task for own in tasks.values() for task in own])
        start = start_run(
            runs_dir, name, stage="dpo", config=config, init_from=config.init_from,
            data_hashes={field: own.content_hash for field, own in rows.items()} | reward_hashes, seed=config.seed,
            resume=resume, keeps_parent=config.keeps_reference
            or (config.needs_reference and not covers(runs_dir / name, config.num_steps)),
        )  # fmt: skip
        with start, Interrupt() as interrupt:
            _train(config, start, interrupt, reward, rows, tasks)
    return start.run.path


def _train(
    config: Config,
    start: Start,
    interrupt: Interrupt,
    reward: WeightedRewards | None,
    rows: Mapping[str, Rows],
    tasks: Mapping[str, Sequence[Task]],
) -> None:
    run = start.run
    actors, batches, eval_data = prepare(config, start, reward, rows, tasks)
    skipped = SkippedSteps(config.optimizer.max_skipped_steps)
    restore(start, actors, batches, skipped)

    def evaluate() -> dict[str, float]:
        metrics: dict[str, float] = {}
        if eval_data is not None:
            metrics |= evaluate_preferences(
                actors.policy,
                actors.reference,
                eval_data,
                config,
                prefers_longer=actors.prefers_longer,
                bco_shift=actors.bco_shift,
            )
        if tasks["eval_tasks"]:
            metrics |= evaluate_answers(actors, tasks["eval_tasks"], config)
        return metrics

    has_eval = eval_data is not None or bool(tasks["eval_tasks"])
    if start.resumed is None and has_eval:
        run.log(0, evaluate())
    with Progress("dpo", total_steps=config.num_steps, start_step=start.step) as progress:
        for step in range(start.step + 1, config.num_steps + 1):
            is_last = step == config.num_steps
            try:
                metrics, batch, groups = one_step(actors, batches, config, step)
                if has_eval and (is_last or step % config.eval_every == 0):
                    metrics |= evaluate()
            except FloatingPointError as error:
                raise DivergedError(f"step {step}: {error}. Lower optimizer.lr or lengthen the warm-up") from error
            run.log(step, metrics | {"epoch": batches.epoch})
            run.log_samples(step, sample_rows(actors.tokenizer, groups, config.online.samples_per_step))
            skipped.record(
                bool(metrics.get("skipped", 0.0)),
                lambda batch=batch: save_failed_batch(run.path, pack_completions(item.tree for item in batch)),
            )
            if config.reference_refresh_steps and step % config.reference_refresh_steps == 0:
                assert isinstance(actors.reference, LiveReference)
                actors.reference.refresh(actors.policy)
            is_stopped = interrupt.is_requested  # looked at once: a signal after the save is for the next step
            if is_last or step % config.save_every == 0 or is_stopped:
                save(start, step, actors, batches, skipped, config)
            figures = {name: metrics[name] for name in ("loss", "accuracy") if name in metrics}
            progress.update(step, figures | {"tokens/s": metrics["time/tokens_per_second"]})
            if is_stopped and not is_last:
                interrupt.exit()


def prepare(
    config: Config,
    start: Start,
    reward: WeightedRewards | None,
    rows: Mapping[str, Rows],
    tasks: Mapping[str, Sequence[Task]],
) -> tuple[Actors, ComparisonBatches | TaskBatches, Comparisons | None]:
    """Everything that the first step needs, checked; and the held-out comparisons."""
    tokenizer = kept_tokenizer(start, lambda: load_tokenizer(start))
    dtype = chosen_dtype(start, config.dtype, config.device)
    policy = load_policy(
        start, config.lora, dtype, config.device, config.seed, checkpointing=config.gradient_checkpointing
    )
    tokenizer.check_fits(policy.config.vocab_size)
    limit = policy.config.max_position_embeddings
    prompt_ids = encode_prompts(tasks["online.tasks"], tokenizer, config.sampling.max_new_tokens, limit)
    eval_ids = encode_prompts(tasks["eval_tasks"], tokenizer, config.sampling.max_new_tokens, limit)
    check_room(prompt_ids, config)
    if reward is not None:
        reward.bind(tokenizer, longest_prompt(prompt_ids, eval_ids) + config.sampling.max_new_tokens)
    data = read_comparisons(rows["data"], tokenizer, limit, config) if "data" in rows else Comparisons([])
    eval_data = read_comparisons(rows["eval_data"], tokenizer, limit, config) if "eval_data" in rows else None
    lenders: dict[str, Comparison] = {}
    if config.loss == "kto" and not config.is_online:
        max_tokens = min(config.max_length, config.micro_batch_tokens)
        lenders = {lent.where: lent for lent in mismatched(data, max_tokens=max_tokens)}
    batches: ComparisonBatches | TaskBatches
    if config.is_online:
        batches = TaskBatches(tasks["online.tasks"], batch_size=1, seed=derive_seed(config.seed, "tasks"))
    else:
        batches = ComparisonBatches(data, batch_size=config.batch_size, seed=derive_seed(config.seed, "comparisons"))
    actors = Actors(
        policy=policy,
        reference=make_reference(config, start, policy, batches, lenders, eval_data or []),
        tokenizer=tokenizer,
        optimizer=config.optimizer.build(policy.named_parameters()),
        engine=Engine(policy, tokenizer, num_slots=config.online.num_slots),
        reward=reward,
        prompt_ids=prompt_ids,
        lenders=lenders,
        prefers_longer=length_preference(data) if data else None,
    )
    return actors, batches, eval_data


def check_room(prompt_ids: Mapping[str, tuple[int, ...]], config: Config) -> None:
    """ValueError naming the first online task whose answers, if all were as long as allowed, no pass could hold."""
    num_answers = 2 if config.online.pairs == "best_worst" else config.online.group_size
    for task, prompt in prompt_ids.items():
        size = len(prompt) + num_answers * config.sampling.max_new_tokens
        if size > config.micro_batch_tokens:
            raise ValueError(
                f"{task}: its prompt and {num_answers} answers may have {size} tokens, which one pass must hold: raise "
                f"micro_batch_tokens={config.micro_batch_tokens}, or lower sampling.max_new_tokens"
            )


def one_step(
    actors: Actors, batches: ComparisonBatches | TaskBatches, config: Config, step: int
) -> tuple[dict[str, float], Sequence[Comparison], list[Group]]:
    """A step with its data, which online is sampled first. Where every prompt's answers tie there is no update."""
    lr = config.optimizer.lr_at(step - 1, config.num_steps)
    if isinstance(batches, ComparisonBatches):
        batch = next(batches)
        return dpo_step(actors, batch, config, lr=lr), batch, []
    started = time.perf_counter()
    assert actors.reward is not None
    chosen = [next(batches)[0] for _ in range(config.batch_size)]
    comparisons, groups, judging = sample_comparisons(
        actors.engine,
        actors.reward,
        chosen,
        [actors.prompt_ids[task.id] for task in chosen],
        config,
        sampling=config.sampling.params(actors.tokenizer),
        seed=derive_seed(config.seed, "rollout", step),
    )
    rollout_seconds = time.perf_counter() - started
    metrics = rollout_metrics(groups, actors.reward.names)
    has_pairs = bool(comparisons) and (config.loss != "kto" or len({c.prompt_ids for c in comparisons}) > 1)
    metrics |= dpo_step(actors, comparisons, config, lr=lr) if has_pairs else {"num_comparisons": 0, "lr": lr}
    num_tokens = sum(len(completion.token_ids) for group in groups for completion in group.completions)
    seconds = time.perf_counter() - started
    metrics |= judging.metrics(seconds) | {
        "num_tokens": num_tokens,
        "time/rollout_seconds": rollout_seconds,
        "time/step_seconds": seconds,
        "time/tokens_per_second": num_tokens / seconds,
    }
    return metrics, comparisons, groups


def evaluate_answers(actors: Actors, tasks: Sequence[Task], config: Config) -> dict[str, float]:
    """Held-out figures of the first reward, always with the same seed."""
    assert actors.reward is not None
    metrics = held_out.evaluate(
        actors.engine,
        actors.tokenizer,
        tasks,
        actors.reward,
        sampling=config.sampling,
        num_samples=1,
        seed=derive_seed(config.seed, "eval"),
    )
    actors.engine.release()  # offline nobody else does
    return metrics


def save(
    start: Start, step: int, actors: Actors, batches: ComparisonBatches | TaskBatches, skipped: SkippedSteps,
    config: Config,
) -> None:  # fmt: skip
    """A checkpoint between two steps; of a reference that moves, its weights too."""

    def write_model(folder: Path) -> None:
        save_model(actors.policy, folder)
        actors.tokenizer.save(folder)

    tensors = actors.optimizer.state_dict()
    if config.reference_refresh_steps and isinstance(actors.reference, LiveReference):
        tensors |= {f"reference.{name}": value for name, value in actors.reference.model.named_parameters()}
    state = {"batches": batches.state_dict(), "skipped": skipped.state_dict(), "bco_shift": actors.bco_shift}
    start.run.save_checkpoint(step, write_model, tensors, state, keep_last=config.keep_checkpoints)


def restore(start: Start, actors: Actors, batches: ComparisonBatches | TaskBatches, skipped: SkippedSteps) -> None:
    """Put back what `save` kept in the run's newest checkpoint, if there is one."""
    saved = start.training_state()
    if saved is None:
        return
    tensors, state = saved
    reference = {name: tensors.pop(name) for name in list(tensors) if name.startswith("reference.")}
    if reference and isinstance(actors.reference, LiveReference):
        with torch.no_grad():
            for name, parameter in actors.reference.model.named_parameters():
                parameter.copy_(reference[f"reference.{name}"])
    actors.optimizer.load_state_dict(tensors)
    batches.load_state_dict(state["batches"])
    skipped.load_state_dict(state["skipped"])
    actors.bco_shift = state["bco_shift"]
