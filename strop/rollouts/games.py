"""Games between players, many at a time: every position is a prompt, and the move is the completion."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from strop.environments import Environment, Opponent
from strop.environments.opponents import RandomOpponent
from strop.generation import Engine
from strop.runs.seeds import derive_seed
from strop.tokenizer import Tokenizer
from strop.types import Completion, Observation, Request, SamplingParams, Transition


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """What one player did. A policy's move has the tokens that made it, another player's has none."""

    player: int
    text: str
    prompt_ids: tuple[int, ...] = ()
    completion: Completion | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Game:
    """A game that has ended: who sat where, what they did, and what each seat got."""

    seats: tuple[str, ...]
    moves: tuple[Move, ...]
    rewards: tuple[float, ...]
    is_illegal: bool
    """Whether the last move was not allowed, which ended it."""
    is_truncated: bool


class Player(Protocol):
    """Moves in many games at once."""

    @property
    def name(self) -> str: ...

    def moves(self, positions: Sequence[Position]) -> list[Move]:
        """One per position, in its order."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """A game that waits for a move. The seed decides the chance in it: of the game, its place, and the ply."""

    game: Environment
    observation: Observation
    seed: int


class PolicyPlayer:
    """A language model. What it says is its move, and where that is not legal it has lost."""

    def __init__(
        self, name: str, engine: Engine, tokenizer: Tokenizer, sampling: SamplingParams, *, as_chat: bool = False
    ) -> None:
        """as_chat: the position is a user's message, as a model that was tuned to chat expects."""
        self.name = name
        self.engine = engine
        self.tokenizer = tokenizer
        self.sampling = sampling
        self.as_chat = as_chat
        self._prompts: dict[str, tuple[int, ...]] = {}

    def moves(self, positions: Sequence[Position]) -> list[Move]:
        """ValueError for a position that does not fit into the model's context with a move after it."""
        prompts = [self.prompt_ids(position.observation.text) for position in positions]
        longest = max(map(len, prompts))
        if longest + self.sampling.max_new_tokens > self.engine.max_length:
            raise ValueError(
                f"a position of the game has {longest} tokens; with max_new_tokens={self.sampling.max_new_tokens} it "
                f"exceeds the model's {self.engine.max_length} positions: lower max_moves, or take one that reads more"
            )
        requests = [
            Request(prompt_ids=prompt, sampling=self.sampling, seed=position.seed)
            for prompt, position in zip(prompts, positions, strict=True)
        ]
        completions = [completion for (completion,) in self.engine.generate(requests)]
        return [
            Move(player=position.observation.player, text=completion.text, prompt_ids=prompt, completion=completion)
            for position, prompt, completion in zip(positions, prompts, completions, strict=True)
        ]

    def prompt_ids(self, text: str) -> tuple[int, ...]:
        if text not in self._prompts:
            self._prompts[text] = tuple(
                self.tokenizer.encode_prompt(({"role": "user", "content": text},) if self.as_chat else text)
            )
        return self._prompts[text]


class OpponentPlayer:
    """A player that is no model."""

    def __init__(self, name: str, opponent: Opponent) -> None:
        self.name = name
        self.opponent = opponent

    def moves(self, positions: Sequence[Position]) -> list[Move]:
        return [
            Move(
                player=position.observation.player,
                text=self.opponent.move(position.game, position.observation, random.Random(position.seed)),
            )
            for position in positions
        ]


def play(
    make: Callable[[], Environment],
    seatings: Sequence[Sequence[Player]],
    *,
    seed: int,
    openings: Sequence[int] | None = None,
    max_moves: int = 1000,
) -> list[Game]:
    """One game for every seating, whose players it names seat by seat; the seed and a game's place decide it.

    All games go on side by side: each player moves at once in all that wait for it. openings: so many first moves of
    each game are legal ones drawn by lot, whoever's turn it is. A game of max_moves moves ends there (is_truncated),
    with what its players have got so far.

    Raises ValueError, naming the move, for a game that fails or pays something else than a number to each seat.
    """
    by_lot = OpponentPlayer("lot", RandomOpponent())
    games = [make() for _ in seatings]
    rewards = [[0.0] * len(seating) for seating in seatings]
    moves: list[list[Move]] = [[] for _ in seatings]
    ended: dict[int, tuple[bool, bool]] = {}
    waiting = {index: game.reset(derive_seed(seed, "game", index)) for index, game in enumerate(games)}
    ply = 0
    while waiting:
        to_move: dict[int, tuple[Player, list[int]]] = {}
        for index, observation in waiting.items():
            is_opening = openings is not None and ply < openings[index]
            player = by_lot if is_opening else seatings[index][observation.player]
            to_move.setdefault(id(player), (player, []))[1].append(index)
        for player, indices in to_move.values():
            positions = [
                Position(game=games[index], observation=waiting[index], seed=derive_seed(seed, "move", index, ply))
                for index in indices
            ]
            for index, move in zip(indices, player.moves(positions), strict=True):
                transition = _checked_step(games[index], move.text, len(seatings[index]))
                moves[index].append(move)
                for seat, reward in enumerate(transition.rewards):
                    rewards[index][seat] += reward
                if transition.observation is None or ply + 1 == max_moves:
                    ended[index] = transition.is_illegal, transition.is_truncated or transition.observation is not None
                    del waiting[index]
                else:
                    waiting[index] = transition.observation
        ply += 1
    for game in games:
        game.close()
    return [
        Game(
            seats=tuple(player.name for player in seating),
            moves=tuple(moves[index]),
            rewards=tuple(rewards[index]),
            is_illegal=ended[index][0],
            is_truncated=ended[index][1],
        )
        for index, seating in enumerate(seatings)
    ]


def _checked_step(game: Environment, text: str, num_seats: int) -> Transition:
    """A game may be a user's own: what it makes of a move is looked at before it gets into averages and weights."""
    try:
        transition = game.step(text)
    except Exception as error:
        raise ValueError(
            f"the game failed on the move {text!r} ({type(error).__name__}: {error}): for text that is no move it must "
            "end with is_illegal, not raise"
        ) from error
    if len(transition.rewards) != num_seats or not all(map(math.isfinite, transition.rewards)):
        raise ValueError(f"after the move {text!r} the game pays {transition.rewards}, not one number to each seat")
    if transition.observation is not None and not 0 <= transition.observation.player < num_seats:
        raise ValueError(
            f"after the move {text!r} it is the turn of player {transition.observation.player}, who has no seat"
        )
    return transition
