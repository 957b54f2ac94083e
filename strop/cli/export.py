"""`strop export`: a checkpoint for other runtimes, as a GGUF file or a merged Hugging Face folder."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

if TYPE_CHECKING:
    from strop.models import CausalLM
    from strop.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Write a checkpoint as one GGUF file (llama.cpp and what is built on it) or as one Hugging Face folder.

    A LoRA adapter is merged into its base. What the target's format cannot express is refused, by name.
    """

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN[/STEP]|FOLDER")]
    """A run (its newest checkpoint), a run's step, or the folder of a model or adapter."""
    path: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="PATH")]
    """The file (gguf) or folder (hf) to write."""
    to: Literal["gguf", "hf"]
    """gguf: weights, tokenizer and chat template in one file. hf: a folder that transformers opens."""
    dtype: Literal["same", "f32", "f16", "bf16", "q8_0"] = "same"
    """Of the matrices; same = as in the checkpoint. q8_0 (gguf only): 8 bits and a scale per 32 values."""
    check: tyro.conf.FlagCreatePairsOff[bool] = False
    """Open it with the other runtime (llama.cpp or transformers) and compare ids, logprobs and greedy text with ours.
    What differs is not written."""
    force: tyro.conf.FlagCreatePairsOff[bool] = False
    """Replace an existing file or model folder."""
    base: Path | None = None
    """The base model's folder, where an adapter does not name it or names a hub."""
    runs_dir: Path = Path("runs")
    """Folder of all runs."""


def run(command: str, args: Sequence[str]) -> int:
    arguments = tyro.cli(Arguments, args=list(args), prog=f"strop {command}")
    if arguments.dtype == "q8_0" and arguments.to != "gguf":
        raise ValueError("--dtype q8_0 is a format of GGUF: use --to gguf, or f32, f16 or bf16")

    from strop.export import check_target, new_target, require_runtime
    from strop.models import load_model, tokenizer_folder
    from strop.models.adapters import is_adapter
    from strop.runs import resolve
    from strop.tokenizer import Tokenizer

    if arguments.check:
        require_runtime(arguments.to)
    source = resolve(arguments.model, arguments.runs_dir).path
    check_target(arguments.path, replace=arguments.force, source=source)
    if arguments.base is not None and not is_adapter(source):
        raise ValueError(f"--base belongs to an adapter, but {source} is a whole model")
    model = load_model(source, dtype=None, base=arguments.base, frozen=True)
    tokenizer = Tokenizer.load(tokenizer_folder(source, base=arguments.base))
    tokenizer.check_fits(model.lm_head_weight.shape[0])
    dtype = stored_dtype(model) if arguments.dtype == "same" else arguments.dtype
    with new_target(arguments.path, replace=arguments.force) as partial:
        write = write_file if arguments.to == "gguf" else write_model_folder
        write(model, tokenizer, partial, dtype, is_checked=arguments.check)
    print(f"{arguments.path}  ({dtype})")
    return 0


def stored_dtype(model: CausalLM) -> str:
    """--dtype's name for what the checkpoint is stored in."""
    from strop.export import FOLDER_DTYPES

    names = {dtype: name for name, dtype in FOLDER_DTYPES.items()}
    if model.dtype not in names:
        raise ValueError(f"the checkpoint is stored as {model.dtype}: name a --dtype")
    return names[model.dtype]


def write_file(model: CausalLM, tokenizer: Tokenizer, path: Path, dtype: str, *, is_checked: bool) -> None:
    from strop.export import check_gguf, write_gguf
    from strop.models import Decoder

    for note in write_gguf(model, tokenizer, path, dtype=dtype, name=path.stem):
        print(f"note: {note}", file=sys.stderr)
    if is_checked:
        assert isinstance(model, Decoder)
        print(f"llama.cpp: {check_gguf(model, tokenizer, path, dtype=dtype)}", file=sys.stderr)


def write_model_folder(model: CausalLM, tokenizer: Tokenizer, path: Path, dtype: str, *, is_checked: bool) -> None:
    from strop.export import FOLDER_DTYPES, check_folder, write_folder

    for note in write_folder(model, tokenizer, path, dtype=FOLDER_DTYPES[dtype]):
        print(f"note: {note}", file=sys.stderr)
    if is_checked:
        print(f"transformers: {check_folder(model, tokenizer, path)}", file=sys.stderr)
