"""The run folder: what was run, from what, how it went, and the state to go on from."""

from strop.runs.checkpoints import Checkpoint, load_training_state, resolve, verify
from strop.runs.folder import RunFolder
from strop.runs.interrupt import Interrupt
from strop.runs.lineage import list_runs, render_list, render_run, render_tree, show, tree
from strop.runs.metrics import read_lines
from strop.runs.progress import Progress
from strop.runs.seeds import derive_seed, generator
from strop.runs.start import Start, start_run

__all__ = [
    "Checkpoint",
    "Interrupt",
    "Progress",
    "RunFolder",
    "Start",
    "derive_seed",
    "generator",
    "list_runs",
    "load_training_state",
    "read_lines",
    "render_list",
    "render_run",
    "render_tree",
    "resolve",
    "show",
    "start_run",
    "tree",
    "verify",
]
