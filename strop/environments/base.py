"""The contract of a game or a task of several turns: text in, text out, any number of players."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from strop.types import Observation, Transition

ILLEGAL_REWARD = -1.0
"""Of the player whose move the rules do not allow, which ends the game; where more can be lost, as much as that. The
others get 0: they have not won it."""


class Environment(Protocol):
    """One game at a time. Example:

    game = load_environment("open_spiel:tic_tac_toe")
    observation = game.reset(seed=0)
    transition = game.step("x(1,1)")
    """

    @property
    def num_players(self) -> int: ...

    def reset(self, seed: int, task: Mapping[str, Any] | None = None) -> Observation:
        """A new game, and what the first player sees. The seed decides all chance: dice, cards, the task's own."""
        ...

    def step(self, action: str) -> Transition:
        """What the player to move does, in the words that it said. Text that is no move, or none that is allowed, is
        not repaired and raises nothing: it ends the game with is_illegal.

        Raises RuntimeError after the end, and before the first reset().
        """
        ...

    def close(self) -> None:
        """Give back whatever the environment holds."""
        ...
