"""Bad input to the reward-model and DPO stages: status 2, the place and the remedy; and what they count and tell."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from strop.cli.main import main
from strop.runs import RunFolder, read_lines

RECIPES = {
    "reward-model": 'data = "pairs.jsonl"\nbatch_size = 2\n',
    "dpo": 'data = "pairs.jsonl"\nbatch_size = 2\n',
}
PAIRS = [
    {"prompt": f"the quick {word}", "chosen": " fox", "rejected": " dog"} for word in ("brown", "lazy", "cat", "owl")
]


@pytest.fixture(autouse=True)
def here(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with good data and recipes, and the process inside it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STROP_PROGRESS", "off")
    shutil.copytree(tiny_folder, "tiny")
    write("pairs.jsonl", PAIRS)
    for stage, recipe in RECIPES.items():
        Path(f"{stage}.toml").write_text(
            f'from = "tiny"\nnum_steps = 2\nmax_length = 64\ndtype = "float32"\n{recipe}optimizer = {{ lr = 1e-3 }}\n'
        )


def write(path: str, rows: list[dict[str, Any]]) -> None:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(list(argv)) == 2
    error = capsys.readouterr().err
    assert "strop: error: " in error, error
    assert [str(path) for path in Path("runs").glob("*")] == [], "a failed start left something behind"
    return error


@pytest.mark.parametrize("stage", RECIPES)
def test_the_recipes_of_this_file_work_as_they_are(stage: str) -> None:
    assert main([stage, f"{stage}.toml"]) == 0
    run = RunFolder.open("runs", stage)
    assert run.info["status"] == "finished" and run.info["stage"] == stage
    assert len(list(read_lines(run.path / "metrics.jsonl"))) == 2


@pytest.mark.parametrize("stage", RECIPES)
@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p", "chosen": "a", "rejected": "a"}, "pairs.jsonl:5: columns 'chosen' and 'rejected' are equal"),
        ({"prompt": "p", "chosen": "", "rejected": "a"}, "pairs.jsonl:5: column 'chosen' is empty"),
        ({"prompt": "p", "completion": "a"}, "pairs.jsonl:5: column 'chosen' is missing"),
        ({"prompt": "p", "chosen": "a " * 70, "rejected": "b"}, "pairs.jsonl:5: prompt and answer have"),
    ],
)
def test_bad_rows_are_named(capsys: pytest.CaptureFixture[str], stage: str, row: dict[str, Any], message: str) -> None:
    write("pairs.jsonl", [*PAIRS, row])
    assert message in refused(capsys, stage, f"{stage}.toml")


@pytest.mark.parametrize("stage", RECIPES)
def test_only_ties_are_refused(capsys: pytest.CaptureFixture[str], stage: str) -> None:
    write("pairs.jsonl", [{"prompt": "p", "completions": ["a", "b"], "ranks": [1, 1]}] * 3)
    message = refused(capsys, stage, f"{stage}.toml")
    assert "in every row all answers tie" in message or "of 3, 3 all tied" in message


@pytest.mark.parametrize("stage", RECIPES)
def test_truncation_that_removes_the_difference_is_counted(capsys: pytest.CaptureFixture[str], stage: str) -> None:
    late = {"prompt": "p", "chosen": "a" * 90 + "b", "rejected": "a" * 90 + "c"}
    write("pairs.jsonl", [*PAIRS, late])
    assert main([stage, f"{stage}.toml", "--on-too-long", "truncate"]) == 0
    assert "of 5 rows (max_length 64): 1 alike once truncated" in capsys.readouterr().err


@pytest.mark.parametrize("stage", RECIPES)
def test_what_a_pass_cannot_hold(capsys: pytest.CaptureFixture[str], stage: str) -> None:
    message = refused(capsys, stage, f"{stage}.toml", "--micro-batch-tokens", "5")
    assert "pairs.jsonl:1: its prompt and 2 answers have" in message and "raise micro_batch_tokens=5" in message
    write("pairs.jsonl", [*PAIRS, {"prompt": "p", "chosen": "a " * 90, "rejected": "b"}])
    message = refused(capsys, stage, f"{stage}.toml", "--max-length", "1000")
    assert "pairs.jsonl:5" in message and "the model has only 128 positions" in message


@pytest.mark.parametrize("label", [True, False])
@pytest.mark.parametrize("loss", ["kto", "bco"])
def test_one_class_only(capsys: pytest.CaptureFixture[str], loss: str, label: bool) -> None:
    write("pairs.jsonl", [{"prompt": f"p{n}", "completion": "a", "label": label} for n in range(4)])
    message = refused(capsys, "dpo", "dpo.toml", "--loss", loss)
    assert f"pairs.jsonl: every label is {str(label).lower()}" in message


def test_labels_need_a_loss_that_reads_them(capsys: pytest.CaptureFixture[str]) -> None:
    write("pairs.jsonl", [{"prompt": f"p{n}", "completion": "a", "label": n > 1} for n in range(4)])
    assert "this stage reads prompt/chosen/rejected" in refused(capsys, "dpo", "dpo.toml")
    assert main(["dpo", "dpo.toml", "--loss", "kto"]) == 0


def test_kto_needs_other_prompts(capsys: pytest.CaptureFixture[str]) -> None:
    write("pairs.jsonl", [{**PAIRS[0], "rejected": f" {word}"} for word in ("a", "b", "c")])
    assert "all prompts are the same" in refused(capsys, "dpo", "dpo.toml", "--loss", "kto")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--loss", "ipo", "--flip-probability", "0.1"], "flip_probability is for the losses"),
        (["--loss", "robust"], "needs flip_probability above 0"),
        (["--flip-probability", "0.5"], "must lie in [0, 0.5)"),
        (["--simpo-margin", "1"], 'simpo_margin is for the loss "simpo"'),
        (["--desirable-weight", "2"], 'are for the loss "kto"'),
        (["--loss", "orpo", "--sft-coef", "1"], "leave sft_coef out"),
        (["--loss", "kto", "--sft-coef", "1"], "reads single answers"),
        (["--loss", "simpo", "--reference-refresh-steps", "5"], "leave reference_refresh_steps out"),
        (["--dpo-beta", "0"], "dpo_beta=0.0 must be above 0"),
        (["--online.tasks", "pairs.jsonl"], "give either data (offline) or online.tasks"),
        (["--eval-tasks", "pairs.jsonl"], "need rewards that judge the answers"),
        (["--batch-size", "9"], "batch_size must be between 1 and the number of comparisons 4"),
    ],
)
def test_options_that_do_nothing_are_refused(
    capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert message in refused(capsys, "dpo", "dpo.toml", *flags)


def test_a_margin_has_no_place_in_plackett_luce(capsys: pytest.CaptureFixture[str]) -> None:
    write("pairs.jsonl", [*PAIRS, {**PAIRS[0], "margin": 1.0}])
    message = refused(capsys, "reward-model", "reward-model.toml", "--loss", "plackett_luce")
    assert "pairs.jsonl:5: column 'margin'" in message
    assert main(["reward-model", "reward-model.toml"]) == 0


def test_a_reward_model_goes_on_from_a_reward_model_and_no_policy_does(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reward-model", "reward-model.toml"]) == 0
    assert main(["reward-model", "reward-model.toml", "--from", "reward-model", "--name", "more"]) == 0
    capsys.readouterr()
    assert main(["dpo", "dpo.toml", "--from", "reward-model"]) == 2
    assert "score.weight" in capsys.readouterr().err


def test_a_longer_run_needs_no_parent_once_everything_is_cached() -> None:
    flags = ["dpo", "dpo.toml", "--num-steps", "4"]
    assert main(flags) == 0
    shutil.rmtree("tiny")
    assert main([*flags[:-1], "6", "--resume"]) == 0


def test_an_online_group_must_fit_one_pass(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = Path("dpo.toml").read_text().replace('data = "pairs.jsonl"', 'rewards = [{ name = "length", weight = 1 }]')
    Path("dpo.toml").write_text(recipe.replace("weight = 1 }", "options = { target_tokens = 3, width = 3 } }"))
    flags = ["--online.tasks", "pairs.jsonl", "--sampling.max-new-tokens", "20", "--micro-batch-tokens", "40"]
    message = refused(capsys, "dpo", "dpo.toml", *flags)
    assert "pairs.jsonl:1: its prompt and 2 answers may have" in message and "raise micro_batch_tokens=40" in message
