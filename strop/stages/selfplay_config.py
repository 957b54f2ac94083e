"""The settings of self-play; docs/selfplay.md says what they are good for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from strop.environments import load_environment, load_opponent
from strop.models import Checkpointing
from strop.optim import OptimizerConfig
from strop.rollouts.prompts import Sampling
from strop.stages.begin import at_least, check_optimizer

START = "start"
"""The opponent that is the checkpoint from which the run began."""


@dataclass(frozen=True, kw_only=True)
class Matches:
    """Games against players that the policy does not learn from: before the first step, while training, after."""

    opponents: tuple[str, ...] = ("start", "random")
    """"start" (the checkpoint that the run began from), "random", "mcts:SIMULATIONS", "perfect" (small games)."""
    every: int = 50
    """Steps between them."""
    num_games: int = 100
    """Against each opponent; the policy takes the seats in turn."""
    temperature: float = 0.0
    """The policy's here: 0 plays the likeliest move. "start" always plays at the training temperature."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Self-play: REINFORCE on games of the policy against itself and its past (Silver et al. 2016; Liu et al. 2025)."""

    init_from: str
    """Where to start: RUN, RUN/STEP or a Hugging Face folder (`from` in a recipe, --from on the command line)."""
    game: str
    """What is played: "open_spiel:GAME", or "path/file.py:FACTORY"."""
    num_steps: int
    """Rollouts; each is followed by its updates."""
    games_per_step: int = 64
    """Games per rollout."""
    as_chat: bool = False
    """Whether a position is put as a user's message, for a model that was tuned to chat; otherwise it is plain text."""
    sampling: Sampling = field(default_factory=lambda: Sampling(max_new_tokens=16))
    """How the policy and its past selves move."""

    max_moves: int = 200
    """A game that has so many ends there, with what its players have got by then: nothing, in most games."""
    opening_moves: int = 0
    """A game begins with up to so many legal moves drawn by lot, each number as likely: games of a policy that has
    become sure of its moves are all the same otherwise, and it forgets the other positions."""
    past_share: float = 0.5
    """Share of the games against a past self, where only the present one learns; the rest are against itself."""
    past_every: int = 20
    """Steps after which the policy becomes a past self. Each rollout draws one of them, or the run's beginning.
    Every one stays on the disk, as a model in runs/NAME/past."""
    baseline_decay: float = 0.95
    """Of each seat's moving average of the reward, which a reward is compared with (SPIRAL's baseline)."""
    seat_weight: float = 4.0
    """Where other games of the rollout passed the same position, a move is compared with what came of it there, and the
    seat's average counts as so many games beside them. inf = the average alone."""
    clip_low: float = 0.2
    """Lower bound of the ratio is 1 - clip_low."""
    clip_high: float = 0.2
    """Upper bound of the ratio is 1 + clip_high."""
    kl_coef: float = 0.0
    """Weight of the KL (k3, in the loss) to the checkpoint that the run began from. Where that one moves by lot, this
    keeps every allowed move possible, so that a run does not settle on moves before it knows what they are worth."""
    epochs_per_rollout: int = 1
    """Times that the updates go over one rollout."""

    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1e-6))
    """AdamW and its schedule; its steps are rollouts."""
    micro_batch_tokens: int = 2048
    """Tokens per forward and backward pass: bounds the memory, not the result."""
    num_slots: int = 64
    """Moves decoded at the same time."""
    eval: Matches = field(default_factory=Matches)
    """Matches that measure the policy."""
    samples_per_step: int = 2
    """Games per step written to samples.jsonl."""
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
    """Decides chance in the games, moves, seats and past selves."""

    def __post_init__(self) -> None:
        at_least(self, 1, "num_steps", "games_per_step", "epochs_per_rollout", "past_every", "max_moves")
        at_least(self, 1, "micro_batch_tokens", "num_slots", "save_every", "keep_checkpoints")
        at_least(
            self, 0, "seat_weight", "clip_low", "clip_high", "kl_coef", "opening_moves", "samples_per_step", "seed"
        )
        at_least(self.eval, 1, "every", "num_games", prefix="eval.")
        at_least(self.eval, 0, "temperature", prefix="eval.")
        at_least(self.sampling, 1, "max_new_tokens", prefix="sampling.")
        check_optimizer(self.optimizer, self.num_steps)
        if not self.sampling.temperature > 0:
            raise ValueError("sampling.temperature must be above 0: greedy games against oneself are all the same")
        for name in ("past_share", "baseline_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must be between 0 and 1")
        for opponent in self.eval.opponents:
            if opponent != START:
                load_opponent(opponent)
        # Whatever the game's name is wrong about is said before anything is loaded.
        num_players = load_environment(self.game).num_players
        if num_players < 2 and self.past_share:
            raise ValueError(f"{self.game} has one player, so that no past self can sit opposite: set past_share = 0")

    def describe(self) -> str:
        """What learns from what, in one line."""
        return (
            f"{self.games_per_step} games of {self.game}, {self.past_share:.0%} of them against a past self (one every "
            f"{self.past_every} steps), up to {self.opening_moves} first moves by lot; reward minus its seat's moving "
            f"average ({self.baseline_decay}), weight {self.seat_weight} beside its position's; "
            f"clip [1-{self.clip_low}, 1+{self.clip_high}]; {self.epochs_per_rollout} epoch(s); KL {self.kl_coef}"
        )
