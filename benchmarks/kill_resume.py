"""python -m benchmarks.kill_resume [KILLS]: a GRPO run killed with SIGKILL at random moments, resumed after each.

Prints where every kill fell and whether the end is that of a run that was never killed: weights, optimiser state,
metrics (but for the clock) and samples, byte for byte. A tiny model, so that the moments fall into every part of a run:
start, rollout, update, evaluation, log line, save. Exit status 1 if anything differs.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import replace
from pathlib import Path

import torch

from strop.models import ModelConfig, init_model, save_model
from strop.optim import OptimizerConfig
from strop.rewards.config import RewardConfig
from strop.rollouts.prompts import Sampling
from strop.runs import RunFolder, read_lines
from strop.stages import grpo
from strop.stages.grpo_config import Evaluation
from strop.tokenizer import train_bpe

SENTENCE = "the quick brown fox jumps over the lazy dog"


def write_start(folder: Path) -> grpo.Config:
    """A random model, tasks for it, and the recipe of the run."""
    tokenizer = train_bpe([SENTENCE], 300)
    shape = ModelConfig(
        vocab_size=320, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8
    )
    save_model(init_model(shape, seed=0), folder / "start")
    tokenizer.save(folder / "start")
    tasks = [{"prompt": f"{first} {second}"} for first in SENTENCE.split() for second in SENTENCE.split()]
    (folder / "tasks.jsonl").write_text("".join(json.dumps(task) + "\n" for task in tasks), encoding="utf-8")
    return grpo.Config(
        init_from=str(folder / "start"),
        tasks=str(folder / "tasks.jsonl"),
        rewards=(RewardConfig(name="length", options={"target_tokens": 3, "width": 3}),),
        num_steps=40,
        prompts_per_step=4,
        group_size=4,
        sampling=Sampling(max_new_tokens=6, stop=tuple("aeiou")),
        minibatch_prompts=2,
        epochs_per_rollout=2,
        dynamic_sampling=True,
        max_sampling_rounds=2,
        kl_coef=0.1,
        reference_refresh_steps=7,
        optimizer=OptimizerConfig(lr=3e-3, schedule="cosine", warmup_steps=3),
        eval=Evaluation(tasks=str(folder / "tasks.jsonl"), every=6, max_tasks=8),
        save_every=3,
        dtype="float32",
    )


def start_child(config: grpo.Config, runs_dir: Path, name: str) -> int:
    """The process id of a child that begins the run, or resumes it where its folder exists."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        # A kill inside RunFolder.create leaves no folder of that name, so that the run begins again.
        grpo.train(config, name=name, runs_dir=runs_dir, resume=(runs_dir / name).exists())
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def wait(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def place(run: Path) -> str:
    """Where a dead run had got to."""
    if not run.exists():
        return "before its folder"
    with contextlib.suppress(ValueError):
        steps = [line["step"] for line in read_lines(run / "metrics.jsonl")]
        saved = max((path.name for path in run.glob("checkpoints/step-*[0-9]")), default="nothing")
        is_saving = any(run.glob("checkpoints/*.partial"))
        return f"after step {max(steps, default=0)}, {'in the middle of a save, ' if is_saving else ''}{saved} saved"
    return "in the middle of a line"


def difference(one: Path, other: Path) -> str | None:
    """The first thing in which two finished runs differ."""
    ends = [RunFolder.open(run.parent, run.name).latest_checkpoint() for run in (one, other)]
    assert ends[0] is not None and ends[1] is not None
    for file in sorted(ends[0].path.iterdir()):
        if file.read_bytes() != (ends[1].path / file.name).read_bytes():
            return file.name
    if (one / "samples.jsonl").read_bytes() != (other / "samples.jsonl").read_bytes():
        return "samples.jsonl"
    lines = [list(read_lines(run / "metrics.jsonl", with_clock=False)) for run in (one, other)]
    return None if lines[0] == lines[1] else "metrics.jsonl"


def main(num_kills: int) -> int:
    os.environ["STROP_PROGRESS"] = "off"
    torch.set_num_threads(1)  # the forked children must not wait for threads that they do not have
    seed = random.SystemRandom().randrange(1_000_000)
    moments = random.Random(seed)
    differing = 0
    with tempfile.TemporaryDirectory() as folder:
        runs_dir = Path(folder) / "runs"
        config = write_start(Path(folder))
        # What is imported late is imported here, once, and not by every child.
        grpo.train(replace(config, num_steps=3), name="warm-up", runs_dir=runs_dir, resume=False)
        started = time.monotonic()
        assert wait(start_child(config, runs_dir, "whole")) == 0
        seconds = time.monotonic() - started
        print(f"uninterrupted: {config.num_steps} steps in {seconds:.1f} s; moments from seed {seed}", flush=True)
        kills, rounds = 0, 0
        while kills < num_kills:
            rounds += 1
            name = f"killed-{rounds}"
            while True:
                child = start_child(config, runs_dir, name)
                if kills < num_kills:
                    time.sleep(moments.uniform(0.0, 0.4) * seconds)
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(child, signal.SIGKILL)
                code = wait(child)
                if code == 0:
                    break
                assert code == -signal.SIGKILL, f"the resumed run failed with exit status {code}"
                kills += 1
                print(f"kill {kills:2}: {place(runs_dir / name)}", flush=True)
            found = difference(runs_dir / "whole", runs_dir / name)
            differing += found is not None
            print(
                f"{name}: {'identical to the uninterrupted run' if found is None else f'{found} DIFFERS'}", flush=True
            )
    print(f"{kills} kills in {rounds} runs, {differing} of them with another end")
    return int(differing > 0)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 20))
