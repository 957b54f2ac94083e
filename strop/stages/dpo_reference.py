"""The reference's logprobs: computed once and kept in the run, or by a model that stays in memory."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from strop.data import Comparison, ComparisonBatches, TaskBatches
from strop.models import CausalLM
from strop.runs import Start
from strop.runs.files import sync
from strop.stages.begin import load_reference, refresh_reference
from strop.stages.dpo_config import Config
from strop.stages.dpo_loss import frozen_sums

CACHE = "reference_logprobs.safetensors"

Sums = dict[str, np.ndarray]
"""A comparison's place ("file:line") -> summed reference logprob of each of its answers."""


class LiveReference:
    """A frozen model, for comparisons that are made on the way (online) or a reference that moves."""

    def __init__(self, model: CausalLM, config: Config) -> None:
        self.model = model
        self._config = config

    def sums(self, comparisons: Sequence[Comparison], kind: str) -> list[np.ndarray]:
        return frozen_sums(
            self.model,
            comparisons,
            temperature=self._config.temperature,
            max_tokens=self._config.micro_batch_tokens,
        )

    def refresh(self, policy: CausalLM) -> None:
        refresh_reference(self.model, policy)


class CachedReference:
    """The sums of a fixed set of comparisons, from runs/NAME/reference_logprobs.safetensors. No model is needed."""

    def __init__(self, kinds: Mapping[str, Sums]) -> None:
        self._kinds = kinds

    def sums(self, comparisons: Sequence[Comparison], kind: str) -> list[np.ndarray]:
        own = self._kinds[kind]
        return [own[comparison.where] for comparison in comparisons]


Reference = LiveReference | CachedReference


def covers(run_folder: Path, num_steps: int) -> bool:
    """Whether the run has cached all that its first num_steps steps need."""
    path = run_folder / CACHE
    if not path.is_file():
        return False
    with safe_open(path, framework="pt") as file:
        return int(file.metadata()["num_steps"]) >= num_steps


def read_cache(run_folder: Path) -> CachedReference:
    kinds: dict[str, Sums] = {}
    with safe_open(run_folder / CACHE, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118, it is no mapping
            kind, _, where = name.partition("|")
            kinds.setdefault(kind, {})[where] = file.get_tensor(name).numpy()
    return CachedReference(kinds)


def fill_cache(
    run_folder: Path,
    reference: CausalLM,
    kinds: Mapping[str, Sequence[Comparison]],
    config: Config,
    *,
    num_steps: int,
) -> CachedReference:
    """Compute the sums of every kind of comparison and keep them: the file is there whole or not at all.

    num_steps: how far a run gets with these comparisons.
    """
    started = time.perf_counter()
    tensors: dict[str, torch.Tensor] = {}
    count = 0
    for kind, comparisons in kinds.items():
        sums = frozen_sums(reference, comparisons, temperature=config.temperature, max_tokens=config.micro_batch_tokens)
        tensors |= {
            f"{kind}|{comparison.where}": torch.from_numpy(own.copy())
            for comparison, own in zip(comparisons, sums, strict=True)
        }
        count += sum(len(own) for own in sums)
    partial = run_folder / f"{CACHE}.partial"
    save_file(tensors, partial, metadata={"num_steps": str(num_steps)})
    sync(partial)
    partial.replace(run_folder / CACHE)
    sync(run_folder)
    print(f"reference logprobs of {count} answers: {time.perf_counter() - started:.0f} s, once", flush=True)
    return read_cache(run_folder)


def make_reference(
    config: Config,
    start: Start,
    policy: CausalLM,
    batches: ComparisonBatches | TaskBatches,
    lenders: Mapping[str, Comparison],
    held_out: Sequence[Comparison],
) -> Reference | None:
    """None for a loss without one, the cached logprobs where they can be known beforehand, else the model itself.

    Before the first update the policy is the reference, so that a new run computes its cache without a second model.
    """
    if not config.needs_reference:
        return None
    if not config.keeps_reference and covers(start.run.path, config.num_steps):
        return read_cache(start.run.path)
    if config.keeps_reference or start.resumed is not None:
        model = load_reference(start, policy, config.lora, policy.dtype, config.device)
    else:
        model = policy
    if config.keeps_reference:
        return LiveReference(model, config)
    assert isinstance(batches, ComparisonBatches)
    seen: dict[str, Comparison] = {}
    for _, batch in zip(range(config.num_steps), batches.epoch_batches(), strict=False):
        seen |= {comparison.where: comparison for comparison in batch}
    needed = sorted(seen.values(), key=lambda comparison: comparison.where)
    kinds = {"train": needed, "eval": held_out}
    if lenders:
        kinds["mismatched"] = [lenders[comparison.where] for comparison in needed]
    is_whole = config.num_steps >= batches.num_batches_per_epoch
    return fill_cache(start.run.path, model, kinds, config, num_steps=sys.maxsize if is_whole else config.num_steps)
