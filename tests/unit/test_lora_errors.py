"""Bad input around LoRA: exit status 2 and a message with the place and the remedy."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from strop.cli.main import main
from strop.models import LoraConfig, ModelConfig, init_model, load_model, save_model
from strop.models.adapters import add_adapter
from strop.models.decoder import Decoder
from strop.models.heads import load_scalar_model
from strop.models.lora import adapted_linears

SFT = """
from = "tiny"
data = "sft.jsonl"
num_steps = 1
batch_tokens = 64
micro_batch_tokens = 64
max_length = 64
dtype = "float32"
optimizer = { lr = 1e-3 }
"""


@pytest.fixture
def here(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with data, a base `tiny`, and an adapter of it in `adapter`, and the process inside it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STROP_PROGRESS", "off")
    shutil.copytree(tiny_folder, "tiny")
    Path("sft.jsonl").write_text('{"prompt": "the quick", "completion": " fox"}\n' * 3)
    model = load_model("tiny")
    assert isinstance(model, Decoder)
    add_adapter(model, LoraConfig(rank=2, alpha=4), seed=0, base="tiny")
    with torch.no_grad():
        for linear in adapted_linears(model).values():
            assert linear.adapter is not None
            for part in linear.adapter.parts().values():
                part.B.fill_(0.1)
    save_model(model, "adapter")
    return tmp_path


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(list(argv)) == 2
    error = capsys.readouterr().err
    assert error.startswith("strop: error: "), error
    assert not list(Path("runs").glob("*")), "a failed start left something behind"
    return error


def generate(capsys: pytest.CaptureFixture[str], folder: str = "adapter") -> str:
    return refused(capsys, "generate", folder, "--prompt", "the", "--plain", "--dtype", "float32")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("{ rank = 0 }", "rank=0 must be at least 1"),
        ("{ alpha = 0 }", "alpha=0.0 must be above 0"),
        ("{ alpha = inf }", "alpha=inf must be above 0 and finite"),
        ("{ dropout = 0.1 }", "dropout=0.1 is not supported"),
        ('{ target_modules = ["q_proj", "query"] }', "'query' is not one of q_proj, k_proj"),
        ("{ target_modules = [] }", "target_modules is empty"),
        ('{ target_modules = ["q_proj", "q_proj"] }', "names a module twice"),
        ("{ r = 8 }", "unknown key 'r'"),
        ('{ rank = "8" }', "'rank' must be an integer"),
    ],
)
@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_a_bad_table(here: Path, capsys: pytest.CaptureFixture[str], stage: str, table: str, message: str) -> None:
    grpo = 'from = "tiny"\ntasks = "sft.jsonl"\nrewards = [{ name = "length" }]\nnum_steps = 1\n'
    Path("recipe.toml").write_text({"sft": SFT, "grpo": grpo}[stage] + f"lora = {table}\n")
    error = refused(capsys, stage, "recipe.toml")
    assert message in error and "recipe.toml" in error


def test_pre_training_has_no_adapter(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("recipe.toml").write_text('data = [{ path = "sft.jsonl" }]\nnum_steps = 1\nlora = { rank = 2 }\n')
    assert "unknown key 'lora'" in refused(capsys, "pretrain", "recipe.toml")


def test_a_flag_points_to_the_recipe(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("recipe.toml").write_text(SFT)
    assert "'lora' is a table; set it in the recipe" in refused(capsys, "sft", "recipe.toml", "--lora.rank", "4")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("{ rank = 3, alpha = 4 }", "an adapter with r = 2: lora.rank = 3 does not fit"),
        ("{ rank = 2, alpha = 5 }", "an adapter with lora_alpha = 4: lora.alpha = 5"),
        ('{ rank = 2, alpha = 4, target_modules = ["q_proj"] }', "an adapter with target_modules"),
        ("{ rank = 2, alpha = 4, rslora = true }", "lora.rslora = True does not fit"),
    ],
)
def test_training_on_with_another_shape(
    here: Path, capsys: pytest.CaptureFixture[str], table: str, message: str
) -> None:
    Path("recipe.toml").write_text(SFT + f"lora = {table}\n")
    error = refused(capsys, "sft", "recipe.toml", "--from", "adapter")
    assert message in error and "strop models merge" in error
    Path("recipe.toml").write_text(SFT + "lora = { rank = 2, alpha = 4 }\n")
    assert main(["sft", "recipe.toml", "--from", "adapter"]) == 0


def edit_json(name: str, **fields: Any) -> Callable[[], None]:
    def edit() -> None:
        path = Path("adapter") / name
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return edit


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[], None]:
    def edit() -> None:
        tensors = load_file("adapter/adapter_model.safetensors")
        change(tensors)
        save_file(tensors, "adapter/adapter_model.safetensors")

    return edit


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
DAMAGES: dict[str, tuple[Callable[[], Any], str]] = {
    "dora": (edit_json("adapter_config.json", use_dora=True), "use_dora=True is not supported"),
    "bias": (edit_json("adapter_config.json", bias="all"), "bias='all' is not supported"),
    "saved": (edit_json("adapter_config.json", modules_to_save=["lm_head"]), "modules_to_save=['lm_head']"),
    "unheard of": (edit_json("adapter_config.json", use_future=True), "use_future=True is not supported"),
    "pissa": (edit_json("adapter_config.json", init_lora_weights="pissa"), "init_lora_weights='pissa' changes"),
    "ia3": (edit_json("adapter_config.json", peft_type="IA3"), "peft_type='IA3' is not supported"),
    "regex": (edit_json("adapter_config.json", rank_pattern={"(a+)+b": 2}), "rank_pattern has the key '(a+)+b'"),
    "pattern": (edit_json("adapter_config.json", alpha_pattern={"q_proj": "x"}), "alpha_pattern must be a table"),
    "rank": (edit_json("adapter_config.json", r=5), "has shape [2, 64], not [5, 64]"),
    "missing": (edit_tensors(lambda tensors: tensors.pop(FIRST)), f"{FIRST} is missing"),
    "fewer layers": (
        edit_tensors(lambda tensors: [tensors.pop(name) for name in list(tensors) if ".layers.1." in name]),
        "the adapter belongs to another base",
    ),
    "more layers": (
        edit_tensors(lambda tensors: tensors.update({FIRST.replace(".0.", ".7."): tensors[FIRST].clone()})),
        "layers.7.self_attn.q_proj.lora_A.weight adapts nothing that this base has",
    ),
    "embedding": (
        edit_tensors(lambda tensors: tensors.update({"base_model.model.lm_head.lora_A.weight": torch.ones(2, 2)})),
        "lm_head.lora_A.weight adapts nothing",
    ),
    "cut short": (
        lambda: Path("adapter/adapter_model.safetensors").write_bytes(b"\0" * 9),
        "adapter_model.safetensors is cut short or damaged",
    ),
    "no tensors": (
        lambda: Path("adapter/adapter_model.safetensors").rename("adapter/adapter_model.bin"),
        "is a pickle, which could run any code",
    ),
    "bad json": (lambda: Path("adapter/adapter_config.json").write_text("{"), "adapter_config.json:1: broken JSON"),
    "no base": (lambda: shutil.rmtree("tiny"), "the base model of this adapter is not here"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_a_folder_that_cannot_be_read(here: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    damage, message = DAMAGES[name]
    damage()
    assert message in generate(capsys)


def test_another_base_is_refused_by_the_hash_of_its_weights(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = load_model("tiny")
    with torch.no_grad():
        next(iter(other.parameters()))[0, 0] += 1e-3
    save_model(other, "tiny")
    assert "was trained on a base with other weights" in generate(capsys)


def test_a_base_of_another_size(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = ModelConfig(
        vocab_size=320, hidden_size=48, intermediate_size=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8
    )
    save_model(init_model(config, seed=0), "tiny")
    Path("adapter/strop_base.json").unlink()
    assert "has shape [32, 2], not [48, 2]: the adapter belongs to another base" in generate(capsys)


def test_an_adapter_of_an_adapter(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree("adapter", "second")
    record = json.loads(Path("second/adapter_config.json").read_text()) | {"base_model_name_or_path": "adapter"}
    Path("second/adapter_config.json").write_text(json.dumps(record))
    Path("second/strop_base.json").unlink()
    assert "the base model of this adapter is not here (looked at adapter" in generate(capsys, "second")


def test_merging_what_cannot_be_merged(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "tiny is a whole model, not an adapter" in refused(capsys, "models", "merge", "tiny", "out")
    assert "adapter exists already" in refused(capsys, "models", "merge", "adapter", "adapter")
    shutil.copytree("tiny", "moved")
    shutil.rmtree("tiny")
    assert "is not here" in refused(capsys, "models", "merge", "adapter", "out")
    assert main(["models", "merge", "adapter", "out", "--base", "moved", "--dtype", "bfloat16"]) == 0
    assert load_model("out").dtype == torch.bfloat16
    assert not list(Path().glob(".out*"))


def test_a_resumed_run_checks_its_base(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("recipe.toml").write_text(SFT + "lora = { rank = 2 }\n")
    assert main(["sft", "recipe.toml"]) == 0
    other = load_model("tiny")
    with torch.no_grad():
        next(iter(other.parameters()))[0, 0] += 1e-3
    save_model(other, "tiny")
    capsys.readouterr()
    assert main(["sft", "recipe.toml", "--num-steps", "2", "--resume"]) == 2
    assert "was trained on a base with other weights" in capsys.readouterr().err


def test_reward_model_and_own_critic_start_from_an_adapter_merged(here: Path) -> None:
    """The reward model has no [lora]; beside a policy that goes on with its adapter, an own critic has all weights."""
    Path("pairs.jsonl").write_text('{"prompt": "the quick", "chosen": " fox", "rejected": " dog"}\n' * 3)
    shared = 'from = "adapter"\nnum_steps = 1\ndtype = "float32"\noptimizer = { lr = 0.0 }\n'
    Path("rm.toml").write_text(shared + 'data = "pairs.jsonl"\nbatch_size = 3\n')
    assert main(["reward-model", "rm.toml"]) == 0
    Path("ppo.toml").write_text(
        shared + 'tasks = "pairs.jsonl"\nprompts_per_step = 2\nlora = { rank = 2, alpha = 4 }\n'
        'rewards = [{ name = "model", options = { model = "rm" } }]\nsampling = { max_new_tokens = 4 }\n'
    )
    assert main(["ppo", "ppo.toml"]) == 0
    merged = load_model("adapter")
    for folder in ("runs/rm/checkpoints/step-000001", "runs/ppo/checkpoints/step-000001/critic"):
        trunk = dict(load_scalar_model(folder).backbone.named_parameters())
        assert all(torch.equal(value, trunk[name]) for name, value in merged.named_parameters() if name in trunk)
    assert Path("runs/ppo/checkpoints/step-000001/adapter_model.safetensors").is_file()


def test_reward_model_has_no_lora_table(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("rm.toml").write_text('from = "tiny"\ndata = "sft.jsonl"\nnum_steps = 1\nlora = { rank = 2 }\n')
    assert "unknown key 'lora'" in refused(capsys, "reward-model", "rm.toml")
