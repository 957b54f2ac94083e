"""A small training loop through RunFolder, AdamW and seeds: killed anywhere and resumed, it ends as if never killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from strop.runs import RunFolder, load_training_state, read_lines

TRAIN = """
import os, pathlib, signal, sys, time
import torch
from safetensors.torch import load_file, save_file
from torch import nn
import torch._dynamo, torch.utils.tensorboard.writer  # what optimisers and logs import late: once, before the forks
from strop.optim import AdamW, learning_rate, optimizer_step
from strop.runs import Interrupt, RunFolder, generator, load_training_state

torch.set_num_threads(1)
DTYPE = torch.bfloat16

def train(runs_dir, *, resume, kill=None, stop_at=None):
    config, data = {"num_steps": 30, "seed": 5}, {"data": "0123"}
    if resume:
        run = RunFolder.resume(runs_dir, "toy", config=config, data_hashes=data)
    else:
        run = RunFolder.create(runs_dir, "toy", stage="toy", config=config, parent=None, data_hashes=data, seed=5)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 1)).to(DTYPE)
    optimizer = AdamW(model.named_parameters(), weight_decay=0.01)
    with run, Interrupt() as interrupt:
        checkpoint = run.latest_checkpoint() if resume else None
        start = 0
        if resume:
            run.rewind_to(checkpoint.step if checkpoint else None)
        if checkpoint:
            model.load_state_dict(load_file(checkpoint.path / "model.safetensors"))
            tensors, state = load_training_state(checkpoint)
            optimizer.load_state_dict(tensors)
            start = state["step"]
        for step in range(start + 1, 31):
            random = generator(5, "batch", step)
            inputs = torch.randn(16, 4, generator=random).to(DTYPE)
            noise = torch.randn(16, 1, generator=random).to(DTYPE)
            loss = 0.0
            for part in range(4):
                rows = slice(4 * part, 4 * part + 4)
                error = model(inputs[rows]) - inputs[rows].sum(1, keepdim=True) - 0.1 * noise[rows]
                micro = error.float().square().sum() / 16
                micro.backward()
                loss += micro.item()
            lr = learning_rate(step - 1, schedule="cosine", peak=1e-2, warmup_steps=3, total_steps=30)
            report = optimizer_step(optimizer, lr=lr, max_grad_norm=1.0)
            if kill == ("before log", step):
                os.kill(os.getpid(), signal.SIGKILL)
            run.log(step, {"loss": loss, "grad_norm": report.grad_norm, "time/now": time.time()})
            run.log_samples(step, [{"inputs": inputs[0].tolist()}, {"inputs": inputs[1].tolist()}])
            if kill == ("in line", step):
                run._metrics._file.write(b'{"step": 99, "lo')
                os.kill(os.getpid(), signal.SIGKILL)
            if kill == ("signal", step):
                os.kill(os.getpid(), stop_at)
            if step % 4 == 0 or step == 30 or interrupt.is_requested:
                def write_model(folder):
                    save_file(model.state_dict(), folder / "model.safetensors")
                    (folder / "config.json").write_text("{}")
                    if kill == ("in save", step):
                        os.kill(os.getpid(), signal.SIGKILL)
                run.save_checkpoint(step, write_model, optimizer.state_dict(), {"step": step}, keep_last=2)
                if kill == ("after save", step):
                    os.kill(os.getpid(), signal.SIGKILL)
            if interrupt.is_requested:
                interrupt.exit()

def in_child(**arguments):
    child = os.fork()
    if child == 0:
        code = 1
        try:
            train(**arguments)
            code = 0
        except SystemExit as error:
            code = error.code
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

root = pathlib.Path(sys.argv[1])
assert in_child(runs_dir=root / "whole", resume=False) == 0
places = [("before log", 2), ("in line", 7), ("in save", 8), ("after save", 12), ("before log", 13), ("in save", 30)]
for number, place in enumerate(places):
    assert in_child(runs_dir=root / "killed", resume=number > 0, kill=place) == -9, place
assert in_child(runs_dir=root / "killed", resume=True) == 0
stops = [(signal.SIGINT, 130), (signal.SIGTERM, 143)]
for number, (stop, code) in enumerate(stops):
    assert in_child(runs_dir=root / "stopped", resume=number > 0, kill=("signal", 9 + number), stop_at=stop) == code
assert in_child(runs_dir=root / "stopped", resume=True) == 0
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", TRAIN, str(folder)], capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_weights_state_metrics_and_samples_are_those_of_the_uninterrupted_run(root, how):
    whole, other = RunFolder.open(root / "whole", "toy"), RunFolder.open(root / how, "toy")
    expected, found = whole.latest_checkpoint(), other.latest_checkpoint()
    assert expected is not None and found is not None and found.step == expected.step == 30
    assert found.content_hash == expected.content_hash
    expected_tensors, found_tensors = load_training_state(expected)[0], load_training_state(found)[0]
    assert found_tensors.keys() == expected_tensors.keys()
    assert all(torch.equal(found_tensors[key], value) for key, value in expected_tensors.items())
    for name in ("metrics.jsonl", "samples.jsonl"):
        lines = list(read_lines(whole.path / name, with_clock=False))
        assert list(read_lines(other.path / name, with_clock=False)) == lines
    steps = [line["step"] for line in read_lines(other.path / "metrics.jsonl")]
    assert steps == list(range(1, 31))
    assert other.info["status"] == "finished"


def test_the_loop_learns_so_that_equality_means_something(root):
    losses = [line["loss"] for line in read_lines(root / "whole/toy/metrics.jsonl")]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    first = load_file(root / "whole/toy/checkpoints/step-000028/model.safetensors")
    last = load_file(root / "whole/toy/checkpoints/step-000030/model.safetensors")
    assert not torch.equal(first["0.weight"], last["0.weight"])


def test_tensorboard_hides_what_a_resumed_run_did_again(root):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(root / "killed/toy/tensorboard"))
    accumulator.Reload()
    events = accumulator.Scalars("loss")
    lines = list(read_lines(root / "killed/toy/metrics.jsonl"))
    assert [event.step for event in events] == [line["step"] for line in lines]
    for event, line in zip(events, lines, strict=True):
        assert event.value == pytest.approx(line["loss"], rel=1e-6)


def test_run_json_names_neither_host_nor_home(root):
    text = (root / "whole/toy/run.json").read_text()
    info = json.loads(text)
    assert os.uname().nodename not in json.dumps(info["machine"])
    assert os.path.expanduser("~") + "/" not in text
