"""The run folder: what it records, what it refuses, and its logs."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from strop.runs import Checkpoint, RunFolder, read_lines


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner:
    lr: float = 1e-3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    num_steps: int = 10
    data: Path = Path("train.jsonl")
    betas: tuple[float, float] = (0.9, 0.95)
    optimizer: Inner = Inner()


def create(runs_dir: Path, name: str = "run", config: object = None, **options) -> RunFolder:
    arguments = {"stage": "sft", "parent": None, "data_hashes": {"train.jsonl": "ab"}, "seed": 3} | options
    return RunFolder.create(runs_dir, name, config=config or Config(), **arguments)


def resume(runs_dir: Path, config: object = None, **options) -> RunFolder:
    return RunFolder.resume(
        runs_dir, "run", config=config or Config(), **({"data_hashes": {"train.jsonl": "ab"}} | options)
    )


def test_run_json_has_everything(tmp_path):
    parent = Checkpoint(path=tmp_path / "x", run_name="base", step=40, content_hash="cd")
    create(tmp_path, parent=parent).close()
    info = json.loads((tmp_path / "run/run.json").read_text())
    assert info["stage"] == "sft" and info["seed"] == 3 and info["status"] == "running"
    expected = {"num_steps": 10, "data": "train.jsonl", "betas": [0.9, 0.95], "optimizer": {"lr": 1e-3}}
    assert info["config"] == expected
    assert info["parent"] == {"run": "base", "step": 40, "content_hash": "cd"}
    assert info["data_hashes"] == {"train.jsonl": "ab"}
    assert info["versions"]["torch"] == torch.__version__
    assert info["versions"].keys() == {"python", "torch", "transformers", "strop"}
    assert info["machine"]["cores"] >= 1 and info["machine"]["cpu"]


def test_a_foreign_parent_is_recorded_without_the_home_folder(tmp_path):
    path = Path(os.path.expanduser("~")) / "models" / "smollm2"
    run = create(tmp_path, parent=Checkpoint(path=path, run_name=None, step=None, content_hash="cd"))
    run.close()
    assert run.info["parent"]["folder"] == "~/models/smollm2"


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-c", "user.name=T", "-c", "user.email=t@example.org", *arguments]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


def test_git_revision_and_diff(tmp_path, monkeypatch):
    source = tmp_path / "source"
    source.mkdir()
    monkeypatch.chdir(source)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    create(tmp_path, "outside").close()
    git(source, "init", "-q")
    create(tmp_path, "unborn").close()
    (source / "reward.py").write_text("one\n")
    git(source, "add", ".")
    git(source, "commit", "-qm", "c")
    create(tmp_path, "clean").close()
    (source / "reward.py").write_text("two\n")
    create(tmp_path, "changed").close()
    revision = git(source, "rev-parse", "HEAD")
    recorded = {name: RunFolder.open(tmp_path, name).info["git"] for name in ("outside", "unborn", "clean", "changed")}
    assert recorded == {
        "outside": None,
        "unborn": None,
        "clean": {"revision": revision, "diff": None},
        "changed": {"revision": revision, "diff": "git.diff"},
    }
    assert "-one\n+two\n" in (tmp_path / "changed/git.diff").read_text()
    assert not (tmp_path / "clean/git.diff").exists()


def test_a_taken_name_and_an_impossible_one_are_refused(tmp_path):
    create(tmp_path).close()
    before = (tmp_path / "run/run.json").read_bytes()
    with pytest.raises(ValueError, match=r"--resume, or give another --name"):
        create(tmp_path)
    assert (tmp_path / "run/run.json").read_bytes() == before
    for name in ("", ".hidden", "a/b", "..", "a b", "-x"):
        with pytest.raises(ValueError, match="--name"):
            create(tmp_path, name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_an_unknown_run_names_the_nearest(tmp_path):
    create(tmp_path, "sft-sums").close()
    for name in ("sft-sum", "../sft-sums", ""):
        with pytest.raises(ValueError, match="sft-sums"):
            RunFolder.open(tmp_path, name)
    (tmp_path / "sft-sums/run.json").write_text('{"name": ')
    with pytest.raises(ValueError, match=r"sft-sums/run.json is damaged"):
        RunFolder.open(tmp_path, "sft-sums")


def test_resume_demands_the_same_config_and_data(tmp_path):
    create(tmp_path).close()
    changed = Config(num_steps=5, betas=(0.9, 0.99), optimizer=Inner(lr=1e-4))
    with pytest.raises(ValueError) as caught:
        resume(tmp_path, changed)
    message = str(caught.value)
    assert "betas (was [0.9, 0.95], now [0.9, 0.99])" in message and "num_steps (was 10, now 5)" in message
    assert "optimizer" in message and "data" not in message.split("Only")[0]
    with pytest.raises(ValueError, match=r"content of eval.jsonl, train.jsonl has changed"):
        resume(tmp_path, data_hashes={"train.jsonl": "zz", "eval.jsonl": "ee"})
    resume(tmp_path).close()
    with resume(tmp_path, Config(num_steps=20)) as run:
        assert run.info["config"]["num_steps"] == 20
    with pytest.raises(ValueError, match="num_steps"):
        resume(tmp_path, Config(num_steps=10))


def test_resume_warns_of_other_versions(tmp_path):
    create(tmp_path).close()
    path = tmp_path / "run/run.json"
    path.write_text(path.read_text().replace(torch.__version__, "2.0.0"))
    with pytest.warns(UserWarning, match="other versions of torch"):
        resume(tmp_path).close()


def test_only_one_writer(tmp_path):
    with create(tmp_path) as run:
        with pytest.raises(ValueError, match="living process"):
            resume(tmp_path)
        script = (
            "import sys; from strop.runs import RunFolder\n"
            "try: RunFolder.resume(sys.argv[1], 'run', config={}, data_hashes={})\n"
            "except ValueError as error: print(error)"
        )
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-c", script, str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
        assert "living process" in done.stdout, done.stderr
        run.log(1, {"loss": 1.0})
    resume(tmp_path).close()


def test_a_forked_worker_that_outlives_the_writer_does_not_hold_the_lock(tmp_path):
    """Reward workers are such children: the writer is killed, and --resume comes before they have noticed."""
    script = (
        "import os, signal, sys, time; from strop.runs import RunFolder\n"
        "run = RunFolder.create(sys.argv[1], 'run', stage='s', config={}, parent=None, data_hashes={}, seed=0)\n"
        "child = os.fork()\n"
        "if child == 0: time.sleep(60); os._exit(0)\n"
        "print(child, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True, env=environment
    ) as writer:
        assert writer.stdout is not None
        child = int(writer.stdout.readline())
        try:
            assert writer.wait(timeout=60) == -signal.SIGKILL
            RunFolder.resume(tmp_path, "run", config={}, data_hashes={}).close()
            os.kill(child, 0)
        finally:
            os.kill(child, signal.SIGKILL)


def test_how_a_run_ended_is_recorded(tmp_path):
    def status_after(error: BaseException | None) -> tuple[str, str | None]:
        try:
            with RunFolder.resume(tmp_path, "run", config={}, data_hashes={}):
                if error is not None:
                    raise error
        except (Exception, SystemExit, KeyboardInterrupt):
            pass
        info = RunFolder.open(tmp_path, "run").info
        return info["status"], info.get("error")

    create(tmp_path, config={"num_steps": 1}, data_hashes={}).close()
    (tmp_path / "run/run.json").write_text(json.dumps(RunFolder.open(tmp_path, "run").info | {"config": {}}))
    assert status_after(ValueError("no such column")) == ("failed", "ValueError: no such column")
    assert status_after(SystemExit(130)) == ("interrupted", None)
    assert status_after(KeyboardInterrupt()) == ("interrupted", None)
    assert status_after(None) == ("finished", None)


def test_metrics_lines(tmp_path):
    with create(tmp_path) as run:
        run.log(1, {"loss": torch.tensor(0.5), "kl": np.float32(0.25), "bad": math.nan, "time/seconds": 3.5})
        run.log(2, {"loss": math.inf, "note": "größer\u2028\ud800", "parts": [1, (2.5, math.nan)]})
        assert len((run.path / "metrics.jsonl").read_bytes().splitlines()) == 2, "written before the run ends"
    path = tmp_path / "run/metrics.jsonl"
    assert list(read_lines(path, with_clock=False)) == [
        {"step": 1, "loss": 0.5, "kl": 0.25, "bad": None},
        {"step": 2, "loss": None, "note": "größer\u2028\ud800", "parts": [1, [2.5, None]]},
    ]
    assert next(read_lines(path))["time/seconds"] == 3.5
    for line in path.read_bytes().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


@pytest.mark.parametrize("kept", [None, 0, 2, 3, 9])
def test_rewind(tmp_path, kept):
    with create(tmp_path) as run:
        run.log(0, {"eval": 0})
        for step in (1, 2, 3):
            run.log_samples(step, [{"text": "a"}, {"text": "b"}])
            run.log(step, {"loss": step})
    for name in ("metrics.jsonl", "samples.jsonl"):
        with (tmp_path / "run" / name).open("a") as file:
            file.write('{"step": 4, "lo')
    with resume(tmp_path) as run:
        run.rewind_to(kept)
        steps = [row["step"] for row in read_lines(run.path / "metrics.jsonl")]
        samples = [row["step"] for row in read_lines(run.path / "samples.jsonl")]
        assert steps == [step for step in range(4) if kept is not None and step <= kept]
        assert samples == [step for step in (1, 1, 2, 2, 3, 3) if kept is not None and step <= kept]
        run.log(10, {"loss": 0})
    assert [row["step"] for row in read_lines(tmp_path / "run/metrics.jsonl")] == [*steps, 10]


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    create(tmp_path).close()
    path = tmp_path / "run/metrics.jsonl"
    for broken in ('{"step": 2, "lo', "[2]", '{"loss": 2}'):
        path.write_text(f'{{"step": 1}}\n{broken}\n{{"step": 3}}\n')
        content = path.read_bytes()
        with resume(tmp_path) as run, pytest.raises(ValueError, match=r"metrics.jsonl:2 is damaged"):
            run.rewind_to(3)
        assert path.read_bytes() == content


def test_the_order_that_makes_resuming_exact_is_enforced(tmp_path):
    with create(tmp_path) as run:
        run.log(1, {})
        run.save_checkpoint(1, lambda folder: None, {}, {})
        for step in (0, 1):
            with pytest.raises(AssertionError, match=f"step {step} logged after"):
                run.log(step, {})
        run.log(3, {})
        with pytest.raises(AssertionError, match="checkpoint of step 2 after step 3"):
            run.save_checkpoint(2, lambda folder: None, {}, {})


def test_a_reader_cannot_write(tmp_path):
    create(tmp_path).close()
    reader = RunFolder.open(tmp_path, "run")
    for write in (lambda: reader.log(1, {}), lambda: reader.rewind_to(0), lambda: reader.set_status("failed")):
        with pytest.raises(AssertionError, match="reading only"):
            write()
