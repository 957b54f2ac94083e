"""OpenSpiel's games as text. Needs the extra strop[games]."""

from __future__ import annotations

import difflib
import random
from collections.abc import Mapping
from typing import Any

from strop.environments.base import ILLEGAL_REWARD
from strop.types import Observation, Transition


class OpenSpielGame:
    """A game of OpenSpiel that is played in turns. A player sees:

        tic_tac_toe, player 1
        ...
        .x.
        ...
        move:

    and names its move as OpenSpiel does, here "o(0,0)", or by the number that it has there, here "0". In a game with
    hidden cards each player sees its own.
    """

    def __init__(self, name: str) -> None:
        """ValueError for a game that OpenSpiel does not have, or whose players move at the same time."""
        pyspiel = open_spiel()
        short = name.partition("(")[0]
        known = pyspiel.registered_names()
        if short not in known:
            near = difflib.get_close_matches(short, known, n=1)
            hint = (
                f"; did you mean {near[0]}?"
                if near
                else ": python -c 'import pyspiel; print(pyspiel.registered_names())'"
            )
            raise ValueError(f"OpenSpiel has no game {short}{hint}")
        try:
            self.game: Any = pyspiel.load_game(name)
        except (pyspiel.SpielError, ValueError) as error:
            raise ValueError(f"OpenSpiel refuses {name}: {error}") from None
        kind = self.game.get_type()
        if kind.dynamics != pyspiel.GameType.Dynamics.SEQUENTIAL:
            raise ValueError(f"{name} is not played in turns")
        self.name = short
        self.is_open = kind.information == pyspiel.GameType.Information.PERFECT_INFORMATION
        """Whether every player sees everything."""
        if not self.is_open and not kind.provides_information_state_string:
            raise ValueError(f"{name} does not say what one player knows, so that it cannot be played as text")
        self.state: Any = None
        """OpenSpiel's own, for opponents that search."""
        self._draw = random.Random()

    @property
    def num_players(self) -> int:
        return self.game.num_players()

    def reset(self, seed: int, task: Mapping[str, Any] | None = None) -> Observation:
        self._draw = random.Random(seed)
        self.state = self.game.new_initial_state()
        self._play_chance()
        return self._observation()

    def step(self, action: str) -> Transition:
        if self.state is None or self.state.is_terminal():
            raise RuntimeError("the game has ended: reset() begins another")
        player = self.state.current_player()
        # Where a number is also the name of a move, it is the name.
        moves = {str(move): move for move in self.state.legal_actions()}
        moves |= {self.state.action_to_string(player, move).strip(): move for move in self.state.legal_actions()}
        if action.strip() not in moves:
            self.state = None
            # Never cheaper than losing as much as the game lets anybody lose.
            lost = min(ILLEGAL_REWARD, self.game.min_utility())
            rewards = tuple(lost if seat == player else 0.0 for seat in range(self.num_players))
            return Transition(observation=None, rewards=rewards, is_illegal=True)
        self.state.apply_action(moves[action.strip()])
        self._play_chance()
        if self.state.is_terminal():
            return Transition(observation=None, rewards=tuple(self.state.returns()))
        return Transition(observation=self._observation(), rewards=(0.0,) * self.num_players)

    def close(self) -> None:
        self.state = None

    def _play_chance(self) -> None:
        while self.state.is_chance_node():
            outcomes, weights = zip(*self.state.chance_outcomes(), strict=True)
            self.state.apply_action(self._draw.choices(outcomes, weights)[0])

    def _observation(self) -> Observation:
        player = self.state.current_player()
        # A state's own text shows every card.
        seen = str(self.state) if self.is_open else self.state.information_state_string(player)
        return Observation(
            text=f"{self.name}, player {player}\n{seen.rstrip()}\nmove:",
            player=player,
            legal=tuple(self.state.action_to_string(player, move).strip() for move in self.state.legal_actions()),
        )


def open_spiel() -> Any:
    """The module pyspiel. ImportError that names the extra."""
    try:
        import pyspiel
    except ImportError as error:
        raise ImportError("games need OpenSpiel: pip install 'strop[games]'") from error
    return pyspiel
