"""What stages do before their first step: check numbers, settle the dtype, keep the tokenizer, find reward models."""

from __future__ import annotations

import dataclasses
import functools
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import torch

from strop.models import CausalLM, Checkpointing, Decoder, LoraConfig, compute_in, load_model, tokenizer_folder
from strop.models.adapters import adapter_parts, add_adapter, check_same_config, is_adapter
from strop.models.lora import reference_of
from strop.models.precision import fastest, measure_dtypes, name_of, own_precision
from strop.optim import OptimizerConfig
from strop.rewards.config import RewardConfig
from strop.runs import Start, derive_seed, resolve
from strop.runs.files import sync
from strop.tokenizer import Tokenizer

_Train = TypeVar("_Train", bound=Callable[..., Path])


def in_its_dtype(train: _Train) -> _Train:
    """A stage's train(config, ...) that is in int8 from its first line on where config.dtype says so, and leaves none.

    int8 is a setting of the process (native/products.py). Reward models and judges are loaded before the run is there
    and its dtype chosen, and are refused then where they cannot compute in it; what a Python caller does after the run
    is computed as before it.
    """

    @functools.wraps(train)
    def trained(config: Any, **options: Any) -> Path:
        with own_precision(config.dtype, config.device):
            return train(config, **options)

    return cast(_Train, trained)


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
    """The dtype of the run's weights, in a process that computes as the run does: for "auto" what is measured once.

    The compute dtype is printed, and run.json has it as `dtype`, with the measured rates as `dtype_gflops`.
    """
    reason = ""
    if "dtype" not in start.run.info and requested == "auto":
        rates = measure_dtypes(device)
        measured = ", ".join(f"{name} {rate:.0f}" for name, rate in rates.items())
        start.settle("dtype", lambda: fastest(rates))
        start.settle("dtype_gflops", lambda: measured)
        reason = f", by measurement ({measured} GFLOP/s)"
    dtype = compute_in(start.run.info.get("dtype", requested), device)
    start.settle("dtype", lambda: name_of(dtype))
    print(f"compute dtype {name_of(dtype)}{reason}", flush=True)
    return dtype


def load_policy(
    start: Start,
    lora: LoraConfig | None,
    dtype: torch.dtype,
    device: str,
    seed: int,
    *,
    checkpointing: Checkpointing,
) -> CausalLM:
    """The model to train. With lora only an adapter is trainable: the checkpoint's own, or a fresh one on its weights.

    Without lora, a checkpoint that is an adapter is merged into its base, and everything is trained. ValueError where
    [lora] differs from the adapter that the run starts from, or the architecture is one that takes none, or that cannot
    compute everything again (gradient_checkpointing).
    """
    folder = start.model_folder
    model = load_model(folder, dtype=dtype, device=device, adapter="merge" if lora is None else "keep")
    model.set_checkpointing(checkpointing)
    if lora is None:
        return model
    if not isinstance(model, Decoder):
        raise ValueError(f"[lora] is not supported for {folder}, which runs through transformers: train all weights")
    if model.adapter is None:
        add_adapter(model, lora, seed=derive_seed(seed, "lora"), base=folder)
    else:
        check_same_config(model, lora, str(folder))
    return model


def load_reference(
    start: Start, policy: CausalLM, lora: LoraConfig | None, dtype: torch.dtype, device: str
) -> CausalLM:
    """The checkpoint that the run started from. With LoRA it is the policy's own base, without a second copy of it."""
    assert start.parent is not None
    folder = start.parent.path
    if lora is None:
        return load_model(folder, dtype=dtype, device=device, frozen=True)
    assert isinstance(policy, Decoder)
    return reference_of(policy, adapter_parts(policy, folder) if is_adapter(folder) else None)


@torch.no_grad()
def refresh_reference(reference: CausalLM, policy: CausalLM) -> None:
    """The policy of this moment becomes the reference."""
    current = dict(policy.named_parameters())
    for name, old in reference.named_parameters():
        old.copy_(current[name])


def load_tokenizer(start: Start) -> Tokenizer:
    """The tokenizer of the checkpoint that the run starts from; an adapter's may be its base's."""
    return Tokenizer.load(tokenizer_folder(start.model_folder))


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
