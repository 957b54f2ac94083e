"""The run folder, runs/NAME: the one place where a stage leaves what it did and finds what it needs to go on."""

from __future__ import annotations

import difflib
import errno
import re
import shutil
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

from torch import Tensor

from strop.runs.checkpoints import (
    PARTIAL,
    Checkpoint,
    list_steps,
    prune,
    read_checkpoint,
    remove_partials,
    step_folder_name,
    verify,
    write_checkpoint,
)
from strop.runs.files import Lock, read_json_object, write_json
from strop.runs.metrics import LineLog, plain
from strop.runs.origin import git_origin, machine, recordable, versions, without_home

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter

Status = Literal["running", "finished", "interrupted", "failed"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class RunFolder:
    """One run: run.json, metrics.jsonl, samples.jsonl, tensorboard/, checkpoints/step-000120/.

    `create` and `resume` give the one writer (a lock keeps a second process out), `open` a view for reading. As a
    context manager the writer records how the run ended. The order inside a step is fixed: everything is logged, then
    `save_checkpoint`, so that a resumed run has exactly the lines of an uninterrupted one. A step is the number of
    finished updates: the first line is of step 1, and step 0 is before any update.
    """

    def __init__(self, path: Path, *, lock: Lock | None = None) -> None:
        """Use `create`, `open` or `resume`."""
        self.path = path
        self.name = path.name
        self.info: dict[str, Any] = read_json_object(path / "run.json")
        """The content of run.json."""
        self._lock = lock
        self._metrics = LineLog(path / "metrics.jsonl") if lock else None
        self._samples = LineLog(path / "samples.jsonl") if lock else None
        self._board: SummaryWriter | None = None
        self._last_step = -1
        self._saved_step = -1

    @classmethod
    def create(
        cls,
        runs_dir: str | Path,
        name: str,
        *,
        stage: str,
        config: Any,
        parent: Checkpoint | None,
        data_hashes: Mapping[str, str],
        seed: int,
    ) -> Self:
        """A new run with status "running". config is a dict or dataclass, recorded as resolved.

        ValueError when the name is taken or cannot be a folder's name.
        """
        path = Path(runs_dir) / name
        if not _NAME.fullmatch(name):
            raise ValueError(f"--name {name!r}: use letters, digits, '.', '_' and '-', not starting with a sign")
        taken = f"run {name} exists already in {runs_dir}: continue it with --resume, or give another --name"
        if path.exists():
            raise ValueError(taken)
        git = git_origin()
        info = {
            "name": name,
            "stage": stage,
            "status": "running",
            "created": datetime.now(UTC).isoformat(timespec="microseconds"),
            "seed": seed,
            "config": recordable(config),
            "parent": None if parent is None else _parent_record(parent),
            "data_hashes": dict(data_hashes),
            "git": None if git is None else {"revision": git[0], "diff": "git.diff" if git[1] else None},
            "versions": versions(),
            "machine": machine(),
        }
        partial = path.with_name(f".{name}{PARTIAL}")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        if git is not None and git[1]:
            (partial / "git.diff").write_text(git[1], encoding="utf-8")
        write_json(partial / "run.json", info)
        for log in ("metrics.jsonl", "samples.jsonl", ".lock"):
            (partial / log).touch()
        try:
            partial.rename(path)
        except OSError as error:
            shutil.rmtree(partial)
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
            raise ValueError(taken) from None
        return cls(path, lock=Lock(path / ".lock"))

    @classmethod
    def open(cls, runs_dir: str | Path, name: str) -> Self:
        """An existing run, for reading. ValueError, with the nearest names, when there is none."""
        path = Path(runs_dir) / name
        if not _NAME.fullmatch(name) or not (path / "run.json").is_file():
            names = sorted(found.parent.name for found in Path(runs_dir).glob("*/run.json"))
            near = difflib.get_close_matches(name, names, n=3, cutoff=0.5) or names[:10]
            known = f"near it: {', '.join(near)}" if near else "there is none yet"
            raise ValueError(f"no run {name!r} in {runs_dir} ({known})")
        return cls(path)

    @classmethod
    def resume(
        cls,
        runs_dir: str | Path,
        name: str,
        *,
        config: Any,
        data_hashes: Mapping[str, str],
        growable: Collection[str] = ("num_steps",),
    ) -> Self:
        """An existing run, to go on writing to. What a killed save left behind is deleted.

        Next: checkpoint = run.latest_checkpoint(); run.rewind_to(checkpoint.step if checkpoint else None).
        ValueError when another process writes to it, when the data is not the same, or when config differs in a field
        other than the growable ones, which may become larger (the new value is then recorded).
        """
        found = cls.open(runs_dir, name)
        try:
            lock = Lock(found.path / ".lock")
        except BlockingIOError:
            raise ValueError(f"run {name} is being written to by a living process: stop that one first") from None
        try:
            info = found.info
            new_config = recordable(config)
            _check_config(name, info["config"], new_config, growable)
            changed = _differences(info["data_hashes"], dict(data_hashes))
            if changed:
                raise ValueError(
                    f"run {name} cannot resume: the content of {', '.join(changed)} has changed since it was started. "
                    "Restore it, or start a new run with another --name"
                )
            now = versions()
            if now != info["versions"]:
                differing = ", ".join(_differences(info["versions"], now))
                warnings.warn(
                    f"run {name} was started with other versions of {differing}: it need not continue bit for bit",
                    stacklevel=2,
                )
            remove_partials(found.path / "checkpoints")
            info |= {"config": new_config, "status": "running"}
            info.pop("error", None)
            write_json(found.path / "run.json", info)
            return cls(found.path, lock=lock)
        except BaseException:
            lock.release()
            raise

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl and the numbers to TensorBoard.

        Keys that start with "time/" are for what depends on the clock (seconds, tokens per second); every other value
        must be the same whenever the run is repeated. inf and nan are written as null.
        """
        self._begin(step)
        assert self._metrics is not None
        row = plain(metrics)
        self._metrics.append(step, row)
        board = self._tensorboard()
        for key, value in row.items():
            if isinstance(value, int | float):
                board.add_scalar(key, value, step)

    def log_samples(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append one line per row to samples.jsonl: prompt, completion, reward parts, advantage."""
        self._begin(step)
        assert self._samples is not None
        for row in rows:
            self._samples.append(step, row)

    def save_checkpoint(
        self,
        step: int,
        write_model: Callable[[Path], None],
        tensors: Mapping[str, Tensor],
        state: Mapping[str, Any],
        *,
        keep_last: int | None = None,
        keep_steps: Collection[int] = (),
    ) -> Checkpoint:
        """Save the state after `step` updates, whole or not at all; nothing may be logged for `step` afterwards.

        write_model(folder) writes the Hugging Face files; tensors and state (JSON) are what `load_training_state`
        returns. A step that is saved already is verified and left as it is, since a repeated run would save the same.
        keep_last deletes all but that many of the newest checkpoints, never the newest nor one of keep_steps.
        OSError when the disk is full: the checkpoints before it are intact.
        """
        assert self._metrics is not None and self._samples is not None, "open for reading only"
        assert step >= self._last_step, f"checkpoint of step {step} after step {self._last_step}"
        folder = self.path / "checkpoints"
        if step in list_steps(folder):
            checkpoint = self.checkpoint(step)
            verify(checkpoint)
        else:
            self._metrics.sync()
            self._samples.sync()
            write_checkpoint(folder, step, write_model=write_model, tensors=tensors, state=state)
            checkpoint = self.checkpoint(step)
        self._last_step = self._saved_step = step
        if keep_last is not None:
            prune(folder, keep_last=keep_last, keep_steps=keep_steps)
        return checkpoint

    def checkpoint(self, step: int) -> Checkpoint:
        """The checkpoint of a step, not verified."""
        return read_checkpoint(self.path / "checkpoints" / step_folder_name(step), run_name=self.name)

    def latest_checkpoint(self) -> Checkpoint | None:
        """The newest checkpoint, every file compared with its hash; None when none was saved yet.

        ValueError when it is damaged. An older one is never taken in its place: the message names it, and deleting
        the damaged folder is how the user chooses it.
        """
        steps = list_steps(self.path / "checkpoints")
        if not steps:
            return None
        checkpoint = self.checkpoint(steps[-1])
        verify(checkpoint)
        return checkpoint

    def rewind_to(self, step: int | None) -> None:
        """Cut metrics.jsonl and samples.jsonl back to the lines up to `step`, the checkpoint's; None cuts all of them.

        TensorBoard is told to hide what came after it.
        """
        assert self._metrics is not None and self._samples is not None, "open for reading only"
        self._metrics.keep_until(step)
        self._samples.keep_until(step)
        self._last_step = self._saved_step = -1 if step is None else step
        self._close_board()
        self._tensorboard(purge_step=self._last_step + 1)

    def set_status(self, status: Status, error: str | None = None) -> None:
        """Record how the run is doing. A run that says "running" without a living writer was killed."""
        assert self._lock is not None, "open for reading only"
        self.info |= {"status": status}
        if error is not None:
            self.info |= {"error": without_home(error)}
        write_json(self.path / "run.json", self.info)

    def close(self) -> None:
        """Close the logs and let another process write."""
        self._close_board()
        if self._metrics and self._samples and self._lock:
            self._metrics.close()
            self._samples.close()
            self._lock.release()
            self._metrics = self._samples = self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._lock is not None:
                if error is None:
                    self.set_status("finished")
                elif isinstance(error, KeyboardInterrupt | SystemExit):
                    self.set_status("interrupted")
                else:
                    self.set_status("failed", f"{type(error).__name__}: {error}")
        finally:
            self.close()

    def _begin(self, step: int) -> None:
        assert self._lock is not None, "open for reading only"
        assert step >= self._last_step, f"step {step} logged after step {self._last_step}"
        assert step > self._saved_step, f"step {step} logged after its checkpoint: a resumed run would lack the line"
        self._last_step = step

    def _tensorboard(self, purge_step: int | None = None) -> SummaryWriter:
        if self._board is None:
            from torch.utils.tensorboard.writer import SummaryWriter

            self._board = SummaryWriter(str(self.path / "tensorboard"), purge_step=purge_step)
        return self._board

    def _close_board(self) -> None:
        if self._board is not None:
            self._board.close()
            self._board = None


def _parent_record(parent: Checkpoint) -> dict[str, Any]:
    record = {"run": parent.run_name, "step": parent.step, "content_hash": parent.content_hash}
    return record if parent.run_name else record | {"folder": without_home(str(parent.path.absolute()))}


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    return sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))


def _check_config(name: str, old: Mapping[str, Any], new: Mapping[str, Any], growable: Collection[str]) -> None:
    wrong = [
        f"{field} (was {old.get(field)!r}, now {new.get(field)!r})"
        for field in _differences(old, new)
        if not (field in growable and _has_grown(old.get(field), new.get(field)))
    ]
    if wrong:
        raise ValueError(
            f"run {name} cannot resume with a different config: {', '.join(wrong)}. Only {', '.join(growable)} may "
            "grow; restore the others, or start a new run with another --name"
        )


def _has_grown(old: Any, new: Any) -> bool:
    return isinstance(old, int | float) and isinstance(new, int | float) and new > old
