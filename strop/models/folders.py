"""Model folders in Hugging Face's layout: JSON files and safetensors, whole or in shards. Nothing else is opened."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, TensorSpec, safe_open, serialize_file
from torch import Tensor

MAX_SHARD_BYTES = 5_000_000_000
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def check_folder(folder: Path) -> None:
    """Raise ValueError, saying what is there instead, unless the folder holds a config.json."""
    if not folder.exists():
        raise ValueError(f"there is no folder {folder}")
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file; a model is a folder with config.json and {_SINGLE}")
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is no model folder: it has no config.json, only {_listing(folder)}")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ValueError naming file and line when it is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: broken JSON: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a JSON {type(value).__name__}, not an object")
    return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


class TensorFolder:
    """The tensors of a folder by name, each read from disk only when asked for."""

    def __init__(self, folder: Path) -> None:
        self._handles: dict[str, Any] = {}
        if (folder / _INDEX).is_file():
            weight_map = read_json(folder / _INDEX).get("weight_map")
            if not isinstance(weight_map, dict):
                raise ValueError(f"{folder / _INDEX} has no weight_map")
            shards: dict[str, list[str]] = {}
            for name, shard in weight_map.items():
                if not isinstance(shard, str) or not re.fullmatch(r"[\w.-]+", shard):
                    raise ValueError(
                        f"{folder / _INDEX}: weight_map names the file {shard!r}, which is not in this folder"
                    )
                shards.setdefault(shard, []).append(name)
            for shard, names in shards.items():
                handle = _open(folder / shard)
                absent = sorted(set(names) - set(handle.keys()))
                if absent:
                    raise ValueError(f"{folder / shard} lacks {some(absent)}, which {_INDEX} places there")
                self._handles.update(dict.fromkeys(names, handle))
        elif (folder / _SINGLE).is_file():
            handle = _open(folder / _SINGLE)
            self._handles.update(dict.fromkeys(handle.keys(), handle))
        elif any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
            raise ValueError(
                f"{folder} holds its weights in a pickle ({_listing(folder)}), which could run any code and is never "
                "opened; convert it with transformers where you trust it: "
                "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
            )
        else:
            raise ValueError(f"{folder} has no weights: neither {_SINGLE} nor {_INDEX}, only {_listing(folder)}")
        self.folder = folder

    def __iter__(self) -> Iterator[str]:
        return iter(self._handles)

    def __contains__(self, name: str) -> bool:
        return name in self._handles

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._handles[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Raises ValueError for anything but plain floats: fp8 and integers need scales that nobody applies here."""
        stored = self._handles[name].get_slice(name).get_dtype()
        if stored not in _FLOATS:
            raise ValueError(f"{self.folder}: {name} is stored as {stored}; only {', '.join(_FLOATS)} are read")
        return _FLOATS[stored]

    def read(self, name: str) -> Tensor:
        return self._handles[name].get_tensor(name)


def write_tensors(
    folder: Path, tensors: Iterable[tuple[str, Tensor]], *, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write model.safetensors, or shards of at most max_shard_bytes and their index.

    Contiguous CPU tensors go to disk from where they are; others are copied one shard at a time.
    """
    shards: list[list[tuple[str, Tensor]]] = [[]]
    size = total = 0
    for name, tensor in tensors:
        if shards[-1] and size + tensor.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append((name, tensor))
        size += tensor.nbytes
        total += tensor.nbytes
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = _SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map.update((name, file) for name, _ in shard)
        on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in shard}
        specs = {
            name: TensorSpec(
                dtype=str(tensor.dtype).removeprefix("torch."),
                shape=tensor.shape,
                data_ptr=tensor.data_ptr(),
                data_len=tensor.nbytes,
            )
            for name, tensor in on_cpu.items()
        }
        serialize_file(specs, folder / file, metadata={"format": "pt"})
    if len(shards) > 1:
        write_json(folder / _INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def some(names: Iterable[str], limit: int = 8) -> str:
    """The first few names and how many more there are, for an error message."""
    names = list(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _open(path: Path) -> Any:
    if not path.is_file():
        raise ValueError(f"{path} is missing, though {_INDEX} names it: the copy is incomplete")
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is cut short or damaged ({error}): copy or download it again") from error


def _listing(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    return some(names) if names else "nothing: it is empty"
