"""strop export as it is called: targets, flags, adapters, and what is refused before anything is written."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM

from strop.cli.main import main
from strop.export import check_folder, write_folder
from strop.export.target import new_target
from strop.models import Decoder, LoraConfig, ModelConfig, init_model, load_model, save_model, weight_hash
from strop.models.adapters import add_adapter
from strop.tokenizer import Tokenizer, train_bpe

TEXTS = ["the quick brown fox jumps over the lazy dog and the quick cat sleeps"]


def refused(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    assert main(["export", *args]) == 2
    return capsys.readouterr().err


def adapted(tiny_folder: Path, folder: Path) -> Decoder:
    """An adapter folder on the tiny model whose product is not zero; the model with it."""
    model: Any = load_model(tiny_folder)
    add_adapter(model, LoraConfig(rank=2), seed=1, base=tiny_folder)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    save_model(model, folder)
    return model


def test_a_gguf_file_says_what_it_is(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "out" / "tiny.gguf"
    assert main(["export", str(tiny_folder), "--to", "gguf", str(target), "--dtype", "q8_0"]) == 0
    assert "(q8_0)" in capsys.readouterr().out
    fields = gguf.GGUFReader(target).fields
    assert fields["general.name"].contents() == "tiny" and fields["general.file_type"].contents() == 7
    assert fields["llama.context_length"].contents() == 128
    assert [path.name for path in target.parent.iterdir()] == ["tiny.gguf"]


def test_a_folder_is_checked_with_transformers(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "folder"
    assert main(["export", str(tiny_folder), "--to", "hf", str(target), "--dtype", "bf16", "--check"]) == 0
    assert "6 of 6 greedy texts equal" in capsys.readouterr().err
    assert AutoModelForCausalLM.from_pretrained(target).dtype == torch.bfloat16


def test_a_checked_folder_with_other_weights_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    tokenizer, model = Tokenizer.load(tiny_folder), load_model(tiny_folder, frozen=True)
    write_folder(model, tokenizer, tmp_path / "folder")
    assert isinstance(model, Decoder)
    with torch.no_grad():
        model.final_norm.weight[::2] *= -1
    with pytest.raises(ValueError, match=r"the other runtime writes other text: . of 6 greedy texts equal"):
        check_folder(model, tokenizer, tmp_path / "folder")


def test_an_adapter_is_merged(tiny_folder: Path, tmp_path: Path) -> None:
    adapted(tiny_folder, tmp_path / "adapter")
    expected = load_model(tmp_path / "adapter", frozen=True)
    assert main(["export", str(tmp_path / "adapter"), "--to", "hf", str(tmp_path / "merged")]) == 0
    assert weight_hash(load_model(tmp_path / "merged")) == weight_hash(expected) != weight_hash(load_model(tiny_folder))
    assert main(["models", "merge", str(tmp_path / "adapter"), str(tmp_path / "again")]) == 0
    for file in (tmp_path / "merged").iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes(), file.name


def test_an_existing_target_needs_force(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "tiny.gguf"
    target.write_bytes(b"mine")
    assert "exists already" in refused(capsys, str(tiny_folder), "--to", "gguf", str(target))
    assert target.read_bytes() == b"mine"
    assert main(["export", str(tiny_folder), "--to", "gguf", str(target), "--force"]) == 0
    assert target.read_bytes()[:4] == b"GGUF"
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "one.jpg").touch()
    assert "no model" in refused(capsys, str(tiny_folder), "--to", "hf", str(folder), "--force")
    assert (folder / "one.jpg").exists()


def test_the_source_is_never_replaced(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = weight_hash(load_model(tiny_folder))
    assert "holds the model" in refused(capsys, str(tiny_folder), "--to", "hf", str(tiny_folder), "--force")
    assert weight_hash(load_model(tiny_folder)) == before


def test_a_folder_is_replaced_whole(tiny_folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "folder"
    assert main(["export", str(tiny_folder), "--to", "hf", str(target)]) == 0
    (target / "left.over").touch()
    assert main(["export", str(tiny_folder), "--to", "hf", str(target), "--force"]) == 0
    assert not (target / "left.over").exists() and [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_nothing_is_left_of_a_failed_export(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(RuntimeError), new_target(tmp_path / "file", replace=True) as partial:
        partial.write_bytes(b"half")
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_bytes() == b"old"


def test_flags_that_cannot_be_honoured(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = str(tiny_folder), str(tmp_path / "x")
    assert "format of GGUF" in refused(capsys, source, "--to", "hf", target, "--dtype", "q8_0")
    assert "whole model" in refused(capsys, source, "--to", "hf", target, "--base", source)
    assert "is neither a run" in refused(capsys, "no-such-run", "--to", "hf", target)
    assert not list(tmp_path.iterdir())


def test_a_missing_runtime_is_said_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "llama_cpp" else object())
    message = refused(capsys, "no-such-run", "--to", "gguf", str(tmp_path / "x"), "--check")
    assert "--check needs llama_cpp" in message and "strop[llama]" in message


def test_a_tokenizer_that_auto_rebuilds_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Beside a qwen2 model AutoTokenizer puts Qwen2's splitting rules around whatever vocabulary it finds."""
    tokenizer = train_bpe(TEXTS, 300)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=64, num_layers=1, num_heads=4,
        num_kv_heads=2, head_dim=8, max_position_embeddings=128, qkv_bias=True, model_type="qwen2", eos_token_id=0,
    )  # fmt: skip
    save_model(init_model(config, seed=0), tmp_path / "source")
    tokenizer.save(tmp_path / "source")
    assert main(["export", str(tmp_path / "source"), "--to", "hf", str(tmp_path / "out"), "--check"]) == 0
    assert "AutoTokenizer splits text by the rules of qwen2" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "source"), "--to", "gguf", str(tmp_path / "out.gguf")]) == 0
    assert gguf.GGUFReader(tmp_path / "out.gguf").fields["tokenizer.ggml.pre"].contents() == "smollm"
