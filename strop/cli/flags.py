"""Flags over a recipe: every field of a stage's Config is a flag of its command."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import tyro

from strop.cli.config import TOML_NAMES, build, required_fields

_UNSET: Any = object()


@dataclass(frozen=True, kw_only=True)
class StageCall:
    """One call of a stage, as the command line describes it."""

    config: Any
    name: str
    runs_dir: Path
    resume: bool
    print_config: bool


def parse_stage_flags(
    config_class: type, values: Mapping[str, Any], args: Sequence[str], *, prog: str, where: str, name: str
) -> StageCall:
    """A stage's call: `values` (what the recipe sets) with the flags in `args` over them.

    The Config is built once, after the flags, so that its own checks see the final values and a required field may come
    from either side. Exits with status 2 on an unknown flag (naming the nearest), and 0 on --help.
    """
    recipe_only = _recipe_only_fields(config_class)
    for argument in args:
        field = re.split("[=.]", argument.removeprefix("--"))[0].replace("-", "_")
        if argument.startswith("--") and field in recipe_only:
            raise ValueError(f"--{field.replace('_', '-')}: '{field}' is a table; set it in the recipe")
    flag_class = _flag_class(config_class, recipe_only)
    # tyro reports a missing flag; a missing table is `build`'s to report, after --help had its chance.
    required = {name: _UNSET if name in recipe_only else tyro.MISSING for name in required_fields(config_class)}

    @dataclass(frozen=True, kw_only=True)
    class Call:
        config: Any
        name: str
        """Name of the run; its folder is RUNS_DIR/NAME."""
        runs_dir: Path
        """Folder of all runs."""
        resume: Annotated[bool, tyro.conf.FlagCreatePairsOff]
        """Continue the run of that name where its last checkpoint left it."""
        print_config: Annotated[bool, tyro.conf.FlagCreatePairsOff]
        """Print the recipe that results from the file and the flags, and stop."""

    # The type of `config` is known only now, and a local name cannot stand in a postponed annotation.
    Call.__annotations__["config"] = Annotated[flag_class, tyro.conf.arg(name="")]
    default = Call(
        config=flag_class(**{**required, **values}), name=name, runs_dir=Path("runs"), resume=False, print_config=False
    )
    call = tyro.cli(Call, args=list(args), prog=prog, default=default)
    merged = {field.name: getattr(call.config, field.name) for field in dataclasses.fields(config_class)}
    merged = {name: value for name, value in merged.items() if value is not _UNSET}
    return StageCall(
        config=build(config_class, merged, where),
        name=call.name,
        runs_dir=call.runs_dir,
        resume=call.resume,
        print_config=call.print_config,
    )


def _flag_class(config_class: type, recipe_only: Sequence[str]) -> type:
    """`config_class` as tyro sees it: without its own checks, some flags renamed, recipe-only fields hidden."""
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    annotations: dict[str, Any] = dict.fromkeys(recipe_only, tyro.conf.SuppressFixed[tyro.conf.Fixed[Any]])
    hints = typing.get_type_hints(config_class, include_extras=True)
    for name, flag in TOML_NAMES.items():
        if name in fields:
            annotations[name] = Annotated[hints[name], tyro.conf.arg(name=flag)]
    namespace: dict[str, Any] = {
        "__annotations__": annotations,
        "__doc__": config_class.__doc__,
        "__module__": config_class.__module__,
        "__post_init__": lambda self: None,
    }
    for name in annotations:
        default, factory = fields[name].default, fields[name].default_factory
        if default is not dataclasses.MISSING:
            namespace[name] = default
        elif factory is not dataclasses.MISSING:
            namespace[name] = dataclasses.field(default_factory=factory)
    return dataclass(frozen=True, kw_only=True)(type(config_class.__name__, (config_class,), namespace))


def _recipe_only_fields(config_class: type) -> list[str]:
    """Fields that hold free-form tables, which have no honest form on a command line."""
    hints = typing.get_type_hints(config_class)
    return [field.name for field in dataclasses.fields(config_class) if _holds_table(hints[field.name])]


def _holds_table(hint: Any) -> bool:
    """A nested Config is not such a table (its fields are flags: --sampling.top-p), but a list of them is."""
    if get_origin(hint) in (dict, Mapping) or hint in (dict, Mapping, Any):
        return True
    return any(_holds_table(argument) or dataclasses.is_dataclass(argument) for argument in get_args(hint))
