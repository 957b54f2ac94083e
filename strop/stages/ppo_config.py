"""The settings of PPO; docs/ppo.md says which make whose PPO."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

from strop.models import Checkpointing, LoraConfig
from strop.optim import OptimizerConfig
from strop.rewards.config import RewardConfig
from strop.rollouts.prompts import Sampling
from strop.stages.begin import at_least, check_optimizer
from strop.stages.held_out import Evaluation

SHARED_VALUE_COEF = 0.1


@dataclass(frozen=True, kw_only=True)
class CriticConfig:
    """What predicts the reward that is still to come, so that the policy learns from what was better than expected."""

    network: Literal["own", "shared"] = "own"
    """A network as large as the policy, or a value head on the policy's own trunk, which couples the two losses."""
    start: str = ""
    """An own network's weights: RUN, RUN/STEP or folder of a reward or language model; empty = the policy's."""
    lr: float | None = None
    """An own network's peak learning rate; all else is as in `optimizer`. Not set = optimizer.lr."""
    warmup_steps: int = 0
    """First steps in which only an own network learns."""
    value_coef: float | None = None
    """Weight of a shared trunk's value loss beside the policy's. Not set = 0.1."""
    clip: float = 0.2
    """A value may move by so much within a step, in units of the reward; inf never clips."""


@dataclass(frozen=True, kw_only=True)
class PtxConfig:
    """PPO-ptx: a language-modelling loss beside PPO's, against forgetting (Ouyang et al. 2022, eq. 2)."""

    data: str = ""
    """Text or examples as SFT reads them; empty = none."""
    coef: float = 1.0
    """Weight of its mean loss per token."""
    batch_tokens: int = 2048
    """Tokens of it in every update."""
    max_length: int = 1024
    """Longest example in tokens; a longer one is an error."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Proximal Policy Optimization with a critic (Schulman et al. 2017; Ziegler et al. 2019 for language models)."""

    init_from: str
    """Where to start: RUN, RUN/STEP or a Hugging Face folder (`from` in a recipe, --from on the command line)."""
    tasks: str
    """Prompts with what the rewards need: JSONL, Parquet, CSV or hf:NAME; the column `prompt` is text or messages."""
    rewards: tuple[RewardConfig, ...]
    """Where the reward comes from: a weighted sum of functions of (task, completion)."""
    num_steps: int
    """Rollouts; each is followed by its updates."""
    prompts_per_step: int = 64
    """Prompts per rollout (P)."""
    group_size: int = 1
    """Completions per prompt (G). The critic is the baseline, so that one is enough."""
    sampling: Sampling = field(default_factory=Sampling)
    """How the policy acts."""

    missing_eos: Literal["keep", "subtract", "replace"] = "keep"
    """The reward of a completion that did not stop: as it is, less the penalty (TRL), or minus the penalty (OpenAI)."""
    missing_eos_penalty: float = 1.0
    """See missing_eos."""
    whiten_rewards: bool = False
    """Divide the rewards of all tokens by their standard deviation over the rollout, around their mean."""
    gamma: float = 1.0
    """Discount per token."""
    gae_lambda: float = 0.95
    """1 trusts only what was earned, 0 only the critic."""
    whiten_advantages: bool = True
    """Advantages of the rollout's tokens get mean 0 and variance 1."""

    clip_low: float = 0.2
    """Lower bound of the ratio is 1 - clip_low."""
    clip_high: float = 0.2
    """Upper bound of the ratio is 1 + clip_high."""
    entropy_coef: float = 0.0
    """Weight of an entropy bonus per token."""
    kl_coef: float = 0.05
    """Weight of the KL to the reference, the checkpoint that the run started from. 0 = no reference is loaded."""
    kl_placement: Literal["reward", "loss"] = "reward"
    """Subtracted from the reward of every token, or in its loss."""
    kl_estimator: Literal["k1", "k2", "k3", "k3_plus"] = "k1"
    """In the reward it must be k1; in the loss k2, k3, or k3_plus."""
    kl_target: float | None = None
    """Nats per completion towards which kl_coef is adapted after every rollout (Ziegler: 6). Not set = fixed."""
    kl_horizon: float = 10_000
    """Completions over which the adaptation acts; smaller is faster."""
    critic: CriticConfig = field(default_factory=CriticConfig)
    """The critic."""
    ptx: PtxConfig = field(default_factory=PtxConfig)
    """A language-modelling loss beside PPO's."""

    epochs_per_rollout: int = 4
    """Times that the updates go over one rollout."""
    minibatch_prompts: int = 0
    """Prompts per update, a divisor of prompts_per_step; 0 = all of the rollout in one."""
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1e-6))
    """AdamW and its schedule, of policy and critic; its steps are rollouts. Each network is clipped by its own norm."""
    lora: LoraConfig | None = None
    """Train only a LoRA adapter, its table [lora]; not set = all weights. An own critic trains all of its."""
    micro_batch_tokens: int = 2048
    """Tokens per forward and backward pass, each prompt once per group: bounds the memory, not the result."""
    num_slots: int = 64
    """Completions decoded at the same time."""
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
        at_least(self, 1, "num_steps", "prompts_per_step", "group_size", "epochs_per_rollout", "micro_batch_tokens")
        at_least(self, 1, "num_slots", "save_every", "keep_checkpoints")
        at_least(self, 0, "clip_low", "clip_high", "kl_coef", "minibatch_prompts", "samples_per_step", "seed")
        at_least(self.eval, 1, "every", "max_tasks", "num_samples", prefix="eval.")
        at_least(self.sampling, 1, "max_new_tokens", prefix="sampling.")
        check_optimizer(self.optimizer, self.num_steps)
        if not self.sampling.temperature > 0:
            raise ValueError("sampling.temperature must be above 0: greedy samples explore nothing")
        for name in ("gamma", "gae_lambda"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must lie between 0 and 1")
        if not self.missing_eos_penalty >= 0:
            raise ValueError(f"missing_eos_penalty={self.missing_eos_penalty} must be at least 0: it is taken away")
        if self.minibatch_prompts and self.prompts_per_step % self.minibatch_prompts:
            raise ValueError(
                f"prompts_per_step={self.prompts_per_step} is not divisible by "
                f"minibatch_prompts={self.minibatch_prompts}: a smaller last update would count as much as the others"
            )
        self._check_kl()
        self._check_critic()
        self._check_ptx()

    def _check_kl(self) -> None:
        if self.kl_placement == "reward" and self.kl_estimator != "k1":
            raise ValueError('kl_placement = "reward" needs kl_estimator = "k1", the unbiased one')
        if self.kl_placement == "loss" and self.kl_estimator == "k1":
            raise ValueError('k1 in the loss has no effect on average: use kl_estimator = "k2", "k3" or "k3_plus"')
        if self.kl_target is not None:
            if not self.kl_coef:
                raise ValueError("kl_target adapts kl_coef, which is 0 and would stay so: set kl_coef, or remove it")
            if not self.kl_target > 0 or not self.kl_horizon >= self.prompts_per_step * self.group_size:
                raise ValueError(
                    f"kl_target={self.kl_target} must be above 0, and kl_horizon={self.kl_horizon} at least the "
                    f"{self.prompts_per_step * self.group_size} completions of a step"
                )

    def _check_critic(self) -> None:
        critic = self.critic
        at_least(critic, 0, "warmup_steps", prefix="critic.")
        if not critic.clip > 0:
            raise ValueError(f"critic.clip={critic.clip} must be above 0; inf never clips")
        if critic.lr is not None and not 0 <= critic.lr < float("inf"):
            raise ValueError(f"critic.lr={critic.lr} must be a number of at least 0")
        if critic.value_coef is not None and not 0 <= critic.value_coef < float("inf"):
            raise ValueError(f"critic.value_coef={critic.value_coef} must be a number of at least 0")
        if critic.network == "own" and critic.value_coef is not None:
            raise ValueError(
                'critic.value_coef weighs the losses of a shared trunk; critic.network = "own" has an optimizer of '
                "its own: use critic.lr"
            )
        if critic.network == "shared" and (critic.start or critic.lr is not None or critic.warmup_steps):
            raise ValueError(
                'critic.start, critic.lr and critic.warmup_steps are for critic.network = "own": with "shared" the '
                "critic is the policy's trunk, and learns with it"
            )

    def _check_ptx(self) -> None:
        ptx = self.ptx
        at_least(ptx, 2, "max_length", prefix="ptx.")
        if not 0 < ptx.coef < float("inf"):
            raise ValueError(f"ptx.coef={ptx.coef} must be above 0; leave ptx.data out for none")
        if not ptx.data and ptx != PtxConfig():
            raise ValueError("ptx has settings but no data: set ptx.data, or remove the others")
        if ptx.data and min(self.micro_batch_tokens, ptx.batch_tokens) < ptx.max_length:
            raise ValueError(
                f"ptx.max_length={ptx.max_length} exceeds ptx.batch_tokens={ptx.batch_tokens} or "
                f"micro_batch_tokens={self.micro_batch_tokens}: an example is never cut, so lower it or raise them"
            )

    @property
    def needs_old_logprobs(self) -> bool:
        """Whether the trainer's logprobs before the updates are used at a time when the policy may have moved on."""
        is_split = 0 < self.minibatch_prompts < self.prompts_per_step
        return self.epochs_per_rollout > 1 or is_split or self.kl_coef != 0

    @property
    def critic_optimizer(self) -> OptimizerConfig:
        """An own critic's: the policy's but for the rate."""
        lr = self.optimizer.lr if self.critic.lr is None else self.critic.lr
        return dataclasses.replace(self.optimizer, lr=lr)

    def describe(self) -> str:
        """Which PPO this is, in one line."""
        kl = f"{self.kl_coef} {self.kl_estimator} in the {self.kl_placement}" if self.kl_coef else "none"
        kl += f" (adapted to {self.kl_target} nats per completion)" if self.kl_target is not None else ""
        updates = f"{self.epochs_per_rollout} epoch(s) of {self.minibatch_prompts or self.prompts_per_step} prompts"
        ptx = f"; ptx {self.ptx.coef} of {self.ptx.data}" if self.ptx.data else ""
        return (
            f"{self.prompts_per_step} prompts x {self.group_size} samples; critic {self.critic.network}; gamma "
            f"{self.gamma}, lambda {self.gae_lambda}; clip [1-{self.clip_low}, 1+{self.clip_high}], values "
            f"{self.critic.clip}; KL {kl}; missing EOS {self.missing_eos}; {updates}{ptx}"
        )
