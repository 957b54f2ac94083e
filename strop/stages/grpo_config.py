"""The settings of GRPO and its relatives; docs/grpo.md says which make which algorithm."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from strop.models import Checkpointing, LoraConfig
from strop.objectives.aggregate import Aggregation
from strop.optim import OptimizerConfig
from strop.rewards.config import RewardConfig
from strop.rollouts.prompts import Sampling
from strop.stages.begin import at_least, check_optimizer
from strop.stages.held_out import Evaluation


@dataclass(frozen=True, kw_only=True)
class Config:
    """Group Relative Policy Optimization (Shao et al. 2024) and its relatives."""

    init_from: str
    """Where to start: RUN, RUN/STEP or a Hugging Face folder (`from` in a recipe, --from on the command line)."""
    tasks: str
    """Prompts with what the rewards need: JSONL, Parquet, CSV or hf:NAME; the column `prompt` is text or messages."""
    rewards: tuple[RewardConfig, ...]
    """Where the reward comes from: a weighted sum of functions of (task, completion)."""
    num_steps: int
    """Rollouts; each is followed by its updates."""
    prompts_per_step: int = 8
    """Prompts per rollout (P)."""
    group_size: int = 8
    """Completions per prompt (G)."""
    sampling: Sampling = field(default_factory=Sampling)
    """How the policy acts."""

    advantage: Literal["group", "leave_one_out", "batch"] = "group"
    """What a reward is compared with: its group's mean, the others of its group (RLOO), or the batch (REINFORCE++)."""
    advantage_scale: Literal["std", "none"] = "std"
    """Whether a group's advantages are divided by its standard deviation (GRPO) or not (Dr. GRPO)."""
    loss: Literal["clip", "sequence_clip", "cispo", "sapo", "reinforce"] = "clip"
    """The surrogate: PPO's clip per token, GSPO's per sequence, CISPO, SAPO, or REINFORCE."""
    clip_low: float = 0.2
    """Lower bound of the ratio is 1 - clip_low."""
    clip_high: float = 0.2
    """Upper bound of the ratio is 1 + clip_high; larger than clip_low is DAPO's clip-higher."""
    dual_clip: float | None = None
    """With loss = "clip": bounds the loss of A < 0 by so many |A|."""
    aggregation: Aggregation = "token_mean"
    """How tokens add up: token_mean (DAPO), seq_mean_token_mean (GRPO), token_sum_norm (Dr. GRPO), or RLOO's."""
    kl_coef: float = 0.0
    """Weight of the KL to the reference, the checkpoint that the run started from. 0 = no reference is loaded."""
    kl_placement: Literal["loss", "reward"] = "loss"
    """In the loss of every token, or subtracted from the completion's reward."""
    kl_estimator: Literal["k1", "k2", "k3", "k3_plus"] = "k3"
    """In the loss: k3 (GRPO), k2 or k3_plus (whose gradients are unbiased). In the reward it must be k1."""
    reference_refresh_steps: int = 0
    """So many steps after which the policy becomes the new reference (R1: 400). 0 = never."""
    entropy_coef: float = 0.0
    """Weight of an entropy bonus per token."""

    epochs_per_rollout: int = 1
    """Times that the updates go over one rollout."""
    minibatch_prompts: int = 0
    """Prompts per update, a divisor of prompts_per_step; 0 = all of the rollout in one."""
    importance_correction: Literal["none", "token_truncate", "sequence_truncate", "token_mask", "sequence_mask"] = (
        "none"
    )
    """Corrects for an engine that samples from a slightly different policy than the trainer's (TIS, IcePop)."""
    importance_cap: float = 2.0
    """Truncation bound of the importance weight; masking keeps [1 / cap, cap]."""
    dynamic_sampling: bool = False
    """Sample new prompts in place of groups whose rewards are all equal (DAPO)."""
    max_sampling_rounds: int = 10
    """Rounds of dynamic sampling per step; then the step goes on with the groups that it has."""
    overlong_buffer: int = 0
    """Tokens before max_new_tokens over which overlong_weight of reward is gradually lost (DAPO). 0 = off."""
    overlong_weight: float = 0.5
    """The reward lost by a completion that reaches max_new_tokens, with an overlong_buffer."""
    mask_truncated: bool = False
    """Leave completions without a stop out of the loss; they still count in their group's statistics."""

    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1e-6))
    """AdamW and its schedule; its steps are rollouts."""
    lora: LoraConfig | None = None
    """Train only a LoRA adapter, its table [lora]; not set = all weights."""
    micro_batch_tokens: int = 2048
    """Tokens per forward and backward pass, each prompt once per group: bounds the memory, not the result."""
    num_slots: int = 64
    """Completions decoded at the same time."""
    reuse_rollout: bool = True
    """Keep what the policy computes while it samples as the first update's forward pass, where both compute the same
    bits and the rollout fits into one micro-batch (docs/speed.md). The result is the same, in less time. Every fiftieth
    step computes it in any case, and compares (engine_gap_exp)."""
    eval: Evaluation = field(default_factory=Evaluation)
    """Held-out evaluation."""
    samples_per_step: int = 8
    """Completions per step written to samples.jsonl."""
    save_every: int = 50
    """Steps between checkpoints; the last step always has one."""
    keep_checkpoints: int = 2
    """Older ones are deleted."""
    gradient_checkpointing: Checkpointing = "some"
    """What backward passes compute again instead of keeping it: some of it, none (faster, more memory), or all layers
    (a third slower, least memory). The result is the same."""
    dtype: Literal["auto", "float32", "bfloat16", "int8"] = "auto"
    """Compute dtype of rollouts and training; auto measures, int8 is faster and noisier (docs/speed.md). The weights
    that learn are float32 in any case."""
    device: str = "cpu"
    """A torch device."""
    seed: int = 0
    """Decides prompts, samples and minibatches."""

    def __post_init__(self) -> None:
        if not self.rewards:
            raise ValueError('rewards is empty: name at least one, for example rewards = [{ name = "math" }]')
        at_least(self, 1, "num_steps", "prompts_per_step", "group_size", "epochs_per_rollout", "max_sampling_rounds")
        at_least(self, 1, "micro_batch_tokens", "num_slots", "save_every", "keep_checkpoints", "importance_cap")
        at_least(self, 0, "clip_low", "clip_high", "kl_coef", "reference_refresh_steps", "minibatch_prompts")
        at_least(self, 0, "overlong_buffer", "samples_per_step", "seed")
        at_least(self.eval, 1, "every", "max_tasks", "num_samples", prefix="eval.")
        at_least(self.sampling, 1, "max_new_tokens", prefix="sampling.")
        check_optimizer(self.optimizer, self.num_steps)
        if not self.sampling.temperature > 0:
            raise ValueError("sampling.temperature must be above 0: greedy samples of one prompt are all the same")
        if self.group_size < 2 and self.advantage != "batch":
            raise ValueError(f'advantage = "{self.advantage}" needs group_size >= 2 (or use advantage = "batch")')
        if self.dual_clip is not None and self.loss != "clip":
            raise ValueError(f'dual_clip only acts on loss = "clip", not on "{self.loss}": remove it')
        if self.dual_clip is not None and not self.dual_clip > 1:
            raise ValueError(f"dual_clip={self.dual_clip} must be above 1: it bounds a ratio from above (usually 3)")
        if self.loss == "reinforce" and self.epochs_per_rollout > 1:
            raise ValueError('loss = "reinforce" has no ratio, so that a second epoch would be off-policy: use "clip"')
        if self.advantage_scale == "none" and self.advantage == "batch":
            raise ValueError('advantage = "batch" always divides by the batch\'s deviation: leave advantage_scale out')
        if self.advantage == "leave_one_out" and self.advantage_scale == "std":
            raise ValueError('advantage = "leave_one_out" is not scaled: set advantage_scale = "none"')
        if self.kl_placement == "reward" and self.kl_estimator != "k1" and self.kl_coef:
            raise ValueError('kl_placement = "reward" needs kl_estimator = "k1", the unbiased one')
        if self.kl_placement == "loss" and self.kl_estimator == "k1" and self.kl_coef:
            raise ValueError('k1 in the loss has no effect on average: use kl_estimator = "k2", "k3" or "k3_plus"')
        if self.reference_refresh_steps and not self.kl_coef:
            raise ValueError("reference_refresh_steps has no effect without kl_coef: set kl_coef, or remove it")
        if self.overlong_buffer > self.sampling.max_new_tokens:
            raise ValueError(
                f"overlong_buffer={self.overlong_buffer} is longer than "
                f"sampling.max_new_tokens={self.sampling.max_new_tokens}: lower it"
            )
        if self.minibatch_prompts and self.prompts_per_step % self.minibatch_prompts:
            raise ValueError(
                f"prompts_per_step={self.prompts_per_step} is not divisible by "
                f"minibatch_prompts={self.minibatch_prompts}: a smaller last update would count as much as the others"
            )
        if self.dynamic_sampling and self.group_size < 2:
            raise ValueError("dynamic_sampling needs group_size >= 2: a group of one always looks flat")

    @property
    def updates_share_a_rollout(self) -> bool:
        """Whether old logprobs differ from the current ones at some update, so that they must be kept."""
        is_split = 0 < self.minibatch_prompts < self.prompts_per_step
        return self.epochs_per_rollout > 1 or is_split

    def describe(self) -> str:
        """Which GRPO this is, in one line."""
        kl = f"{self.kl_coef} {self.kl_estimator} in the {self.kl_placement}" if self.kl_coef else "none"
        updates = f"{self.epochs_per_rollout} epoch(s) of {self.minibatch_prompts or self.prompts_per_step} prompts"
        return (
            f"{self.prompts_per_step} prompts x {self.group_size} samples; advantage {self.advantage}, scale "
            f"{self.advantage_scale}; loss {self.loss} [1-{self.clip_low}, 1+{self.clip_high}]; {self.aggregation}; "
            f"KL {kl}; {updates}; importance correction {self.importance_correction}"
        )
