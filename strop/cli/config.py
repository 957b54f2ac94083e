"""Recipes: TOML files read strictly into a stage's Config, and written back.

A relative path inside a recipe is relative to the current directory, as if it had been typed on the command line.
"""

from __future__ import annotations

import dataclasses
import json
import re
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

TOML_NAMES = {"init_from": "from"}
"""Config fields that have another name in a recipe and on the command line, because Python reserves that name."""

FIELD_NAMES = {name: field for field, name in TOML_NAMES.items()}


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file. ValueError when it is missing (naming the nearest file), empty or broken."""
    if not path.is_file():
        raise ValueError(f"{path}: no such recipe{_nearest_recipe(path)}")
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid TOML: {error}") from error
    if not table:
        raise ValueError(f"{path}: the recipe is empty")
    return table


def read_values(table: Mapping[str, Any], config_class: type, where: str) -> dict[str, Any]:
    """The fields that a table sets, by field name and converted to the types that `config_class` declares.

    Fields that the table leaves out are absent, so that flags can still supply the required ones; see `build`.
    ValueError for an unknown key (naming the nearest one) and for a value of another type.
    """
    hints = typing.get_type_hints(config_class, include_extras=False)
    fields = {_toml_name(field.name): field for field in dataclasses.fields(config_class) if field.init}
    values: dict[str, Any] = {}
    for key, value in table.items():
        if key not in fields:
            raise ValueError(f"{where}: unknown key '{key}'{did_you_mean(key, fields)}")
        field = fields[key]
        default = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        if isinstance(value, Mapping) and dataclasses.is_dataclass(default):
            # A nested table changes the keys it names; the others stay as this Config has them, not as their class has.
            values[field.name] = _replace(default, value, f"{where} [{key}]")
        else:
            values[field.name] = _convert(value, hints[field.name], where, key)
    return values


def build(config_class: type, values: Mapping[str, Any], where: str) -> Any:
    """An instance of `config_class`. ValueError when a required field has no value, or when the class refuses it."""
    missing = [_toml_name(name) for name in required_fields(config_class) if name not in values]
    if missing:
        raise ValueError(f"{where}: {', '.join(repr(name) for name in missing)} must be set")
    try:
        return config_class(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _replace(default: Any, table: Mapping[str, Any], where: str) -> Any:
    kept = {field.name: getattr(default, field.name) for field in dataclasses.fields(default) if field.init}
    return build(type(default), kept | read_values(table, type(default), where), where)


def required_fields(config_class: type) -> list[str]:
    """Names of the fields without a default."""
    unset = dataclasses.MISSING
    fields = dataclasses.fields(config_class)
    return [field.name for field in fields if field.init and field.default is unset and field.default_factory is unset]


def merge_tables(base: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `overrides` over it; tables inside tables are merged, everything else is replaced."""
    merged = dict(base)
    for key, value in overrides.items():
        old = merged.get(key)
        both_tables = isinstance(old, Mapping) and isinstance(value, Mapping)
        merged[key] = merge_tables(typing.cast("Mapping[str, Any]", old), value) if both_tables else value
    return merged


def to_toml(config: Any) -> str:
    """The recipe that reads back as `config`. A field that is None has no TOML form: it is named in a comment."""
    lines: list[str] = []
    tables: list[str] = []
    for field in dataclasses.fields(config):
        key, value = _format_key(_toml_name(field.name)), getattr(config, field.name)
        if value is None:
            lines.append(f"# {key} is not set")
        elif dataclasses.is_dataclass(value):
            tables.append(f"\n[{key}]\n{to_toml_table(value)}")
        else:
            lines.append(f"{key} = {_format_value(value)}")
    return "\n".join(lines + tables) + "\n"


def to_toml_table(value: Any) -> str:
    """The body of a nested table; tables deeper than that are written inline."""
    pairs = ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))
    return "\n".join(
        f"# {key} is not set" if item is None else f"{_format_key(key)} = {_format_value(item)}" for key, item in pairs
    )


def did_you_mean(name: str, candidates: typing.Iterable[str]) -> str:
    """The tail of an error message: the nearest of `candidates`, or the whole list when none is near."""
    names = sorted(candidates)
    near = get_close_matches(name.replace("-", "_"), names, n=1, cutoff=0.6) or get_close_matches(name, names, n=1)
    if near:
        return f" (did you mean '{near[0]}'?)"
    return f" (known: {', '.join(names)})" if names else ""


def _toml_name(field_name: str) -> str:
    return TOML_NAMES.get(field_name, field_name)


def _nearest_recipe(path: Path) -> str:
    for folder, pattern in ((path.parent, "*.toml"), (Path("recipes"), "**/*.toml")):
        found = {file.name: file for file in sorted(folder.glob(pattern))} if folder.is_dir() else {}
        near = get_close_matches(f"{path.stem}.toml", found, n=1)
        if near:
            return f" (did you mean {found[near[0]]}?)"
    return ""


def _convert(value: Any, expected: Any, where: str, key: str) -> Any:
    """`value` as the declared type. Integers pass as numbers, booleans pass as nothing else, lists become tuples."""
    wrong = ValueError(f"{where}: '{key}' must be {_describe(expected)}, got {_describe_value(value)}")
    origin, arguments = get_origin(expected), get_args(expected)
    if expected is Any:
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(value, arguments, where, key, wrong)
    if origin is Literal:
        if not any(type(value) is type(choice) and value == choice for choice in arguments):
            raise wrong
        return value
    if dataclasses.is_dataclass(expected):
        if not isinstance(value, Mapping):
            raise wrong
        nested = f"{where} [{key}]"
        return build(typing.cast(type, expected), read_values(value, typing.cast(type, expected), nested), nested)
    if origin in (tuple, list, Sequence) or expected in (tuple, list):
        return _convert_list(value, origin or expected, arguments, where, key, wrong)
    if origin in (dict, Mapping) or expected in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise wrong
        item = arguments[1] if arguments else Any
        return {name: _convert(entry, item, where, f"{key}.{name}") for name, entry in value.items()}
    if expected is float and type(value) is int:
        return float(value)
    if expected is Path and isinstance(value, str):
        return Path(value)
    if type(value) is not expected:
        raise wrong
    return value


def _convert_union(value: Any, arms: Sequence[Any], where: str, key: str, wrong: ValueError) -> Any:
    if isinstance(value, Mapping):
        # The table's own complaint ("unknown key ...") says more than "must be a table or nothing".
        for arm in arms:
            if dataclasses.is_dataclass(arm):
                return _convert(value, arm, where, key)
    for arm in sorted(arms, key=lambda arm: arm is not type(value)):
        try:
            return _convert(value, arm, where, key)
        except ValueError:
            continue
    raise wrong


def _convert_list(
    value: Any, kind: Any, arguments: tuple[Any, ...], where: str, key: str, wrong: ValueError
) -> tuple[Any, ...] | list[Any]:
    if not isinstance(value, list):
        raise wrong
    fixed_length = kind is tuple and arguments and arguments[-1] is not Ellipsis
    if fixed_length and len(value) != len(arguments):
        raise wrong
    expected = arguments if fixed_length else (arguments[0] if arguments else Any,) * len(value)
    items = [
        _convert(item, one, where, f"{key}[{i}]") for i, (item, one) in enumerate(zip(value, expected, strict=True))
    ]
    return items if kind is list else tuple(items)


def _describe(expected: Any) -> str:
    """An expected type in words that fit "must be ..."."""
    words = {bool: "true or false", int: "an integer", float: "a number", str: "text", Path: "a path", Any: "anything"}
    origin, arguments = get_origin(expected), get_args(expected)
    if expected in words:
        return words[expected]
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(arm) for arm in arguments if arm is not type(None))
    if origin is Literal:
        return "one of " + ", ".join(_format_value(choice) for choice in arguments)
    if origin is tuple and arguments and arguments[-1] is not Ellipsis:
        return f"a list of {len(arguments)}: " + ", ".join(_describe(one) for one in arguments)
    if origin in (tuple, list, Sequence) or expected in (tuple, list):
        return f"a list (each {_describe(arguments[0])})" if arguments else "a list"
    return "a table"


def _describe_value(value: Any) -> str:
    kinds = {bool: "", int: "the integer ", float: "the number ", str: "the text ", list: "the list ", dict: "a table "}
    return f"{kinds.get(type(value), '')}{_format_value(value)}"


def _format_key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _format_value(key)


def _format_value(value: Any) -> str:
    if dataclasses.is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str | Path):
        # JSON's escapes are TOML's, except that TOML also wants DEL escaped.
        return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, Mapping):
        pairs = (f"{_format_key(key)} = {_format_value(item)}" for key, item in value.items() if item is not None)
        return "{ " + ", ".join(pairs) + " }" if value else "{}"
    if isinstance(value, Sequence):
        return "[" + ", ".join(_format_value(item) for item in value) + "]"
    return repr(value) if isinstance(value, int | float) else str(value)
