"""The settings of test-time RL; docs/ttrl.md says what they are good for and when to leave it alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from strop.models import Checkpointing, LoraConfig
from strop.objectives.aggregate import Aggregation
from strop.optim import OptimizerConfig
from strop.rewards.answers import check_answer_pattern
from strop.rewards.config import RewardConfig
from strop.rollouts.prompts import Sampling
from strop.stages import grpo_config
from strop.stages.begin import at_least, check_optimizer

MIN_HELD_OUT = 8
"""Held-out prompts below which one of them alone could stop a run."""


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Prompts that are never trained on: by how the policy answers them the run is watched, and stopped."""

    tasks: str = ""
    """A source as `tasks`; empty = num_prompts of `tasks`, drawn by the seed, are set aside."""
    num_prompts: int = 64
    """Prompts that are set aside, or the first so many of held_out.tasks; at least 8."""
    num_samples: int = 16
    """Answers per prompt and measurement."""
    every: int = 10
    """Steps between measurements."""
    max_drop: float = 0.1
    """Alarm when the agreement with the base's majority answers is so far below the best that the run has had."""
    min_answers: float = 0.6
    """Alarm when the number of different majority answers is below this share of the base's."""
    patience: int = 2
    """Alarms in a row that stop the run; its result is then the checkpoint that agreed best."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Test-time reinforcement learning (Zuo et al. 2025): GRPO on unlabelled prompts, a majority vote as the reward."""

    init_from: str
    """The base: RUN, RUN/STEP or a Hugging Face folder (`from` in a recipe, --from on the command line)."""
    tasks: str
    """Prompts without answers: JSONL, Parquet, CSV or hf:NAME; the column `prompt` is text or messages."""
    num_steps: int
    """Rollouts; each is followed by its updates."""
    reward: Literal["majority", "weighted", "entropy", "self_certainty"] = "majority"
    """Agreement with the majority answer, or with the one voted by probability; or being sure (RENT, INTUITOR)."""
    answer_pattern: str = "auto"
    """How an answer is cut out, as in the math reward: auto, boxed, last_number, after:MARKER or whole."""
    answer_column: str = "answer"
    """Right answers, for the report alone, in the rows that have them; empty = none. The reward never sees them."""
    num_votes: int = 32
    """Completions per prompt that vote (N)."""
    group_size: int = 16
    """Of these so many are trained on (G)."""
    prompts_per_step: int = 8
    """Prompts per rollout (P)."""
    sampling: Sampling = field(default_factory=Sampling)
    """How the policy acts, in votes and on held-out prompts."""
    held_out: HeldOut = field(default_factory=HeldOut)
    """What the run is watched by."""

    advantage_scale: Literal["std", "none"] = "std"
    """Whether a group's advantages are divided by its standard deviation (GRPO) or not (Dr. GRPO)."""
    aggregation: Aggregation = "token_mean"
    """How tokens add up: token_mean (DAPO), seq_mean_token_mean (GRPO), token_sum_norm (Dr. GRPO), or RLOO's."""
    kl_coef: float = 0.001
    """Weight of the KL (k3, in the loss) to the base."""
    epochs_per_rollout: int = 1
    """Times that the updates go over one rollout."""
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1e-4))
    """AdamW and its schedule; its steps are rollouts."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """The adapter that learns; the base is write-protected."""
    all_weights: bool = False
    """Train all weights instead of an adapter: the result is a model of its own, and `lora` must not be set."""
    micro_batch_tokens: int = 2048
    """Tokens per forward and backward pass: bounds the memory, not the result."""
    num_slots: int = 64
    """Completions decoded at the same time."""
    samples_per_step: int = 8
    """Completions per step written to samples.jsonl."""
    save_every: int = 50
    """Steps between checkpoints, beside those that agreed best so far and the last."""
    keep_checkpoints: int = 2
    """Older ones are deleted, but never the one that agreed best."""
    gradient_checkpointing: Checkpointing = "some"
    """What backward passes compute again instead of keeping it: some of it, none (faster, more memory), or all layers
    (a third slower, least memory). The result is the same."""
    dtype: Literal["auto", "float32", "bfloat16", "int8"] = "auto"
    """Compute dtype of rollouts and training; auto measures, int8 is faster and noisier (docs/speed.md). The weights
    that learn are float32 in any case."""
    device: str = "cpu"
    """A torch device."""
    seed: int = 0
    """Decides prompts, samples and what is set aside."""

    def __post_init__(self) -> None:
        at_least(self, 1, "num_steps", "prompts_per_step", "epochs_per_rollout")
        at_least(self, 1, "micro_batch_tokens", "num_slots", "save_every", "keep_checkpoints")
        at_least(self, 2, "num_votes", "group_size")
        at_least(self, 0, "kl_coef", "samples_per_step", "seed")
        at_least(self.held_out, 1, "num_samples", "every", "patience", prefix="held_out.")
        at_least(self.held_out, MIN_HELD_OUT, "num_prompts", prefix="held_out.")
        at_least(self.held_out, 0, "max_drop", "min_answers", prefix="held_out.")
        at_least(self.sampling, 1, "max_new_tokens", prefix="sampling.")
        check_optimizer(self.optimizer, self.num_steps)
        check_answer_pattern(self.answer_pattern)
        if not self.sampling.temperature > 0:
            raise ValueError("sampling.temperature must be above 0: greedy samples of one prompt are all the same")
        if self.group_size > self.num_votes:
            raise ValueError(
                f"group_size={self.group_size} is larger than num_votes={self.num_votes}: only completions that voted "
                "can be trained on; raise num_votes or lower group_size"
            )
        if not self.votes and self.num_votes != self.group_size:
            raise ValueError(
                f'reward = "{self.reward}" takes no vote, so that num_votes={self.num_votes} would be sampled in vain '
                f"beyond group_size={self.group_size}: set num_votes = {self.group_size}"
            )
        if self.all_weights and self.lora != LoraConfig():
            raise ValueError("lora has no effect with all_weights = true: remove one of them")

    @property
    def votes(self) -> bool:
        """Whether the reward is a vote, and not the policy's own confidence."""
        return self.reward in ("majority", "weighted")

    @property
    def adapter(self) -> LoraConfig | None:
        return None if self.all_weights else self.lora

    def as_grpo(self) -> grpo_config.Config:
        """The GRPO that learns from the reward: TTRL changes where the reward comes from, and nothing behind it."""
        return grpo_config.Config(
            init_from=self.init_from,
            tasks=self.tasks,
            rewards=(RewardConfig(name="vote", options={"answer_pattern": self.answer_pattern}),),
            num_steps=self.num_steps,
            prompts_per_step=self.prompts_per_step,
            group_size=self.group_size,
            sampling=self.sampling,
            advantage_scale=self.advantage_scale,
            aggregation=self.aggregation,
            kl_coef=self.kl_coef,
            epochs_per_rollout=self.epochs_per_rollout,
            optimizer=self.optimizer,
            lora=self.adapter,
            micro_batch_tokens=self.micro_batch_tokens,
            num_slots=self.num_slots,
            gradient_checkpointing=self.gradient_checkpointing,
            dtype=self.dtype,
            device=self.device,
            seed=self.seed,
        )

    def describe(self) -> str:
        """Which test-time RL this is, in one line."""
        trained = "all weights" if self.all_weights else f"an adapter of rank {self.lora.rank}"
        source = f"{self.reward} of {self.num_votes}, {self.group_size} trained on" if self.votes else self.reward
        return (
            f"{self.prompts_per_step} prompts; reward {source}; scale {self.advantage_scale}; {self.aggregation}; "
            f"KL {self.kl_coef} k3 in the loss; {trained}; held-out prompts every {self.held_out.every} steps"
        )
