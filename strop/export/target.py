"""Where an export goes: it is there whole or not at all, and nothing is overwritten unasked."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer

from strop.models import CausalLM, save_model
from strop.models.folders import read_json
from strop.runs.files import sync
from strop.tokenizer import Tokenizer

FOLDER_DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
"""--dtype of a Hugging Face folder."""


def check_target(target: Path, *, replace: bool = False, source: Path | None = None) -> None:
    """Raise ValueError unless `target` is free, or may be replaced.

    Only what looks like an export is ever replaced, a file or a folder with a config.json, and never the source itself
    or a folder that holds it.
    """
    if not target.exists():
        return
    if not replace:
        raise ValueError(
            f"{target} exists already; remove it or name another {'folder' if target.is_dir() else 'file'}"
        )
    if target.is_dir() and not (target / "config.json").is_file():
        raise ValueError(f"{target} is a folder without a config.json, no model: --force does not remove it")
    if source is not None and source.resolve().is_relative_to(target.resolve()):
        raise ValueError(f"{target} holds the model that is to be exported: name another target")


@contextmanager
def new_target(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """A path beside `target` to write a file or folder at; it becomes the target when the block ends without an error.

    Raises ValueError as check_target does.
    """
    check_target(target, replace=replace)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as work:
        partial = Path(work) / target.name
        yield partial
        for path in sorted(partial.rglob("*"), reverse=True) if partial.is_dir() else ():
            sync(path)
        sync(partial)
        check_target(target, replace=replace)
        if target.is_dir() or (target.exists() and partial.is_dir()):
            os.rename(target, Path(work) / "replaced")  # a file takes another's place in one step, a folder cannot
        os.replace(partial, target)
    sync(target.parent)


def write_folder(
    model: CausalLM, tokenizer: Tokenizer, folder: Path, *, dtype: torch.dtype | None = None
) -> tuple[str, ...]:
    """Write model and tokenizer as a Hugging Face folder; dtype None keeps the model's own. Returns what to beware of.

    The model itself is cast. Raises ValueError for values that float16 cannot hold.
    """
    if dtype is not None:
        assert isinstance(model, nn.Module)
        if dtype == torch.float16:
            check_float16(model)
        model.to(dtype)
    save_model(model, folder)
    tokenizer.save(folder)
    if auto_tokenizer_splits_alike(tokenizer, folder):
        return ()
    model_type = read_json(folder / "config.json")["model_type"]
    return (
        f"AutoTokenizer splits text by the rules of {model_type} whatever the folder says: open this tokenizer with "
        "transformers.PreTrainedTokenizerFast.from_pretrained",
    )


def auto_tokenizer_splits_alike(tokenizer: Tokenizer, folder: Path) -> bool:
    """Whether AutoTokenizer opens what was saved; beside some model types it rebuilds the splitting rules."""
    found: Any = AutoTokenizer.from_pretrained(folder)
    if not hasattr(found, "backend_tokenizer"):
        return False
    saved, opened = (json.loads(one.backend_tokenizer.to_str()) for one in (tokenizer.hf, found))
    return all(saved[part] == opened[part] for part in ("normalizer", "pre_tokenizer", "model", "decoder"))


def check_float16(model: nn.Module) -> None:
    """Raise ValueError naming the first parameter with a value beyond float16's 65504, which would become infinite."""
    for name, parameter in model.named_parameters():
        largest = parameter.detach().abs().max()
        if largest > torch.finfo(torch.float16).max:
            raise ValueError(f"{name} has the value {float(largest):g}, more than f16 holds: use --dtype bf16 or f32")
