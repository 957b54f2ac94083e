"""Every stage, killed at any moment and resumed, ends as if it had never been killed; Ctrl-C and SIGTERM save first.

One process imports everything and forks a child for each run, so that a kill costs no import.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from strop.runs import Checkpoint, RunFolder, load_training_state, read_lines

DRIVER = """
import importlib, json, os, pathlib, random, signal, sys, time
import torch
import torch._dynamo, torch.utils.tensorboard.writer  # what is imported late: once, before the forks
from strop.cli.main import main

torch.set_num_threads(1)
os.environ["STROP_PROGRESS"] = "off"
RECIPE = sys.argv[1]
STAGE = RECIPE.partition(":")[0]
module = importlib.import_module(f"strop.stages.{STAGE.replace('-', '_')}")
SAVE = "save_scalar_model" if STAGE == "reward-model" else "save_model"
CALL = [STAGE, f"{RECIPE.replace(':', '-')}.toml"]

def in_child(*flags, kill_after=None, in_save=None, stop=None):
    "The child's exit code, -9 for a kill. in_save: the number of the save in whose middle it dies."
    child = os.fork()
    if child == 0:
        code = 1
        try:
            if in_save or stop:
                arrange(in_save, stop)
            code = main([*CALL, *flags])
        except SystemExit as error:
            code = error.code
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            os._exit(code)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def arrange(in_save, stop):
    real, count = getattr(module, SAVE), 0
    def save_model(model, folder, **options):
        nonlocal count
        count += 1
        real(model, folder, **options)
        if count == in_save:
            os.kill(os.getpid(), signal.SIGKILL)
    setattr(module, SAVE, save_model)
    if stop:
        from strop.runs import RunFolder
        log = RunFolder.log
        def log_and_stop(self, step, metrics):
            log(self, step, metrics)
            if step == stop[1]:
                os.kill(os.getpid(), stop[0])
        RunFolder.log = log_and_stop

started = time.monotonic()
assert in_child("--name", "whole") == 0
seconds = time.monotonic() - started

assert in_child("--name", "killed", in_save=2) == -9
partials = [path.name for path in pathlib.Path("runs/killed/checkpoints").glob("*.partial")]
assert partials, "the kill came too late to be in the middle of a save"
moment = random.SystemRandom().uniform(0.1, 0.9) * seconds
print("killed after", moment, "of", seconds, "seconds", file=sys.stderr)
code = in_child("--name", "killed", "--resume", kill_after=moment)
assert code in (-9, 0), code
if code == -9:
    assert in_child("--name", "killed", "--resume") == 0

for number, (which, step) in enumerate([(signal.SIGINT, 3), (signal.SIGTERM, 6)]):
    resume = ["--resume"] if number else []
    assert in_child("--name", "stopped", *resume, stop=(which, step)) == 128 + which
    info = json.loads(pathlib.Path("runs/stopped/run.json").read_text())
    assert info["status"] == "interrupted", info["status"]
    assert pathlib.Path(f"runs/stopped/checkpoints/step-{step:06}").is_dir()
assert in_child("--name", "stopped", "--resume") == 0
"""

PRETRAIN = """
data = [{ path = "corpus.txt", weight = 0.7 }, { path = "more.txt", weight = 0.3 }]
eval_data = "corpus.txt"
eval_bytes = 100
num_steps = 9
vocab_size = 280
context_length = 16
batch_tokens = 64
micro_batch_tokens = 32
sample_prompts = ["the"]
eval_every = 4
save_every = 4
dtype = "bfloat16"
optimizer = { warmup_steps = 2 }
model = { hidden_size = 32, num_layers = 2, num_heads = 4, num_kv_heads = 2, intermediate_size = 32 }
"""
SFT = """
from = "tiny"
data = "sft.jsonl"
eval_data = "sft.jsonl"
num_steps = 9
batch_tokens = 64
micro_batch_tokens = 32
max_length = 32
eval_every = 4
save_every = 4
dtype = "bfloat16"
optimizer = { lr = 3e-3, schedule = "cosine", weight_decay = 0.1 }
"""
REWARD_MODEL = """
from = "tiny"
data = "ranks.jsonl"
eval_data = "ranks.jsonl"
num_steps = 9
batch_size = 5
micro_batch_tokens = 64
eval_every = 4
save_every = 4
dtype = "bfloat16"
optimizer = { lr = 3e-3, schedule = "cosine" }
"""
DPO = """
from = "tiny"
data = "ranks.jsonl"
eval_data = "ranks.jsonl"
loss = "bco"
num_steps = 9
batch_size = 3
micro_batch_tokens = 64
max_length = 32
eval_every = 4
save_every = 4
dtype = "bfloat16"
optimizer = { lr = 3e-3, schedule = "cosine" }
"""
ONLINE = """
from = "tiny"
rewards = [{ name = "length", options = { target_tokens = 3, width = 3 } }]
num_steps = 9
batch_size = 4
reference_refresh_steps = 5
save_every = 4
dtype = "float32"
online = { tasks = "tasks.jsonl", group_size = 4, pairs = "all" }
sampling = { max_new_tokens = 5, stop = ["a", "e", "o", "t", "u", "n", "r", "i", "h"] }
optimizer = { lr = 3e-3, schedule = "linear" }
"""
GRPO = """
from = "tiny"
tasks = "tasks.jsonl"
rewards = [{ name = "length", options = { target_tokens = 3, width = 3 } }]
num_steps = 9
prompts_per_step = 4
group_size = 4
minibatch_prompts = 2
epochs_per_rollout = 2
dynamic_sampling = true
max_sampling_rounds = 2
kl_coef = 0.1
reference_refresh_steps = 5
save_every = 4
dtype = "float32"
sampling = { max_new_tokens = 5, stop = ["a", "e", "o", "t", "u", "n", "r", "i", "h"] }
optimizer = { lr = 3e-3, schedule = "linear" }
eval = { tasks = "tasks.jsonl", every = 4 }
"""
SFT_LORA = SFT + "lora = { rank = 2 }\n"
GRPO_LORA = GRPO.replace('dtype = "float32"', 'dtype = "bfloat16"') + "lora = { rank = 2, rslora = true }\n"
PPO = """
from = "tiny"
tasks = "tasks.jsonl"
num_steps = 9
prompts_per_step = 4
group_size = 2
minibatch_prompts = 2
epochs_per_rollout = 2
missing_eos = "subtract"
whiten_rewards = true
kl_target = 0.01
kl_horizon = 40
save_every = 4
sampling = { max_new_tokens = 5, stop = ["a", "e", "o", "t", "u", "n", "r", "i", "h"] }
optimizer = { lr = 3e-3, schedule = "linear" }
eval = { tasks = "tasks.jsonl", every = 4 }
ptx = { data = "sft.jsonl", max_length = 32, batch_tokens = 64 }
"""
PPO_OWN = """
rewards = [
    { name = "model", options = { model = "rm" } },
    { name = "length", options = { target_tokens = 3, width = 3 } },
]
dtype = "bfloat16"
critic = { start = "rm", lr = 1e-2, warmup_steps = 2 }
"""
PPO_SHARED = """
rewards = [{ name = "length", options = { target_tokens = 3, width = 3 } }]
dtype = "bfloat16"
critic = { network = "shared" }
"""
PPO_LORA = PPO + PPO_SHARED + "lora = { rank = 2 }\n"
DPO_LORA = DPO + "lora = { rank = 2 }\n"
ONLINE_LORA = ONLINE + "lora = { rank = 2 }\n"
TTRL = """
from = "tiny"
tasks = "tasks.jsonl"
answer_pattern = "whole"
answer_column = ""
num_steps = 9
num_votes = 6
group_size = 4
prompts_per_step = 4
epochs_per_rollout = 2
kl_coef = 0.1
save_every = 4
dtype = "bfloat16"
lora = { rank = 2 }
sampling = { max_new_tokens = 5, stop = ["a", "e", "o", "t", "u", "n", "r", "i", "h"] }
optimizer = { lr = 3e-3, schedule = "linear" }
held_out = { num_prompts = 8, num_samples = 4, every = 3, max_drop = 1.0, min_answers = 0.0 }
"""
SELFPLAY = """
from = "tiny"
game = "open_spiel:tic_tac_toe"
num_steps = 9
games_per_step = 6
opening_moves = 3
past_every = 3
epochs_per_rollout = 2
kl_coef = 0.01
save_every = 4
dtype = "bfloat16"
sampling = { max_new_tokens = 3 }
optimizer = { lr = 3e-3, schedule = "linear" }
eval = { opponents = ["start", "random"], every = 4, num_games = 4 }
"""
RECIPES = {
    "pretrain": PRETRAIN,
    "sft": SFT,
    "grpo": GRPO,
    "sft:lora": SFT_LORA,
    "grpo:lora": GRPO_LORA,
    "reward-model": REWARD_MODEL,
    "ppo": PPO + PPO_OWN,
    "ppo:shared": PPO + PPO_SHARED,
    "dpo": DPO,
    "dpo:online": ONLINE,
    "ppo:lora": PPO_LORA,
    "dpo:lora": DPO_LORA,
    "dpo:online-lora": ONLINE_LORA,
    "ttrl": TTRL,
    "selfplay": SELFPLAY,
}


@pytest.fixture(scope="module", params=RECIPES)
def runs(request: pytest.FixtureRequest, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp(request.param.replace(":", ""))
    shutil.copytree(tiny_folder, root / "tiny")
    # A stop token that only the model's config names: the run's own checkpoints get a generation_config.json with it,
    # and a resumed run must not end its completions there, since the run did not before.
    (root / "tiny/generation_config.json").unlink()
    config = json.loads((root / "tiny/config.json").read_text())
    (root / "tiny/config.json").write_text(json.dumps({**config, "eos_token_id": 77}))
    (root / "corpus.txt").write_text(
        "<|endoftext|>\n".join(f"the quick brown fox number {i} jumps\n" for i in range(30))
    )
    (root / "more.txt").write_text("<|endoftext|>\n".join(f"{i} lazy dogs sleep and sleep\n" for i in range(9)))
    words = ["brown", "lazy", "cat", "dog", "fox", "quick"]
    rows = [{"prompt": f"the {a} {b}", "completion": f" {b}"} for a in words for b in words]
    (root / "sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks = [{"prompt": row["prompt"], "answer": row["completion"]} for row in rows[:10]]
    (root / "tasks.jsonl").write_text("".join(json.dumps(task) + "\n" for task in tasks))
    answers = [[f" {word}" for word in words[place:] + words[: place // 2]] for place in range(5)]
    ranks = [{"prompt": "the", "completions": own, "ranks": [len(text) for text in own]} for own in answers]
    (root / "ranks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ranks * 4))
    for name, recipe in RECIPES.items():
        (root / f"{name.replace(':', '-')}.toml").write_text(recipe)
    if request.param == "ppo":
        save_reward_model(tiny_folder, root / "rm")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, request.param],
        cwd=root,
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return root / "runs"


def save_reward_model(tiny_folder: Path, folder: Path) -> None:
    from strop.models import load_model
    from strop.models.heads import add_scalar_head, save_scalar_model
    from strop.models.reward_scale import RewardScale
    from strop.tokenizer import Tokenizer

    model = add_scalar_head(load_model(tiny_folder), seed=3)  # type: ignore[arg-type]
    save_scalar_model(model, folder, reward_scale=RewardScale(mean=0.1, std=2.0))
    Tokenizer.load(tiny_folder).save(folder)


def last(runs_dir: Path, name: str) -> Checkpoint:
    checkpoint = RunFolder.open(runs_dir, name).latest_checkpoint()
    assert checkpoint is not None and checkpoint.step == 9
    return checkpoint


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_the_end_is_that_of_the_uninterrupted_run_to_the_last_byte(runs: Path, how: str) -> None:
    whole, other = last(runs, "whole"), last(runs, how)
    files, others = (
        sorted(path.relative_to(one.path) for path in one.path.rglob("*") if path.is_file()) for one in (whole, other)
    )
    assert others == files
    for name in files:
        assert (other.path / name).read_bytes() == (whole.path / name).read_bytes(), str(name)
    lines = list(read_lines(runs / "whole/metrics.jsonl", with_clock=False))
    assert list(read_lines(runs / how / "metrics.jsonl", with_clock=False)) == lines
    assert (runs / how / "samples.jsonl").read_bytes() == (runs / "whole/samples.jsonl").read_bytes()
    assert [line["step"] for line in lines if line["step"]] == list(range(1, 10))
    assert RunFolder.open(runs, how).info["status"] == "finished"


def test_there_was_something_to_lose(runs: Path) -> None:
    """Weights move in every step, metrics differ from step to step, and the state that must come back is not empty."""
    [file] = last(runs, "whole").path.glob("*model.safetensors")
    early, late = load_file(runs / "whole/checkpoints/step-000008" / file.name), load_file(file)
    assert any(not torch.equal(value, late[name]) for name, value in early.items())
    tensors, state = load_training_state(last(runs, "whole"))
    assert any(name.startswith("exp_avg.") and bool(value.any()) for name, value in tensors.items())
    if "baselines" in state:  # self-play has no data to be somewhere in
        assert {"self/0", "self/1", "past/0", "past/1"} == set(state["baselines"]) and any(state["baselines"].values())
    else:
        position = state.get("batches") or state["tasks"]
        assert (position["epoch"], position["batch"]) != (0, 0)
    lines = [line for line in read_lines(runs / "whole/metrics.jsonl") if line["step"]]
    assert len({line["grad_norm"] for line in lines}) >= 8  # PPO's critic has its first two steps for itself
    if "kl_coef" in state:
        assert len({line["kl_coef"] for line in lines}) > 5
        assert state["ptx"]["epoch"] > 0
        critic = last(runs, "whole").path / "critic"
        if (critic / "value_head.safetensors").is_file():
            assert load_file(critic / "value_head.safetensors")["weight"].any()
            assert "exp_avg.value_head.weight" in tensors
        else:
            assert len({line["critic_grad_norm"] for line in lines}) == 9
            assert any(name.startswith("critic.master.") for name in tensors)
            early = load_file(runs / "whole/checkpoints/step-000008/critic/model.safetensors")
            late = load_file(critic / "model.safetensors")
            assert any(not torch.equal(value, late[name]) for name, value in early.items())
    elif "watch" in state:
        assert len(state["watch"]["base_answers"]) == 8 and state["watch"]["best_metrics"]
        assert len({line["majority_share"] for line in lines}) > 1
    elif "tasks" in state:
        assert any(name.startswith("reference.") for name in tensors)
        assert any(line["groups_sampled"] > line["groups"] for line in lines), "no group was ever replaced"
        assert (runs / "whole/samples.jsonl").stat().st_size > 0
