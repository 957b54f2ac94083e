"""Where a stage begins: a new run from a parent checkpoint, or an old one from its own newest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from strop.runs.checkpoints import Checkpoint, load_training_state, resolve
from strop.runs.folder import RunFolder


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """The run folder, open for writing, and what to begin with."""

    run: RunFolder
    parent: Checkpoint | None
    """What the run started from; None for a model made from scratch."""
    resumed: Checkpoint | None
    """The run's own checkpoint to go on from; None at the very beginning."""

    @property
    def step(self) -> int:
        """Finished updates."""
        return 0 if self.resumed is None or self.resumed.step is None else self.resumed.step

    @property
    def model_folder(self) -> Path:
        """The folder to load policy and tokenizer from. A run from scratch has none until its first checkpoint."""
        source = self.resumed or self.parent
        assert source is not None, "a model made from scratch has no folder yet"
        return source.path

    def training_state(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Tensors and JSON state of the checkpoint to go on from; None at the very beginning."""
        return None if self.resumed is None else load_training_state(self.resumed)


def start_run(
    runs_dir: Path,
    name: str,
    *,
    stage: str,
    config: Any,
    init_from: str,
    data_hashes: Mapping[str, str],
    seed: int,
    resume: bool,
) -> Start:
    """A new run, or with resume=True the existing one, cut back to its newest checkpoint.

    A run that was killed before its first checkpoint starts again from its parent. ValueError as RunFolder.create,
    RunFolder.resume and resolve; also when the parent is no longer the checkpoint that the run started from.
    """
    if not resume:
        parent = resolve(init_from, runs_dir) if init_from else None
        run = RunFolder.create(
            runs_dir, name, stage=stage, config=config, parent=parent, data_hashes=data_hashes, seed=seed
        )
        return Start(run=run, parent=parent, resumed=None)
    run = RunFolder.resume(runs_dir, name, config=config, data_hashes=data_hashes)
    try:
        parent = _recorded_parent(run, runs_dir)
        resumed = run.latest_checkpoint()
        run.rewind_to(None if resumed is None else resumed.step)
    except BaseException:
        run.close()
        raise
    return Start(run=run, parent=parent, resumed=resumed)


def _recorded_parent(run: RunFolder, runs_dir: Path) -> Checkpoint | None:
    record = run.info["parent"]
    if record is None:
        return None
    parent = resolve(f"{record['run']}/{record['step']}" if record["run"] else record["folder"], runs_dir)
    if parent.content_hash != record["content_hash"]:
        raise ValueError(
            f"run {run.name} started from {parent.path}, whose content has changed since: restore it, or start anew"
        )
    return parent
