"""`strop STAGE RECIPE.toml`, as in `strop grpo recipe.toml`: a recipe, flags over it, one run."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from strop.cli.config import read_toml, read_values, to_toml
from strop.cli.flags import parse_stage_flags

STAGES = {
    "pretrain": "strop.stages.pretrain",
    "sft": "strop.stages.sft",
    "ppo": "strop.stages.ppo",
    "reward-model": "strop.stages.reward_model",
    "dpo": "strop.stages.dpo",
    "grpo": "strop.stages.grpo",
    "ttrl": "strop.stages.ttrl",
    "selfplay": "strop.stages.selfplay",
}
"""Stage name -> the module with its Config and train()."""


def run(command: str, args: Sequence[str]) -> int:
    stage = load_stage(command)
    if not args or args[0] in ("-h", "--help"):
        parse_stage_flags(stage.Config, {}, ["--help"], prog=f"strop {command} RECIPE.toml", where="", name="RECIPE")
    if args[0].startswith("-"):
        raise ValueError(f"the recipe comes first: strop {command} RECIPE.toml {args[0]} ...")
    recipe = Path(args[0])
    values = read_values(read_toml(recipe), stage.Config, str(recipe))
    prog = f"strop {command} {recipe}"
    call = parse_stage_flags(stage.Config, values, args[1:], prog=prog, where=str(recipe), name=recipe.stem)
    if call.print_config:
        print(to_toml(call.config), end="")
        return 0
    folder = stage.train(call.config, name=call.name, runs_dir=call.runs_dir, resume=call.resume)
    where = "" if call.runs_dir == Path("runs") else f" --runs-dir {call.runs_dir}"
    hints = {"reward-model": "strop runs report", "selfplay": "play against it: strop play"}
    hint = f"{hints.get(command, 'talk to it: strop chat')} {folder.name}"
    print(f"{folder}  ({hint}{where})")
    return 0


def load_stage(name: str) -> ModuleType:
    return importlib.import_module(STAGES[name])
