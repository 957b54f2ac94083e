"""Where a stage begins: a new run from a parent checkpoint, or an old one from its own newest."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch import Tensor

from strop.runs.checkpoints import PARTIAL, Checkpoint, list_steps, load_training_state, resolve
from strop.runs.folder import RunFolder
from strop.runs.metrics import read_lines


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """The run folder, open for writing, and what to begin with. As a context manager it is the run's (RunFolder), and
    a new run that bad input (ValueError) stops before its first step leaves no folder behind that blocks its name.
    """

    run: RunFolder
    parent: Checkpoint | None
    """What the run started from. None for a model made from scratch, and in a resumed run that needs it no longer."""
    resumed: Checkpoint | None
    """The run's own checkpoint to go on from; None at the very beginning."""
    is_new: bool

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

    def settle(self, key: str, decide: Callable[[], str]) -> str:
        """run.json's value of `key`, decided and written there the first time it is asked for.

        For what a measurement decides ("auto"): a second measurement, after a kill, might decide otherwise.
        """
        if key not in self.run.info:
            self.run.info[key] = decide()
            self.run.set_status("running")
        return self.run.info[key]

    def __enter__(self) -> Self:
        self.run.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.run.__exit__(kind, error, trace)
        if self.is_new and isinstance(error, ValueError) and not _has_step(self.run.path):
            # Renamed first: a deletion cut short leaves what the next run of this name clears away.
            doomed = self.run.path.with_name(f".{self.run.name}{PARTIAL}")
            self.run.path.rename(doomed)
            shutil.rmtree(doomed)


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
    keeps_parent: bool = False,
) -> Start:
    """A new run, or with resume=True the existing one, cut back to its newest checkpoint.

    A run that was killed before its first checkpoint starts again from its parent. Later the parent may be gone, unless
    keeps_parent says that the run needs it to the end (as the reference of a KL). ValueError as RunFolder.create,
    RunFolder.resume and resolve; also when the parent is no longer the checkpoint that the run started from.
    """
    if not resume:
        parent = resolve(init_from, runs_dir) if init_from else None
        run = RunFolder.create(
            runs_dir, name, stage=stage, config=config, parent=parent, data_hashes=data_hashes, seed=seed
        )
        return Start(run=run, parent=parent, resumed=None, is_new=True)
    run = RunFolder.resume(runs_dir, name, config=config, data_hashes=data_hashes)
    try:
        resumed = run.latest_checkpoint()
        parent = _recorded_parent(run, init_from, runs_dir) if resumed is None or keeps_parent else None
        run.rewind_to(None if resumed is None else resumed.step)
    except BaseException:
        run.close()
        raise
    return Start(run=run, parent=parent, resumed=resumed, is_new=False)


def _recorded_parent(run: RunFolder, init_from: str, runs_dir: Path) -> Checkpoint | None:
    record = run.info["parent"]
    if record is None:
        return None
    # A checkpoint named by its folder may belong to a run of another runs_dir.
    is_here = record["run"] and (runs_dir / record["run"] / "run.json").is_file()
    reference = f"{record['run']}/{record['step']}" if is_here else record.get("folder", init_from)
    parent = resolve(reference, runs_dir)
    if parent.content_hash != record["content_hash"]:
        raise ValueError(
            f"run {run.name} started from {parent.path}, whose content has changed since: restore it, or start anew"
        )
    return parent


def _has_step(run_folder: Path) -> bool:
    """Whether an update was logged or saved; step 0 is the evaluation before the first."""
    is_logged = any(line["step"] > 0 for line in read_lines(run_folder / "metrics.jsonl"))
    return is_logged or bool(list_steps(run_folder / "checkpoints"))
