"""What several tests start from: a tiny model with its tokenizer, on disk."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def sandbox_works() -> None:
    """A machine on which model code cannot be boxed fails the tests that need it, with what is to be done."""
    from strop.rewards.sandbox import canary

    if canary()[0].name == "sandbox":
        pytest.fail(f"no sandbox here ({canary()[0].detail}): install bubblewrap (make setup does, as root)")


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder: byte-level tokenizer of 300 ids, hidden size 32, 2 layers, 128 positions, random weights."""
    import torch

    from strop.models import ModelConfig, init_model, save_model
    from strop.tokenizer import train_bpe

    folder = tmp_path_factory.mktemp("tiny") / "model"
    tokenizer = train_bpe(["the quick brown fox jumps over the lazy dog and the quick cat sleeps"], 300)
    config = ModelConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        max_position_embeddings=128,
        eos_token_id=tokenizer.eos_id,
    )
    model = init_model(config, seed=7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)  # far enough from uniform that a wrong logprob shows
    save_model(model, folder)
    tokenizer.save(folder)
    return folder
