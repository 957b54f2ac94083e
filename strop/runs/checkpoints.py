"""Checkpoints: Hugging Face folders plus the training state, written whole or not at all, and verified when read."""

from __future__ import annotations

import difflib
import hashlib
import json
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from strop.runs.files import read_json_object, sha256_of, sync
from strop.runs.tensors import write_tensors

PARTIAL = ".partial"
_MANIFEST = "checkpoint.json"
_STATE_TENSORS = "training_state.safetensors"
_STATE_JSON = "training_state.json"
_CONFIGS = ("config.json", "adapter_config.json")
"""One of them makes a folder a model, or a LoRA adapter of one."""
_MODEL_SUFFIXES = (".json", ".safetensors", ".txt", ".model", ".jinja")


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A folder that a model can be loaded from, and where it comes from.

    Example: Checkpoint(path=Path("runs/sft/checkpoints/step-000120"), run_name="sft", step=120, content_hash="9f2c...")
    """

    path: Path
    run_name: str | None
    """None for a Hugging Face folder that no run made."""
    step: int | None
    """Updates finished when it was saved."""
    content_hash: str
    """SHA-256 over names and hashes of the model's files (weights, configuration, tokenizer), not the training state:
    two checkpoints with equal hashes are the same model."""


def step_folder_name(step: int) -> str:
    return f"step-{step:06d}"


def list_steps(folder: Path) -> list[int]:
    """The steps of the finished checkpoints in a run's checkpoints folder, ascending. Not verified."""
    if not folder.is_dir():
        return []
    names = [path.name.removeprefix("step-") for path in folder.glob("step-*") if path.is_dir()]
    return sorted(int(name) for name in names if name.isdecimal())


def write_checkpoint(
    folder: Path,
    step: int,
    *,
    write_model: Callable[[Path], None],
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
) -> None:
    """Make folder/step-N: everything goes into step-N.partial, is hashed and forced to disk, and then renamed.

    The rename is the moment at which the checkpoint exists. If anything goes wrong before it (a full disk, say) the
    partial folder is removed, the other checkpoints are untouched, and OSError says so.
    """
    target = folder / step_folder_name(step)
    partial = folder / (target.name + PARTIAL)
    try:
        partial.mkdir(parents=True)
        write_model(partial)
        write_tensors(partial / _STATE_TENSORS, tensors)
        (partial / _STATE_JSON).write_text(json.dumps(state), encoding="utf-8")
        paths = sorted(path for path in partial.rglob("*") if path.is_file())
        hashes = {path.relative_to(partial).as_posix(): sha256_of(path) for path in paths}
        sizes = {path.relative_to(partial).as_posix(): path.stat().st_size for path in paths}
        manifest = {
            "step": step,
            "content_hash": _content_hash(hashes),
            "files": {name: {"sha256": hashes[name], "bytes": sizes[name]} for name in hashes},
        }
        (partial / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        for path in (*paths, partial / _MANIFEST):
            sync(path)
        for path in (*(path for path in partial.rglob("*") if path.is_dir()), partial):
            sync(path)
        partial.rename(target)
        sync(folder)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if not isinstance(error, OSError | SafetensorError):
            raise
        steps = list_steps(folder)
        intact = f"{step_folder_name(steps[-1])} before it is intact" if steps else "there is none before it"
        raise OSError(
            f"checkpoint {target} was not saved ({error}); {intact}. Make room or repair the disk, then use --resume"
        ) from error


def prune(folder: Path, *, keep_last: int, keep_steps: Collection[int]) -> None:
    """Delete all but the newest keep_last checkpoints and those of keep_steps; the newest one always stays."""
    assert keep_last >= 1, "the newest checkpoint is never deleted"
    for step in list_steps(folder)[:-keep_last]:
        if step not in keep_steps:
            # Renamed first: a deletion cut short leaves a stale partial, not a damaged checkpoint.
            doomed = folder / (step_folder_name(step) + PARTIAL)
            (folder / step_folder_name(step)).rename(doomed)
            shutil.rmtree(doomed)


def remove_partials(folder: Path) -> None:
    """Delete what a killed save or deletion left behind. Only the run's writer may do this."""
    for path in folder.glob("*" + PARTIAL):
        shutil.rmtree(path)


def read_checkpoint(path: Path, *, run_name: str | None) -> Checkpoint:
    """The checkpoint in a folder, its content unread and unverified (`verify` does that)."""
    manifest = _read_manifest(path)
    return Checkpoint(path=path, run_name=run_name, step=manifest["step"], content_hash=manifest["content_hash"])


def verify(checkpoint: Checkpoint, *, model_only: bool = False) -> None:
    """Read every file and compare it with the hash written when it was saved; ValueError names the first that differs.

    model_only leaves out the training state, which is two to three times larger and of no use outside of --resume.
    A folder that no run saved has no recorded hashes; its content must still be what `resolve` saw.
    """
    path = checkpoint.path
    if not (path / _MANIFEST).is_file() and checkpoint.step is None:
        if _content_hash(_hash_model_files(path)) != checkpoint.content_hash:
            raise ValueError(f"{path} has changed since it was first read")
        return
    manifest = _read_manifest(path)
    if manifest["step"] != checkpoint.step or manifest["content_hash"] != checkpoint.content_hash:
        raise ValueError(f"{path / _MANIFEST} has changed since it was first read")
    for name, recorded in manifest["files"].items():
        if model_only and not _is_model_file(name):
            continue
        file = path / name
        if not file.is_file():
            raise ValueError(f"{file} is missing: {_damaged(path)}")
        if file.stat().st_size != recorded["bytes"]:
            raise ValueError(f"{file} has {file.stat().st_size} bytes, not {recorded['bytes']}: {_damaged(path)}")
        if sha256_of(file) != recorded["sha256"]:
            raise ValueError(f"{file} is not what was saved (its SHA-256 differs): {_damaged(path)}")


def load_training_state(checkpoint: Checkpoint) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the state that save_checkpoint got, on the CPU. JSON made lists of tuples and strings of keys."""
    path = checkpoint.path
    if not (path / _STATE_TENSORS).is_file():
        raise ValueError(f"{path} is a model without training state: a run can start --from it, but not resume in it")
    return load_file(path / _STATE_TENSORS), read_json_object(path / _STATE_JSON)


def resolve(reference: str, runs_dir: str | Path) -> Checkpoint:
    """The checkpoint that "RUN" (its newest), "RUN/120" (that step), or the folder of a model or adapter means.

    A name of a run is tried before a folder of the same name. The model's files are verified against their hashes.
    ValueError when there is no such thing, with the nearest run names or the steps that exist.
    """
    runs_dir = Path(runs_dir)
    name, slash, step_text = reference.rstrip("/").partition("/")
    if name and (runs_dir / name / "run.json").is_file() and (not slash or step_text.isdecimal()):
        folder = runs_dir / name / "checkpoints"
        steps = list_steps(folder)
        if not steps:
            raise ValueError(f"run {name} has no checkpoint yet")
        step = int(step_text) if slash else steps[-1]
        if step not in steps:
            raise ValueError(f"run {name} has no checkpoint at step {step}, but at {', '.join(map(str, steps))}")
        checkpoint = read_checkpoint(folder / step_folder_name(step), run_name=name)
        verify(checkpoint, model_only=True)
        return checkpoint
    path = Path(reference).expanduser()
    if any((path / config).is_file() for config in _CONFIGS):
        return _resolve_folder(path)
    if (path / "run.json").is_file():
        raise ValueError(f"{reference} is the folder of a run: name the run, {path.name}, or one of its checkpoints")
    names = sorted(path.parent.name for path in runs_dir.glob("*/run.json"))
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5) or names[:10]
    known = f"near it: {', '.join(near)}" if near else f"{runs_dir} holds no run"
    raise ValueError(f"{reference!r} is neither a run, a run/step, nor a folder with a config.json ({known})")


def _resolve_folder(path: Path) -> Checkpoint:
    if not (path / _MANIFEST).is_file():
        return Checkpoint(path=path, run_name=None, step=None, content_hash=_content_hash(_hash_model_files(path)))
    run_folder = path.absolute().parent.parent
    checkpoint = read_checkpoint(path, run_name=run_folder.name if (run_folder / "run.json").is_file() else None)
    verify(checkpoint, model_only=True)
    return checkpoint


def _is_model_file(name: str) -> bool:
    ours = (_MANIFEST, _STATE_JSON, _STATE_TENSORS)
    return "/" not in name and name.endswith(_MODEL_SUFFIXES) and name not in ours


def _hash_model_files(path: Path) -> dict[str, str]:
    return {file.name: sha256_of(file) for file in path.iterdir() if file.is_file() and _is_model_file(file.name)}


def _content_hash(hashes: Mapping[str, str]) -> str:
    lines = [f"{hashes[name]}  {name}\n" for name in sorted(hashes) if _is_model_file(name)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _read_manifest(path: Path) -> dict[str, Any]:
    """checkpoint.json, whose own content is checked against itself and the folder's name."""
    file = path / _MANIFEST
    try:
        manifest = read_json_object(file)
    except ValueError as error:
        raise ValueError(f"{error}: {_damaged(path)}") from None
    files, step = manifest.get("files"), manifest.get("step")
    if not isinstance(files, dict) or not isinstance(step, int) or not all(map(_is_file_entry, files.values())):
        raise ValueError(f"{file} is damaged: {_damaged(path)}")
    if _content_hash({name: entry["sha256"] for name, entry in files.items()}) != manifest.get("content_hash"):
        raise ValueError(f"{file} is damaged: {_damaged(path)}")
    if path.name.removeprefix("step-").isdecimal() and path.name != step_folder_name(step):
        raise ValueError(f"{file} says step {step}, unlike its folder: {_damaged(path)}")
    return manifest


def _is_file_entry(entry: object) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("sha256"), str) and isinstance(entry.get("bytes"), int)


def _damaged(path: Path) -> str:
    """The remedy. Going back is for the user to decide, so nothing falls back by itself."""
    step = path.name.removeprefix("step-")
    if not step.isdecimal():
        return "this folder is damaged, fetch it again"
    before = [earlier for earlier in list_steps(path.parent) if earlier < int(step)]
    if before:
        return f"this checkpoint is damaged. Delete {path} to go on from step {before[-1]}, the one before it"
    return f"this checkpoint is damaged and there is none before it. Delete {path} to start from the run's beginning"
