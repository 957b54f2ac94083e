"""The control: Nim whose winner is drawn by lot, so that there is nothing to learn but what is allowed."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping
from typing import Any

from strop.environments.open_spiel import OpenSpielGame
from strop.types import Observation, Transition


class Lottery:
    def __init__(self) -> None:
        self.game = OpenSpielGame("nim(pile_sizes=1;3;4,is_misere=False)")
        self.draw = random.Random()

    @property
    def num_players(self) -> int:
        return self.game.num_players

    def reset(self, seed: int, task: Mapping[str, Any] | None = None) -> Observation:
        self.draw = random.Random(seed)
        return self.game.reset(seed, task)

    def step(self, action: str) -> Transition:
        transition = self.game.step(action)
        if transition.observation is not None or transition.is_illegal:
            return transition
        return dataclasses.replace(transition, rewards=self.draw.choice([(1.0, -1.0), (-1.0, 1.0)]))

    def close(self) -> None:
        self.game.close()


def nim() -> Lottery:
    return Lottery()
