"""The settings of the reward model; docs/reward_model.md says what they do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from strop.models import Checkpointing
from strop.optim import OptimizerConfig
from strop.stages.begin import at_least, check_optimizer


@dataclass(frozen=True, kw_only=True)
class Config:
    """A reward model from pairs or rankings (Bradley and Terry 1952; Stiennon et al. 2020; Ouyang et al. 2022)."""

    init_from: str
    """Where to start: RUN, RUN/STEP or a Hugging Face folder, of a language model (it gets a fresh head) or of a
    reward model (`from` in a recipe, --from on the command line)."""
    data: str
    """Preferences: prompt + chosen + rejected, or prompt + completions + ranks (lower is better, equal is a tie)."""
    eval_data: str = ""
    """Held-out preferences, of other prompts."""
    reference_data: str = ""
    """Good answers (prompt + completion, or messages) whose mean score is stored as the zero; empty: all answers of
    eval_data, or of data where there is none."""
    num_steps: int
    """Optimiser steps; more than one epoch usually overfits (`epoch` in the log)."""
    batch_size: int = 64
    """Comparisons per optimiser step: a prompt with all its answers is one."""
    micro_batch_tokens: int = 4096
    """Tokens per forward and backward pass, each prompt once: bounds the activation memory, never the result."""
    max_length: int = 1024
    """Longest prompt and answer in tokens; what happens to longer ones is on_too_long."""
    on_too_long: Literal["error", "drop", "truncate"] = "error"
    """Dropped and truncated rows are counted and reported; truncate cuts answers at their end."""
    loss: Literal["kwise", "pairwise", "plackett_luce"] = "kwise"
    """A prompt's pairs averaged (InstructGPT), each pair counted alike, or the likelihood of the whole ranking."""
    ties: Literal["half", "ignore"] = "half"
    """A tied pair counts as half a win each way, or not at all. Plackett-Luce always has its own form."""
    centring_coef: float = 0.0
    """Weight of (score + score)^2 per pair, which keeps scores near 0 (0.01; Eisenstein et al. 2023)."""
    annotator_weights: Mapping[str, float] = field(default_factory=dict)
    """Factor of the rows whose column `annotator` has this name (others 1), times their column `weight`."""
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1e-5, schedule="cosine"))
    """AdamW and its schedule."""
    eval_every: int = 50
    """Steps between evaluations on eval_data; the first and the last step always have one."""
    max_reference: int = 256
    """Prompts, from the top of the reference data, whose answers decide the stored mean and deviation."""
    save_every: int = 100
    """Steps between checkpoints; the last step always has one."""
    keep_checkpoints: int = 2
    """Older ones are deleted."""
    gradient_checkpointing: Checkpointing = "some"
    """What backward passes compute again instead of keeping it: some of it, none (faster, more memory), or all layers
    (a third slower, least memory). The result is the same."""
    dtype: Literal["auto", "float32", "bfloat16", "int8"] = "auto"
    """Compute dtype; auto measures, int8 is faster and noisier (docs/speed.md). The weights that learn are float32 in
    any case."""
    device: str = "cpu"
    """A torch device."""
    seed: int = 0
    """Decides the head's first weights and the order of the comparisons."""

    def __post_init__(self) -> None:
        at_least(self, 1, "num_steps", "batch_size", "micro_batch_tokens", "eval_every", "save_every")
        at_least(self, 1, "keep_checkpoints", "max_reference")
        at_least(self, 2, "max_length")
        at_least(self, 0, "centring_coef", "seed")
        check_optimizer(self.optimizer, self.num_steps)
        if self.loss == "plackett_luce" and self.ties == "ignore":
            raise ValueError('ties = "ignore" is about pairs: leave it out with loss = "plackett_luce"')
        for name, weight in self.annotator_weights.items():
            if not 0 <= weight < float("inf"):
                raise ValueError(f"annotator_weights: the weight of {name!r} must be 0 or more, not {weight}")
