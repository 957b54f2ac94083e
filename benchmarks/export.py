"""Exports opened by llama.cpp and transformers: python -m benchmarks.export [MODEL]

Random models of every family that the decoder has, with a tokenizer trained here, and MODEL (SmolLM2 by default), in
every --dtype: what the other runtime reads, its logprobs and its greedy text beside ours (strop export --check). A
config that GGUF cannot express must be refused. Needs llama-cpp-python (the extra llama) for the GGUF rows.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.__main__ import MODEL
from strop.export import FOLDER_DTYPES, GGUF_DTYPES, check_folder, check_gguf, write_folder, write_gguf
from strop.models import Decoder, init_model, load_model
from strop.models.huggingface import config_from_dict
from strop.tokenizer import Tokenizer, train_bpe

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "vocab_size": 520,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "tie_word_embeddings": False},
    "llama, tied, one key-value head": {"model_type": "llama", "tie_word_embeddings": True, "num_key_value_heads": 1},
    "llama, llama3 rope": {"model_type": "llama", "rope_parameters": LLAMA3},
    "llama, biases, wide heads": {"model_type": "llama", "attention_bias": True, "mlp_bias": True, "head_dim": 32},
    "mistral": {"model_type": "mistral", "sliding_window": None, "head_dim": 32, "rope_theta": 1e6},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True, "rope_theta": 1e6},
    "qwen3": {"model_type": "qwen3", "head_dim": 32, "tie_word_embeddings": True},
    "smollm3": {"model_type": "smollm3", "num_hidden_layers": 5},
    "qwen3, biases": {"model_type": "qwen3", "head_dim": 32, "attention_bias": True},
    "qwen2, llama3 rope": {"model_type": "qwen2", "rope_parameters": LLAMA3},
    "smollm3, other layers without rope": {"model_type": "smollm3", "no_rope_layers": [1, 0, 1, 1]},
}
TEXTS = [f"the quick brown fox number {n} jumps over {n * n} lazy dogs, doesn't it?\n\n  Then: {n}" for n in range(300)]


def random_model(config: dict[str, Any], seed: int = 0) -> Decoder:
    """Norms away from 1, biases away from 0, logits far enough apart that a wrong weight shows."""
    model = init_model(config_from_dict({**SIZES, **config}), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * noise if "norm" in name else 0.15 * noise)
    return model.requires_grad_(False).eval()


def row(name: str, load: Any, tokenizer: Tokenizer, to: str, dtype: str) -> None:
    with tempfile.TemporaryDirectory() as work:
        path, model = Path(work) / "model", load()
        assert isinstance(model, nn.Module)
        try:
            if to == "gguf":
                write_gguf(model, tokenizer, path, dtype=dtype, name="model")
                report: Any = check_gguf(model, tokenizer, path, dtype=dtype)
            else:
                write_folder(model, tokenizer, path, dtype=FOLDER_DTYPES[dtype])
                report = check_folder(model, tokenizer, path)
            cells = f"{report.num_equal} of {report.num_texts} | {report.difference:.1e} | {report.gap:.1e}"
        except ValueError as error:
            cells = f"refused: {error} | |"
    print(f"| {name} | {to} {dtype} | {cells} |", flush=True)


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else MODEL
    print("| model | written as | greedy texts equal | largest difference of a logprob | largest gap of a choice |")
    print("|---|---|---|---|---|")
    tokenizer = train_bpe(TEXTS, 500)
    for name, config in CONFIGS.items():
        for dtype in GGUF_DTYPES:
            row(name, lambda config=config: random_model(config), tokenizer, "gguf", dtype)
        row(name, lambda config=config: random_model(config), tokenizer, "hf", "f32")
    words = Tokenizer.load(folder)
    for to, dtypes in (("gguf", GGUF_DTYPES), ("hf", FOLDER_DTYPES)):
        for dtype in dtypes:
            row(folder.name, lambda: load_model(folder, frozen=True), words, to, dtype)


if __name__ == "__main__":
    main()
