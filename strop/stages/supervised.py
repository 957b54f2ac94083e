"""What pre-training, SFT and PPO-ptx share: the same cross entropy, on every token or on the completion's only."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from strop.data import Examples, split_packed
from strop.data.batches import Batches
from strop.models.interface import CausalLM
from strop.models.logprobs import packed_logprobs
from strop.objectives.aggregate import masked_sum
from strop.optim import AdamW, SkippedSteps, optimizer_step
from strop.runs import Start
from strop.types import PackedBatch


def supervised_step(
    model: CausalLM,
    optimizer: AdamW,
    batch: PackedBatch,
    *,
    lr: float,
    max_grad_norm: float,
    micro_batch_tokens: int,
) -> dict[str, float]:
    """One optimiser step on -(1/N) sum log p(label), N the counting labels of the WHOLE step.

    Micro-batches bound the memory and leave the result as it is: they share the one denominator.
    """
    started = time.perf_counter()
    loss = backward_mean_loss(model, batch, micro_batch_tokens=micro_batch_tokens)
    report = optimizer_step(optimizer, lr=lr, max_grad_norm=max_grad_norm)
    seconds = time.perf_counter() - started
    return {
        "loss": loss,
        "grad_norm": report.grad_norm,
        "lr": lr,
        "skipped": float(report.is_skipped),
        "num_tokens": len(batch.token_ids_T),
        "num_labels": int(batch.loss_mask_T.sum()),
        "time/step_seconds": seconds,
        "time/tokens_per_second": len(batch.token_ids_T) / seconds,
    }


def backward_mean_loss(model: CausalLM, batch: PackedBatch, *, micro_batch_tokens: int, coef: float = 1.0) -> float:
    """Nats per counting label of the batch; adds coef times its gradient to the model's, without an update."""
    num_labels = int(batch.loss_mask_T.sum())
    loss_sum = 0.0
    for micro in split_packed(batch, micro_batch_tokens):
        if not micro.loss_mask_T.any():
            continue
        logprobs_R, _ = packed_logprobs(model, micro.to(model.device))
        loss = masked_sum(-logprobs_R, torch.ones_like(logprobs_R, dtype=torch.bool), num_labels)
        (loss if coef == 1.0 else coef * loss).backward()
        loss_sum += float(loss.detach())
    return loss_sum


@torch.no_grad()
def mean_loss(model: CausalLM, batches: Sequence[PackedBatch], *, micro_batch_tokens: int) -> float:
    """Nats per counting label over all batches, held out."""
    total, count = 0.0, 0
    for batch in batches:
        for micro in split_packed(batch, micro_batch_tokens):
            logprobs_R, _ = packed_logprobs(model, micro.to(model.device))
            total -= float(logprobs_R.double().sum())
            count += len(logprobs_R)
    return total / count


def restore(start: Start, optimizer: AdamW, batches: Batches[Any], skipped: SkippedSteps) -> None:
    """Put back what the run's newest checkpoint kept, if there is one."""
    if state := start.training_state():
        tensors, values = state
        optimizer.load_state_dict(tensors)
        batches.load_state_dict(values["batches"])
        skipped.load_state_dict(values["skipped"])


def save_failed_batch(run_folder: Path, batch: PackedBatch) -> Path:
    """Keep the batch whose gradient was not finite, for a look at it: runs/NAME/failed_batch.safetensors."""
    path = run_folder / "failed_batch.safetensors"
    lengths = torch.tensor([len(segment) for segment in batch.segments])
    save_file(
        {"token_ids": batch.token_ids_T, "labels": batch.labels_T, "loss_mask": batch.loss_mask_T, "lengths": lengths},
        path,
    )
    return path


def check_lengths(examples: Examples, max_positions: int) -> None:
    """ValueError naming the first example that is longer than the model has positions."""
    for example in examples:
        if example.num_labels > max_positions:
            raise ValueError(
                f"{example.where}: {example.num_labels} label positions, but the model has only {max_positions}: lower "
                f"max_length to {max_positions}, and say with on_too_long what becomes of longer examples"
            )
