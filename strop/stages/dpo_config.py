"""The settings of DPO and its relatives; docs/dpo.md says which make which algorithm."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from strop.models import Checkpointing, LoraConfig
from strop.optim import OptimizerConfig
from strop.rewards.config import RewardConfig
from strop.rollouts.prompts import Sampling
from strop.stages.begin import at_least, check_optimizer

REFERENCE_FREE = ("cpo", "orpo", "simpo")
SINGLE = ("kto", "bco")
"""Losses that also read single answers with a label."""
BETAS = {"simpo": 2.0, "sigmoid_norm": 5.0}
"""Published values of dpo_beta for losses of mean logprobs; 0.1 for all others."""


@dataclass(frozen=True, kw_only=True)
class Online:
    """Instead of `data`: the policy answers, the rewards choose."""

    tasks: str = ""
    """Prompts with what the rewards need, as in GRPO; empty = offline, from `data`."""
    group_size: int = 2
    """Answers per prompt."""
    pairs: Literal["best_worst", "all"] = "best_worst"
    """The best answer against the worst, or every answer against every worse one."""
    num_slots: int = 64
    """Completions decoded at the same time."""
    samples_per_step: int = 8
    """Completions per step written to samples.jsonl."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Direct preference optimisation (Rafailov et al. 2023) and its relatives: preferences without a reward model."""

    init_from: str
    """Where to start: RUN, RUN/STEP or a Hugging Face folder (`from` in a recipe, --from on the command line). It is
    also the reference."""
    data: str = ""
    """Preferences: prompt + chosen + rejected, or prompt + completions + ranks; for kto and bco also prompt +
    completion + label. Empty with online.tasks."""
    eval_data: str = ""
    """Held-out preferences in one of these formats."""
    online: Online = field(default_factory=Online)
    """Online DPO: the pairs are made by the policy itself."""
    rewards: tuple[RewardConfig, ...] = ()
    """What chooses online, and judges the answers to eval_tasks."""
    eval_tasks: str = ""
    """Held-out tasks whose answers the first reward judges; empty = none."""
    max_eval_tasks: int = 200
    """Only the first so many."""
    sampling: Sampling = field(default_factory=Sampling)
    """How the policy answers, online and for eval_tasks. Online, logprobs are taken at its temperature."""
    num_steps: int
    """Optimiser steps."""
    batch_size: int = 64
    """Comparisons per optimiser step (online: prompts): a prompt with all its answers is one."""

    loss: Literal[
        "sigmoid", "robust", "ipo", "ipo_sum", "hinge", "sigmoid_norm", "apo_zero", "apo_down", "sppo", "bco", "kto",
        "cpo", "orpo", "simpo",
    ] = "sigmoid"  # fmt: skip
    """docs/dpo.md has the formulas. cpo, orpo and simpo need no reference."""
    dpo_beta: float | None = None
    """Strength of the pull to the reference; unset = 0.1, for simpo 2 and for sigmoid_norm 5."""
    flip_probability: float = 0.0
    """Share of labels taken to be wrong: label smoothing (cDPO) with sigmoid, its unbiased form with robust."""
    simpo_margin: float | None = None
    """SimPO's gamma, not multiplied by beta; unset = 0.5."""
    sft_coef: float = 0.0
    """Weight of the chosen answer's mean negative logprob per token (RPO, IRPO; CPO has 1): holds its likelihood up."""
    desirable_weight: float = 1.0
    """KTO's factor of wanted answers."""
    undesirable_weight: float = 1.0
    """KTO's factor of unwanted ones."""
    reference_refresh_steps: int = 0
    """So many steps after which the policy becomes the new reference. 0 = never."""

    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=5e-7, warmup_steps=0))
    """AdamW and its schedule."""
    lora: LoraConfig | None = None
    """Train only a LoRA adapter, its table [lora]; not set = all weights."""
    micro_batch_tokens: int = 2048
    """Tokens per forward and backward pass, each prompt once: bounds the activation memory, never the result."""
    max_length: int = 1024
    """Longest prompt and answer in tokens; what happens to longer ones is on_too_long."""
    on_too_long: Literal["error", "drop", "truncate"] = "error"
    """Dropped and truncated rows are counted and reported; truncate cuts answers at their end."""
    eval_every: int = 50
    """Steps between evaluations; before the first and after the last there always is one."""
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
    """Decides the order of the comparisons, and online the prompts and samples."""

    def __post_init__(self) -> None:
        at_least(self, 1, "num_steps", "batch_size", "micro_batch_tokens", "eval_every", "save_every")
        at_least(self, 1, "keep_checkpoints", "max_eval_tasks")
        at_least(self, 2, "max_length")
        at_least(self, 0, "seed", "reference_refresh_steps", "sft_coef", "desirable_weight", "undesirable_weight")
        at_least(self.online, 2, "group_size", prefix="online.")
        at_least(self.online, 1, "num_slots", prefix="online.")
        at_least(self.online, 0, "samples_per_step", prefix="online.")
        at_least(self.sampling, 1, "max_new_tokens", prefix="sampling.")
        check_optimizer(self.optimizer, self.num_steps)
        if bool(self.data) == self.is_online:
            raise ValueError("give either data (offline) or online.tasks (the policy answers, rewards choose)")
        if (self.is_online or self.eval_tasks) and not self.rewards:
            raise ValueError("online.tasks and eval_tasks need rewards that judge the answers")
        if self.rewards and not (self.is_online or self.eval_tasks):
            raise ValueError("rewards judge online.tasks or eval_tasks, of which there are none: remove them")
        if self.is_online and not self.sampling.temperature > 0:
            raise ValueError("sampling.temperature must be above 0: greedy answers to one prompt are all the same")
        if self.dpo_beta is not None and not 0 < self.dpo_beta < float("inf"):
            raise ValueError(f"dpo_beta={self.dpo_beta} must be above 0")
        if not 0 <= self.flip_probability < 0.5:
            raise ValueError(f"flip_probability={self.flip_probability} must lie in [0, 0.5)")
        self._check_options()

    def _check_options(self) -> None:
        """An option that the chosen loss does not have is refused, not ignored."""
        if self.flip_probability and self.loss not in ("sigmoid", "robust"):
            raise ValueError(f'flip_probability is for the losses "sigmoid" and "robust", not "{self.loss}": remove it')
        if self.loss == "robust" and not self.flip_probability:
            raise ValueError('loss = "robust" needs flip_probability above 0: at 0 it is "sigmoid"')
        if self.simpo_margin is not None and self.loss != "simpo":
            raise ValueError(f'simpo_margin is for the loss "simpo", not "{self.loss}": remove it')
        if self.loss != "kto" and (self.desirable_weight, self.undesirable_weight) != (1.0, 1.0):
            raise ValueError(
                f'desirable_weight and undesirable_weight are for the loss "kto", not "{self.loss}": remove them'
            )
        if self.sft_coef and self.loss == "orpo":
            raise ValueError('loss = "orpo" has an SFT term already: leave sft_coef out')
        if self.sft_coef and self.loss in SINGLE:
            raise ValueError(f'sft_coef needs pairs, and loss = "{self.loss}" reads single answers: leave it out')
        if self.reference_refresh_steps and not self.needs_reference:
            raise ValueError(f'loss = "{self.loss}" has no reference: leave reference_refresh_steps out')

    @property
    def is_online(self) -> bool:
        return bool(self.online.tasks)

    @property
    def needs_reference(self) -> bool:
        return self.loss not in REFERENCE_FREE

    @property
    def keeps_reference(self) -> bool:
        """Whether the reference model stays in memory, since nobody knows beforehand what it will be asked."""
        return self.needs_reference and (self.is_online or self.reference_refresh_steps > 0)

    @property
    def beta(self) -> float:
        return BETAS.get(self.loss, 0.1) if self.dpo_beta is None else self.dpo_beta

    @property
    def margin(self) -> float:
        return 0.5 if self.simpo_margin is None else self.simpo_margin

    @property
    def temperature(self) -> float:
        """Of every logprob in the loss."""
        return self.sampling.temperature if self.is_online else 1.0
