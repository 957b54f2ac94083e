"""Bad input to the stages: exit status 2, a message with the place and the remedy, nothing half-made left behind."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from strop.cli.main import main
from strop.models import compute_in, load_model
from strop.models.heads import add_scalar_head, save_scalar_model
from strop.native.build import why_unavailable
from strop.native.products import are_in_int8, int8
from strop.runs import RunFolder, load_training_state, read_lines
from strop.stages.begin import in_its_dtype

PRETRAIN = """
data = [{ path = "corpus.txt" }]
num_steps = 2
vocab_size = 280
context_length = 16
batch_tokens = 64
micro_batch_tokens = 64
dtype = "float32"
optimizer = { warmup_steps = 0 }
model = { hidden_size = 16, num_layers = 1, num_heads = 2, num_kv_heads = 1, intermediate_size = 16 }
"""
SFT = """
from = "tiny"
data = "sft.jsonl"
num_steps = 2
batch_tokens = 64
micro_batch_tokens = 64
max_length = 64
dtype = "float32"
optimizer = { lr = 1e-3 }
"""
GRPO = """
from = "tiny"
tasks = "tasks.jsonl"
rewards = [{ name = "length", options = { target_tokens = 3, width = 3 } }]
num_steps = 2
prompts_per_step = 2
group_size = 2
dtype = "float32"
sampling = { max_new_tokens = 4 }
optimizer = { lr = 1e-3 }
"""
PPO = GRPO  # only the stage differs
RECIPES = {"pretrain": PRETRAIN, "sft": SFT, "grpo": GRPO, "ppo": PPO}


@pytest.fixture
def here(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with good data, recipes and the start checkpoint, and the process inside it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STROP_PROGRESS", "off")
    shutil.copytree(tiny_folder, "tiny")
    Path("corpus.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 8)
    rows = [{"prompt": f"the quick {word}", "completion": " fox"} for word in ("brown", "lazy", "cat")]
    Path("sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("tasks.jsonl").write_text("".join(json.dumps({"prompt": row["prompt"], "answer": "3"}) + "\n" for row in rows))
    for stage, recipe in RECIPES.items():
        Path(f"{stage}.toml").write_text(recipe)
    return tmp_path


def refused(capsys: pytest.CaptureFixture[str], *argv: str, status: int = 2) -> str:
    """The message of a call that must fail, and must not leave a run behind."""
    assert main(list(argv)) == status
    error = capsys.readouterr().err
    assert error.startswith("strop: error: "), error
    assert [str(path) for path in Path("runs").glob("*")] == [], "a failed start left something behind"
    return error


def change(recipe: str, old: str, new: str) -> None:
    path = Path(recipe)
    text = path.read_text()
    assert text.count(old) == 1, old
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize("stage", ["pretrain", "sft", "grpo", "ppo"])
def test_the_recipes_of_this_file_work_as_they_are(here: Path, stage: str) -> None:
    assert main([stage, f"{stage}.toml"]) == 0
    assert RunFolder.open("runs", stage).info["status"] == "finished"


def no_file(stage: str, file: Path) -> str:
    file.unlink()
    return f"{file} does not exist"


def empty_file(stage: str, file: Path) -> str:
    file.write_text("")
    return f"{file}: the file is empty"


STAGES_AND_FILES = [("pretrain", "corpus.txt"), ("sft", "sft.jsonl"), ("grpo", "tasks.jsonl"), ("ppo", "tasks.jsonl")]


@pytest.mark.parametrize("damage", [no_file, empty_file])
@pytest.mark.parametrize(("stage", "file"), STAGES_AND_FILES)
def test_missing_and_empty_files(
    here: Path, capsys: pytest.CaptureFixture[str], stage: str, file: str, damage: Callable[[str, Path], str]
) -> None:
    expected = damage(stage, Path(file))
    assert expected in refused(capsys, stage, f"{stage}.toml")


@pytest.mark.parametrize(("stage", "file"), STAGES_AND_FILES[1:])
def test_bad_rows_are_named_by_file_and_line(
    here: Path, capsys: pytest.CaptureFixture[str], stage: str, file: str
) -> None:
    good = Path(file).read_text()
    Path(file).write_text(good + '{"prompt": "cut off\n')
    assert f"{file}:4: broken JSON" in refused(capsys, stage, f"{stage}.toml")
    Path(file).write_text(good + '{"question": "2 + 2"}\n')
    message = refused(capsys, stage, f"{stage}.toml")
    assert f"{file}:4" in message and "prompt" in message
    Path(file).write_text(good)
    assert main([stage, f"{stage}.toml"]) == 0, "the name must be free after the failures"


def test_a_missing_answer_column_is_found_before_the_run_begins(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("math_verify")
    change("grpo.toml", '{ name = "length", options = { target_tokens = 3, width = 3 } }', '{ name = "math" }')
    Path("tasks.jsonl").write_text('{"prompt": "1 + 1 =", "answer": "2"}\n{"prompt": "2 + 2 =", "solution": "4"}\n')
    message = refused(capsys, "grpo", "grpo.toml")
    assert "tasks.jsonl:2" in message and "'answer'" in message


def test_what_is_longer_than_the_context(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long = "x " * 200
    with Path("tasks.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": long, "answer": "3"}) + "\n")
    message = refused(capsys, "grpo", "grpo.toml")
    assert "tasks.jsonl:4: the prompt has" in message and "the model's 128 positions" in message

    with Path("sft.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "a", "completion": long}) + "\n")
    message = refused(capsys, "sft", "sft.toml")
    assert "sft.jsonl:4: " in message and "max_length is 64" in message and "on_too_long" in message
    sizes = ["--max-length", "512", "--micro-batch-tokens", "512", "--batch-tokens", "512"]
    message = refused(capsys, "sft", "sft.toml", *sizes)
    assert "sft.jsonl:4: " in message and "the model has only 128: lower max_length to 128" in message

    change("pretrain.toml", "vocab_size = 280\n", 'from = "tiny"\n')
    Path("pretrain.toml").write_text(Path("pretrain.toml").read_text().split("model =")[0])
    sizes = ["--context-length", "129", "--micro-batch-tokens", "200", "--batch-tokens", "200"]
    assert "context_length=129 exceeds the model's 128 positions" in refused(
        capsys, "pretrain", "pretrain.toml", *sizes
    )


def test_sample_prompts_are_looked_at_before_the_first_step(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = "x " * 3000
    message = refused(capsys, "pretrain", "pretrain.toml", "--sample-prompts", "the", prompt)
    assert "sample_prompts[1] has" in message


@pytest.mark.parametrize("stage", ["sft", "grpo", "ppo"])
def test_a_tokenizer_that_does_not_fit_the_model(here: Path, capsys: pytest.CaptureFixture[str], stage: str) -> None:
    from strop.tokenizer import train_bpe

    words = " ".join(a + b + c for a in "abcdefg" for b in "hijklmn" for c in "opqrstu")
    larger = train_bpe([words], 400)
    assert larger.vocab_size > 320
    larger.save("tiny")
    message = refused(capsys, stage, f"{stage}.toml")
    assert f"has {larger.vocab_size} ids, but the model's vocabulary has only 320" in message


@pytest.mark.parametrize(
    ("stage", "flags", "expected"),
    [
        ("pretrain", ["--micro-batch-tokens", "8"], "micro_batch_tokens=8 is smaller than context_length=16"),
        ("pretrain", ["--batch-tokens", "8"], "batch_tokens=8 is smaller than context_length=16"),
        ("pretrain", ["--model.num-heads", "3"], "model.hidden_size=16 is not divisible by model.num_heads=3"),
        ("pretrain", ["--model.num-kv-heads", "3"], "model.num_heads=2 is not divisible by model.num_kv_heads=3"),
        ("pretrain", ["--model.num-heads", "16"], "model.hidden_size / model.num_heads = 1 is odd"),
        ("pretrain", ["--model.num-layers", "0"], "model.num_layers=0 must be at least 1"),
        ("pretrain", ["--from", "tiny"], "model is the shape of a new model, but init_from has one already"),
        ("pretrain", ["--vocab-size", "100"], "vocab_size 100 is too small"),
        ("pretrain", ["--tokenizer", "tiny"], "vocab_size is for a new tokenizer"),
        ("pretrain", ["--num-steps", "0"], "num_steps=0 must be at least 1"),
        ("pretrain", ["--eval-every", "0"], "eval_every=0 must be at least 1"),
        ("pretrain", ["--optimizer.warmup-steps", "3"], "warmup_steps = 3 does not lie between 0 and the 2 steps"),
        ("sft", ["--micro-batch-tokens", "32"], "micro_batch_tokens=32 is smaller than max_length=64"),
        ("sft", ["--batch-tokens", "32"], "batch_tokens=32 cannot hold an example of max_length=64"),
        ("sft", ["--save-every", "0"], "save_every=0 must be at least 1"),
        ("sft", ["--keep-checkpoints", "0"], "keep_checkpoints=0 must be at least 1"),
        ("sft", ["--seed", "-1"], "seed=-1 must be at least 0"),
        ("sft", ["--optimizer.lr", "nan"], "optimizer.lr=nan must be at least 0"),
        ("sft", ["--from", "tinny"], "'tinny' is neither a run, a run/step, nor a folder with a config.json"),
        ("grpo", ["--minibatch-prompts", "3"], "prompts_per_step=2 is not divisible by minibatch_prompts=3"),
        ("grpo", ["--group-size", "1"], 'advantage = "group" needs group_size >= 2'),
        ("grpo", ["--sampling.max-new-tokens", "0"], "sampling.max_new_tokens=0 must be at least 1"),
        ("grpo", ["--num-slots", "0"], "num_slots=0 must be at least 1"),
        ("ppo", ["--critic.value-coef", "1"], "critic.value_coef weighs the losses of a shared trunk"),
        ("ppo", ["--critic.start", "tinny"], "'tinny' is neither a run, a run/step, nor a folder with a config.json"),
        ("ppo", ["--ptx.data", "absent.jsonl"], "absent.jsonl does not exist"),
        ("ppo", ["--ptx.data", "sft.jsonl", "--ptx.max-length", "4"], "sft.jsonl:1: "),
        ("ppo", ["--gamma", "2"], "gamma=2.0 must lie between 0 and 1"),
    ],
)
def test_sizes_that_cannot_work(
    here: Path, capsys: pytest.CaptureFixture[str], stage: str, flags: list[str], expected: str
) -> None:
    assert expected in refused(capsys, stage, f"{stage}.toml", *flags)


@pytest.mark.parametrize("stage", ["pretrain", "sft", "grpo", "ppo"])
def test_unknown_keys_name_the_nearest(here: Path, capsys: pytest.CaptureFixture[str], stage: str) -> None:
    path = Path(f"{stage}.toml")
    path.write_text("num_step = 3\n" + path.read_text())
    assert f"{stage}.toml: unknown key 'num_step' (did you mean 'num_steps'?)" in refused(capsys, stage, str(path))


def test_a_name_that_is_taken_is_left_alone(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sft", "sft.toml"]) == 0
    before = {path: path.read_bytes() for path in Path("runs/sft").rglob("*") if path.is_file()}
    assert main(["sft", "sft.toml"]) == 2
    assert "run sft exists already in runs: continue it with --resume" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in Path("runs/sft").rglob("*") if path.is_file()} == before


def test_a_flipped_byte_in_the_checkpoint_stops_the_resume(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sft", "sft.toml"]) == 0
    capsys.readouterr()
    for name in ("model.safetensors", "training_state.safetensors"):
        file = Path("runs/sft/checkpoints/step-000002") / name
        good = file.read_bytes()
        file.write_bytes(good[:-9] + bytes([good[-9] ^ 1]) + good[-8:])
        assert main(["sft", "sft.toml", "--resume", "--num-steps", "3"]) == 2
        message = capsys.readouterr().err
        assert f"{name} is not what was saved (its SHA-256 differs)" in message and "Delete" in message
        file.write_bytes(good[:-9])
        assert main(["sft", "sft.toml", "--resume", "--num-steps", "3"]) == 2
        assert f"{name} has {len(good) - 9} bytes, not {len(good)}" in capsys.readouterr().err
        file.write_bytes(good)
    assert main(["sft", "sft.toml", "--resume", "--num-steps", "3"]) == 0
    assert RunFolder.open("runs", "sft").latest_checkpoint().step == 3  # type: ignore[union-attr]


def test_a_resume_goes_on_when_the_parent_is_gone_unless_it_is_the_reference(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["grpo", "grpo.toml"]) == 0
    assert main(["grpo", "grpo.toml", "--name", "with-kl", "--kl-coef", "0.1"]) == 0
    assert main(["ppo", "ppo.toml", "--name", "ppo-with-kl"]) == 0
    assert main(["ppo", "ppo.toml", "--kl-coef", "0"]) == 0
    shutil.move("tiny", "elsewhere")
    assert main(["grpo", "grpo.toml", "--resume", "--num-steps", "3"]) == 0
    capsys.readouterr()
    assert main(["grpo", "grpo.toml", "--name", "with-kl", "--kl-coef", "0.1", "--resume", "--num-steps", "3"]) == 2
    assert "tiny" in capsys.readouterr().err
    assert main(["ppo", "ppo.toml", "--kl-coef", "0", "--resume", "--num-steps", "3"]) == 0
    capsys.readouterr()
    assert main(["ppo", "ppo.toml", "--name", "ppo-with-kl", "--resume", "--num-steps", "3"]) == 2
    assert "tiny" in capsys.readouterr().err


@pytest.mark.parametrize("stage", ["grpo", "ppo"])
def test_ppos_checkpoint_is_a_policy_with_its_critic_in_a_folder_of_its_own(here: Path, stage: str) -> None:
    """Both open in transformers; the next stage starts from the policy, and a next PPO's critic from the critic."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    flags = ["--kl-coef", "0", "--critic.lr", "1e-2"]
    assert main(["ppo", "ppo.toml", *flags]) == 0
    checkpoint = RunFolder.open("runs", "ppo").latest_checkpoint()
    assert checkpoint is not None
    _, info = AutoModelForCausalLM.from_pretrained(checkpoint.path, output_loading_info=True)
    assert not any(info.values()), info
    critic, info = AutoModelForSequenceClassification.from_pretrained(
        checkpoint.path / "critic", output_loading_info=True
    )
    assert not any(info.values()), info
    assert critic.score.weight.any(), "the head began as zeros and has learned"
    AutoTokenizer.from_pretrained(checkpoint.path)
    manifest = json.loads((checkpoint.path / "checkpoint.json").read_text())
    assert "critic/model.safetensors" in manifest["files"]

    start = [] if stage == "grpo" else ["--critic.start", str(checkpoint.path / "critic")]
    assert main([stage, f"{stage}.toml", "--from", "ppo", "--name", "next", *start]) == 0
    run = RunFolder.open("runs", "next")
    assert run.info["parent"]["run"] == "ppo"
    if stage == "ppo":
        assert run.info["critic"].startswith("own network, from the reward model")
        first = next(line for line in read_lines(run.path / "metrics.jsonl") if line["step"] == 1)
        assert first["value_mean"] != 0.0


def test_run_json_says_which_critic_it_was(here: Path) -> None:
    shutil.copytree("tiny", "other")
    for name, flags, expected in (
        ("policy", [], "own network, from the policy's weights and a head of zeros"),
        ("model", ["--critic.start", "other"], "own network, from the language model other ("),
        ("shared", ["--critic.network", "shared"], "value head on the policy's trunk, from zeros"),
    ):
        assert main(["ppo", "ppo.toml", "--name", name, *flags]) == 0
        assert RunFolder.open("runs", name).info["critic"].startswith(expected)


def test_a_critic_that_reads_other_words_is_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from strop.tokenizer import train_bpe

    shutil.copytree("tiny", "other")
    train_bpe(["completely different words make other tokens"], 290).save("other")
    message = refused(capsys, "ppo", "ppo.toml", "--critic.start", "other")
    assert "critic.start: the tokenizer of other is not the policy's" in message
    config = json.loads(Path("other/config.json").read_text())
    shutil.copytree("tiny", "short")
    Path("short/config.json").write_text(json.dumps({**config, "max_position_embeddings": 64}))
    message = refused(capsys, "ppo", "ppo.toml", "--critic.start", "short")
    assert "short has 64 positions, fewer than the policy's 128" in message


REWARD = """
import time
def good(completions, **kwargs): return [float(len(text)) for text in completions]
def raises(completions, **kwargs): return [1 / 0 for _ in completions]
def hangs(completions, **kwargs): time.sleep(60)
def nan(completions, **kwargs): return [float("nan") for _ in completions]
def short(completions, **kwargs): return [1.0]
"""


@pytest.mark.parametrize(
    ("function", "status", "expected"),
    [
        ("raises", 1, "reward 'raises' failed on 4 of 4 completions; the first: ZeroDivisionError"),
        ("hangs", 1, "reward 'hangs' failed on 4 of 4 completions; the first: "),
        ("nan", 1, "reward 'nan' failed on 4 of 4 completions; the first: returned nan"),
        ("short", 2, "reward 'short' returned 1 rewards for 4 completions"),
        ("absent", 2, "has no function 'absent'"),
    ],
)
def test_reward_functions_that_fail(
    here: Path, capsys: pytest.CaptureFixture[str], function: str, status: int, expected: str
) -> None:
    Path("my_reward.py").write_text(REWARD)
    options = ", options = { timeout = 1.0 }" if function == "hangs" else ""
    rewards = f'rewards = [{{ name = "my_reward.py:{function}"{options} }}]'
    text = Path("grpo.toml").read_text()
    Path("grpo.toml").write_text(
        "\n".join(rewards if line.startswith("rewards") else line for line in text.splitlines())
    )
    assert main(["grpo", "grpo.toml"]) == status
    assert expected in capsys.readouterr().err
    if status == 2:
        assert [str(path) for path in Path("runs").glob("*")] == []
    else:
        run = RunFolder.open("runs", "grpo")
        assert run.info["status"] == "failed"
        assert expected in run.info["error"]
        # Nothing of the recipe was at fault, so the run goes on once the function is mended.
        Path("my_reward.py").write_text(
            REWARD.replace(f"def {function}", "def old").replace("def good", f"def {function}")
        )
        assert main(["grpo", "grpo.toml", "--resume"]) == 0


def with_weight(value: float) -> None:
    """Put the value into one weight of the start checkpoint."""
    from strop.models import load_model, save_model

    model = load_model("tiny")
    with torch.no_grad():
        next(iter(model.parameters())).view(-1)[0] = value
    save_model(model, "tiny")


@pytest.mark.parametrize("stage", ["pretrain", "sft"])
def test_a_gradient_that_is_not_finite_is_refused_counted_and_stops_the_run(
    here: Path, capsys: pytest.CaptureFixture[str], stage: str
) -> None:
    if stage == "pretrain":
        change("pretrain.toml", "vocab_size = 280\n", 'from = "tiny"\n')
        Path("pretrain.toml").write_text(Path("pretrain.toml").read_text().split("model =")[0])
    with_weight(float("inf"))
    flags = ["--num-steps", "20", "--optimizer.max-skipped-steps", "3", "--save-every", "2", "--eval-every", "1"]
    more = ["--sample-prompts", "the"] if stage == "pretrain" else []
    # Row 0 of the embedding is the end of a text, which every document of SFT has.
    assert main([stage, f"{stage}.toml", *flags, *more]) == 1
    message = capsys.readouterr().err
    assert "3 steps in a row had a non-finite gradient and changed nothing" in message
    assert "failed_batch.safetensors" in message and "Lower optimizer.lr" in message
    run = RunFolder.open("runs", stage)
    assert run.info["status"] == "failed"
    lines = list(read_lines(run.path / "metrics.jsonl"))
    assert [line["skipped"] for line in lines] == [1.0, 1.0, 1.0]
    from safetensors.torch import load_file

    batch = load_file(run.path / "failed_batch.safetensors")
    assert int(batch["lengths"].sum()) == len(batch["token_ids"]) == len(batch["labels"]) > 0
    # The weights of the checkpoint in between are those of the start: every update was refused.
    saved = load_file(run.path / "checkpoints/step-000002/model.safetensors")
    start = load_file("tiny/model.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in start.items())
    checkpoint = run.latest_checkpoint()
    assert checkpoint is not None
    assert load_training_state(checkpoint)[1]["skipped"] == {"total": 2, "in_a_row": 2}


@pytest.mark.parametrize(
    ("stage", "plain"), [("grpo", 'advantage_scale = "none"'), ("ppo", "whiten_advantages = false")]
)
def test_rl_says_that_its_weights_are_damaged_and_saves_a_rollout_whose_gradient_overflows(
    here: Path, capsys: pytest.CaptureFixture[str], stage: str, plain: str
) -> None:
    Path("my_reward.py").write_text(
        "def huge(completions, **_): return [3e38 * (i % 2) for i in range(len(completions))]\n"
    )
    text = Path(f"{stage}.toml").read_text()
    rewards = 'rewards = [{ name = "my_reward.py:huge" }]\n' + plain
    Path(f"{stage}.toml").write_text(
        "\n".join(rewards if line.startswith("rewards") else line for line in text.splitlines())
    )
    flags = ["--num-steps", "9", "--optimizer.max-skipped-steps", "2"]
    assert main([stage, f"{stage}.toml", *flags]) == 1
    assert "2 steps in a row had a non-finite gradient" in capsys.readouterr().err
    rows = [json.loads(line) for line in Path(f"runs/{stage}/failed_batch.jsonl").read_text().splitlines()]
    assert len(rows) == 4
    assert {row["reward"] for row in rows} == {0.0, 3e38}
    assert all(row["prompt"].startswith("the quick") for row in rows)

    with_weight(float("inf"))
    assert main([stage, f"{stage}.toml", "--name", "damaged"]) == 1
    message = capsys.readouterr().err
    assert "step 1: " in message and "logits are not finite" in message and "lower optimizer.lr" in message


FULL = """
import resource, sys
import strop.stages.sft as stage
from strop.cli.main import main
real = stage.save_model
saves = 0
def save(model, folder):
    global saves
    saves += 1
    if saves == 2:  # the disk is full from here on
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    real(model, folder)
stage.save_model = save
sys.exit(main(sys.argv[1:]))
"""


def test_a_full_disk_leaves_the_checkpoint_before_it_and_the_run_goes_on_from_there(here: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    argv = ["sft", "sft.toml", "--num-steps", "6", "--save-every", "2"]
    done = subprocess.run(
        [sys.executable, "-c", FULL, *argv], capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.returncode == 1, done.stderr
    assert "step-000004 was not saved" in done.stderr and "step-000002 before it is intact" in done.stderr
    assert [path.name for path in Path("runs/sft/checkpoints").iterdir()] == ["step-000002"]
    assert main([*argv, "--resume"]) == 0
    assert main([*argv, "--name", "whole"]) == 0
    ends = [Path(f"runs/{name}/checkpoints/step-000006/model.safetensors").read_bytes() for name in ("sft", "whole")]
    assert ends[0] == ends[1]


@pytest.mark.parametrize("stage", ["pretrain", "sft", "grpo", "ppo"])
def test_a_ctrl_c_that_comes_just_after_the_save_stops_after_the_next_one(
    here: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """Nothing that was logged is lost: the run never exits at a step without a checkpoint."""
    from strop.runs import Progress

    update = Progress.update

    def update_and_interrupt(self: Progress, step: int, figures: Any) -> None:
        update(self, step, figures)
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Progress, "update", update_and_interrupt)
    with pytest.raises(SystemExit) as stopped:
        main([stage, f"{stage}.toml", "--num-steps", "9", "--save-every", "100"])
    assert stopped.value.code == 130
    run = RunFolder.open("runs", stage)
    *_, last = read_lines(run.path / "metrics.jsonl")
    checkpoint = run.latest_checkpoint()
    assert checkpoint is not None and checkpoint.step == last["step"] == 3


def test_the_measured_dtype_is_settled_once(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A second measurement on a busy machine might prefer the other dtype, and the run would no longer be the same."""
    import strop.stages.begin as begin

    answers: list[Any] = [{"float32": 90.0, "bfloat16": 400.4}, {"float32": 90.0, "bfloat16": 4.0}]
    monkeypatch.setattr(begin, "measure_dtypes", lambda device: answers.pop(0))
    change("sft.toml", 'dtype = "float32"\n', 'dtype = "auto"\n')
    assert main(["sft", "sft.toml"]) == 0
    printed = "compute dtype bfloat16, by measurement (float32 90, bfloat16 400 GFLOP/s)"
    assert printed in capsys.readouterr().out.splitlines()
    shutil.rmtree("runs/sft/checkpoints")  # as if killed before the first one
    assert main(["sft", "sft.toml", "--resume"]) == 0
    assert "compute dtype bfloat16" in capsys.readouterr().out.splitlines()
    assert len(answers) == 1
    info = RunFolder.open("runs", "sft").info
    assert (info["dtype"], info["dtype_gflops"]) == ("bfloat16", "float32 90, bfloat16 400")
    config = json.loads(Path("runs/sft/checkpoints/step-000002/config.json").read_text())
    assert config["dtype"] == "bfloat16"


@pytest.fixture
def int8_works() -> None:
    reason = why_unavailable()
    if reason is not None and not reason.startswith("there is no C++ compiler"):
        pytest.skip(reason)  # another processor; a missing compiler is a failure


def test_int8_is_refused_for_a_model_that_cannot_and_kept_by_a_run_that_can(
    here: Path, capsys: pytest.CaptureFixture[str], int8_works: None
) -> None:
    change("pretrain.toml", 'dtype = "float32"\n', 'dtype = "int8"\n')
    error = refused(capsys, "pretrain", "pretrain.toml")
    assert 'dtype="int8" needs hidden_size' in error and 'use "bfloat16"' in error
    assert not are_in_int8()
    wide = ["--model.hidden-size", "64", "--model.num-heads", "2", "--model.num-kv-heads", "1"]
    wide += ["--model.intermediate-size", "96"]
    assert main(["pretrain", "pretrain.toml", *wide]) == 0
    assert "compute dtype int8" in capsys.readouterr().out.splitlines()
    assert RunFolder.open("runs", "pretrain").info["dtype"] == "int8"
    assert not are_in_int8()  # what comes after the run is computed as before it
    shutil.rmtree("runs/pretrain/checkpoints")  # as if killed before the first one
    assert main(["pretrain", "pretrain.toml", *wide, "--resume"]) == 0
    assert "compute dtype int8" in capsys.readouterr().out.splitlines()
    losses = [line["loss"] for line in read_lines(Path("runs/pretrain/metrics.jsonl"))]
    assert losses and all(math.isfinite(loss) for loss in losses)
    assert main(["generate", "pretrain", "--prompt", "the", "--dtype", "int8", "--max-new-tokens", "2"]) == 0
    assert ": int8, weights" in capsys.readouterr().err
    assert not are_in_int8()


def test_a_caller_in_int8_gets_it_back_and_the_run_does_not_have_it(here: Path, int8_works: None) -> None:
    seen = []

    @in_its_dtype
    def train(config: Any, **_: Any) -> Path:
        seen.append(are_in_int8())
        compute_in("int8")
        return Path()

    @dataclasses.dataclass
    class Config:
        dtype: str
        device: str = "cpu"

    with int8():
        train(Config("bfloat16"), name="x")
        assert are_in_int8()
    train(Config("int8"), name="x")
    assert seen == [False, True] and not are_in_int8()


@pytest.mark.parametrize("stage", ["grpo", "ppo"])
def test_a_reward_model_that_cannot_compute_in_int8_is_refused_by_its_name(
    here: Path, capsys: pytest.CaptureFixture[str], int8_works: None, stage: str
) -> None:
    """It is loaded before the policy, and would otherwise be in bfloat16 or not as the order falls out."""
    model = load_model("tiny", dtype=torch.bfloat16)
    save_scalar_model(add_scalar_head(model, seed=0), "rm")  # type: ignore[arg-type]
    shutil.copy("tiny/tokenizer.json", "rm")
    change(f"{stage}.toml", 'dtype = "float32"\n', 'dtype = "int8"\n')
    change(
        f"{stage}.toml",
        '{ name = "length", options = { target_tokens = 3, width = 3 } }',
        '{ name = "model", options = { model = "rm" } }',
    )
    error = refused(capsys, stage, f"{stage}.toml")
    assert 'rm: dtype="int8" needs head_dim (8) to be a multiple of 32: use "bfloat16"' in error
