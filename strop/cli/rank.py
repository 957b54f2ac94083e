"""`strop rank STORE`: sample answers, let people rank them in a browser, write the rankings for training."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from strop.cli.frozen import SamplingArguments

if TYPE_CHECKING:
    from strop.ranking import Agreement, PreferenceStore, Share

Flag = tyro.conf.FlagCreatePairsOff[bool]


@dataclass(frozen=True, kw_only=True)
class Arguments(SamplingArguments):
    """Answers of one or more checkpoints, ranked by people in a browser. STORE alone opens the page again."""

    store: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="STORE")]
    """The file that holds prompts, answers and rankings; made if it is not there."""
    prompts: str | None = None
    """Sample answers to the prompts of this data source (text, or messages) before serving."""
    from_: Annotated[tuple[str, ...], tyro.conf.arg(name="from"), tyro.conf.UseAppendAction] = ()
    """RUN[/STEP] or a Hugging Face folder that answers them; give it again to compare several."""
    num_completions: int = 4
    """Answers per prompt, of all checkpoints together: 2 to 9. With 2 the page asks A, B, tie or both bad."""
    active: Flag = False
    """Sample a batch at a time while the page is open, each from the newest checkpoint of --from."""
    batch_size: int = 16
    """Prompts per batch of --active; the next is sampled when half of them are left."""
    sample_only: Flag = False
    """Sample, and stop without serving."""

    overlap: float | None = None
    """Share of the items that several people rank, to measure agreement. Kept in the store, as the next four."""
    people: int | None = None
    """How many people rank an item of the overlap."""
    repeats: float | None = None
    """Share of a person's items that come a second time, in reversed order."""
    gold_share: float | None = None
    """Share of a person's items that are gold."""
    gold: str | None = None
    """Add the rows of this listwise file as gold items: their ranks are the right answer."""

    export: tuple[Literal["trl", "kto", "listwise"], Path] | None = None
    """Write the rankings in this format to this JSONL file, and stop."""
    held_out: float = 0.0
    """Share of the prompts whose lines --export writes to NAME.held_out.jsonl instead."""
    import_: Annotated[str | None, tyro.conf.arg(name="import")] = None
    """Read rankings from a file of any of the three formats, and stop."""
    report: Flag = False
    """Print agreement, and how often each checkpoint wins, and stop."""

    host: str = "127.0.0.1"
    """Address to listen on. Other than loopback needs --token-file."""
    port: int = 8417
    """Port to listen on; 0 takes a free one."""
    token_file: Path | None = None
    """File with the access token that people must type in."""
    allowed_host: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """A further name under which browsers may reach the page."""

    runs_dir: Path = Path("runs")
    """Folder of all runs."""
    dtype: Literal["auto", "float32", "bfloat16", "int8"] = "auto"
    """Compute dtype of the checkpoints; auto is whichever of float32 and bfloat16 multiplies faster on this machine."""
    device: str = "cpu"
    """cpu or cuda."""


SAMPLING_FLAGS = (
    *(field.name for field in dataclasses.fields(SamplingArguments)),
    *("from_", "num_completions", "active", "batch_size", "sample_only", "runs_dir", "dtype", "device"),
)
SERVING_FLAGS = ("host", "port", "token_file", "allowed_host")

SETTINGS = {"overlap": "overlap", "people": "people", "repeats": "repeats", "gold_share": "gold"}
"""Flag -> the field of the store's Settings that it changes."""


def run(command: str, args: Sequence[str]) -> int:
    arguments = tyro.cli(Arguments, args=list(args), prog=f"strop {command}")
    is_serving = not (arguments.export or arguments.import_ or arguments.report or arguments.sample_only)
    check_flags(arguments, is_serving)
    if is_serving:
        require_server()
    from strop.ranking import PreferenceStore

    is_filled = arguments.prompts is not None or arguments.import_ is not None
    with closing(PreferenceStore(arguments.store, create=is_filled)) as store:
        changes = {field: getattr(arguments, flag) for flag, field in SETTINGS.items()}
        changes |= {"newest_first": True} if arguments.active else {}
        store.change_settings(**{field: value for field, value in changes.items() if value is not None})
        if arguments.gold is not None:
            from strop.ranking import load_gold

            print(f"{load_gold(store, arguments.gold)} gold items")
        if arguments.import_ is not None:
            import_file(store, arguments.import_)
        if arguments.prompts is not None:
            return sample_and_serve(arguments, store, is_serving)
        if arguments.export is not None:
            export_file(store, *arguments.export, held_out=arguments.held_out)
        if arguments.report:
            print("\n".join(report_lines(store)))
        if is_serving:
            serve(arguments, store)
    return 0


def check_flags(arguments: Arguments, is_serving: bool) -> None:
    """ValueError for a flag that would have no effect, or is out of range."""
    defaults = {field.name: field.default for field in dataclasses.fields(Arguments)}
    given = [name for name, default in defaults.items() if getattr(arguments, name) != default]
    if arguments.prompts is not None and not arguments.from_:
        raise ValueError("--prompts needs --from RUN[/STEP] or a Hugging Face folder: the checkpoint that answers them")
    allowed = {
        "--prompts FILE": SAMPLING_FLAGS if arguments.prompts is None else (),
        "--export FORMAT FILE": ("held_out",) if arguments.export is None else (),
        "serving the page": () if is_serving else (*SERVING_FLAGS, "active"),
    }
    for needed, names in allowed.items():
        for name in given:
            if name in names:
                raise ValueError(f"--{name.rstrip('_').replace('_', '-')} has no effect without {needed}")
    if "batch_size" in given and not arguments.active:
        raise ValueError("--batch-size has no effect without --active")
    if (arguments.export or arguments.report) and arguments.prompts is not None:
        raise ValueError("--export and --report write what is in the store: leave --prompts out")
    if not 2 <= arguments.num_completions <= 9:
        raise ValueError(f"--num-completions {arguments.num_completions}: from 2 to 9, one key each")
    if arguments.batch_size < 1:
        raise ValueError(f"--batch-size {arguments.batch_size}: at least 1")


def require_server() -> None:
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ImportError(f"the ranking page needs {error.name}: pip install 'strop[serve]'") from error


def sample_and_serve(arguments: Arguments, store: PreferenceStore, is_serving: bool) -> int:
    from strop.cli.rank_sampling import load_tasks, sample_all, sample_batch, sampling_in_background

    tasks = load_tasks(arguments)
    if not arguments.active:
        sample_all(arguments, store, tasks)
        if is_serving:
            serve(arguments, store)
        return 0
    sample_batch(arguments, store, tasks)
    with sampling_in_background(arguments, store, tasks):
        serve(arguments, store)
    return 0


def serve(arguments: Arguments, store: PreferenceStore) -> None:
    from strop.ranking.serve import serve as serve_store

    if not store.query("SELECT 1 FROM items LIMIT 1"):
        raise ValueError(f"{store.path} holds nothing to rank; add items with --prompts FILE --from RUN")
    token = None
    if arguments.token_file is not None:
        token = arguments.token_file.read_text(encoding="utf-8").strip()

    def announce(url: str) -> None:
        print(f"{url}  (Ctrl-C stops; strop rank {arguments.store} opens it again)", flush=True)

    serve_store(
        store,
        host=arguments.host,
        port=arguments.port,
        allowed_hosts=arguments.allowed_host,
        token=token,
        on_ready=announce,
    )


def import_file(store: PreferenceStore, source: str) -> None:
    from strop.ranking import import_rankings

    report = import_rankings(store, source)
    known = f", {report.num_known} of them known already" if report.num_known else ""
    print(f"{source}: {report.num_rankings} rankings ({report.format}){known}")


def export_file(store: PreferenceStore, format: Literal["trl", "kto", "listwise"], path: Path, held_out: float) -> None:
    from strop.ranking import export_rankings
    from strop.ranking.export import held_out_path

    report = export_rankings(store, format, path, held_out=held_out)
    store.record("export", f"{format} {path.name}, {report.num_lines} lines")
    print(f"{path}: {report.num_lines - report.num_held_out} lines of {report.num_rankings} rankings")
    if held_out:
        print(f"{held_out_path(path)}: {report.num_held_out} lines of other prompts")
    if report.num_silent:
        print(f"{report.num_silent} rankings say nothing in this format (ties only, or all bad)", file=sys.stderr)
    if report.is_one_sided:
        print("every label is the same: a stage that learns from labels needs both", file=sys.stderr)


def report_lines(store: PreferenceStore) -> list[str]:
    """Agreement, the people, and the checkpoints, as text."""
    from strop.ranking import agreement, win_rates

    found: Agreement = agreement(store)
    alpha = "nothing to compare" if found.alpha is None else f"{found.alpha:.3f}"
    lines = [
        f"rankings            {found.num_rankings}",
        f"alpha               {alpha}   ({found.num_overlapping} items ranked by two or more)",
        f"raw agreement       {share_text(found.raw_agreement)}",
        f"first shown wins    {share_text(found.first_wins)}",
        f"same word again     {share_text(found.consistency)}",
        f"right on gold       {share_text(found.gold)}",
    ]
    lines += [f"skipped             {count} {reason}" for reason, count in sorted(found.skipped.items())]
    for person in found.people:
        seconds = "" if person.median_seconds is None else f", {person.median_seconds:.1f} s per item"
        lines.append(
            f"{person.name}: {person.num_rankings} rankings, {person.num_skipped} skipped{seconds}, "
            f"gold {share_text(person.gold)}, again {share_text(person.consistency)}"
        )
    lines += [f"{model} wins {share_text(share)}" for model, share in win_rates(store).items()]
    return lines


def share_text(share: Share | None) -> str:
    if share is None:
        return "nothing to compare"
    return f"{share.value:.3f}   [{share.low:.3f}, {share.high:.3f}] of {share.count}"
