"""What a run leaves behind is a Hugging Face folder: transformers opens it, and computes the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from strop.models import LoraConfig, load_model
from strop.models.interface import CausalLM
from strop.optim import OptimizerConfig
from strop.rewards.config import RewardConfig
from strop.rollouts.prompts import Sampling
from strop.stages import grpo, pretrain, sft
from strop.tokenizer import Tokenizer
from strop.types import PackedBatch, Segment

TEXTS = ["the quick brown fox jumps over the lazy dog", "a cat sleeps all day", "in zürich 42 owls"]


def run_stage(stage: str, tiny_folder: Path, folder: Path, lora: LoraConfig | None) -> Path:
    """The last checkpoint of a short run."""
    rows = [{"prompt": text[:9], "completion": text[9:], "answer": ""} for text in TEXTS]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "corpus.txt").write_text("\n".join(TEXTS * 5))
    optimizer = OptimizerConfig(lr=1e-2)
    common = {"num_steps": 3, "optimizer": optimizer, "dtype": "float32"}
    if stage == "pretrain":
        shape = pretrain.Shape(hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=1, intermediate_size=48)
        config = pretrain.Config(
            data=(pretrain.Source(path=str(folder / "corpus.txt")),),
            vocab_size=290,
            model=shape,
            context_length=32,
            batch_tokens=64,
            micro_batch_tokens=64,
            **common,
        )
        run = pretrain.train(config, name="run", runs_dir=folder, resume=False)
    elif stage == "sft":
        config = sft.Config(
            init_from=str(tiny_folder),
            data=str(folder / "rows.jsonl"),
            max_length=64,
            batch_tokens=64,
            lora=lora,
            **common,
        )
        run = sft.train(config, name="run", runs_dir=folder, resume=False)
    else:
        config = grpo.Config(
            init_from=str(tiny_folder),
            tasks=str(folder / "rows.jsonl"),
            rewards=(RewardConfig(name="length", options={"target_tokens": 3, "width": 3}),),
            prompts_per_step=3,
            group_size=4,
            sampling=Sampling(max_new_tokens=5, stop=("e", "a", "o", "t", "n", "i", "r", "s")),
            lora=lora,
            **common,
        )
        run = grpo.train(config, name="run", runs_dir=folder, resume=False)
    return run / "checkpoints/step-000003"


def ours(model: CausalLM, ids: list[int]) -> torch.Tensor:
    tokens = torch.tensor(ids)
    batch = PackedBatch(
        token_ids_T=tokens, labels_T=tokens, loss_mask_T=tokens >= 0, segments=(Segment(trunk=len(ids)),)
    )
    with torch.no_grad():
        return model.logits(model.hidden(batch))


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers, where peft meets it
@pytest.mark.parametrize(
    ("stage", "lora"),
    [("pretrain", None), ("sft", None), ("grpo", None), ("sft", LoraConfig(rank=2)), ("grpo", LoraConfig(rank=2))],
)
def test_transformers_opens_it_and_gives_the_same_logits(
    stage: str, lora: LoraConfig | None, tiny_folder: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    checkpoint = run_stage(stage, tiny_folder, tmp_path, lora)
    theirs = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert theirs.dtype == torch.float32
    tokenizer, their_tokenizer = Tokenizer.load(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    model = load_model(checkpoint)
    start = load_model(tiny_folder) if stage != "pretrain" else None
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert their_tokenizer(text)["input_ids"] == ids
        with torch.no_grad():
            expected = theirs(torch.tensor([ids])).logits[0]
        found = ours(model, ids)
        assert expected.std() > 1e-3
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        if start is not None:
            assert (ours(start, ids) - expected).abs().max() > 1e-2, "the run has not changed the model"
