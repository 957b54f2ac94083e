"""Rewards from a recipe."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from strop.rewards.base import Reward, WeightedRewards
from strop.rewards.code import CodeReward
from strop.rewards.config import RewardConfig
from strop.rewards.function import FunctionReward
from strop.rewards.judge import JudgeReward
from strop.rewards.lean import LeanReward
from strop.rewards.math import MathReward
from strop.rewards.metamath import MetamathReward
from strop.rewards.model import ModelReward
from strop.rewards.reasoning_gym import ReasoningGymReward
from strop.rewards.text import FormatReward, OverlongPenalty, TargetLength
from strop.rewards.vote import VoteReward

_KINDS: dict[str, Callable[..., Reward]] = {
    "judge": JudgeReward,
    "math": MathReward,
    "code": CodeReward,
    "metamath": MetamathReward,
    "lean": LeanReward,
    "reasoning_gym": ReasoningGymReward,
    "format": FormatReward,
    "length": TargetLength,
    "overlong": OverlongPenalty,
    "model": ModelReward,
    "vote": VoteReward,
}

_R = TypeVar("_R", bound=Reward)

RewardSpec = str | Mapping[str, Any] | RewardConfig


def load_rewards(specs: RewardSpec | Sequence[RewardSpec], *, max_infra_error_share: float = 0.25) -> WeightedRewards:
    """The weighted sum of what a recipe names. Each spec is as for load_reward, with "weight" (1.0 unless given).

    Example: load_rewards(["math", {"name": "format", "weight": 0.2, "pattern": "<think>.*</think>.*"}])
    """
    if isinstance(specs, str | Mapping | RewardConfig):
        specs = [specs]
    parts: list[tuple[Reward, float]] = []
    for spec in specs:
        spec = spec.spec() if isinstance(spec, RewardConfig) else spec
        weight = 1.0 if isinstance(spec, str) else spec.get("weight", 1.0)
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            raise ValueError(f"reward {spec!r}: weight must be a number, got {weight!r}")
        parts.append((load_reward(spec), float(weight)))
    return WeightedRewards(parts, max_infra_error_share=max_infra_error_share)


def load_reward(spec: RewardSpec) -> Reward:
    """The reward that a recipe names: "math", or a table {name = "math", answer_column = "solution", ...}.

    name is a key of _KINDS, model, "package.module:function" or "path/file.py:function"; the other keys are the keyword
    arguments of that reward's class; label is its name in metrics; weight is for load_rewards. A function is loaded at
    once, in its process; a reward model in this one. Raises ValueError naming the nearest known name or option.
    """
    if isinstance(spec, RewardConfig):
        spec = spec.spec()
    options = {"name": spec} if isinstance(spec, str) else dict(spec)
    name = options.pop("name", None)
    options.pop("weight", None)  # belongs to the sum, not to the reward
    if not isinstance(name, str):
        raise ValueError(f"reward {spec!r}: name is missing, for example name = 'math'")
    if "label" in options:
        options["name"] = options.pop("label")
    if ":" in name:
        _check_options(name, options, FunctionReward, given=("function",))
        reward = _build(name, FunctionReward, {"function": name, **options})
        reward.start()
        return reward
    if name not in _KINDS:
        raise ValueError(
            f"unknown reward {name!r}{_nearest(name, _KINDS)}; a function of your own is 'module:function' or "
            "'path/file.py:function'"
        )
    kind = _KINDS[name]
    _check_options(name, options, kind)
    return _build(name, kind, options)


def _build(name: str, kind: Callable[..., _R], options: Mapping[str, Any]) -> _R:
    try:
        return kind(**options)
    except TypeError as error:
        raise ValueError(f"reward {name!r}: an option has the wrong type: {error}") from None


def _check_options(
    name: str, options: Mapping[str, Any], kind: Callable[..., Reward], given: Sequence[str] = ()
) -> None:
    parameters = {key: p for key, p in inspect.signature(kind).parameters.items() if key not in given}
    known = [key for key in parameters if key != "name"] + ["label", "weight"]
    for key in options:
        if key not in parameters:
            raise ValueError(f"reward {name!r} has no option {key!r}{_nearest(key, known)}; it has {', '.join(known)}")
    for key, parameter in parameters.items():
        if parameter.default is parameter.empty and key not in options:
            raise ValueError(f"reward {name!r} needs the option {key!r}")


def _nearest(word: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f", did you mean {close[0]!r}?" if close else f": known are {', '.join(known)}"
