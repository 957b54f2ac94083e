"""Architectures that Decoder does not cover, through transformers behind the same interface. Slower, but right."""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from strop.models.attention import bucket_by_length
from strop.models.checkpointing import Checkpointing
from strop.models.folders import MAX_SHARD_BYTES, TensorFolder, read_json, some, write_json
from strop.models.interface import Cache
from strop.models.loading import replace_weights, widest
from strop.models.recording import Recording
from strop.types import PackedBatch


class SlotCaches:
    """One transformers cache per slot, so that slots of any length live side by side."""

    def __init__(self, *, num_slots: int, max_length: int, device: torch.device) -> None:
        self.slots: list[DynamicCache | None] = [None] * num_slots
        self.max_length = max_length
        self.lengths_S = torch.zeros(num_slots, dtype=torch.int64, device=device)

    @property
    def num_slots(self) -> int:
        return len(self.slots)

    def fit(self, length: int) -> None:
        if length > self.max_length:
            raise ValueError(f"the cache holds {self.max_length} tokens per slot; a sequence wants {length}")

    def move(self, source: int, target: int) -> None:
        if source != target:
            self.slots[target] = copy.deepcopy(self.slots[source])
            self.lengths_S[target] = self.lengths_S[source]


@dataclass(frozen=True, slots=True, kw_only=True)
class FallbackLimits:
    vocab_size: int
    max_position_embeddings: int
    """sys.maxsize where the architecture has no limit of its own."""


class FallbackModel(nn.Module):
    """Any causal language model of transformers as a CausalLM.

    Packed rows are padded to the right for it, branches with their trunk repeated, and a decode step runs slot by slot.
    Dropout stays off even in training: the policy that samples and the one that learns must be the same function.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model.eval()
        if model.base_model is model or not isinstance(model.get_output_embeddings(), nn.Linear):
            raise ValueError(
                f"{type(model).__name__} has no linear head on a base model, which training here relies on"
            )
        self._check_head()

    @property
    def config(self) -> FallbackLimits:
        text = self.model.config.get_text_config()
        positions = getattr(text, "max_position_embeddings", None)
        return FallbackLimits(vocab_size=text.vocab_size, max_position_embeddings=positions or sys.maxsize)

    @property
    def dtype(self) -> torch.dtype:
        return self.lm_head_weight.dtype

    @property
    def device(self) -> torch.device:
        return self.lm_head_weight.device

    @property
    def lm_head_weight(self) -> Tensor:
        """(V, D)."""
        return self._head.weight

    @property
    def head_bias(self) -> Tensor | None:
        """(V,) or None."""
        return self._head.bias

    @property
    def logit_softcap(self) -> float | None:
        return getattr(self.model.config.get_text_config(), "final_logit_softcapping", None)

    def train(self, mode: bool = True) -> FallbackModel:
        return super().train(False)

    def hidden_and_head(self, batch: PackedBatch, recording: Recording | None = None) -> tuple[Tensor, Tensor]:
        assert recording is None  # new_recording makes none
        return self.hidden(batch), self.lm_head_weight

    def set_checkpointing(self, what: Checkpointing) -> None:
        """Nothing is ever computed again here, so that "some" is "none"."""
        if what == "all":
            raise ValueError(
                f'gradient_checkpointing = "all" is not supported for {type(self.model).__name__}, which runs through '
                "transformers: leave it out, and lower micro_batch_tokens instead"
            )

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V)."""
        logits = F.linear(hidden, self.lm_head_weight, self.head_bias)
        cap = self.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def hidden(self, batch: PackedBatch) -> Tensor:
        """Hidden states after the final norm, (T, D)."""
        rows: list[tuple[list[int], int]] = []  # packed positions of one row, and how many of the last are its own
        start = 0
        for segment in batch.segments:
            trunk = list(range(start, start + segment.trunk))
            if trunk and not segment.branches:
                rows.append((trunk, len(trunk)))
            position = start + segment.trunk
            for number, length in enumerate(segment.branches):
                row = trunk + list(range(position, position + length))
                if row:
                    rows.append((row, length if number else len(row)))
                position += length
            start = position
        outputs, owners = [], []
        for bucket in bucket_by_length(rows, lambda row: len(row[0])):
            width = len(bucket[-1][0])
            index_BT = torch.tensor([row + [row[-1]] * (width - len(row)) for row, _ in bucket])
            is_real_BT = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row, _ in bucket])
            hidden_BTD = self._base(
                input_ids=batch.token_ids_T[index_BT.to(self.device)],
                attention_mask=is_real_BT.to(self.device),
                use_cache=False,
            )
            for row, (positions, own) in zip(hidden_BTD, bucket, strict=True):
                outputs.append(row[len(positions) - own : len(positions)])
                owners.extend(positions[len(positions) - own :])
        order = torch.tensor(owners, device=self.device).argsort()
        return torch.cat(outputs)[order]

    def new_cache(self, *, num_slots: int, max_length: int) -> SlotCaches:
        return SlotCaches(num_slots=num_slots, max_length=max_length, device=self.device)

    @torch.no_grad()
    def prefill(
        self,
        prompts: Sequence[Sequence[int]],
        cache: Cache,
        slots: Sequence[int],
        starts: Sequence[int] | None = None,
    ) -> Tensor:
        """As Decoder.prefill."""
        assert isinstance(cache, SlotCaches)
        outputs = []
        for prompt, slot, start in zip(prompts, slots, starts or [0] * len(prompts), strict=True):
            cache.fit(start + len(prompt))
            if not start:
                cache.slots[slot] = DynamicCache(config=self.model.config)
            outputs.append(self._append(prompt, cache.slots[slot]))
            cache.lengths_S[slot] = start + len(prompt)
        return torch.stack(outputs)

    def decoding(self, num_rows: int) -> AbstractContextManager[None]:
        return nullcontext()

    def release(self) -> None:
        """Nothing was kept."""

    @torch.no_grad()
    def decode_step(self, token_ids_S: Tensor, cache: Cache) -> Tensor:
        """As Decoder.decode_step."""
        assert isinstance(cache, SlotCaches)
        num_active = token_ids_S.shape[0]
        cache.fit(int(cache.lengths_S[:num_active].max()) + 1)
        outputs = [self._append([token], cache.slots[slot]) for slot, token in enumerate(token_ids_S.tolist())]
        cache.lengths_S[:num_active] += 1
        return torch.stack(outputs)

    @property
    def _head(self) -> nn.Linear:
        return cast(nn.Linear, self.model.get_output_embeddings())

    def _append(self, tokens: Sequence[int], past: DynamicCache | None) -> Tensor:
        input_ids = torch.tensor([list(tokens)], device=self.device)
        return self._base(input_ids=input_ids, past_key_values=past, use_cache=True)[0, -1]

    def _base(self, **inputs: Any) -> Tensor:
        return self.model.base_model(**inputs).last_hidden_state

    @torch.no_grad()
    def _check_head(self) -> None:
        """Refuse models that do more between the last hidden state and the logits than head, bias and softcap."""
        input_ids = torch.arange(4, device=self.device)[None]
        theirs = self.model(input_ids=input_ids, use_cache=False).logits.float()
        ours = self.logits(self._base(input_ids=input_ids, use_cache=False)).float()
        tolerance = 1e-2 * float(theirs.abs().max())
        if theirs.shape != ours.shape or not torch.allclose(theirs, ours, rtol=0, atol=tolerance):
            raise ValueError(
                f"{type(self.model).__name__} computes its logits in a way that is not covered here: they differ from "
                "head(last hidden state) with bias and softcap"
            )


def load_fallback(
    folder: Path, raw: Mapping[str, Any], *, dtype: torch.dtype | None, device: torch.device | str
) -> FallbackModel:
    """Through AutoModelForCausalLM, from safetensors only and without code from the folder."""
    if raw.get("quantization_config"):
        raise ValueError(f"{folder}: quantization_config is not supported: save the model dequantised first")
    TensorFolder(folder)  # refuses pickles and incomplete folders by name
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype="auto" if dtype is None else dtype,
        local_files_only=True,
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
    )
    model, info = loaded
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[problem]:
            names = some(sorted(str(key) for key in info[problem]))
            raise ValueError(f"{folder}: weights and config.json do not belong together: {problem} {names}")
    return FallbackModel(model.to(device))


def save_fallback(
    model: FallbackModel,
    folder: Path,
    *,
    weights: Mapping[str, Tensor] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """As save_model: `weights` go by the names of model.named_parameters()."""
    values = replace_weights(model, weights)
    dtype = widest(value.dtype for value in values.values() if value.is_floating_point())
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    state = {}
    for name, tensor in model.model.state_dict(keep_vars=True).items():  # tied ones under each of their names
        value = values[names[id(tensor)]] if id(tensor) in names else tensor.detach()
        state[name] = value.to(dtype) if value.is_floating_point() else value
    model.model.save_pretrained(folder, state_dict=state, max_shard_size=max_shard_bytes)
    config = read_json(folder / "config.json")
    write_json(folder / "config.json", {**config, "dtype": str(dtype).removeprefix("torch.")})
