"""Scalar heads: a value for every position (PPO's critic), or a score for a whole text (reward models)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from strop.models.config import ModelConfig
from strop.models.decoder import Decoder, uninitialised
from strop.models.folders import MAX_SHARD_BYTES, check_folder, read_json
from strop.models.huggingface import config_from_dict
from strop.models.loading import read_module, write_module
from strop.models.native import check_int8
from strop.models.reward_scale import RewardScale
from strop.types import PackedBatch, Segment, Tree


class ScalarModel(nn.Module):
    """A decoder whose head gives one number per position instead of logits.

    On disk it is a Hugging Face sequence classifier with one label, whose score transformers reads at the last token
    that is not padding.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = Decoder(config)
        self.backbone.head = None
        self.score = nn.Linear(config.hidden_size, 1, bias=False)
        self.source_config: dict[str, Any] | None = None
        self.source_generation_config: dict[str, Any] | None = None

    @property
    def dtype(self) -> torch.dtype:
        return self.backbone.dtype

    @property
    def device(self) -> torch.device:
        return self.backbone.device

    def scores_R(self, batch: PackedBatch) -> Tensor:
        """Shape (R,), float32 at least: the score of the text up to and including each True position of loss_mask_T.

        The product is taken in float32: rounded to bfloat16, scores near 4 would come in steps of 1/32.
        """
        hidden_RD = self.backbone.hidden(batch)[batch.loss_mask_T]
        wide = torch.promote_types(hidden_RD.dtype, torch.float32)
        return hidden_RD.to(wide) @ self.score.weight[0].to(wide)


def pack_scored(trees: Iterable[Tree]) -> PackedBatch:
    """Prompts with their completions, each prompt once, for a score of each whole text.

    loss_mask_T is True at every completion's last token and nowhere else: there a reward model reads its score, so that
    the last token must be among the inputs, unlike in data.pack_completions. labels_T means nothing here.
    """
    token_ids: list[int] = []
    loss_mask: list[bool] = []
    segments: list[Segment] = []
    for prompt, completions, _ in trees:
        assert all(len(completion) for completion in completions), "a completion is empty"
        token_ids.extend(prompt)
        loss_mask.extend([False] * len(prompt))
        for completion in completions:
            token_ids.extend(completion)
            loss_mask.extend([False] * (len(completion) - 1) + [True])
        segments.append(Segment(trunk=len(prompt), branches=tuple(map(len, completions))))
    token_ids_T = torch.tensor(token_ids, dtype=torch.int64)
    return PackedBatch(
        token_ids_T=token_ids_T,
        labels_T=token_ids_T,
        loss_mask_T=torch.tensor(loss_mask, dtype=torch.bool),
        segments=tuple(segments),
    )


def add_scalar_head(model: Decoder, *, seed: int) -> ScalarModel:
    """A copy of the decoder with a fresh head from N(0, 1 / sqrt(D + 1)) (Stiennon et al. 2020, appendix B.1)."""
    scalar = uninitialised(ScalarModel, model.config, dtype=model.dtype, device=model.device)
    scalar.source_config, scalar.source_generation_config = model.source_config, model.source_generation_config
    backbone = {name: value for name, value in model.state_dict().items() if not name.startswith("head.")}
    scalar.backbone.load_state_dict(backbone)
    generator = torch.Generator().manual_seed(seed)
    width = model.config.hidden_size
    with torch.no_grad():
        scalar.score.weight.copy_(torch.randn(1, width, generator=generator) / math.sqrt(width + 1))
    return scalar


def is_scalar_folder(folder: str | Path) -> bool:
    """Whether a model folder holds a sequence classifier, and not a language model or a LoRA adapter of one."""
    config = Path(folder) / "config.json"
    architectures = (read_json(config).get("architectures") or []) if config.is_file() else []
    return any(str(name).endswith("ForSequenceClassification") for name in architectures)


def load_scalar_model(
    folder: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu", frozen: bool = False
) -> ScalarModel:
    """The value or reward model in a sequence-classification folder; arguments and errors as load_model."""
    folder = Path(folder)
    check_folder(folder)
    config = config_from_dict(read_json(folder / "config.json"), str(folder / "config.json"))
    model = read_module(ScalarModel, config, folder, dtype=dtype, device=device)
    check_int8(model.backbone, folder, has_head=False)
    if frozen:
        model.requires_grad_(False).eval()
    return model


def save_scalar_model(
    model: ScalarModel,
    folder: str | Path,
    *,
    reward_scale: RewardScale | None = None,
    weights: Mapping[str, Tensor] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write the folder that load_scalar_model and AutoModelForSequenceClassification open; `weights` as save_model.

    reward_scale goes into config.json; without it, that of the folder that the model was loaded from stays. The head is
    left as it is.
    """
    scale = {} if reward_scale is None else reward_scale.fields()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_module(
        model,
        model.config,
        folder,
        task="SequenceClassification",
        extra_config={
            "id2label": {"0": "LABEL_0"},
            "label2id": {"LABEL_0": 0},
            **scale,
        },
        weights=weights,
        max_shard_bytes=max_shard_bytes,
    )
