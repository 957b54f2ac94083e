"""What stages do before their first step: check numbers, settle the dtype, keep the tokenizer, find reward models."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from strop.models import choose_dtype
from strop.models.precision import DTYPES
from strop.optim import OptimizerConfig
from strop.rewards.config import RewardConfig
from strop.runs import Start, resolve
from strop.runs.files import sync
from strop.tokenizer import Tokenizer


def at_least(config: Any, minimum: float, *fields: str, prefix: str = "") -> None:
    """ValueError naming the first of the config's fields that is below the minimum (or nan)."""
    for field in fields:
        value = getattr(config, field)
        if not value >= minimum:
            raise ValueError(f"{prefix}{field}={value} must be at least {minimum}")


def check_optimizer(optimizer: OptimizerConfig, num_steps: int) -> None:
    """ValueError for a schedule that does not fit into the run, and for numbers that no update can use."""
    at_least(optimizer, 0, "lr", "weight_decay", prefix="optimizer.")
    at_least(optimizer, 1, "max_skipped_steps", prefix="optimizer.")
    if not math.isfinite(optimizer.lr):
        raise ValueError(f"optimizer.lr={optimizer.lr} is not finite")
    if not optimizer.max_grad_norm > 0:
        raise ValueError(f"optimizer.max_grad_norm={optimizer.max_grad_norm} must be above 0; inf never clips")
    try:
        optimizer.lr_at(0, num_steps)
    except ValueError as error:
        raise ValueError(f"optimizer: {error}") from None


def chosen_dtype(start: Start, requested: str, device: str) -> torch.dtype:
    """The run's compute dtype: measured once for "auto", and the same ever after."""
    name = start.settle("dtype", lambda: str(choose_dtype(requested, device)).removeprefix("torch."))
    return DTYPES[name]


def kept_tokenizer(start: Start, make: Callable[[], Tokenizer]) -> Tokenizer:
    """The run's tokenizer: what make() gave when the run began, kept in runs/NAME/tokenizer.

    A resumed run must not take it from its checkpoint: a model's generation_config.json may know stop tokens of which
    the tokenizer that the run began with knew nothing, and completions would end elsewhere.
    """
    folder = start.run.path / "tokenizer"
    if not folder.is_dir():
        partial = folder.with_name("tokenizer.partial")
        shutil.rmtree(partial, ignore_errors=True)
        make().save(partial)
        for file in partial.iterdir():
            sync(file)
        partial.rename(folder)
    return Tokenizer.load(folder)


def located_rewards(
    rewards: Sequence[RewardConfig], runs_dir: Path, device: str
) -> tuple[list[RewardConfig], dict[str, str]]:
    """The rewards with the folder of every reward model in place of RUN[/STEP], and the content hashes of those models.

    The hashes belong to run.json's data_hashes: a run that resumed with another reward model would be another run.
    """
    located: list[RewardConfig] = []
    hashes: dict[str, str] = {}
    for reward in rewards:
        model = reward.options.get("model")
        if reward.name == "model" and isinstance(model, str):
            checkpoint = resolve(model, runs_dir)
            hashes[f"rewards.{reward.label or reward.name}"] = checkpoint.content_hash
            reward = dataclasses.replace(
                reward, options={"device": device, **reward.options, "model": str(checkpoint.path)}
            )
        located.append(reward)
    return located, hashes
