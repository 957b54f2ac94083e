"""Token shards: what is stored, when it is rebuilt, and that damage is found and named."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from strop.data import shards as shards_module
from strop.data.shards import TokenShards, build_shards, encode_pieces
from strop.tokenizer import Tokenizer, train_bpe

TEXTS = ["The sky is blue.", "Grass: 12 green blades\n\nand one more, é.", "x"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(TEXTS, 300)


@pytest.fixture
def sources(tmp_path) -> list[str]:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    (tmp_path / "b.txt").write_text("one document alone")
    return [str(tmp_path / "a.jsonl"), str(tmp_path / "b.txt")]


def test_documents_come_back_with_an_eos_each(tmp_path, tokenizer, sources):
    shards = build_shards(sources, tokenizer, tmp_path / "shards")
    first, second = shards.sources
    documents = [first.document(index).tolist() for index in range(3)]
    assert [tokenizer.decode(ids[:-1]) for ids in documents] == TEXTS
    assert [ids[-1] for ids in documents] == [tokenizer.eos_id] * 3
    assert tokenizer.decode(second.document(0).tolist()) == "one document alone"
    assert first.lengths.tolist() == [len(ids) for ids in documents]
    assert shards.num_tokens == sum(map(len, documents)) + len(second.document(0))
    assert shards.num_bytes == sum(len(text.encode()) for text in [*TEXTS, "one document alone"])
    assert shards.num_documents == 4
    assert first.tokens.dtype == np.uint16
    assert isinstance(first.tokens, np.memmap)
    assert (tmp_path / "shards" / "000.tokens.bin").stat().st_size == 2 * len(first.tokens)


def test_ids_beyond_two_bytes_come_back(tmp_path):
    words = Backend(models.WordLevel({"<eos>": 0, **{f"w{number}": number for number in range(1, 70000)}}, "<eos>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>"), name="words")
    (tmp_path / "a.txt").write_text("w69999 w7 w65536")
    (source,) = build_shards([str(tmp_path / "a.txt")], tokenizer, tmp_path / "shards").sources
    assert source.document(0).tolist() == [69999, 7, 65536, 0]


def test_shards_are_rebuilt_only_when_source_or_tokenizer_changed(tmp_path, tokenizer, sources):
    folder = tmp_path / "shards"
    progress: list[tuple[str, int, int]] = []

    def build(with_tokenizer: Tokenizer) -> int:
        progress.clear()
        build_shards(sources, with_tokenizer, folder, on_progress=lambda *call: progress.append(call))
        return len(progress)

    assert build(tokenizer) == 4
    assert [call[1] for call in progress] == [1, 2, 3, 1]
    assert progress[3] == (sources[1], 1, len(TokenShards.open(folder).sources[1].tokens))
    assert build(tokenizer) == 0
    with open(sources[0], "a") as file:
        file.write('{"text": "new"}\n')
    assert build(tokenizer) == 5
    assert build(train_bpe(TEXTS, 280)) == 5
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl", "b.txt", "shards"]


def test_a_failed_build_leaves_the_old_shards_and_no_rest(tmp_path, tokenizer, sources):
    folder = tmp_path / "shards"
    before = build_shards(sources, tokenizer, folder).num_tokens
    with open(sources[0], "a") as file:
        file.write('{"text": ""}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl:4: column 'text' is empty"):
        build_shards(sources, tokenizer, folder)
    assert TokenShards.open(folder).num_tokens == before
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl", "b.txt", "shards"]


def test_the_rest_of_a_killed_build_is_replaced(tmp_path, tokenizer, sources):
    partial = tmp_path / "shards.partial"
    partial.mkdir()
    (partial / "000.tokens.bin").write_bytes(b"half")
    assert build_shards(sources, tokenizer, tmp_path / "shards").num_documents == 4
    assert not partial.exists()


@pytest.mark.parametrize("name", ["000.tokens.bin", "001.documents.bin"])
def test_a_damaged_file_is_named(tmp_path, tokenizer, sources, name):
    folder = tmp_path / "shards"
    build_shards(sources, tokenizer, folder)
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[:-2])
    with pytest.raises(ValueError, match=rf"{name} has {len(content) - 2} bytes instead of {len(content)} \(cut short"):
        TokenShards.open(folder)
    (folder / name).write_bytes(content[:3] + bytes([content[3] ^ 1]) + content[4:])
    with pytest.raises(ValueError, match=rf"{name} was changed"):
        TokenShards.open(folder)
    (folder / name).unlink()
    with pytest.raises(ValueError, match=rf"{name} is missing"):
        TokenShards.open(folder)


def test_a_damaged_index_and_a_foreign_folder_are_refused(tmp_path, tokenizer, sources):
    folder = tmp_path / "shards"
    with pytest.raises(ValueError, match=r"index\.json is missing"):
        TokenShards.open(folder)
    build_shards(sources, tokenizer, folder)
    (folder / "index.json").write_text("{")
    with pytest.raises(ValueError, match=r"index\.json is broken .* remove"):
        build_shards(sources, tokenizer, folder)
    (folder / "index.json").write_text('{"format": 99}')
    with pytest.raises(ValueError, match=r"index\.json has format 99"):
        TokenShards.open(folder)
    mine = tmp_path / "thesis"
    mine.mkdir()
    (mine / "chapter.tex").write_text("words")
    with pytest.raises(ValueError, match="thesis exists and holds no token shards"):
        build_shards(sources, tokenizer, mine)
    assert (mine / "chapter.tex").read_text() == "words"
    with pytest.raises(ValueError, match="no source to tokenize"):
        build_shards([], tokenizer, folder)


def test_a_split_shares_no_document_and_loses_none(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"number {n}"}) + "\n" for n in range(50)))
    shards = build_shards([str(tmp_path / "a.jsonl")], tokenizer, tmp_path / "shards")

    def texts(part: TokenShards) -> list[str]:
        source = part.sources[0]
        return [tokenizer.decode(source.document(index).tolist()) for index in range(len(source.chosen))]

    training, validation = shards.split(0.1)
    assert len(texts(validation)) == 5
    assert sorted(texts(training) + texts(validation)) == sorted(texts(shards))
    assert texts(validation) == texts(shards.split(0.1)[1]) != texts(shards.split(0.1, seed=1)[1])
    assert training.num_tokens + validation.num_tokens == shards.num_tokens
    assert validation.num_bytes == sum(len(text) for text in texts(validation))
    assert len(texts(shards.split(0.001)[1])) == 1
    assert len(texts(shards.split(0.999)[0])) == 1
    with pytest.raises(ValueError, match="validation_fraction must be between 0 and 1, got 1"):
        shards.split(1)


def test_one_document_cannot_be_split(tmp_path, tokenizer, sources):
    with pytest.raises(ValueError, match=r"b\.txt: one document cannot be split .* <\|endoftext\|>"):
        build_shards(sources, tokenizer, tmp_path / "shards").split(0.1)


def test_a_long_document_is_encoded_in_pieces_without_changing_a_token(monkeypatch, tokenizer):
    monkeypatch.setattr(shards_module, "PIECE_CHARACTERS", 400)
    monkeypatch.setattr(shards_module, "SEAM_CHARACTERS", 40)
    words = np.random.default_rng(0).choice(["sky", " blue", "12", "  ", "\n", "\n\n", "é", "..", "\r\n"], size=3000)
    text = "".join(words)
    pieces = list(encode_pieces(tokenizer, text))
    assert len(pieces) >= len(text) / 800
    assert [token for piece in pieces for token in piece] == tokenizer.encode(text)
    # No line feed, or none where a cut is harmless: one piece rather than other tokens.
    assert len(list(encode_pieces(tokenizer, "sky" * 1000))) == 1


def test_a_bos_begins_the_document_not_each_of_its_pieces(monkeypatch):
    tokenizer = train_bpe(TEXTS, 300, special_tokens=["<s>"])
    tokenizer.hf.bos_token = "<s>"
    tokenizer.hf.backend_tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore
        single="<s> $A", special_tokens=[("<s>", 3)]
    )
    tokenizer = Tokenizer(tokenizer.hf, name="with BOS")
    monkeypatch.setattr(shards_module, "PIECE_CHARACTERS", 400)
    text = "sky\n" * 1000
    pieces = list(encode_pieces(tokenizer, text))
    assert len(pieces) > 5
    assert [token for piece in pieces for token in piece] == [tokenizer.bos_id, *tokenizer.encode(text)]


def test_a_tokenizer_for_which_no_cut_is_harmless_gets_the_whole_document(monkeypatch):
    tokenizer = train_bpe(TEXTS, 300)
    tokenizer.hf.backend_tokenizer.normalizer = normalizers.Prepend("_")  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setattr(shards_module, "PIECE_CHARACTERS", 400)
    text = "sky\n" * 1000
    assert list(encode_pieces(tokenizer, text)) == [tokenizer.encode(text)]
