"""`strop play`: a game against a checkpoint, at the terminal. The model does not learn from it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from strop.cli.frozen import ModelArguments, SamplingArguments, frozen_model, sampling_params

if TYPE_CHECKING:
    from strop.rollouts.games import Move, Player, Position
    from strop.types import Observation


@dataclass(frozen=True, kw_only=True)
class Arguments(ModelArguments, SamplingArguments):
    """A game against frozen weights. Type a move, "?" for those that are allowed; Ctrl-D or /quit gives up."""

    game: str | None = None
    """As in a self-play recipe, "open_spiel:GAME" or "file.py:FACTORY"; left out, the game that the run learned."""
    seat: int = 0
    """Yours; 0 begins."""
    as_chat: bool | None = None
    """Put positions as a user's message; left out, as the run learned it."""
    max_new_tokens: int = 16
    """Tokens after which the model's move is cut."""
    temperature: float = 0.0
    """Logits are divided by it; 0 plays the likeliest move."""


class GaveUp(Exception):
    """The person at the terminal has left the game."""


def run(command: str, args: Sequence[str]) -> int:
    arguments = tyro.cli(Arguments, args=list(args), prog=f"strop {command}")
    game, as_chat = game_of(arguments)
    from strop.environments import load_environment
    from strop.rollouts.games import PolicyPlayer, play

    num_players = load_environment(game).num_players
    if not 0 <= arguments.seat < num_players:
        raise ValueError(f"--seat {arguments.seat}: {game} has the seats 0 to {num_players - 1}")
    with frozen_model(arguments, num_slots=1) as frozen:
        sampling = sampling_params(arguments, frozen.tokenizer)
        model = PolicyPlayer("model", frozen.engine, frozen.tokenizer, sampling, as_chat=as_chat)
        seats: list[Player] = [Person() if seat == arguments.seat else model for seat in range(num_players)]
        try:
            (ended,) = play(lambda: load_environment(game), [seats], seed=arguments.seed)
        except GaveUp:
            print("You gave up.")
            return 0
    last = ended.moves[-1]
    if ended.is_illegal:
        print(f"The model says {last.text.strip()!r}, which is not allowed, and has lost.")
        return 0
    if last.player != arguments.seat:
        print(f"The model: {last.text.strip()}")
    reward = ended.rewards[arguments.seat]
    print(f"You get {reward:+g}: {'won' if reward > 0 else 'lost' if reward < 0 else 'drawn'}.")
    return 0


def game_of(arguments: Arguments) -> tuple[str, bool]:
    """The game, and whether positions are a user's messages: as told, or as the self-play run had them."""
    from strop.runs import RunFolder

    config: dict[str, object] = {}
    name = arguments.model.partition("/")[0]
    if (Path(arguments.runs_dir) / name / "run.json").is_file():
        config = RunFolder.open(arguments.runs_dir, name).info["config"]
    game = arguments.game or config.get("game")
    if not isinstance(game, str):
        raise ValueError(
            f"{arguments.model} is no self-play run: say what to play, as in --game open_spiel:tic_tac_toe"
        )
    return game, bool(config.get("as_chat", False)) if arguments.as_chat is None else arguments.as_chat


class Person:
    """Whoever sits at the terminal. A move that is not allowed is asked for again."""

    name = "person"

    def moves(self, positions: Sequence[Position]) -> list[Move]:
        from strop.rollouts.games import Move

        return [Move(player=position.observation.player, text=self.ask(position.observation)) for position in positions]

    def ask(self, observation: Observation) -> str:
        print(observation.text.removesuffix("move:").rstrip())
        while True:
            try:
                text = input("your move> " if sys.stdin.isatty() else "").strip()
            except (EOFError, KeyboardInterrupt):
                raise GaveUp from None
            if text == "/quit":
                raise GaveUp
            if observation.legal is None or text in observation.legal:
                return text
            print(f"allowed: {'  '.join(observation.legal)}")
