"""Environments by name."""

from __future__ import annotations

import importlib.util
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import cast

from strop.environments.base import Environment
from strop.environments.open_spiel import OpenSpielGame


def load_environment(name: str) -> Environment:
    """The environment of a recipe: "open_spiel:GAME", or "path/file.py:FACTORY", a function without arguments.

    GAME is any of OpenSpiel's that is played in turns, with its parameters: "open_spiel:hex(board_size=5)".
    Raises ValueError for a name that is neither, naming the remedy; ImportError where OpenSpiel is not installed.
    """
    kind, colon, rest = name.partition(":")
    if kind == "open_spiel" and rest:
        return OpenSpielGame(rest)
    path = Path(kind)
    if not colon or path.suffix != ".py":
        raise ValueError(f'game "{name}": write "open_spiel:GAME", as in open_spiel:tic_tac_toe, or "file.py:FACTORY"')
    if not path.is_file():
        raise ValueError(f'game "{name}": there is no file {path}')
    factory = getattr(_module(path.resolve()), rest, None)
    if not callable(factory):
        raise ValueError(f'game "{name}": {path} has no function {rest}')
    return cast(Environment, factory())


@cache
def _module(path: Path) -> ModuleType:
    """The file as a module, run once; what lies beside it can be imported from it."""
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    spec = importlib.util.spec_from_file_location(f"strop_game_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module
