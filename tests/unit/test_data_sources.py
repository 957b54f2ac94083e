"""Sources: every kind of file gives the same rows with their places, and a bad one an error that names the place."""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import lzma
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from strop.data.sources import load_rows, source_hash, stream_rows, stream_texts

ROWS = [{"prompt": "1 + 1 =", "answer": "2"}, {"prompt": 'say "hé\nllo"', "answer": "hé\nllo, x"}]


def json_lines(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def write(path: Path, kind: str, rows: list[dict]) -> str:
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif kind == "csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif kind == "list":
        path.write_text(json.dumps(rows, indent=1))
    else:
        path.write_bytes(json_lines(rows))
    return str(path)


@pytest.mark.parametrize(
    ("name", "kind", "places"),
    [
        ("a.jsonl", "lines", ["1", "2"]),
        ("a.json", "lines", ["1", "2"]),
        ("a.json", "list", ["row 1", "row 2"]),
        ("a.csv", "csv", ["2", "3"]),
        ("a.parquet", "parquet", ["row 1", "row 2"]),
    ],
)
def test_every_kind_of_file_gives_the_same_rows_and_their_places(tmp_path, name, kind, places):
    source = write(tmp_path / name, kind, ROWS)
    rows = load_rows(source)
    assert list(rows) == ROWS
    assert [rows.where(index) for index in range(2)] == [f"{source}:{place}" for place in places]
    assert rows.file(1) == source
    assert rows.content_hash == hashlib.sha256(Path(source).read_bytes()).hexdigest()


@pytest.mark.parametrize(("suffix", "compress"), [(".gz", gzip.compress), (".xz", lzma.compress)])
def test_compressed_files_read_the_same_and_a_cut_short_one_is_named(tmp_path, suffix, compress):
    path = tmp_path / f"a.JSONL{suffix}"
    many = [{"text": f"row {number}"} for number in range(2000)]
    path.write_bytes(compress(json_lines(many)))
    assert list(load_rows(str(path))) == many
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match=r"a\.JSONL\.\wz: broken or cut-short compressed file after line \d+"):
        load_rows(str(path))


def test_a_text_file_is_one_document_unless_separators_divide_it(tmp_path):
    whole = tmp_path / "whole.txt"
    whole.write_bytes("\ufeff\r\nOne.\r\n\r\n  Two.\n\n".encode())
    rows = load_rows(str(whole))
    assert (list(rows), rows.where(0)) == ([{"text": "One.\n\n  Two."}], f"{whole}:2")

    divided = tmp_path / "divided.txt"
    divided.write_text("<|endoftext|>\nfirst\nline <|endoftext|> inside\n<|endoftext|>\n\n<|endoftext|>\n\nsecond\n")
    assert list(stream_texts(str(divided))) == [
        (f"{divided}:2", "first\nline <|endoftext|> inside"),
        (f"{divided}:8", "second"),
    ]


def test_a_folder_is_its_files_in_sorted_order_without_hidden_or_foreign_ones(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / ".cache").mkdir()
    (tmp_path / "b.txt").write_text("bee")
    (tmp_path / "sub" / "a.jsonl").write_text('{"text": "ay"}\n')
    (tmp_path / "README.md").write_text("not data")
    (tmp_path / ".cache" / "x.txt").write_text("hidden")
    rows = load_rows(str(tmp_path))
    assert [(rows.where(index), row["text"]) for index, row in enumerate(rows)] == [
        (f"{tmp_path}/b.txt:1", "bee"),
        (f"{tmp_path}/sub/a.jsonl:1", "ay"),
    ]
    before = rows.content_hash
    (tmp_path / "README.md").write_text("changed")
    assert source_hash(str(tmp_path)) == before
    (tmp_path / "b.txt").rename(tmp_path / "c.txt")
    assert source_hash(str(tmp_path)) != before


def test_the_order_of_a_folder_is_not_the_order_of_its_making(tmp_path):
    names = [f"{number * 37 % 50:02d}.txt" for number in range(50)]
    for name in names:
        (tmp_path / name).write_text(name)
    assert [row["text"] for row in load_rows(str(tmp_path))] == sorted(names)


def test_csv_places_are_the_lines_where_records_begin(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('text\n"two\nlines"\n\nlast\n')
    rows = load_rows(str(path))
    assert [rows.where(index) for index in range(2)] == [f"{path}:2", f"{path}:5"]


def test_structs_of_parquet_lose_the_nulls_that_arrow_adds(tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": "hi"}], "extra": None},
        {"messages": [{"role": "tool", "content": "4", "name": "add"}], "extra": "x"},
    ]
    assert list(load_rows(write(tmp_path / "a.parquet", "parquet", rows))) == rows


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"a": 1}\n\n{"a": 1,}\n', r"a\.jsonl:3: broken JSON"),
        ("a.jsonl", b'{"a": 1}\n[1]\n', r"a\.jsonl:2: expected a JSON object .* found list"),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', r"a\.jsonl:2: not UTF-8"),
        ("a.jsonl", b"", r"a\.jsonl: the file is empty"),
        ("a.json", b"[]", r"a\.json: the file is empty"),
        ("a.json", b'[{"a": 1},\n{"a" 2}]', r"a\.json:2: broken JSON"),
        ("a.json", b'[{"a": 1}, 2]', r"a\.json:row 2: expected an object"),
        ("a.json", b'{\n "a": 1\n}', r"a\.json:1: broken JSON"),
        ("a.txt", b" \n\n", r"a\.txt: the file is empty"),
        ("a.csv", b"a,b\n1,2\n1,2,3\n", r"a\.csv:3: 3 values, but the header has 2"),
        ("a.csv", b"a,b,a\n1,2,3\n", r"a\.csv:1: the header names a column twice"),
        ("a.csv", b'a,b\n1,"2\n', r"a\.csv:2: broken CSV"),
        ("a.csv", b"a,b\n", r"a\.csv: the file is empty"),
        ("a.parquet", b"PAR1 not really", r"a\.parquet: cannot be read as Parquet"),
        ("a.docx", b"x", r"a\.docx: unknown kind of file; expected \.txt"),
        ("a.parquet.gz", b"x", r"a\.parquet\.gz: unknown kind of file"),
    ],
)
def test_a_bad_file_is_an_error_that_names_the_place(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_rows(str(tmp_path / name))


def test_a_missing_file_is_answered_with_the_nearest_one(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=r"trian\.jsonl does not exist\. Did you mean .*data/train\.jsonl\?"):
        load_rows(str(tmp_path / "data" / "trian.jsonl"))
    with pytest.raises(ValueError, match=r"dta/train\.jsonl does not exist\. Did you mean .*/data\?"):
        load_rows(str(tmp_path / "dta" / "train.jsonl"))
    with pytest.raises(ValueError, match=r"holds train\.jsonl"):
        load_rows(str(tmp_path / "data" / "corpus.txt"))


def test_a_split_of_a_file_and_a_folder_without_data_are_refused(tmp_path):
    (tmp_path / "a.md").write_text("x")
    with pytest.raises(ValueError, match=r"the folder holds no \.txt"):
        load_rows(str(tmp_path))
    with pytest.raises(ValueError, match="only hf: sources have splits"):
        load_rows(str(tmp_path), split="train")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"txt": "a"}', r"a\.jsonl:2: column 'text' is missing; the row has 'txt'"),
        ('{"text": 5}', r"a\.jsonl:2: column 'text' must be text, found int"),
        ('{"text": " \\n"}', r"a\.jsonl:2: column 'text' is empty"),
        ('{"text": "ab\\ud83d"}', r"a\.jsonl:2: column 'text' holds half a character .* at 2"),
    ],
)
def test_a_row_without_usable_text_is_named(tmp_path, row, message):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n' + row + "\n")
    with pytest.raises(ValueError, match=message):
        list(stream_texts(str(path)))


def test_rows_are_streamed_not_collected(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\nbroken\n')
    stream = stream_rows(str(path))
    assert next(stream)[1] == {"text": "fine"}
    with pytest.raises(ValueError, match=r"a\.jsonl:2"):
        next(stream)


@pytest.fixture
def hub_folder(tmp_path, monkeypatch) -> Path:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_bytes(json_lines(ROWS))
    (folder / "test.jsonl").write_bytes(json_lines(ROWS[:1]))
    return folder


def test_hub_sources_have_splits_places_and_a_hash_of_their_rows(hub_folder):
    test = load_rows(f"hf:{hub_folder}:test")
    train = load_rows(f"hf:{hub_folder}", split="train")
    assert (list(test), list(train)) == (ROWS[:1], ROWS)
    assert train.where(1) == f"hf:{hub_folder}:train:row 2"
    assert train.file(1) == f"hf:{hub_folder}:train"
    assert train.content_hash == source_hash(f"hf:{hub_folder}:train") != test.content_hash
    assert list(stream_rows(f"hf:{hub_folder}:test")) == [(f"hf:{hub_folder}:test:row 1", ROWS[0])]


def test_hub_errors_say_what_to_choose(hub_folder):
    with pytest.raises(ValueError, match=r"choose one of its splits: hf:.*:train, hf:.*:test"):
        load_rows(f"hf:{hub_folder}")
    with pytest.raises(ValueError, match="choose one of its splits"):
        load_rows(f"hf:{hub_folder}:validation")
    with pytest.raises(ValueError, match="names split 'test', but split 'train' was asked for"):
        load_rows(f"hf:{hub_folder}:test", split="train")
    with pytest.raises(ValueError, match=r"cannot load .*Check the name"):
        load_rows(f"hf:{hub_folder}/nothing-here:test")
    with pytest.raises(ValueError, match="expected hf:NAME"):
        load_rows("hf:a:b:c:d")
