"""`strop serve RUN`: frozen checkpoints behind an OpenAI-compatible server."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

if TYPE_CHECKING:
    from strop.serving import Limits, ServedModel


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Frozen checkpoints behind an OpenAI-compatible server, with a page to chat with one or compare two."""

    models: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="[NAME=]RUN[/STEP]|FOLDER")]
    """Runs, steps of runs, or Hugging Face folders, each served under NAME, else the run's or folder's own."""
    adapter: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """[NAME=]RUN[/STEP]|FOLDER of a LoRA adapter of the first model, served beside it; may be given again."""
    host: str = "127.0.0.1"
    """Address to listen on. Other than loopback needs --api-key-file."""
    port: int = 8000
    """Port to listen on; 0 takes a free one."""
    api_key_file: Path | None = None
    """File with the key that clients must send."""
    allowed_host: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """A further name under which clients may reach the server."""
    preferences: Path | None = None
    """Preference store (see strop rank) that the page's "prefer this one" writes to; made if it is not there."""

    num_slots: int = 32
    """Completions of one checkpoint that decode together."""
    max_length: int = 2048
    """Tokens of prompt and completion together."""
    max_queue: int = 256
    """Completions that may wait, of all clients together; further requests get 429."""
    request_seconds: float = 600.0
    """A request that takes longer is given up; so long SIGTERM waits for those under way."""

    runs_dir: Path = Path("runs")
    """Folder of all runs."""
    dtype: Literal["auto", "float32", "bfloat16", "int8"] = "auto"
    """Compute dtype; auto is whichever of float32 and bfloat16 multiplies faster on this machine."""
    device: str = "cpu"
    """cpu or cuda."""


def run(command: str, args: Sequence[str]) -> int:
    arguments = tyro.cli(Arguments, args=list(args), prog=f"strop {command}")
    if not arguments.models:
        raise ValueError("strop serve needs a checkpoint: RUN[/STEP] or a Hugging Face folder")
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ImportError(f"strop serve needs {error.name}: pip install 'strop[serve]'") from error
    key = None
    if arguments.api_key_file is not None:
        key = arguments.api_key_file.read_text(encoding="utf-8").strip()
    from strop.native.teams import in_own_thread
    from strop.serving import Limits
    from strop.serving.preferences import Preferences
    from strop.serving.server import serve

    limits = Limits(
        num_slots=arguments.num_slots,
        max_length=arguments.max_length,
        max_queue=arguments.max_queue,
        request_seconds=arguments.request_seconds,
    )
    models = in_own_thread(lambda: load_models(arguments, limits))
    with ExitStack() as stack:
        preferences = None
        if arguments.preferences is not None:
            from strop.ranking import PreferenceStore

            store = stack.enter_context(closing(PreferenceStore(arguments.preferences, create=True)))
            preferences = Preferences(store)
        serve(
            models,
            limits=limits,
            host=arguments.host,
            port=arguments.port,
            allowed_hosts=arguments.allowed_host,
            key=key,
            preferences=preferences,
            on_ready=lambda url: print(f"{url}  (Ctrl-C finishes what is under way, and stops)", flush=True),
        )
    for served in models:
        print(f"{served.name}: weights {served.check_unchanged()[:16]}, unchanged", file=sys.stderr)
    return 0


def load_models(arguments: Arguments, limits: Limits) -> list[ServedModel]:
    """The checkpoints in the order given, then the adapters; ValueError for a name that comes twice."""
    from strop.models import compute_in
    from strop.models.adapters import is_adapter
    from strop.models.precision import name_of
    from strop.runs import resolve
    from strop.serving import serve_model

    dtype = compute_in(arguments.dtype, arguments.device)
    named = [(*name_and_reference(one), False) for one in arguments.models]
    named += [(*name_and_reference(one), True) for one in arguments.adapter]
    names = [name for name, _, _ in named]
    if double := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"the name {min(double)} comes twice: write NAME={named[names.index(min(double))][1]}")
    found = [(name, resolve(reference, arguments.runs_dir), is_extra) for name, reference, is_extra in named]
    models = []
    for name, checkpoint, is_extra in found:
        if is_extra and not is_adapter(checkpoint.path):
            raise ValueError(f"--adapter {name} is no LoRA adapter; name it without --adapter")
        base = found[0][1].path if is_extra else None
        served = serve_model(name, checkpoint, dtype=dtype, device=arguments.device, limits=limits, base=base)
        protection = "read-only" if served.is_protected else "not write-protected on this device"
        print(
            f"{name}: {checkpoint.path}, {name_of(dtype)}, weights {served.weights_sha256[:16]}, "
            f"{protection}, {served.engine.max_length} tokens",
            file=sys.stderr,
        )
        models.append(served)
    return models


def name_and_reference(reference: str) -> tuple[str, str]:
    """(name, RUN or folder): "base=runs/x" -> ("base", "runs/x"); a run is its own name, a folder its last part."""
    name, equals, rest = reference.partition("=")
    if equals and name and "/" not in name:
        return name, rest
    path = Path(reference)
    return (path.name if path.is_absolute() or path.is_dir() else reference), reference
