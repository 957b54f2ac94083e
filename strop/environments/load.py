"""Environments by name."""

from __future__ import annotations

import importlib.util
from pathlib import Path
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
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    factory = getattr(module, rest, None)
    if not callable(factory):
        raise ValueError(f'game "{name}": {path} has no function {rest}')
    return cast(Environment, factory())
