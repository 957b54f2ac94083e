"""Bad input to `strop ttrl`: exit status 2, a message with the place and the remedy, no run left behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from strop.cli.main import main
from strop.cli.stages import STAGES
from strop.runs import RunFolder, read_lines

RECIPE = """
from = "tiny"
tasks = "tasks.jsonl"
answer_pattern = "whole"
num_steps = 2
num_votes = 4
group_size = 2
prompts_per_step = 2
dtype = "float32"
sampling = { max_new_tokens = 2 }
held_out = { num_prompts = 8, num_samples = 2, every = 1, min_answers = 0.0, max_drop = 1.0 }
"""
PROMPTS = [f"the quick {word} {number}" for word in ("fox", "dog", "cat") for number in range(4)]


@pytest.fixture
def here(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STROP_PROGRESS", "off")
    Path("tiny").symlink_to(tiny_folder)
    write("tasks.jsonl", PROMPTS)
    Path("ttrl.toml").write_text(RECIPE)
    return tmp_path


def write(name: str, prompts: list[str], answer: object = None) -> None:
    extra = {} if answer is None else {"answer": answer}
    Path(name).write_text("".join(json.dumps({"prompt": prompt, **extra}) + "\n" for prompt in prompts))


def refused(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    assert main(["ttrl", "ttrl.toml", *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("strop: error: "), error
    assert list(Path("runs").glob("*")) == [], "a failed start left something behind"
    return error


def test_without_any_label_it_runs_and_reports_no_accuracy(here: Path) -> None:
    assert main(["ttrl", "ttrl.toml", "--reward", "weighted"]) == 0
    run = RunFolder.open("runs", "ttrl")
    assert run.info["status"] == "finished" and run.info["stage"] == "ttrl"
    lines = list(read_lines(run.path / "metrics.jsonl"))
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert all("eval/base_agreement" in line and "eval/pass@1" not in line for line in lines)
    assert "label_accuracy" not in lines[1]
    assert (run.path / "checkpoints/step-000002/adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--group-size", "5"], "group_size=5 is larger than num_votes=4: only completions that voted"),
        (["--num-votes", "1", "--group-size", "1"], "num_votes=1 must be at least 2"),
        (["--held-out.num-prompts", "7"], "held_out.num_prompts=7 must be at least 8"),
        (["--held-out.num-prompts", "12"], "tasks.jsonl has 12 different prompts, of which held_out.num_prompts=12"),
        (["--held-out.patience", "0"], "held_out.patience=0 must be at least 1"),
        (["--reward", "entropy"], "num_votes=4 would be sampled in vain beyond group_size=2: set num_votes = 2"),
        (["--sampling.temperature", "0"], "sampling.temperature must be above 0"),
        (["--answer-pattern", "bxed"], "bxed"),
        (["--all-weights", "--lora.rank", "4"], "lora has no effect with all_weights"),
        (
            ["--answer-pattern", "boxed"],
            "none of the 32 answers of the base to 8 held-out prompts can be read by answer",
        ),
        (["--kl-coef", "-1"], "kl_coef=-1.0 must be at least 0"),
    ],
)
def test_settings_that_cannot_be_meant(
    here: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert message in refused(capsys, *flags)


def test_held_out_prompts_must_be_enough_and_not_trained_on(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write("few.jsonl", [f"few {number}" for number in range(7)])
    message = refused(capsys, "--held-out.tasks", "few.jsonl")
    assert "few.jsonl has 7 prompts; an early stop needs at least 8" in message
    write("shared.jsonl", [*(f"other {number}" for number in range(8)), PROMPTS[3]])
    message = refused(capsys, "--held-out.tasks", "shared.jsonl", "--held-out.num-prompts", "9")
    assert "shared.jsonl:9: this held-out prompt is trained on (tasks.jsonl:4)" in message


def test_a_prompt_that_comes_twice_is_never_on_both_sides(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write("tasks.jsonl", PROMPTS[:9] * 2)
    assert main(["ttrl", "ttrl.toml"]) == 0
    trained = {row["prompt"] for row in read_lines(Path("runs/ttrl/samples.jsonl"))}
    assert len(trained) == 1, "nine prompts, of which eight are held out"


def test_an_answer_that_can_never_be_right_is_named_and_can_be_left_unread(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write("tasks.jsonl", PROMPTS, answer=["a list"])
    message = refused(capsys)
    assert "tasks.jsonl:4: the answer must be text or a number" in message
    assert 'answer_column = "" leaves them unread' in message
    assert main(["ttrl", "ttrl.toml", "--answer-column", ""]) == 0


def test_the_command_line_knows_the_stage(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "ttrl" in STAGES
    assert main(["ttrl", "ttrl.toml", "--print-config"]) == 0
    printed = capsys.readouterr().out
    Path("again.toml").write_text(printed)
    assert main(["ttrl", "again.toml", "--print-config"]) == 0
    assert capsys.readouterr().out == printed
