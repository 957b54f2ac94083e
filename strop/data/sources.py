"""Files, folders and datasets -> rows, each with the place it came from, so that every later error can name it.

A source is what the user writes in a recipe:

    corpus.txt  corpus.txt.xz     documents; a line that holds only <|endoftext|> begins the next one, otherwise the
                                  whole file is one document (column "text")
    train.jsonl(.gz|.xz)          one JSON object per line
    train.json(.gz|.xz)           a list of objects, or one object per line
    train.csv(.gz|.xz)            with a header; every value is text
    train.parquet
    folder/                       every such file below it, in sorted order
    hf:NAME[:SPLIT]               datasets.load_dataset; hf:NAME:CONFIG:SPLIT where the dataset has configurations
"""

from __future__ import annotations

import csv
import difflib
import gzip
import hashlib
import json
import lzma
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, cast

Row = dict[str, Any]

DOCUMENT_SEPARATOR = "<|endoftext|>"
SUFFIXES = (".txt", ".jsonl", ".json", ".csv", ".parquet")
COMPRESSIONS = (".gz", ".xz")


class Rows(Sequence[Row]):
    """The rows of one source in memory (of an `hf:` source: memory-mapped), with their places and a content hash."""

    def __init__(self, rows: Sequence[Row], *, places: Sequence[str], source: str, content_hash: str) -> None:
        assert len(rows) == len(places), (len(rows), len(places))
        self._rows = rows
        self._places = places
        self.source = source
        self.content_hash = content_hash
        """sha256 of what was read: the files' bytes, or the rows of an `hf:` source. Goes into run.json."""

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Row:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self._rows[index]

    def where(self, index: int) -> str:
        """The place of a row: "train.jsonl:12" (line), or "train.parquet:row 12" where there are no lines; from 1."""
        return self._places[index]

    def file(self, index: int) -> str:
        """The file (or `hf:` split) of a row."""
        return file_of(self._places[index])


def file_of(where: str) -> str:
    """The file part of a place: "data/train.jsonl:12" -> "data/train.jsonl"."""
    return where.rpartition(":")[0]


def load_rows(source: str, *, split: str | None = None) -> Rows:
    """Every row of a source (module docstring: what a source may be).

    Raises ValueError for a missing file (naming the nearest that exists), an empty or broken one (naming the line), an
    unknown kind of file, a `split` where there are no splits.
    """
    if source.startswith("hf:"):
        name, dataset = _open_hub(source, split)
        places = [f"{name}:row {number}" for number in range(1, len(dataset) + 1)]
        rows = cast(Sequence[Row], _HubRows(dataset))
        return Rows(rows, places=places, source=source, content_hash=_hash_of_rows(rows))
    content_hash = source_hash(source, split=split)
    placed = list(stream_rows(source, split=split))
    return Rows(
        [row for _, row in placed],
        places=[place for place, _ in placed],
        source=source,
        content_hash=content_hash,
    )


def stream_rows(source: str, *, split: str | None = None) -> Iterator[tuple[str, Row]]:
    """(place, row) one after the other, holding no more than one document (of .json: one file) in memory."""
    if source.startswith("hf:"):
        name, dataset = _open_hub(source, split)
        for number, row in enumerate(_HubRows(dataset), start=1):
            yield f"{name}:row {number}", row
        return
    for path in _files(source, split):
        yield from _file_rows(path)


def stream_texts(source: str, *, split: str | None = None) -> Iterator[tuple[str, str]]:
    """(place, text) of a source of plain documents, for training a tokenizer or a base model.

    Raises ValueError for a row without a "text" column, or with an empty one.
    """
    for place, row in stream_rows(source, split=split):
        yield place, text_column(row, "text", place)


def text_column(row: Mapping[str, Any], column: str, where: str) -> str:
    """The text of a column, which must be there and not be blank."""
    if row.get(column) is None:
        raise ValueError(
            f"{where}: column {column!r} is missing; the row has {', '.join(map(repr, row)) or 'no columns'}. "
            f"Rename the column that holds it to {column!r}"
        )
    return checked_text(row[column], f"column {column!r}", where)


def checked_text(value: Any, name: str, where: str) -> str:
    """The value, if it is text that is not blank and can be encoded; `name` is what the error calls it."""
    if not isinstance(value, str):
        raise ValueError(f"{where}: {name} must be text, found {type(value).__name__}")
    if not value.strip():
        raise ValueError(f"{where}: {name} is empty; fill it or remove the row")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: {name} holds half a character (a lone surrogate) at {error.start}; remove it"
        ) from error
    return value


def source_hash(source: str, *, split: str | None = None) -> str:
    """sha256 of a file's bytes; of a folder's sorted relative names and file hashes; of `hf:` rows as JSON lines."""
    if source.startswith("hf:"):
        return _hash_of_rows(_HubRows(_open_hub(source, split)[1]))
    root = Path(source).expanduser()
    files = _files(source, split)
    if root.is_file():
        return file_hash(root)
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.relative_to(root).as_posix()}\0{file_hash(path)}\n".encode())
    return digest.hexdigest()


def file_hash(path: Path) -> str:
    """sha256 of a file's bytes as they lie on disk, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files(source: str, split: str | None) -> list[Path]:
    root = Path(source).expanduser()
    if split is not None:
        raise ValueError(
            f"{source}: split {split!r} was asked for, but only hf: sources have splits. Name the file itself"
        )
    if not root.exists():
        raise ValueError(f"{source} does not exist.{_nearest(root)}")
    if root.is_dir():
        files = sorted(
            path
            for path in root.rglob("*")
            if path.is_file()
            and _suffix(path) in SUFFIXES
            and not any(part.startswith(".") for part in path.relative_to(root).parts)
        )
        if not files:
            raise ValueError(f"{source}: the folder holds no {', '.join(SUFFIXES)} file")
        return files
    if _suffix(root) not in SUFFIXES:
        raise ValueError(
            f"{source}: unknown kind of file; expected {', '.join(SUFFIXES)} (all but .parquet also with "
            f"{' or '.join(COMPRESSIONS)}), a folder of them, or hf:NAME"
        )
    return [root]


def _suffix(path: Path) -> str:
    """The kind of a file: ".jsonl" for both train.jsonl and train.jsonl.xz, "" where it is none of ours."""
    name = path.name.lower()
    for compression in COMPRESSIONS:
        if name.endswith(compression):
            suffix = Path(name.removesuffix(compression)).suffix
            return "" if suffix == ".parquet" else suffix
    return Path(name).suffix


def _nearest(path: Path) -> str:
    """A sentence that names what exists closest to a missing path, at the first folder or file that is missing."""
    while path.parent != path and not path.parent.exists():
        path = path.parent
    if not path.parent.is_dir():
        return f" {path.parent} is not a folder"
    names = sorted(entry.name for entry in path.parent.iterdir())
    matches = difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)
    if matches:
        return f" Did you mean {path.parent / matches[0]}?"
    return f" {path.parent} holds {', '.join(names[:8]) or 'nothing'}{', ...' if len(names) > 8 else ''}"


def _file_rows(path: Path) -> Iterator[tuple[str, Row]]:
    readers = {
        ".txt": _text_rows,
        ".jsonl": _json_lines_rows,
        ".json": _json_rows,
        ".csv": _csv_rows,
        ".parquet": _parquet_rows,
    }
    is_empty = True
    for place, row in readers[_suffix(path)](path):
        is_empty = False
        yield place, row
    if is_empty:
        raise ValueError(
            f"{path}: the file is empty: it holds no row to train on; write rows into it, or name another file"
        )


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(line number from 1, line with its line feed), decompressed; decoded line by line so that an error has a line."""
    number = 0
    try:
        with _open(path) as file:
            for number, raw in enumerate(file, start=1):
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                yield number, line[:-2] + "\n" if line.endswith("\r\n") else line
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}:{number}: not UTF-8 ({error.reason} at byte {error.start}); convert the file"
        ) from error
    except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
        if isinstance(error, OSError) and not isinstance(error, gzip.BadGzipFile):
            raise
        raise ValueError(f"{path}: broken or cut-short compressed file after line {number} ({error})") from error


def _open(path: Path) -> IO[bytes]:
    if path.name.lower().endswith(".gz"):
        return cast(IO[bytes], gzip.open(path, "rb"))
    if path.name.lower().endswith(".xz"):
        return lzma.open(path, "rb")
    return path.open("rb")


def _text_rows(path: Path) -> Iterator[tuple[str, Row]]:
    document: list[str] = []
    first_line = 1
    for number, line in _lines(path):
        if line.strip() == DOCUMENT_SEPARATOR:
            if document:
                yield f"{path}:{first_line}", {"text": "".join(document).rstrip("\n")}
            document = []
        elif document or line.strip():
            if not document:
                first_line = number
            document.append(line)
    if document:
        yield f"{path}:{first_line}", {"text": "".join(document).rstrip("\n")}


def _json_lines_rows(path: Path) -> Iterator[tuple[str, Row]]:
    for number, line in _lines(path):
        if line.strip():
            place = f"{path}:{number}"
            yield place, _json_object(line, place)


def _json_object(text: str, place: str) -> Row:
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{place}: broken JSON ({error.msg} at column {error.colno}); fix or remove this line"
        ) from error
    if not isinstance(row, dict):
        raise ValueError(f"{place}: expected a JSON object with named columns, found {type(row).__name__}")
    return row


def _json_rows(path: Path) -> Iterator[tuple[str, Row]]:
    first = next((line for _, line in _lines(path) if line.strip()), "")
    if not first.lstrip().startswith("["):
        yield from _json_lines_rows(path)
        return
    try:
        rows = json.loads("".join(line for _, line in _lines(path)))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: broken JSON ({error.msg} at column {error.colno})") from error
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise ValueError(f"{path}:row {number}: expected an object with named columns, found {type(row).__name__}")
        yield f"{path}:row {number}", row


def _csv_rows(path: Path) -> Iterator[tuple[str, Row]]:
    reader = csv.reader((line for _, line in _lines(path)), strict=True)
    header: list[str] | None = None
    place = f"{path}:1"
    try:
        for fields in reader:
            if fields and header is None:
                header = fields
                if len(set(header)) != len(header):
                    raise ValueError(f"{place}: the header names a column twice: {', '.join(header)}")
            elif fields and header is not None:
                if len(fields) != len(header):
                    raise ValueError(f"{place}: {len(fields)} values, but the header has {len(header)} columns")
                yield place, dict(zip(header, fields, strict=True))
            place = f"{path}:{reader.line_num + 1}"
    except csv.Error as error:
        raise ValueError(f"{place}: broken CSV ({error}); quote the value, or use JSONL") from error


def _parquet_rows(path: Path) -> Iterator[tuple[str, Row]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path, memory_map=True) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}:row {number}", _without_nested_nulls(row)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: cannot be read as Parquet after row {number} ({error})") from error


def _without_nested_nulls(row: Row) -> Row:
    """The row without the null fields that Arrow gives every struct for keys that only other rows have."""

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: clean(item) for key, item in value.items() if item is not None}
        if isinstance(value, list):
            return [clean(item) for item in value]
        return value

    return {column: clean(value) for column, value in row.items()}


class _HubRows(Sequence[Row]):
    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Row:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _without_nested_nulls(self._dataset[index])


def _open_hub(source: str, split: str | None) -> tuple[str, Any]:
    """("hf:NAME:SPLIT", Dataset) of hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT; `split` may stand for SPLIT."""
    import datasets
    from datasets.exceptions import DatasetsError

    name, *rest = source.removeprefix("hf:").split(":")
    if not name or len(rest) > 2:
        raise ValueError(f"{source}: expected hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT")
    if rest and split is not None and rest[-1] != split:
        raise ValueError(f"{source}: the source names split {rest[-1]!r}, but split {split!r} was asked for")
    config = rest[0] if len(rest) == 2 else None
    split = rest[-1] if rest else split
    try:
        loaded = datasets.load_dataset(name, config)
    except (ValueError, OSError, DatasetsError) as error:
        raise ValueError(
            f"{source}: the datasets package cannot load {name!r} ({error}). Check the name, the configuration "
            "(hf:NAME:CONFIG:SPLIT) and the connection, or download it and name the files"
        ) from error
    splits = list(loaded)
    if split is None and len(splits) == 1:
        split = str(splits[0])
    if split is None or split not in splits:
        raise ValueError(f"{source}: choose one of its splits: {', '.join(f'hf:{name}:{choice}' for choice in splits)}")
    dataset = loaded[split]
    if len(dataset) == 0:
        raise ValueError(f"{source}: split {split!r} is empty")
    return ":".join(["hf", name, *([config] if config else []), split]), dataset


def _hash_of_rows(rows: Sequence[Row]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=repr).encode())
        digest.update(b"\n")
    return digest.hexdigest()
