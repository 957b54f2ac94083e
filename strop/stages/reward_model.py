"""The reward model: a scalar head that learns which answers people prefer. Not RL: the rankings are given.

A prompt and all its answers are one tree of a packed batch, so that the prompt is computed once, and one element of the
loss: its C(K, 2) pairs are not independent (Ouyang et al. 2022, section 3.5). The score is read at an answer's last
token, the one at which a policy stops.

Shape suffixes: P prompts, K answers, R answers laid end to end.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from strop.data import (
    Comparison,
    ComparisonBatches,
    Comparisons,
    Rows,
    comparisons_from_rows,
    load_rows,
    sft_examples,
)
from strop.data.comparisons import Answer
from strop.data.formats import COMPARED
from strop.evals.comparisons import comparison_metrics, length_preference
from strop.models import Decoder, load_model
from strop.models.heads import (
    ScalarModel,
    add_scalar_head,
    is_scalar_folder,
    load_scalar_model,
    pack_scored,
    save_scalar_model,
)
from strop.models.reward_scale import RewardScale
from strop.objectives.aggregate import masked_sum
from strop.objectives.reward_model import kwise_loss, pair_centring, plackett_luce_loss
from strop.optim import AdamW, SkippedSteps, optimizer_step
from strop.runs import Interrupt, Progress, Start, derive_seed, start_run
from strop.stages.begin import chosen_dtype, in_its_dtype, kept_tokenizer, load_tokenizer
from strop.stages.compared import check_fits, micro_batches
from strop.stages.reward_model_config import Config
from strop.stages.supervised import restore, save_failed_batch
from strop.tokenizer import Tokenizer

SAMPLED_ANSWERS = 8
"""Held-out answers that samples.jsonl shows at every evaluation."""


def reward_step(
    model: ScalarModel, optimizer: AdamW, batch: Sequence[Comparison], config: Config, *, lr: float
) -> dict[str, float]:
    """One optimiser step over whole comparisons; micro-batches share one denominator."""
    started = time.perf_counter()
    denominator = (
        sum(num_pairs(comparison, config) for comparison in batch) if config.loss == "pairwise" else len(batch)
    )
    loss_sum, scores = 0.0, []
    for micro, comparisons in micro_batches(batch, pack_scored, config.micro_batch_tokens):
        scores_R = model.scores_R(micro.to(model.device))
        loss_P = ranking_loss(scores_R, comparisons, config)
        weights_P = loss_P.new_tensor([comparison.weight for comparison in comparisons])
        loss = masked_sum(loss_P, torch.ones_like(loss_P, dtype=torch.bool), denominator, weights_BT=weights_P)
        loss.backward()
        loss_sum += float(loss.detach())
        scores += split_scores(scores_R, comparisons)
    report = optimizer_step(optimizer, lr=lr, max_grad_norm=config.optimizer.max_grad_norm)
    seconds = time.perf_counter() - started
    num_tokens = sum(comparison.num_tokens for comparison in batch)
    every_score = np.concatenate(scores)
    metrics = {
        "loss": loss_sum,
        "grad_norm": report.grad_norm,
        "lr": lr,
        "skipped": float(report.is_skipped),
        "score_mean": float(every_score.mean()),
        "score_std": float(every_score.std()),
        "num_comparisons": len(batch),
        "num_tokens": num_tokens,
        "time/step_seconds": seconds,
        "time/tokens_per_second": num_tokens / seconds,
    }
    if any(comparison.pairs for comparison in batch):
        found = comparison_metrics(batch, scores)
        metrics |= {name: found[name] for name in ("accuracy", "margin")}
    return metrics


def ranking_loss(scores_R: Tensor, comparisons: Sequence[Comparison], config: Config) -> Tensor:
    """The loss of every comparison, shape (P,), not yet weighted by its source."""
    sizes = [len(comparison.answers) for comparison in comparisons]
    scores_PK = pad_sequence(list(scores_R.split(sizes)), batch_first=True)
    ranks_PK = torch.full(scores_PK.shape, max(sizes), device=scores_R.device)
    for place, comparison in enumerate(comparisons):
        ranks_PK[place, : sizes[place]] = torch.tensor(comparison.ranks)
    mask_PK = torch.arange(max(sizes), device=scores_R.device) < torch.tensor(sizes, device=scores_R.device)[:, None]
    if config.loss == "plackett_luce":
        loss_P = plackett_luce_loss(scores_PK, mask_PK, ranks_PK=ranks_PK)
        return loss_P + config.centring_coef * pair_centring(scores_PK, mask_PK)
    loss_P = kwise_loss(
        scores_PK,
        mask_PK,
        ranks_PK=ranks_PK,
        count_ties=config.ties == "half",
        margin_P=scores_R.new_tensor([comparison.margin or 0.0 for comparison in comparisons]),
        centring_coef=config.centring_coef,
    )
    if config.loss == "kwise":
        return loss_P
    return loss_P * loss_P.new_tensor([num_pairs(comparison, config) for comparison in comparisons])


def num_pairs(comparison: Comparison, config: Config) -> int:
    """Pairs that count in the loss."""
    size = len(comparison.answers)
    return size * (size - 1) // 2 if config.ties == "half" else len(comparison.pairs)


def split_scores(scores_R: Tensor, comparisons: Sequence[Comparison]) -> list[np.ndarray]:
    """Each comparison's own scores, in the order of its answers."""
    sizes = [len(comparison.answers) for comparison in comparisons]
    return [part.numpy() for part in scores_R.detach().cpu().split(sizes)]


@torch.no_grad()
def score_all(model: ScalarModel, comparisons: Sequence[Comparison], *, max_tokens: int) -> list[np.ndarray]:
    """Scores of all answers, comparison by comparison."""
    scores: list[np.ndarray] = []
    for micro, own in micro_batches(comparisons, pack_scored, max_tokens):
        scores += split_scores(model.scores_R(micro.to(model.device)), own)
    return scores


@in_its_dtype
def train(config: Config, *, name: str, runs_dir: Path, resume: bool) -> Path:
    """Learn the preferences; returns the run folder. Raises ValueError for bad input, DivergedError as SkippedSteps."""
    sources = {"data": config.data, "eval_data": config.eval_data, "reference_data": config.reference_data}
    rows = {field: load_rows(source) for field, source in sources.items() if source}
    start = start_run(
        runs_dir, name, stage="reward-model", config=config, init_from=config.init_from,
        data_hashes={field: own.content_hash for field, own in rows.items()}, seed=config.seed, resume=resume,
    )  # fmt: skip
    with start, Interrupt() as interrupt:
        _train(config, start, interrupt, rows)
    return start.run.path


def _train(config: Config, start: Start, interrupt: Interrupt, rows: Mapping[str, Rows]) -> None:
    run = start.run
    tokenizer = kept_tokenizer(start, lambda: with_padding(load_tokenizer(start)))
    model = load_reward_model(config, start, tokenizer)
    tokenizer.check_fits(model.config.vocab_size)
    data = read_comparisons(rows["data"], tokenizer, model, config)
    held_out = read_comparisons(rows["eval_data"], tokenizer, model, config) if "eval_data" in rows else None
    if "reference_data" in rows:
        references = reference_answers(rows["reference_data"], tokenizer, model, config)
    else:
        references = list(data if held_out is None else held_out)
    references = references[: config.max_reference]
    prefers_longer = length_preference(data)
    batches = ComparisonBatches(data, batch_size=config.batch_size, seed=derive_seed(config.seed, "comparisons"))
    optimizer = config.optimizer.build(model.named_parameters())
    skipped = SkippedSteps(config.optimizer.max_skipped_steps)
    restore(start, optimizer, batches, skipped)

    def evaluate(step: int) -> dict[str, float]:
        assert held_out is not None
        scores = score_all(model, held_out, max_tokens=config.micro_batch_tokens)
        run.log_samples(step, sample_rows(tokenizer, held_out, scores))
        metrics = comparison_metrics(held_out, scores, prefers_longer=prefers_longer)
        return {f"eval/{metric}": value for metric, value in metrics.items()}

    def write_model(folder: Path) -> None:
        reference = np.concatenate(score_all(model, references, max_tokens=config.micro_batch_tokens))
        save_scalar_model(model, folder, reward_scale=RewardScale.of(torch.from_numpy(reference)))
        tokenizer.save(folder)

    if start.resumed is None and held_out is not None:
        run.log(0, evaluate(0))
    with Progress("reward-model", total_steps=config.num_steps, start_step=start.step) as progress:
        for step in range(start.step + 1, config.num_steps + 1):
            batch = next(batches)
            lr = config.optimizer.lr_at(step - 1, config.num_steps)
            metrics: dict[str, Any] = reward_step(model, optimizer, batch, config, lr=lr)
            is_last = step == config.num_steps
            if held_out is not None and (is_last or step % config.eval_every == 0):
                metrics |= evaluate(step)
            run.log(step, metrics | {"epoch": batches.epoch})
            skipped.record(
                bool(metrics["skipped"]),
                lambda batch=batch: save_failed_batch(run.path, pack_scored(item.tree for item in batch)),
            )
            is_stopped = interrupt.is_requested  # looked at once: a signal after the save is for the next step
            if is_last or step % config.save_every == 0 or is_stopped:
                run.save_checkpoint(
                    step,
                    write_model,
                    optimizer.state_dict(),
                    {"batches": batches.state_dict(), "skipped": skipped.state_dict()},
                    keep_last=config.keep_checkpoints,
                )
            progress.update(step, {"loss": metrics["loss"], "tokens/s": metrics["time/tokens_per_second"]})
            if is_stopped and not is_last:
                interrupt.exit()


def load_reward_model(config: Config, start: Start, tokenizer: Tokenizer) -> ScalarModel:
    """The run's own reward model, the one that it starts from, or a language model with a fresh head."""
    dtype = chosen_dtype(start, config.dtype, config.device)
    if is_scalar_folder(start.model_folder):
        model = load_scalar_model(start.model_folder, dtype=dtype, device=config.device)
    else:
        base = load_model(start.model_folder, dtype=dtype, device=config.device)
        if not isinstance(base, Decoder):
            raise ValueError(
                f"{start.model_folder}: a reward model needs an architecture that Strop has itself "
                "(docs/reward_model.md lists them)"
            )
        model = add_scalar_head(base, seed=derive_seed(config.seed, "head"))
    model.backbone.set_checkpointing(config.gradient_checkpointing)
    model.config = replace(model.config, pad_token_id=tokenizer.pad_id)
    return model


def with_padding(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer with a padding token that no answer ends with, or without one where it has no such token.

    transformers finds the end of a padded row by looking for the last id that is not the padding's. Where the padding
    is also the stop token, it would read the score one token early, before the answer has ended.
    """
    candidates = [tokenizer.pad_id, tokenizer.hf.unk_token_id, *sorted(tokenizer.hf.added_tokens_decoder)]
    apart = [token for token in candidates if token is not None and token not in tokenizer.stop_token_ids]
    tokenizer.hf.pad_token = tokenizer.hf.convert_ids_to_tokens(apart[0]) if apart else None
    return tokenizer


def read_comparisons(rows: Rows, tokenizer: Tokenizer, model: ScalarModel, config: Config) -> Comparisons:
    """The rows as comparisons, checked against the settings."""
    comparisons = comparisons_from_rows(
        rows, tokenizer, accepted=COMPARED, max_length=config.max_length, on_too_long=config.on_too_long,
        keep_ties=config.ties == "half",
        annotator_weights=config.annotator_weights if rows.source == config.data else None,
    )  # fmt: skip
    check_fits(
        comparisons,
        max_positions=model.config.max_position_embeddings,
        micro_batch_tokens=config.micro_batch_tokens,
    )
    if config.loss == "plackett_luce":
        for comparison in comparisons:
            if comparison.margin is not None:
                raise ValueError(
                    f"{comparison.where}: column 'margin' has no place in loss = \"plackett_luce\": remove it, or use "
                    '"kwise"'
                )
    return comparisons


def reference_answers(rows: Rows, tokenizer: Tokenizer, model: ScalarModel, config: Config) -> list[Comparison]:
    """Good answers as comparisons of one: only their score at the end is wanted."""
    answers: list[Comparison] = []
    for example in sft_examples(rows, tokenizer, config.max_length, on_too_long="drop"):
        end = int(np.flatnonzero(example.loss_mask)[-1]) + 1
        ids = tuple(example.token_ids[:end].tolist())
        answer = Answer(token_ids=ids[1:], mask=(True,) * (end - 1))
        answers.append(Comparison(where=example.where, prompt_ids=ids[:1], answers=(answer,), ranks=(0,)))
    check_fits(
        answers, max_positions=model.config.max_position_embeddings, micro_batch_tokens=config.micro_batch_tokens
    )
    return answers


def sample_rows(
    tokenizer: Tokenizer, comparisons: Sequence[Comparison], scores: Sequence[np.ndarray]
) -> list[dict[str, Any]]:
    """The first held-out answers with their score and their place in the ranking."""
    rows = [
        {
            "task": comparison.where,
            "prompt": tokenizer.decode(comparison.prompt_ids, skip_special_tokens=False),
            "completion": tokenizer.decode(answer.token_ids),
            "reward": float(score),
            "rank": rank,
        }
        for comparison, own in zip(comparisons, scores, strict=True)
        for answer, score, rank in zip(comparison.answers, own, comparison.ranks, strict=True)
    ]
    return rows[:SAMPLED_ANSWERS]
