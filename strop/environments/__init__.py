"""Worlds that answer a move with a new position: games, and tasks of several turns."""

from strop.environments.base import ILLEGAL_REWARD, Environment
from strop.environments.load import load_environment
from strop.environments.opponents import Opponent, load_opponent

__all__ = ["ILLEGAL_REWARD", "Environment", "Opponent", "load_environment", "load_opponent"]
