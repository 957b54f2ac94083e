"""PPO's critic: a network of its own, or a value head on the policy's trunk. It values every state before its token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from strop.models import CausalLM, Decoder, load_model
from strop.models.heads import ScalarModel, add_scalar_head, is_scalar_folder, load_scalar_model, save_scalar_model
from strop.models.reward_scale import RewardScale, read_reward_scale
from strop.optim import AdamW, State
from strop.rollouts.batch import RolloutBatch
from strop.rollouts.logprobs import rectangular
from strop.runs import Start, resolve
from strop.stages.ppo_config import Config
from strop.tokenizer import Tokenizer
from strop.types import PackedBatch

FOLDER = "critic"
"""Of a checkpoint: the policy is at its top, where everybody looks for a model."""
_HEAD = "value_head.safetensors"


@dataclass(frozen=True, kw_only=True)
class Critic:
    """Exactly one of network (with its optimizer) and head is there."""

    network: ScalarModel | None = None
    scale: RewardScale = RewardScale()
    """Of a network that began as a reward model: it then values in units of the reward from the first step on."""
    optimizer: AdamW | None = None
    head: nn.Linear | None = None
    """float32; the policy's optimizer has its weight, called value_head.weight."""

    def head_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Those of a head, which learn with the policy."""
        return [] if self.head is None else list(self.head.named_parameters("value_head"))

    def own_values_R(self, batch: PackedBatch) -> Tensor:
        """float32: the value of the state before each label that counts."""
        assert self.network is not None
        return self.scale(self.network.scores_R(batch))

    def head_values_R(self, hidden_TD: Tensor, batch: PackedBatch) -> Tensor:
        """The same, from the policy's hidden states."""
        assert self.head is not None
        return self.head(hidden_TD[batch.loss_mask_T].float()).squeeze(-1)

    @torch.no_grad()
    def frozen_values(self, policy: CausalLM, batch: RolloutBatch, *, max_tokens: int) -> Tensor:
        """values_BT without gradient, in micro-batches of max_tokens."""
        values_BT = torch.zeros_like(batch.sampling_logprobs_BT)
        start = 0
        for micro in batch.split(max_tokens):
            packed = micro.packed()
            values_R = (
                self.own_values_R(packed) if self.head is None else self.head_values_R(policy.hidden(packed), packed)
            )
            micro_BT = rectangular(values_R, micro)
            values_BT[start : start + len(micro), : micro_BT.shape[1]] = micro_BT
            start += len(micro)
        return values_BT

    def save(self, folder: Path) -> None:
        """Into the checkpoint's subfolder: a sequence classifier that transformers opens, or the head alone."""
        folder = folder / FOLDER
        if self.network is not None:
            save_scalar_model(self.network, folder)
        elif self.head is not None:
            folder.mkdir()
            save_file({"weight": self.head.weight.detach().cpu().contiguous()}, folder / _HEAD)

    def training_state(self) -> State:
        """What an own network's next update depends on, beside its weights."""
        return State({}) if self.optimizer is None else self.optimizer.state_dict().under(FOLDER)

    def load_training_state(self, state: Mapping[str, Tensor]) -> None:
        if self.optimizer is not None:
            self.optimizer.load_state_dict({name.removeprefix(f"{FOLDER}."): value for name, value in state.items()})


def make_critic(
    config: Config, start: Start, runs_dir: Path, policy: CausalLM, tokenizer: Tokenizer, dtype: torch.dtype
) -> Critic:
    """The critic that the run goes on with: of its newest checkpoint, or a new one. run.json says which.

    A new head is all zeros, so that the first advantages are the rewards to come and no noise of a random head.
    Raises ValueError when critic.start is no model, or one of another vocabulary.
    """
    saved = None if start.resumed is None else start.resumed.path / FOLDER
    if config.critic.network == "shared":
        head = nn.Linear(policy.lm_head_weight.shape[1], 1, bias=False, device=config.device)
        with torch.no_grad():
            head.weight.copy_(load_file(saved / _HEAD)["weight"] if saved else torch.zeros_like(head.weight))
        start.settle("critic", lambda: "value head on the policy's trunk, from zeros")
        return Critic(head=head)
    if saved:
        network = load_scalar_model(saved, dtype=dtype, device=config.device)
    elif config.critic.start:
        checkpoint = resolve(config.critic.start, runs_dir)
        network, kind = _started(checkpoint.path, dtype, config.device)
        check_critic(network, checkpoint.path, policy, tokenizer)
        start.settle(
            "critic", lambda: f"own network, from the {kind} {config.critic.start} ({checkpoint.content_hash})"
        )
    else:
        # A policy with an adapter is no plain decoder; merged from its folder, it is.
        start_model = (
            policy if config.lora is None else load_model(start.model_folder, dtype=dtype, device=config.device)
        )
        network = _with_zero_head(start_model, 'critic.start = ""')
        start.settle("critic", lambda: "own network, from the policy's weights and a head of zeros")
    network.backbone.set_checkpointing(config.gradient_checkpointing)
    where = f"{saved or config.critic.start or 'the policy'}/config.json"
    optimizer = config.critic_optimizer.build(network.named_parameters())
    return Critic(network=network, scale=read_reward_scale(network.source_config, where), optimizer=optimizer)


def check_critic(network: ScalarModel, folder: Path, policy: CausalLM, tokenizer: Tokenizer) -> None:
    """ValueError where the critic could not read what the policy writes."""
    tokenizer.check_fits(network.config.vocab_size)
    if (folder / "tokenizer.json").is_file() and not tokenizer.has_same_ids(Tokenizer.load(folder)):
        raise ValueError(f"critic.start: the tokenizer of {folder} is not the policy's, so that it reads other words")
    limit, needed = network.config.max_position_embeddings, policy.config.max_position_embeddings
    if limit < needed:
        raise ValueError(f"critic.start: {folder} has {limit} positions, fewer than the policy's {needed}")


def _started(folder: Path, dtype: torch.dtype, device: str) -> tuple[ScalarModel, str]:
    if is_scalar_folder(folder):
        return load_scalar_model(folder, dtype=dtype, device=device), "reward model"
    return _with_zero_head(load_model(folder, dtype=dtype, device=device), "critic.start"), "language model"


def _with_zero_head(model: CausalLM, where: str) -> ScalarModel:
    if not isinstance(model, Decoder):
        raise ValueError(
            f'{where}: an own critic must be of a family that Strop computes itself, or use critic.network = "shared"'
        )
    network = add_scalar_head(model, seed=0)
    nn.init.zeros_(network.score.weight)
    return network
