"""Task + completion -> Verdict(score, status). Verifiers see text only and run in another process."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from strop.rewards.base import Reward, ScoredCompletion, WeightedRewards
    from strop.rewards.load import load_reward, load_rewards

__all__ = ["Reward", "ScoredCompletion", "WeightedRewards", "load_reward", "load_rewards"]

_LOADERS = ("load_reward", "load_rewards")


def __getattr__(name: str) -> Any:
    # Imported when asked for: a worker process also passes through this file, and must start without torch.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"strop.rewards.{'load' if name in _LOADERS else 'base'}"), name)
