"""What every causal language model here can do, whoever built it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, Self, runtime_checkable

import torch
from torch import Tensor, nn

from strop.models.checkpointing import Checkpointing
from strop.models.recording import Recording
from strop.types import PackedBatch


class Cache(Protocol):
    """Per-slot keys and values; slots [0, n) are running."""

    lengths_S: Tensor

    @property
    def num_slots(self) -> int: ...

    @property
    def max_length(self) -> int: ...

    def move(self, source: int, target: int) -> None: ...


class Limits(Protocol):
    """The part of a model's config that does not depend on the architecture."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def max_position_embeddings(self) -> int: ...


@runtime_checkable
class CausalLM(Protocol):
    """A module: our Decoder, or another architecture through transformers (FallbackModel)."""

    @property
    def config(self) -> Limits: ...

    @property
    def head_bias(self) -> Tensor | None:
        """(V,) added to the logits."""
        ...

    @property
    def logit_softcap(self) -> float | None:
        """Logits become cap * tanh(logits / cap) (Gemma 2)."""
        ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def lm_head_weight(self) -> Tensor: ...

    def hidden(self, batch: PackedBatch) -> Tensor: ...

    def hidden_and_head(self, batch: PackedBatch, recording: Recording | None = None) -> tuple[Tensor, Tensor]:
        """(hidden, lm_head_weight) for one loss on both. recording: only one that new_recording made for this model."""
        ...

    def set_checkpointing(self, what: Checkpointing) -> None:
        """How much the backward passes from now on compute again. ValueError where the model cannot."""
        ...

    def logits(self, hidden: Tensor) -> Tensor: ...

    def new_cache(self, *, num_slots: int, max_length: int) -> Cache: ...

    def prefill(
        self,
        prompts: Sequence[Sequence[int]],
        cache: Cache,
        slots: Sequence[int],
        starts: Sequence[int] | None = None,
    ) -> Tensor:
        """starts: how much of each prompt its slot holds already; the last positions' hidden states, (P, D)."""
        ...

    def decoding(self, num_rows: int) -> AbstractContextManager[None]:
        """Entered around many decode_steps between which the weights do not change."""
        ...

    def release(self) -> None:
        """Give back what decoding() has kept for the next time."""
        ...

    def decode_step(self, token_ids_S: Tensor, cache: Cache) -> Tensor: ...

    # What callers use of torch.nn.Module.

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]: ...

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def requires_grad_(self, requires_grad: bool = True) -> Self: ...

    def eval(self) -> Self: ...
