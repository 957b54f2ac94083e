"""gradient_checkpointing: what the backward pass computes again changes memory and time, and no bit of any gradient."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from strop.cli.main import main
from strop.models import Checkpointing, Decoder, LoraConfig, ModelConfig, init_model
from strop.models.heads import add_scalar_head
from strop.models.live_memory import LiveMemory
from strop.models.logprobs import packed_logprobs
from strop.models.lora import attach, fresh_parts
from strop.optim import AdamW, optimizer_step
from strop.runs import RunFolder
from strop.types import PackedBatch, Segment

WIDE = ModelConfig(
    vocab_size=80, hidden_size=64, intermediate_size=96, num_layers=5, num_heads=4, num_kv_heads=2, head_dim=32
)
"""Widths that the C++ kernels take in bfloat16."""
ODD = ModelConfig(
    vocab_size=61, hidden_size=24, intermediate_size=40, num_layers=5, num_heads=3, num_kv_heads=1, head_dim=8,
    qkv_bias=True, output_bias=True, mlp_bias=True, qk_norm=True, tie_embeddings=False,
)  # fmt: skip
CHOICES: tuple[Checkpointing, ...] = ("none", "some", "all")


def batch(config: ModelConfig) -> PackedBatch:
    segments = (Segment(trunk=40), Segment(trunk=9, branches=(20, 31)), Segment(trunk=1))
    size = sum(map(len, segments))
    tokens = torch.randint(config.vocab_size, (size + 1,), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(size) % 3 > 0
    return PackedBatch(token_ids_T=tokens[:-1], labels_T=tokens[1:], loss_mask_T=mask, segments=segments)


def model_of(config: ModelConfig, dtype: torch.dtype, *, has_lora: bool = False) -> Decoder:
    model = init_model(config, seed=0, dtype=dtype)
    if has_lora:
        parts = fresh_parts(model, LoraConfig(rank=3), seed=1)
        generator = torch.Generator().manual_seed(2)
        attach(model, {name: (A, torch.randn(B.shape, generator=generator), s) for name, (A, B, s) in parts.items()})
    return model


def gradients(model: Decoder, data: PackedBatch) -> dict[str, Tensor]:
    model.zero_grad()
    logprobs_R, entropy_R = packed_logprobs(model, data, with_entropy=True)
    assert entropy_R is not None
    (logprobs_R.mean() + 0.1 * entropy_R.mean()).backward()
    found = {"logprobs": logprobs_R.detach()}
    return found | {name: value.grad for name, value in model.named_parameters() if value.grad is not None}


@pytest.mark.parametrize("has_lora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [WIDE, ODD], ids=["wide", "odd"])
def test_gradients_are_the_same_to_the_bit(config: ModelConfig, dtype: torch.dtype, has_lora: bool) -> None:
    model, data = model_of(config, dtype, has_lora=has_lora), batch(config)
    found = {}
    for choice in CHOICES:
        model.set_checkpointing(choice)
        found[choice] = gradients(model, data)
    wanted = {name for name, value in model.named_parameters() if value.requires_grad}
    assert found["none"].keys() == wanted | {"logprobs"}
    for choice in ("some", "all"):
        assert found[choice].keys() == found["none"].keys()
        for name, expected in found["none"].items():
            assert torch.equal(found[choice][name], expected), (choice, name)


def test_accumulated_updates_are_the_same_to_the_bit() -> None:
    """Through the optimiser's hooks, which take each gradient away as soon as it is there."""
    ends = []
    for choice in CHOICES:
        model = model_of(WIDE, torch.bfloat16)
        model.set_checkpointing(choice)
        optimizer = AdamW(model.named_parameters())
        for _ in range(2):
            for _ in range(2):
                packed_logprobs(model, batch(WIDE))[0].mean().neg().backward()
            optimizer_step(optimizer, lr=1e-2, max_grad_norm=1.0)
        ends.append(model.state_dict())
    start = model_of(WIDE, torch.bfloat16).state_dict()
    for other in ends[1:]:
        assert all(torch.equal(other[name], value) for name, value in ends[0].items())
    assert all(not torch.equal(start[name], value) for name, value in ends[0].items() if value.ndim > 1)


def test_scores_have_the_same_gradients() -> None:
    scalar = add_scalar_head(model_of(WIDE, torch.bfloat16), seed=3)
    found = []
    for choice in CHOICES:
        scalar.backbone.set_checkpointing(choice)
        scalar.zero_grad()
        scalar.scores_R(batch(WIDE)).square().sum().backward()
        found.append([value.grad for value in scalar.parameters()])
    for other in found[1:]:
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(other, found[0], strict=True))


def kept_bytes(config: ModelConfig, num_layers: int, choice: Checkpointing) -> int:
    model = model_of(dataclasses.replace(config, num_layers=num_layers), torch.bfloat16)
    model.set_checkpointing(choice)
    with LiveMemory() as memory:
        result = model.hidden(batch(config))
        return memory.live_bytes if result.requires_grad else 0


@pytest.mark.parametrize("config", [WIDE, ODD], ids=["wide", "odd"])
def test_all_keeps_one_input_a_layer_and_none_keeps_most(config: ModelConfig) -> None:
    size = len(batch(config).token_ids_T)
    five, four = (kept_bytes(config, count, "all") for count in (5, 4))
    assert five - four == size * config.hidden_size * 2
    some, none = (kept_bytes(config, 5, choice) for choice in ("some", "none"))
    assert five < some < none
    # Two of the five layers leave out gate and up; where the kernels do attention, all leave out its output as well.
    assert none - some >= 2 * size * 2 * config.intermediate_size * 2


RECIPES = {
    "pretrain": 'data = [{ path = "corpus.txt" }]\nvocab_size = 280\ncontext_length = 16\nbatch_tokens = 64\n'
    "optimizer = { warmup_steps = 0 }\nmodel = { hidden_size = 32, num_layers = 3, num_heads = 2, num_kv_heads = 1, "
    "intermediate_size = 32 }\n",
    "sft": 'from = "tiny"\ndata = "sft.jsonl"\nbatch_tokens = 64\nmax_length = 32\n',
    "reward-model": 'from = "tiny"\ndata = "ranks.jsonl"\nbatch_size = 3\n',
    "dpo": 'from = "tiny"\ndata = "ranks.jsonl"\nbatch_size = 3\nlora = { rank = 2 }\n',
    "grpo": 'from = "tiny"\ntasks = "tasks.jsonl"\nprompts_per_step = 2\ngroup_size = 3\n',
    "ppo": 'from = "tiny"\ntasks = "tasks.jsonl"\nprompts_per_step = 4\n',
    "ttrl": 'from = "tiny"\ntasks = "tasks.jsonl"\nprompts_per_step = 2\ngroup_size = 3\nnum_votes = 3\n'
    'answer_pattern = "whole"\nanswer_column = ""\nheld_out = { num_prompts = 8, num_samples = 2, max_drop = 1.0, '
    "min_answers = 0.0 }\n",
}
ROLLOUT = (
    'sampling = { max_new_tokens = 5 }\nrewards = [{ name = "length", options = { target_tokens = 3, width = 3 } }]\n'
)
REST = 'num_steps = 2\nmicro_batch_tokens = 64\ndtype = "float32"\n'


@pytest.fixture
def here(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STROP_PROGRESS", "off")
    shutil.copytree(tiny_folder, tmp_path / "tiny")
    (tmp_path / "corpus.txt").write_text("the quick brown fox jumps\n" * 40)
    words = ["brown", "lazy", "cat", "dog", "fox", "quick"]
    rows = [{"prompt": f"the {a} {b}", "completion": f" {b}"} for a in words for b in words]
    (tmp_path / "sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tasks.jsonl").write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in rows[:12]))
    ranks = [{"prompt": f"the {a}", "chosen": f" {a}", "rejected": " x"} for a in words]
    (tmp_path / "ranks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ranks))
    return tmp_path


@pytest.mark.parametrize("stage", RECIPES)
def test_every_stage_passes_it_on_and_learns_the_same(here: Path, stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rest = REST + (ROLLOUT if stage in ("grpo", "ppo") else "")
    rest = rest + "sampling = { max_new_tokens = 5 }\n" if stage == "ttrl" else rest
    (here / "recipe.toml").write_text(RECIPES[stage] + rest)
    chosen: list[Checkpointing] = []
    original = Decoder.set_checkpointing

    def watched(self: Decoder, what: Checkpointing) -> None:
        chosen.append(what)
        original(self, what)

    monkeypatch.setattr(Decoder, "set_checkpointing", watched)
    files = []
    for choice in CHOICES:
        chosen.clear()
        flags = [] if choice == "some" else ["--gradient-checkpointing", choice]
        assert main([stage, "recipe.toml", "--name", choice, *flags]) == 0
        if choice != "some":  # which every decoder starts with
            assert chosen.count(choice) == (2 if stage == "ppo" else 1), "policy, and PPO's own critic"
        checkpoint = RunFolder.open(here / "runs", choice).latest_checkpoint()
        assert checkpoint is not None
        files.append({path.name: path.read_bytes() for path in checkpoint.path.rglob("*.safetensors")})
    assert files[0] == files[1] == files[2]
