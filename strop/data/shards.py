"""A corpus as memory-mapped token files: built once, then read in any order without ever being in memory as a whole.

FOLDER/index.json           format, dtype, tokenizer hash; per source its name, content hash, files and their hashes
FOLDER/000.tokens.bin       uint16 (vocabularies up to 65536) or uint32, little-endian: every document, EOS after each
FOLDER/000.documents.bin    uint64, shape (documents + 1, 2): where each document begins, in tokens and in UTF-8
                            bytes of its text; the last row holds the totals
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import IO, Any

import numpy as np

from strop.data.examples import require_eos
from strop.data.sources import file_hash, source_hash, stream_texts
from strop.tokenizer import Tokenizer

FORMAT = 1
PIECE_CHARACTERS = 1 << 20
SEAM_CHARACTERS = 256

OnProgress = Callable[[str, int, int], None]
"""Called with (source, documents so far, tokens so far)."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SourceTokens:
    """The chosen documents of one source; the arrays are views of files."""

    source: str
    content_hash: str
    tokens: np.ndarray
    """uint16 or uint32, shape (all tokens of the source,)."""
    documents: np.ndarray
    """uint64, shape (all documents of the source + 1, 2): begin of each in tokens and in bytes."""
    chosen: np.ndarray
    """int64: numbers of the documents that belong to this (half of a) split."""

    @property
    def starts(self) -> np.ndarray:
        """int64: the first token of each chosen document."""
        return self.documents[self.chosen, 0].astype(np.int64)

    @property
    def lengths(self) -> np.ndarray:
        """int64: tokens of each chosen document, its EOS included."""
        return (self.documents[self.chosen + 1, 0] - self.documents[self.chosen, 0]).astype(np.int64)

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of the chosen documents' text: the denominator of bits per byte."""
        return int((self.documents[self.chosen + 1, 1] - self.documents[self.chosen, 1]).sum())

    def document(self, index: int) -> np.ndarray:
        """The tokens of the index-th chosen document, its EOS included."""
        begin, end = (int(self.documents[self.chosen[index] + step, 0]) for step in (0, 1))
        return self.tokens[begin:end]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TokenShards:
    """The tokens of several sources. Made by build_shards, opened with TokenShards.open."""

    sources: tuple[SourceTokens, ...]
    tokenizer_hash: str

    @property
    def num_documents(self) -> int:
        return sum(len(source.chosen) for source in self.sources)

    @property
    def num_tokens(self) -> int:
        """Tokens of all chosen documents, each EOS included."""
        return sum(int(source.lengths.sum()) for source in self.sources)

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of their text."""
        return sum(source.num_bytes for source in self.sources)

    @staticmethod
    def open(folder: str | Path) -> TokenShards:
        """The shards in a folder, every file checked against the size and the sha256 in its index.

        Raises ValueError naming the file that is missing, cut short or changed.
        """
        folder = Path(folder)
        index = _read_index(folder)
        dtype = np.dtype(index["dtype"])
        sources: list[SourceTokens] = []
        for entry in index["sources"]:
            for file in entry["files"]:
                _check_file(folder / file["name"], file)
            tokens_file, documents_file = (folder / file["name"] for file in entry["files"])
            documents = np.memmap(documents_file, dtype="<u8", mode="r").reshape(-1, 2)
            sources.append(
                SourceTokens(
                    source=entry["source"],
                    content_hash=entry["content_hash"],
                    tokens=np.memmap(tokens_file, dtype=dtype, mode="r"),
                    documents=documents,
                    chosen=np.arange(len(documents) - 1),
                )
            )
        return TokenShards(sources=tuple(sources), tokenizer_hash=index["tokenizer_hash"])

    def split(self, validation_fraction: float, *, seed: int = 0) -> tuple[TokenShards, TokenShards]:
        """(training, validation): of every source, that fraction of its documents, at least one, held out at random.

        Whole documents, so that no token of one is in both halves. Raises ValueError for a source of one document.
        """
        if not 0 < validation_fraction < 1:
            raise ValueError(f"validation_fraction must be between 0 and 1, got {validation_fraction}")
        training: list[SourceTokens] = []
        validation: list[SourceTokens] = []
        for number, source in enumerate(self.sources):
            count = len(source.chosen)
            if count < 2:
                raise ValueError(
                    f"{source.source}: one document cannot be split into training and validation; name a validation "
                    "source, or put <|endoftext|> on a line of its own between its documents"
                )
            held_out = min(max(1, round(count * validation_fraction)), count - 1)
            order = np.random.default_rng([seed, number]).permutation(count)
            validation.append(replace(source, chosen=source.chosen[np.sort(order[:held_out])]))
            training.append(replace(source, chosen=source.chosen[np.sort(order[held_out:])]))
        return (
            TokenShards(sources=tuple(training), tokenizer_hash=self.tokenizer_hash),
            TokenShards(sources=tuple(validation), tokenizer_hash=self.tokenizer_hash),
        )


def build_shards(
    sources: Sequence[str], tokenizer: Tokenizer, folder: str | Path, *, on_progress: OnProgress | None = None
) -> TokenShards:
    """The shards of these sources in `folder`: opened if they are there and current, otherwise built.

    Current means the same tokenizer and the same sources with the same content, by hash. They are written to
    FOLDER.partial, synced and renamed, so that a kill leaves either no shards or whole ones. A document's tokens are
    those of its text (BOS first for tokenizers that use it) and EOS.

    Raises ValueError for a bad row (naming it), and for a folder with something else in it, which is left alone.
    """
    if not sources:
        raise ValueError("no source to tokenize: name at least one file, folder or hf:NAME")
    folder = Path(folder)
    hashes = [source_hash(source) for source in sources]
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / "index.json").is_file())):
        raise ValueError(f"{folder} exists and holds no token shards; name another folder, or remove it")
    if (folder / "index.json").is_file() and _is_current(_read_index(folder), sources, hashes, tokenizer):
        return TokenShards.open(folder)
    partial = folder.with_name(folder.name + ".partial")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    try:
        dtype = "<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4"
        entries = [
            _write_source(number, source, content_hash, tokenizer, dtype, partial, on_progress)
            for number, (source, content_hash) in enumerate(zip(sources, hashes, strict=True))
        ]
        index = {"format": FORMAT, "dtype": dtype, "tokenizer_hash": tokenizer.content_hash, "sources": entries}
        with (partial / "index.json").open("wb") as file:
            file.write(json.dumps(index, indent=1).encode())
            _sync(file)
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
        descriptor = os.open(folder.parent, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return TokenShards.open(folder)


def _is_current(index: dict[str, Any], sources: Sequence[str], hashes: Sequence[str], tokenizer: Tokenizer) -> bool:
    built = [(entry["source"], entry["content_hash"]) for entry in index["sources"]]
    return index["tokenizer_hash"] == tokenizer.content_hash and built == list(zip(sources, hashes, strict=True))


def _read_index(folder: Path) -> dict[str, Any]:
    path = folder / "index.json"
    try:
        index = json.loads(path.read_bytes())
        known = index["format"] == FORMAT
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing: {folder} holds no token shards") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is broken ({error}); remove {folder} to build it again") from error
    if not known:
        raise ValueError(f"{path} has format {index['format']}, this version reads {FORMAT}; remove {folder}")
    return index


def _check_file(path: Path, expected: dict[str, Any]) -> None:
    if not path.is_file():
        raise ValueError(f"{path} is missing; remove {path.parent} to build it again")
    size = path.stat().st_size
    if size != expected["size"]:
        raise ValueError(
            f"{path} has {size} bytes instead of {expected['size']} (cut short?); remove {path.parent} to build it anew"
        )
    if file_hash(path) != expected["sha256"]:
        raise ValueError(f"{path} was changed after it was written; remove {path.parent} to build it again")


def _write_source(
    number: int,
    source: str,
    content_hash: str,
    tokenizer: Tokenizer,
    dtype: str,
    folder: Path,
    on_progress: OnProgress | None,
) -> dict[str, Any]:
    eos_id = require_eos(tokenizer)
    names = [f"{number:03d}.tokens.bin", f"{number:03d}.documents.bin"]
    num_tokens = num_bytes = num_documents = 0
    with (folder / names[0]).open("wb") as tokens_file, (folder / names[1]).open("wb") as documents_file:
        documents_file.write(np.array([0, 0], dtype="<u8").tobytes())
        for _, text in stream_texts(source):
            for ids in chain(encode_pieces(tokenizer, text), ([eos_id],)):
                tokens_file.write(np.array(ids, dtype=dtype).tobytes())
                num_tokens += len(ids)
            num_bytes += len(text.encode())
            num_documents += 1
            documents_file.write(np.array([num_tokens, num_bytes], dtype="<u8").tobytes())
            if on_progress is not None:
                on_progress(source, num_documents, num_tokens)
        _sync(tokens_file)
        _sync(documents_file)
    files = [
        {"name": name, "size": (folder / name).stat().st_size, "sha256": file_hash(folder / name)} for name in names
    ]
    return {"source": source, "content_hash": content_hash, "files": files}


def encode_pieces(tokenizer: Tokenizer, text: str) -> Iterator[list[int]]:
    """The ids of a document in pieces, since a tokenizer needs some hundred bytes of memory per token of its input.

    A piece ends at a line feed after about PIECE_CHARACTERS where the cut changes no token: the surroundings of the
    cut must encode to the same ids in one go as in two. Where no cut of ten is harmless, the piece grows.
    """
    encode = tokenizer.encode_prompt  # of the first piece only: it puts BOS first where the tokenizer wants it
    begin = search = tries = 0
    while len(text) - begin > PIECE_CHARACTERS:
        search = max(search, begin + PIECE_CHARACTERS // 2)
        cut = text.find("\n", search) + 1
        if not cut or cut == len(text):
            break
        left, right = text[max(begin, cut - SEAM_CHARACTERS) : cut], text[cut : cut + SEAM_CHARACTERS]
        if tokenizer.encode(left) + tokenizer.encode(right) == tokenizer.encode(left + right):
            yield encode(text[begin:cut])
            encode = tokenizer.encode
            begin, search, tries = cut, cut, 0
        else:
            tries += 1
            search = cut if tries % 10 else cut + PIECE_CHARACTERS
    yield encode(text[begin:])


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())
