"""`strop doctor --recipe` of every stage: what its settings and its data mean for memory, and the advice."""

from __future__ import annotations

import dataclasses
import json
import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

from strop.cli.config import build, read_values
from strop.cli.stages import load_stage
from strop.cli.workload import smaller, workload
from strop.models import LoraConfig, ModelConfig, init_model, load_model, save_model
from strop.models.heads import add_scalar_head, save_scalar_model
from strop.native.build import why_unavailable
from strop.native.products import are_in_int8
from strop.stages.forecast import Workload, forecast
from strop.stages.forecast_probe import measure

RECIPES: dict[str, str] = {
    "reward-model": 'data = "pairs.jsonl"\nbatch_size = 4\nmicro_batch_tokens = 30\n',
    "dpo": 'data = "pairs.jsonl"\nbatch_size = 4\nmicro_batch_tokens = 30\nlora = { rank = 2 }\n',
    "dpo:online": 'online = { tasks = "tasks.jsonl", group_size = 3 }\nbatch_size = 4\nmicro_batch_tokens = 30\n'
    'sampling = { max_new_tokens = 6 }\nrewards = [{ name = "length", options = { target_tokens = 3, width = 3 } }]\n',
    "grpo": 'tasks = "tasks.jsonl"\nprompts_per_step = 4\ngroup_size = 3\nsampling = { max_new_tokens = 6 }\n'
    'kl_coef = 0.1\nlora = { rank = 2 }\nrewards = [{ name = "model", options = { model = "rm" } }]\n',
    "ppo": 'tasks = "tasks.jsonl"\nprompts_per_step = 4\nepochs_per_rollout = 2\nminibatch_prompts = 2\n'
    'sampling = { max_new_tokens = 6 }\nrewards = [{ name = "model", options = { model = "rm" } }]\n'
    "lora = { rank = 2 }\n",
    "ppo:shared": 'tasks = "tasks.jsonl"\nprompts_per_step = 4\ncritic = { network = "shared" }\n'
    'sampling = { max_new_tokens = 6 }\nrewards = [{ name = "model", options = { model = "rm" } }]\n',
    "ttrl": 'tasks = "tasks.jsonl"\nprompts_per_step = 2\nnum_votes = 4\ngroup_size = 2\n'
    "sampling = { max_new_tokens = 6 }\n",
}


@pytest.fixture
def here(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_folder, tmp_path / "tiny")
    save_scalar_model(add_scalar_head(load_model(tiny_folder), seed=0), tmp_path / "rm")  # type: ignore[arg-type]
    shutil.copy(tiny_folder / "tokenizer.json", tmp_path / "rm")
    animals = ["cat", "dog", "fox", "the lazy dog", "the quick brown fox"]
    rows = [{"prompt": f"the {a}", "chosen": f" {a}", "rejected": " x"} for a in animals]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tasks.jsonl").write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in rows))
    return tmp_path


def planned(name: str, *, extra: str = "", dtype: str = "bfloat16") -> tuple[Any, Workload]:
    stage = load_stage(name.partition(":")[0])
    table = tomllib.loads(f'from = "tiny"\nnum_steps = 2\ndtype = "{dtype}"\n' + RECIPES[name] + extra)
    config = build(stage.Config, read_values(table, stage.Config, name), name)
    return config, workload(name.partition(":")[0], config, Path("runs"))


@pytest.mark.parametrize("name", ["reward-model", "dpo"])
def test_micro_batches_of_preferences_are_those_of_the_stage(here: Path, name: str):
    """In one batch that is the whole data, the order does not matter for its size."""
    config, _ = planned(name)
    stage = load_stage(name)
    sizes: list[list[int]] = []

    def watch(micro_batches: Any) -> Any:
        def watched(*args: Any) -> Any:
            sizes.append([])
            for micro, own in micro_batches(*args):
                sizes[-1].append(len(micro.token_ids_T))
                yield micro, own

        return watched

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "micro_batches", watch(stage.micro_batches))
        patch.setenv("STROP_PROGRESS", "off")
        stage.train(dataclasses.replace(config, batch_size=5), name="real", runs_dir=Path("runs"), resume=False)
    whole = dataclasses.replace(config, batch_size=5)
    work = workload(name, whole, Path("runs"))
    assert all(sum(step) == work.tokens_per_step for step in sizes[:2])
    assert work.micro_tokens <= max(max(step) for step in sizes[:2]) + 5, "order moves a few tokens"
    assert work.accumulates and any(len(step) > 1 for step in sizes)


def test_what_each_stage_keeps_is_seen_in_its_settings(here: Path):
    _, reward_model = planned("reward-model")
    assert reward_model.learner.output == "scores" and reward_model.loaded_copies == 1
    assert reward_model.learner.seen_tokens and len(reward_model.learner.seen_tokens) < 60
    _, dpo = planned("dpo")
    assert dpo.learner.lora is not None and not dpo.has_reference and dpo.rollout is None
    _, online = planned("dpo:online")
    assert online.has_reference and online.rollout is not None and online.rollout.num_samples == 12
    assert {segment.branches for segment in online.micro_batch} == {(6, 6)}
    size = (here / "rm/model.safetensors").stat().st_size
    for name in ("grpo", "ppo", "ppo:shared"):
        assert planned(name)[1].reward_bytes == size and planned(name)[1].has_reference
    _, ppo = planned("ppo")
    assert ppo.critic is not None and ppo.critic.lora is None and ppo.critic.output == "scores"
    assert ppo.loaded_copies == 1 and ppo.num_updates == 4
    _, shared = planned("ppo:shared")
    assert shared.critic is None and shared.learner.output == "logprobs and values"
    _, ttrl = planned("ttrl")
    assert ttrl.learner.lora is not None and ttrl.rollout is not None and ttrl.rollout.group_size == 4


@pytest.mark.parametrize("name", RECIPES)
def test_every_stage_is_foretold(here: Path, name: str, capsys: pytest.CaptureFixture[str]):
    from strop.cli.main import main

    (here / "recipe.toml").write_text('from = "tiny"\nnum_steps = 2\n' + RECIPES[name])
    stage = name.partition(":")[0]
    assert main(["doctor", "--recipe", "recipe.toml", "--stage", stage, "--gradient-checkpointing", "all"]) == 0
    printed = capsys.readouterr().out
    assert "peak memory:" in printed and "time per step:" in printed
    assert ("critic's update" in printed) == (name == "ppo")


def test_an_adapter_is_foretold_by_its_base(here: Path):
    from strop.stages.sft import Config, train

    (here / "sft.jsonl").write_text('{"prompt": "the", "completion": " fox"}\n' * 4)
    settings: dict[str, Any] = {"data": "sft.jsonl", "num_steps": 1, "max_length": 32, "lora": LoraConfig(rank=2)}
    train(Config(init_from="tiny", **settings), name="adapter", runs_dir=Path("runs"), resume=False)
    work = workload("sft", Config(init_from="adapter", **settings), Path("runs"))
    base = workload("sft", Config(init_from="tiny", **settings), Path("runs"))
    assert dataclasses.replace(work, micro_batch=base.micro_batch) == base


def test_advice_names_what_the_stage_can_do(here: Path):
    def advice(name: str, extra: str = "") -> set[str]:
        config, _ = planned(name, extra=extra)
        return {what.partition(" (")[0] for what, _ in smaller(name.partition(":")[0], config)}

    assert {'gradient_checkpointing = "all"', "lora.rank = 8", 'optimizer.state = "8bit"'} <= advice("dpo:online")
    assert 'gradient_checkpointing = "all"' not in advice("dpo", 'gradient_checkpointing = "all"\n')
    assert 'gradient_checkpointing = "some"' in advice("dpo", 'gradient_checkpointing = "none"\n')
    assert "lora.rank = 8" not in advice("dpo") | advice("ttrl") | advice("reward-model")
    assert {'critic.network = "shared"', "kl_coef = 0"} <= advice("ppo")
    assert 'critic.network = "shared"' not in advice("ppo:shared")


def test_int8_is_forecast_as_the_run_has_it(here: Path):
    """Refused for what the run refuses, counted in its bytes, and set while it is measured only."""
    reason = why_unavailable()
    if reason is not None and not reason.startswith("there is no C++ compiler"):
        pytest.skip(reason)  # another processor; a missing compiler is a failure
    with pytest.raises(ValueError, match=r"needs head_dim \(8\) to be a multiple of 32"):
        planned("ppo", dtype="int8")
    wide = ModelConfig(
        vocab_size=320, hidden_size=64, intermediate_size=96, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=32
    )
    save_model(init_model(wide, seed=0), here / "tiny")
    packed = {}
    for dtype in ("bfloat16", "int8"):
        _, work = planned("ttrl", dtype=dtype)
        assert (work.dtype, work.dtype_name) == (torch.bfloat16, dtype) and not are_in_int8()
        result = forecast(work, measure(work, has_times=False))
        packed[dtype] = result.phases["rollout"]["packed weights"]
    assert not are_in_int8()
    assert packed["int8"] == pytest.approx(packed["bfloat16"] * (1 + 8 / 64) / 2)
