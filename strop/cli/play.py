"""`strop play`: a game against a checkpoint, at the terminal. The model does not learn from it."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import tyro

from strop.cli.frozen import ModelArguments, SamplingArguments, frozen_model, sampling_params

if TYPE_CHECKING:
    from strop.rollouts.games import Move, Player, Position


@dataclass(frozen=True, kw_only=True)
class Arguments(ModelArguments, SamplingArguments):
    """A game against frozen weights. Type a move, "?" for those that are allowed; Ctrl-D or /quit gives up."""

    game: str | None = None
    """As in a self-play recipe, "open_spiel:GAME" or "file.py:FACTORY"; left out, the game that the run learned."""
    seat: int = 0
    """Yours; 0 begins."""
    as_chat: bool | None = None
    """Put positions as a user's message; left out, as the run learned it."""
    max_new_tokens: int = 0
    """Tokens after which the model's move is cut; 0 = as the run learned it, or 16."""
    temperature: float = 0.0
    """Logits are divided by it; 0 plays the likeliest move."""


class GaveUp(Exception):
    """The person at the terminal has left the game."""


def run(command: str, args: Sequence[str]) -> int:
    arguments = as_learned(tyro.cli(Arguments, args=list(args), prog=f"strop {command}"))
    game = arguments.game
    assert game is not None
    from strop.environments import load_environment
    from strop.rollouts.games import PolicyPlayer, play

    num_players = load_environment(game).num_players
    if not 0 <= arguments.seat < num_players:
        raise ValueError(f"--seat {arguments.seat}: {game} has the seats 0 to {num_players - 1}")
    with frozen_model(arguments, num_slots=1) as frozen:
        sampling = sampling_params(arguments, frozen.tokenizer)
        model = PolicyPlayer("model", frozen.engine, frozen.tokenizer, sampling, as_chat=bool(arguments.as_chat))
        seats: list[Player] = [Person() if seat == arguments.seat else model for seat in range(num_players)]
        try:
            (ended,) = play(lambda: load_environment(game), [seats], seed=arguments.seed)
        except GaveUp:
            print("You gave up.")
            return 0
    last = ended.moves[-1]
    if ended.is_illegal:
        who = "You have said" if last.player == arguments.seat else "The model has said"
        print(f"{who} {last.text.strip()!r}, which is not allowed, and lost.")
        return 0
    if last.player != arguments.seat:
        print(f"The model: {last.text.strip()}")
    reward = ended.rewards[arguments.seat]
    print(f"You get {reward:+g}: {'won' if reward > 0 else 'lost' if reward < 0 else 'drawn'}.")
    return 0


def as_learned(arguments: Arguments) -> Arguments:
    """The arguments, with what was left out taken from the self-play run: its game, and how it was asked for a move."""
    from strop.runs import RunFolder

    config: dict[str, Any] = {}
    name = arguments.model.partition("/")[0]
    if (arguments.runs_dir / name / "run.json").is_file():
        config = RunFolder.open(arguments.runs_dir, name).info["config"]
    if arguments.game is None and "game" not in config:
        raise ValueError(
            f"{arguments.model} is no self-play run: say what to play, as in --game open_spiel:tic_tac_toe"
        )
    learned = config["sampling"] if "game" in config else {}
    return dataclasses.replace(
        arguments,
        game=arguments.game or config["game"],
        as_chat=config.get("as_chat", False) if arguments.as_chat is None else arguments.as_chat,
        max_new_tokens=arguments.max_new_tokens or learned.get("max_new_tokens", 16),
        stop=arguments.stop or tuple(learned.get("stop", ())),
    )


class Person:
    """Whoever sits at the terminal. A move that is not allowed is asked for again."""

    name = "person"

    def moves(self, positions: Sequence[Position]) -> list[Move]:
        from strop.rollouts.games import Move

        return [Move(player=position.observation.player, text=self.ask(position)) for position in positions]

    def ask(self, position: Position) -> str:
        from strop.environments.open_spiel import OpenSpielGame

        legal = position.observation.legal
        # What the model may say: a game of OpenSpiel takes a move's number too.
        numbers = position.game.state.legal_actions() if isinstance(position.game, OpenSpielGame) else []
        print(position.observation.text.removesuffix("move:").rstrip())
        while True:
            try:
                text = input("your move> " if sys.stdin.isatty() else "").strip()
            except (EOFError, KeyboardInterrupt):
                raise GaveUp from None
            if text == "/quit":
                raise GaveUp
            if legal is None or text in (*legal, *map(str, numbers)):
                return text
            names = (
                legal if not numbers else [f"{number} = {name}" for number, name in zip(numbers, legal, strict=True)]
            )
            print(f"allowed: {', '.join(names)}")
