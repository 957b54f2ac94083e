"""Players that do not learn, to measure a policy against: chance, tree search, and perfect play."""

from __future__ import annotations

import random
from typing import Any, Protocol

from strop.environments.base import Environment
from strop.environments.open_spiel import OpenSpielGame, open_spiel
from strop.types import Observation

MAX_POSITIONS = 500_000
"""Of a game that "perfect" still works out; tic-tac-toe has 5,478."""


class Opponent(Protocol):
    """Who sits at the other side of the board."""

    def move(self, game: Environment, observation: Observation, draw: random.Random) -> str:
        """A legal move of the player to move; all chance comes from `draw`."""
        ...


def load_opponent(name: str) -> Opponent:
    """ "random", "mcts:SIMULATIONS" or "perfect"; ValueError for another name."""
    if name == "random":
        return RandomOpponent()
    if name == "perfect":
        return PerfectOpponent()
    kind, _, number = name.partition(":")
    if kind == "mcts" and number.isdigit() and int(number) > 0:
        return MctsOpponent(int(number))
    raise ValueError(
        f'no opponent "{name}": there are "random", "perfect", and "mcts:100" with its simulations per move'
    )


class RandomOpponent:
    """Any legal move, each as likely as the others."""

    def move(self, game: Environment, observation: Observation, draw: random.Random) -> str:
        if not observation.legal:
            raise ValueError(
                'the game does not say which moves are legal, so that none can be drawn by lot: leave "random" out of '
                "eval.opponents, and opening_moves at 0"
            )
        return draw.choice(observation.legal)


class MctsOpponent:
    """Monte Carlo tree search (UCT; Kocsis and Szepesvari 2006) with random play-outs, of OpenSpiel."""

    def __init__(self, simulations: int) -> None:
        self.simulations = simulations

    def move(self, game: Environment, observation: Observation, draw: random.Random) -> str:
        state, pyspiel = state_of(game, "mcts"), open_spiel()
        kind = state.get_game().get_type()
        is_searchable = (
            kind.information == pyspiel.GameType.Information.PERFECT_INFORMATION
            and kind.reward_model == pyspiel.GameType.RewardModel.TERMINAL
        )
        if not is_searchable:  # it searches from the true state, hidden cards and all
            raise ValueError(
                f'{state.get_game()} has secrets, or pays before its end: the opponent "mcts" would cheat, or cannot '
                'search it; use "random"'
            )
        seed = draw.getrandbits(30)
        bot = pyspiel.MCTSBot(
            state.get_game(),
            pyspiel.RandomRolloutEvaluator(1, seed),
            2.0,  # the exploration constant of OpenSpiel's own examples
            self.simulations,
            100,  # MB
            True,
            seed,
            False,
        )
        return state.action_to_string(observation.player, bot.step(state))


class PerfectOpponent:
    """Never gives away what the position is worth; among equal moves any. For two players, without chance or secrets.

    It works out the whole game once. ValueError for a game that has any of those, or more than MAX_POSITIONS positions.
    """

    def __init__(self) -> None:
        self._values: dict[str, float] = {}
        """Position -> what it is worth to player 0."""

    def move(self, game: Environment, observation: Observation, draw: random.Random) -> str:
        state = state_of(game, "perfect")
        check_solvable(state.get_game())
        sign = 1 if observation.player == 0 else -1
        values = {move: sign * self._value(state.child(move)) for move in state.legal_actions()}
        best = max(values.values())
        chosen = draw.choice([move for move, value in values.items() if value == best])
        return state.action_to_string(observation.player, chosen)

    def _value(self, state: Any) -> float:
        if state.is_terminal():
            return state.returns()[0]
        mover = state.current_player()
        key = f"{state.get_game()} {mover} {state}"
        if key not in self._values:
            if len(self._values) >= MAX_POSITIONS:
                raise ValueError(
                    f'the game has more than {MAX_POSITIONS:,} positions, too many for the opponent "perfect": '
                    'use "mcts:1000"'
                )
            best = max if mover == 0 else min
            self._values[key] = best(self._value(state.child(move)) for move in state.legal_actions())
        return self._values[key]


def check_solvable(game: Any) -> None:
    """ValueError for a game that a search through all of it does not solve."""
    pyspiel, kind = open_spiel(), game.get_type()
    is_solvable = (
        game.num_players() == 2
        and kind.information == pyspiel.GameType.Information.PERFECT_INFORMATION
        and kind.chance_mode == pyspiel.GameType.ChanceMode.DETERMINISTIC
        and kind.utility == pyspiel.GameType.Utility.ZERO_SUM
    )
    if not is_solvable:
        raise ValueError(
            f"{game} has chance, secrets, or not two players of whom one loses what the other wins: the opponent "
            '"perfect" cannot work it out'
        )


def state_of(game: Environment, opponent: str) -> Any:
    """OpenSpiel's state of the game, for search; ValueError for a game that is not OpenSpiel's."""
    if not isinstance(game, OpenSpielGame):
        raise ValueError(f'the opponent "{opponent}" searches, which needs a game of OpenSpiel: use "random"')
    return game.state
