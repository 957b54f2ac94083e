"""A checkpoint is there whole or not at all, and one that is not what was saved is never read."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from strop.runs import RunFolder, load_training_state, resolve, verify


def make_run(runs_dir: Path, name: str = "run", **options) -> RunFolder:
    arguments = {"stage": "sft", "config": {"num_steps": 9}, "parent": None, "data_hashes": {}, "seed": 0} | options
    return RunFolder.create(runs_dir, name, **arguments)


def tensors_of(step: int) -> dict[str, Tensor]:
    return {"exp_avg.w": torch.full((3, 5), float(step)), "step.w": torch.tensor(float(step))}


def write_model(step: int):
    def write(folder: Path) -> None:
        (folder / "config.json").write_text('{"model_type": "llama"}')
        save_file({"w": torch.full((64, 64), float(step))}, folder / "model.safetensors")

    return write


def save(run: RunFolder, step: int, **options):
    return run.save_checkpoint(step, write_model(step), tensors_of(step), {"data": {"row": step}}, **options)


def resume(runs_dir: Path) -> RunFolder:
    return RunFolder.resume(runs_dir, "run", config={"num_steps": 9}, data_hashes={})


def test_round_trip(tmp_path):
    with make_run(tmp_path) as run:
        save(run, 100)
        state = {"loader": {"epoch": 2, "order": [3, 1]}, "rng": 2**80, "best": 0.1 + 0.2}
        tensors = {"a": torch.randn(4, 3).T, "b": torch.ones(2, dtype=torch.bfloat16), "c": torch.tensor(5)}
        saved = run.save_checkpoint(120, write_model(120), tensors, state)
    latest = RunFolder.open(tmp_path, "run").latest_checkpoint()
    assert latest == saved and latest.step == 120 and latest.path.name == "step-000120"
    read_tensors, read_state = load_training_state(latest)
    assert read_state == state and read_tensors.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert torch.equal(read_tensors[key], tensor) and read_tensors[key].dtype == tensor.dtype


KILLED_SAVES = """
import os, pathlib, random, signal, sys, time
import torch
from safetensors.torch import save_file
from strop.runs import RunFolder, checkpoints, load_training_state

runs_dir, random = pathlib.Path(sys.argv[1]), random.Random(int(sys.argv[2]))
torch.set_num_threads(1)

def write_model(step):
    def write(folder):
        save_file({"w": torch.full((300, 1000), float(step))}, folder / "model.safetensors")
        (folder / "config.json").write_text("{}")
    return write

def fork(function):
    child = os.fork()
    if child == 0:
        try:
            function()
        finally:
            os._exit(1)
    return child

def writer(kill_at_call=None):
    run = RunFolder.resume(runs_dir, "run", config={}, data_hashes={})
    latest = run.latest_checkpoint()
    run.rewind_to(latest.step if latest else None)
    step = latest.step if latest else 0
    count = 0
    def counted(call):
        def counting(*arguments, **options):
            nonlocal count
            count += 1
            if count == kill_at_call:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **options)
        return counting
    os.fsync, os.unlink, pathlib.Path.write_text = map(counted, (os.fsync, os.unlink, pathlib.Path.write_text))
    checkpoints.write_tensors = counted(checkpoints.write_tensors)
    while True:
        step += 1
        run.save_checkpoint(step, write_model(step), {"m": torch.full((300, 1000), -float(step))}, {"step": step},
                            keep_last=2)

def check(at_least):
    run = RunFolder.open(runs_dir, "run")
    latest = run.latest_checkpoint()
    step = latest.step if latest else 0
    assert step >= at_least, (step, at_least)
    if latest:
        tensors, state = load_training_state(latest)
        assert state == {"step": step} and bool((tensors["m"] == -step).all())
        for older in checkpoints.list_steps(run.path / "checkpoints"):
            checkpoints.verify(run.checkpoint(older))
    return step

RunFolder.create(runs_dir, "run", stage="sft", config={}, parent=None, data_hashes={}, seed=0).close()
step = 0
for kill_at_call in range(1, 25):
    assert os.waitpid(fork(lambda: writer(kill_at_call)), 0)[1] == signal.SIGKILL
    step = check(step)
assert step > 5, step
for _ in range(20):
    child = fork(writer)
    time.sleep(random.uniform(0.0, 0.04))
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL, "the writer failed before it was killed"
    step = check(step)
print("steps", step)
"""


def run_script(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


def test_kill_during_save_leaves_the_last_checkpoint_valid(tmp_path):
    """SIGKILL at each write, fsync and unlink of a save, then at 20 random moments; the next writer goes on."""
    done = run_script(KILLED_SAVES, tmp_path, 7)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[1]) > 10


DISK_FULL = """
import pathlib, resource, sys
import torch
from safetensors.torch import save_file
from strop.runs import RunFolder

runs_dir = pathlib.Path(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

def save(run, step, too_large):
    def write_model(folder):
        save_file({"w": torch.zeros(300_000 if too_large == "model" else 1)}, folder / "model.safetensors")
        (folder / "config.json").write_text("{}")
    tensors = {"m": torch.ones(300_000 if too_large == "tensors" else 1)}
    run.save_checkpoint(step, write_model, tensors, {"notes": "x" * (400_000 if too_large == "json" else 1)})

for place in ("model", "tensors", "json"):
    run = RunFolder.create(runs_dir, place, stage="sft", config={}, parent=None, data_hashes={}, seed=0)
    save(run, 1, None)
    try:
        save(run, 2, place)
    except OSError as error:
        print(error)
    print(run.latest_checkpoint().step, [path.name for path in (run.path / "checkpoints").iterdir()])
    save(run, 3, None)
    print(run.latest_checkpoint().step)
"""


def test_a_file_that_cannot_be_written_leaves_the_last_checkpoint(tmp_path):
    """The kernel refuses writes past 200 kB: in the model's file, in the training tensors, in the training JSON."""
    done = run_script(DISK_FULL, tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 9
    for message, after, later in zip(lines[::3], lines[1::3], lines[2::3], strict=True):
        assert "step-000002 was not saved" in message and "File too large" in message and "step-000001" in message
        assert after == "1 ['step-000001']"
        assert later == "3"


def test_an_error_of_the_model_writer_passes_through_and_leaves_nothing(tmp_path):
    with make_run(tmp_path) as run:
        save(run, 1)

        def broken(folder: Path) -> None:
            (folder / "config.json").write_text("{}")
            raise KeyError("lm_head.weight")

        with pytest.raises(KeyError, match="lm_head"):
            run.save_checkpoint(2, broken, {}, {})
        assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-000001"]


FILES = ("model.safetensors", "config.json", "training_state.safetensors", "training_state.json", "checkpoint.json")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "empty"])
def test_damage_is_refused_with_file_and_way_back(tmp_path, name, damage):
    with make_run(tmp_path) as run:
        save(run, 100)
        path = save(run, 120).path / name
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 4
    path.write_bytes({"truncate": content[: len(content) // 2], "empty": b""}.get(damage, content))
    if damage == "delete":
        path.unlink()
    run = RunFolder.open(tmp_path, "run")
    with pytest.raises(ValueError) as caught:
        run.latest_checkpoint()
    message = str(caught.value)
    assert str(path) in message and f"Delete {path.parent} to go on from step 100" in message
    shutil.rmtree(path.parent)
    latest = run.latest_checkpoint()
    assert latest is not None and latest.step == 100


def test_the_only_checkpoint_damaged(tmp_path):
    with make_run(tmp_path) as run:
        path = save(run, 5).path
        (path / "model.safetensors").write_bytes(b"short")
        with pytest.raises(ValueError, match="there is none before it"):
            run.latest_checkpoint()


def test_every_flipped_bit_of_the_manifest_is_seen_or_harmless(tmp_path):
    with make_run(tmp_path) as run:
        checkpoint = save(run, 7)
    manifest = checkpoint.path / "checkpoint.json"
    content = manifest.read_bytes()
    refused = 0
    for index in range(len(content)):
        flipped = bytearray(content)
        flipped[index] ^= 1 << (index % 8)
        manifest.write_bytes(flipped)
        try:
            latest = RunFolder.open(tmp_path, "run").latest_checkpoint()
        except ValueError as error:
            assert str(checkpoint.path) in str(error)
            refused += 1
        else:
            assert latest == checkpoint, f"byte {index}"
    assert refused > 0.8 * len(content.split(b" ")), "nearly all but white space matters"
    manifest.write_bytes(content)
    verify(checkpoint)


@settings(max_examples=8, deadline=None)
@given(st.sets(st.integers(1, 12), min_size=4), st.integers(1, 4), st.sets(st.integers(1, 12), min_size=4))
def test_keep_last_never_deletes_the_newest_or_a_kept_step(steps, keep_last, kept):
    with tempfile.TemporaryDirectory() as runs_dir:
        with make_run(Path(runs_dir)) as run:
            for step in sorted(steps):
                run.save_checkpoint(step, lambda folder: None, {}, {}, keep_last=keep_last, keep_steps=kept)
        names = sorted(path.name for path in Path(runs_dir, "run/checkpoints").iterdir())
    wanted = set(sorted(steps)[-keep_last:]) | (kept & set(steps))
    assert names == [f"step-{step:06d}" for step in sorted(wanted)]


def test_what_a_killed_save_left_is_deleted_by_the_next_writer_only(tmp_path):
    with make_run(tmp_path) as run:
        save(run, 1)
    stale = tmp_path / "run/checkpoints/step-000002.partial"
    stale.mkdir()
    (stale / "model.safetensors").write_bytes(b"half")
    reader = RunFolder.open(tmp_path, "run")
    latest = reader.latest_checkpoint()
    assert latest is not None and latest.step == 1 and stale.exists()
    with resume(tmp_path) as run:
        assert not stale.exists()
        assert save(run, 2).step == 2


def test_saving_a_saved_step_again_keeps_and_verifies_it(tmp_path):
    with make_run(tmp_path) as run:
        first = save(run, 3)
        assert run.save_checkpoint(3, write_model(99), {}, {}) == first
        (first.path / "model.safetensors").write_bytes(b"short")
        with pytest.raises(ValueError, match=r"model.safetensors"):
            save(run, 3)


def test_steps_beyond_six_digits_are_ordered_as_numbers(tmp_path):
    with make_run(tmp_path) as run:
        save(run, 999_999)
        save(run, 1_000_000)
        latest = run.latest_checkpoint()
        assert latest is not None and latest.step == 1_000_000
        (latest.path / "config.json").write_text("")
        with pytest.raises(ValueError, match="go on from step 999999"):
            run.latest_checkpoint()


def test_resolve(tmp_path):
    with make_run(tmp_path, "grpo-sums") as run:
        save(run, 100)
        newest = save(run, 120)
    make_run(tmp_path, "empty").close()
    assert resolve("grpo-sums", tmp_path) == newest
    assert resolve("grpo-sums/100", tmp_path).step == 100
    assert resolve(str(newest.path), tmp_path) == newest
    for reference, message in {
        "grpo-sum": "near it: grpo-sums",
        "grpo-sums/110": "no checkpoint at step 110, but at 100, 120",
        "empty": "no checkpoint yet",
        str(tmp_path / "empty"): "name the run, empty",
        str(tmp_path / "elsewhere"): "neither a run",
        "": "neither a run",
    }.items():
        with pytest.raises(ValueError, match=message):
            resolve(reference, tmp_path)
    (newest.path / "model.safetensors").write_bytes(b"short")
    for reference in ("grpo-sums", str(newest.path)):
        with pytest.raises(ValueError, match=r"model.safetensors has 5 bytes"):
            resolve(reference, tmp_path)


def test_the_hash_is_of_the_model_and_only_of_it(tmp_path):
    with make_run(tmp_path) as run:
        saved = save(run, 1)
        same_model = run.save_checkpoint(2, write_model(1), tensors_of(2), {"other": "state"})
        other_model = save(run, 3)
    assert saved.content_hash == same_model.content_hash != other_model.content_hash
    plain = tmp_path / "plain"
    shutil.copytree(saved.path, plain)
    for name in ("checkpoint.json", "training_state.json", "training_state.safetensors"):
        (plain / name).unlink()
    (plain / "README.md").write_text("A model.")
    folder = resolve(str(plain), tmp_path)
    assert (folder.run_name, folder.step, folder.content_hash) == (None, None, saved.content_hash)
    verify(folder)
    with pytest.raises(ValueError, match="without training state"):
        load_training_state(folder)
    (plain / "config.json").write_text("{}")
    assert resolve(str(plain), tmp_path).content_hash != saved.content_hash
    with pytest.raises(ValueError, match="has changed"):
        verify(folder)
