"""Loads and calls a user's reward function with TRL's signature. Also the process in which it runs."""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from strop.rewards.serve import Handler, serve

RewardFunction = Callable[..., Any]


def main() -> None:
    # No respawn: the user's module may start threads or a GPU, which do not survive a fork.
    serve(_make_handler, respawn=False)


def _make_handler() -> Handler:
    function = load_function(sys.argv[1])

    def handle(request: Mapping[str, Any]) -> list[float | None]:
        return call_reward_function(function, request)

    return handle


def load_function(spec: str) -> RewardFunction:
    """The function named by "package.module:function" or "path/file.py:function".

    A file's folder becomes importable, as when it is run as a script. Raises ValueError when there is no such function.
    """
    place, _, name = spec.rpartition(":")
    if place.endswith(".py"):
        path = Path(place).resolve()
        if not path.is_file():
            raise ValueError(f"{spec}: there is no file {path}")
        sys.path.insert(0, str(path.parent))
        module_spec = importlib.util.spec_from_file_location(f"strop_reward_{path.stem}", path)
        assert module_spec is not None and module_spec.loader is not None
        module = importlib.util.module_from_spec(module_spec)
        sys.modules[module_spec.name] = module
        module_spec.loader.exec_module(module)
    else:
        module = importlib.import_module(place)
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"{spec}: {place} has no function {name!r}")
    return function


def call_reward_function(function: RewardFunction, arguments: Mapping[str, Any]) -> list[float | None]:
    """The function's rewards as plain floats, None where it gave None.

    A function without **kwargs gets only the arguments that it names; TRL's would fail there. Awaits an async function.
    Raises what the function raises, and TypeError for a result that is no list of numbers.
    """
    parameters = inspect.signature(function).parameters.values()
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        missing = [p.name for p in parameters if p.default is p.empty and p.name not in arguments]
        if missing:
            raise TypeError(f"needs {', '.join(map(repr, missing))}; given are {', '.join(map(repr, arguments))}")
        names = {parameter.name for parameter in parameters}
        arguments = {name: value for name, value in arguments.items() if name in names}
    result = function(**arguments)
    if inspect.iscoroutine(result):
        result = asyncio.run(result)
    if isinstance(result, str | Mapping) or not hasattr(result, "__iter__"):
        raise TypeError(f"returned {type(result).__name__}, expected a list of numbers")
    return [None if value is None else float(value) for value in result]
