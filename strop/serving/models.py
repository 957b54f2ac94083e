"""One checkpoint as it is served: a name, weights that nothing can write to, and what identifies them."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from strop.generation import Engine
from strop.models import CausalLM, load_model, tokenizer_folder, weight_hash
from strop.models.protect import protect
from strop.runs.checkpoints import Checkpoint
from strop.serving.limits import Limits
from strop.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """Example: serve_model("sft", resolve("sft", "runs"), dtype=torch.bfloat16, device="cpu", limits=Limits())"""

    name: str
    model: CausalLM
    tokenizer: Tokenizer
    engine: Engine
    weights_sha256: str
    """weight_hash of the parameters in memory, taken when they were loaded."""
    content_hash: str
    """Of the checkpoint's files."""
    is_protected: bool
    """Whether the system refuses writes to the weights."""
    created: int

    def check_unchanged(self) -> str:
        """The hash of the weights now. AssertionError if it is not the one of the beginning."""
        assert isinstance(self.model, nn.Module)
        now = weight_hash(self.model)
        assert now == self.weights_sha256, f"{self.name}: the weights have changed: {self.weights_sha256} -> {now}"
        return now


def serve_model(
    name: str,
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype,
    device: str,
    limits: Limits,
    base: Path | None = None,
) -> ServedModel:
    """The checkpoint, loaded, frozen and write-protected. An adapter is merged into a copy of its base.

    The files are read once: what happens to them afterwards changes nothing that is served.
    """
    model = load_model(checkpoint.path, dtype=dtype, device=device, frozen=True, base=base)
    assert isinstance(model, nn.Module)
    before = weight_hash(model)
    is_protected = protect(model)
    assert weight_hash(model) == before
    tokenizer = Tokenizer.load(tokenizer_folder(checkpoint.path))
    tokenizer.check_fits(model.lm_head_weight.shape[0])
    max_length = min(limits.max_length, model.config.max_position_embeddings)
    return ServedModel(
        name=name,
        model=model,
        tokenizer=tokenizer,
        engine=Engine(model, tokenizer, num_slots=limits.num_slots, max_length=max_length),
        weights_sha256=before,
        content_hash=checkpoint.content_hash,
        is_protected=is_protected,
        created=int(time.time()),
    )
