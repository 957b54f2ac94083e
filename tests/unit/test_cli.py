"""The command line: strict recipes, flags over them, errors that name the remedy, exit codes."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from strop.cli import main as cli
from strop.cli.config import build, merge_tables, read_toml, read_values, to_toml
from strop.cli.evaluate import metric_lines
from strop.cli.flags import parse_stage_flags
from strop.cli.stages import STAGES


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How completions are drawn."""

    temperature: float = 1.0
    """Logits are divided by it."""
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Config:
    """A sample stage."""

    init_from: str
    """Start checkpoint."""
    group_size: int = 8
    """Samples per prompt."""
    lr: float = 1e-6
    scale: Literal["std", "none"] = "std"
    is_frozen: bool = False
    max_length: int | None = None
    files: tuple[str, ...] = ()
    betas: tuple[float, float] = (0.9, 0.95)
    folder: Path = Path("data")
    rewards: tuple[str | Mapping[str, Any], ...] = ("math",)
    weights: dict[str, float] = field(default_factory=dict)
    sampling: Sampling = Sampling(temperature=0.5)

    def __post_init__(self) -> None:
        if self.group_size < 2:
            raise ValueError(f"group_size must be at least 2, not {self.group_size}")


def read(text: str) -> Any:
    return build(Config, {"init_from": "base"} | read_values(tomllib.loads(text), Config, "x.toml"), "x.toml")


def flags(*args: str, recipe: str = "") -> Any:
    values = read_values(tomllib.loads(recipe), Config, "x.toml")
    return parse_stage_flags(Config, values, args, prog="strop toy x.toml", where="x.toml", name="x")


# Recipes


def test_a_recipe_sets_every_kind_of_field():
    config = read("""
        from = "sft/120"
        group_size = 4
        lr = 1
        scale = "none"
        is_frozen = true
        max_length = 64
        files = ["a", "b"]
        betas = [0.8, 1]
        folder = "elsewhere"
        rewards = ["format", { name = "math", weight = 2 }]
        weights = { math = 1 }
        [sampling]
        stop = ["\\n"]
    """)
    assert config == Config(
        init_from="sft/120",
        group_size=4,
        lr=1.0,
        scale="none",
        is_frozen=True,
        max_length=64,
        files=("a", "b"),
        betas=(0.8, 1.0),
        folder=Path("elsewhere"),
        rewards=("format", {"name": "math", "weight": 2}),
        weights={"math": 1.0},
        sampling=Sampling(temperature=0.5, stop=("\n",)),
    )
    assert type(config.lr) is float and type(config.betas[1]) is float and type(config.weights["math"]) is float


def test_a_nested_table_keeps_the_defaults_of_this_config_not_of_its_class():
    assert read('[sampling]\nstop = ["x"]').sampling.temperature == 0.5
    assert Sampling().temperature == 1.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("grop_size = 4", "x.toml: unknown key 'grop_size' (did you mean 'group_size'?)"),
        ("group-size = 4", "x.toml: unknown key 'group-size' (did you mean 'group_size'?)"),
        ('init_from = "a"', "x.toml: unknown key 'init_from'"),
        ("[sampling]\ntemprature = 1", "x.toml [sampling]: unknown key 'temprature' (did you mean 'temperature'?)"),
        ('group_size = "8"', "x.toml: 'group_size' must be an integer, got the text \"8\""),
        ("group_size = 8.0", "x.toml: 'group_size' must be an integer, got the number 8.0"),
        ("group_size = true", "x.toml: 'group_size' must be an integer, got true"),
        ("lr = true", "x.toml: 'lr' must be a number, got true"),
        ("is_frozen = 1", "x.toml: 'is_frozen' must be true or false, got the integer 1"),
        ('scale = "Std"', 'x.toml: \'scale\' must be one of "std", "none", got the text "Std"'),
        ('max_length = "1"', "x.toml: 'max_length' must be an integer, got the text \"1\""),
        ('files = "a"', "x.toml: 'files' must be a list (each text), got the text \"a\""),
        ('files = ["a", 2]', "x.toml: 'files[1]' must be text, got the integer 2"),
        ("betas = [0.9]", "x.toml: 'betas' must be a list of 2: a number, a number, got the list [0.9]"),
        ('weights = { math = "1" }', "x.toml: 'weights.math' must be a number, got the text \"1\""),
        ("sampling = 1", "x.toml: 'sampling' must be a table, got the integer 1"),
        ("group_size = 1", "x.toml: group_size must be at least 2, not 1"),
    ],
)
def test_a_wrong_recipe_is_refused_by_file_key_and_expected_type(text: str, message: str):
    with pytest.raises(ValueError) as caught:
        read(text)
    assert str(caught.value).startswith(message)


def test_a_required_field_that_nothing_sets_is_named_as_the_recipe_writes_it():
    with pytest.raises(ValueError, match=r"x.toml: 'from' must be set"):
        build(Config, read_values({"group_size": 4}, Config, "x.toml"), "x.toml")


text_values = st.text(st.characters(exclude_categories=["Cs"]))
free_values = st.recursive(
    st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | text_values,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text_values, inner, max_size=3),
    max_leaves=6,
)


@given(
    config=st.builds(
        Config,
        init_from=text_values,
        group_size=st.integers(2, 2**40),
        lr=st.floats(allow_nan=False),
        max_length=st.none() | st.integers(0, 9),
        files=st.tuples() | st.tuples(text_values, text_values),
        rewards=st.lists(text_values | st.dictionaries(text_values, free_values), max_size=3).map(tuple),
        weights=st.dictionaries(text_values, st.floats(allow_nan=False), max_size=3),
        folder=st.just(Path("a b/c")),
        sampling=st.builds(Sampling, temperature=st.floats(0, 2), stop=st.tuples(text_values)),
    )
)
def test_a_printed_config_reads_back_as_itself(config: Config):
    table = tomllib.loads(to_toml(config))
    assert build(Config, read_values(table, Config, "x.toml"), "x.toml") == config


def test_a_missing_recipe_names_the_nearest(tmp_path: Path):
    (tmp_path / "demo_grpo.toml").write_text("group_size = 4")
    with pytest.raises(ValueError, match=r"demo_gpro.toml: no such recipe \(did you mean .*demo_grpo.toml\?\)"):
        read_toml(tmp_path / "demo_gpro.toml")


@pytest.mark.parametrize(("content", "message"), [(b"a = ", "not valid TOML"), (b"", "empty"), (b"\xff", "not valid")])
def test_a_broken_recipe_is_named(tmp_path: Path, content: bytes, message: str):
    (tmp_path / "x.toml").write_bytes(content)
    with pytest.raises(ValueError, match=f"x.toml: .*{message}"):
        read_toml(tmp_path / "x.toml")


def test_overrides_merge_inside_tables_and_replace_lists():
    merged = merge_tables({"a": 1, "t": {"x": 1, "y": 2}, "l": [1, 2]}, {"t": {"y": 3}, "l": [9]})
    assert merged == {"a": 1, "t": {"x": 1, "y": 3}, "l": [9]}


# Flags


def test_flags_win_over_the_recipe_and_the_recipe_over_the_defaults():
    call = flags("--from", "sft", "--lr=0.5", "--sampling.stop", "a", "b", recipe="group_size = 4\nlr = 0.1")
    assert call.config == Config(
        init_from="sft", group_size=4, lr=0.5, sampling=Sampling(temperature=0.5, stop=("a", "b"))
    )
    assert type(call.config) is Config
    assert (call.name, call.runs_dir, call.resume, call.print_config) == ("x", Path("runs"), False, False)


def test_flags_take_underscores_pairs_and_none():
    call = flags("--from", "a", "--group_size", "3", "--is-frozen", "--max-length", "None", recipe="max_length = 4")
    assert (call.config.group_size, call.config.is_frozen, call.config.max_length) == (3, True, None)
    assert flags("--from", "a", "--no-is-frozen", recipe="is_frozen = true").config.is_frozen is False


def test_the_run_is_named_by_flags():
    call = flags("--from", "a", "--name", "n", "--runs-dir", "elsewhere", "--resume", "--print-config")
    assert (call.name, call.runs_dir, call.resume, call.print_config) == ("n", Path("elsewhere"), True, True)


def test_a_tables_content_survives_flags():
    call = flags("--group-size", "3", recipe='from = "a"\nrewards = ["format", { name = "math" }]\nweights = { m = 2 }')
    assert call.config.rewards == ("format", {"name": "math"})
    assert call.config.weights == {"m": 2.0}


def test_a_field_that_holds_tables_is_not_a_flag():
    with pytest.raises(ValueError, match="--rewards: 'rewards' is a table; set it in the recipe"):
        flags("--from", "a", "--rewards", "math")


def test_a_required_table_is_asked_for_by_name_and_not_by_help(capsys: pytest.CaptureFixture[str]):
    @dataclass(frozen=True, kw_only=True)
    class Mixture:
        data: tuple[Sampling, ...]
        num_steps: int

    Mixture.__annotations__ = {"data": tuple[Sampling, ...], "num_steps": int}

    def parse(*args: str) -> Any:
        return parse_stage_flags(Mixture, {}, args, prog="strop toy", where="x.toml", name="x")

    with pytest.raises(ValueError, match=r"x.toml: 'data' must be set"):
        parse("--num-steps", "3")
    with pytest.raises(ValueError, match="--data: 'data' is a table"):
        parse("--data", "a")
    with pytest.raises(SystemExit) as caught:
        parse("--help")
    assert caught.value.code == 0 and "--num-steps INT" in capsys.readouterr().out


def test_the_configs_own_checks_see_the_final_values():
    assert flags("--from", "a", "--group-size", "2", recipe="group_size = 1").config.group_size == 2
    with pytest.raises(ValueError, match=r"x.toml: group_size must be at least 2, not 1"):
        flags("--from", "a", "--group-size", "1")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--from", "a", "--grop-size", "4"), "--group-size"),
        (("--from", "a", "--temperature", "1"), "--sampling.temperature"),
        (("--from", "a", "--group-size", "four"), "--group-size"),
        (("--from", "a", "stray"), "stray"),
        (("--group-size", "4"), "--from"),
    ],
)
def test_a_wrong_flag_ends_with_status_2_and_names_the_right_one(
    args: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as caught:
        flags(*args)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_help_describes_fields_with_the_recipes_values_as_defaults(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as caught:
        flags("--help", recipe="group_size = 5")
    printed = " ".join(capsys.readouterr().out.split())
    assert caught.value.code == 0
    assert "Samples per prompt. (default: 5)" in printed and "--from STR" in printed and "--rewards" not in printed


# The command


@pytest.fixture
def toy_stage(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A stage without training: train() notes the call in a real run folder; step_limit stops it before its end."""
    from strop.runs import RunFolder, resolve

    module = ModuleType("toy_stage")

    def train(config: Config, *, name: str, runs_dir: Path, resume: bool) -> Path:
        module.calls.append((name, config, resume))
        if resume:
            run = RunFolder.resume(runs_dir, name, config=config, data_hashes={})
        else:
            parent = None if config.init_from == "nothing" else resolve(config.init_from, runs_dir)
            run = RunFolder.create(
                runs_dir, name, stage="toy", config=config, parent=parent, data_hashes={}, seed=config.group_size
            )
        with run:
            if not resume and name in module.stopped:
                sys.exit(130)
            run.save_checkpoint(1, lambda folder: (folder / "config.json").write_text("{}") and None, {}, {})
        return runs_dir / name

    module.Config, module.train, module.calls, module.stopped = Config, train, [], set()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "toy_stage", module)
    monkeypatch.setitem(STAGES, "toy", "toy_stage")
    monkeypatch.setitem(cli.COMMANDS, "toy", "stages")
    return module


def test_a_stage_command_trains_what_the_recipe_says(toy_stage: ModuleType, tmp_path: Path):
    recipe = tmp_path / "first.toml"
    recipe.write_text('from = "nothing"\ngroup_size = 4')
    assert cli.main(["toy", str(recipe), "--lr", "0.5", "--runs-dir", str(tmp_path / "runs")]) == 0
    assert toy_stage.calls == [("first", Config(init_from="nothing", group_size=4, lr=0.5), False)]


def test_print_config_prints_the_resolved_recipe_and_trains_nothing(
    toy_stage: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    recipe = tmp_path / "x.toml"
    recipe.write_text('from = "nothing"')
    assert cli.main(["toy", str(recipe), "--group-size", "3", "--print-config"]) == 0
    assert read_values(tomllib.loads(capsys.readouterr().out), Config, "")["group_size"] == 3
    assert toy_stage.calls == []


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["grop", "x.toml"], "strop: error: no command 'grop' (did you mean 'grpo'?)"),
        (["toy", "--resume", "x.toml"], "strop: error: the recipe comes first: strop toy RECIPE.toml --resume"),
        (["toy", "no/such.toml"], "strop: error: no/such.toml: no such recipe"),
        (
            ["eval", "runs/x"],
            "strop: error: give one of --suite KIND:WHAT, --tasks FILE",
        ),
        (["eval", "x", "--tasks", "t"], "strop: error: --tasks needs --reward"),
        (["eval", "x", "--text", "t", "--reward", "math"], "strop: error: --reward and --output belong to --tasks"),
        (["generate", "x"], "strop: error: give either --prompt TEXT or --file FILE"),
        (["generate", "no-such-run", "--prompt", "a"], "strop: error: 'no-such-run' is neither a run"),
        (["runs", "show", "no-such-run"], "strop: error: no run 'no-such-run'"),
    ],
)
def test_bad_input_ends_with_status_2_and_one_line(
    toy_stage: ModuleType, args: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    assert cli.main(args) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(message) and printed.count("\n") == 1


@pytest.mark.parametrize(
    ("raised", "status"), [(ValueError("bad"), 2), (OSError(28, "No space left"), 1), (KeyboardInterrupt(), 130)]
)
def test_the_exit_status_says_what_stopped_a_command(
    toy_stage: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raised: BaseException, status: int
):
    def train(config: Config, **_: Any) -> Path:
        raise raised

    monkeypatch.setattr(toy_stage, "train", train)
    recipe = tmp_path / "x.toml"
    recipe.write_text('from = "nothing"')
    assert cli.main(["toy", str(recipe)]) == status


def test_strop_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("STROP_DEBUG", "1")
    with pytest.raises(ValueError, match="no command"):
        cli.main(["grop"])


def test_a_run_that_gives_up_says_so_and_a_bug_shows_its_traceback(
    toy_stage: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    from strop.optim import SkippedSteps

    recipe = tmp_path / "x.toml"
    recipe.write_text('from = "nothing"')
    monkeypatch.setattr(toy_stage, "train", lambda config, **_: SkippedSteps(1).record(True, lambda: Path("batch")))
    assert cli.main(["toy", str(recipe)]) == 1
    assert capsys.readouterr().err.startswith("strop: error: 1 steps in a row had a non-finite gradient")

    def fails(config: Config, **_: Any) -> Path:
        raise RuntimeError("a bug")

    monkeypatch.setattr(toy_stage, "train", fails)
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["toy", str(recipe)])


def test_every_command_is_in_the_help_and_has_a_run():
    for command, module in cli.COMMANDS.items():
        assert f"\n  {command}" in cli.HELP
        assert callable(importlib.import_module(f"strop.cli.{module}").run)


@pytest.mark.parametrize("args", [["--help"], ["runs", "list", "--runs-dir", "no-such-folder"]])
def test_a_reader_that_closes_its_pipe_is_no_error(args: list[str]):
    command = [sys.executable, "-m", "strop.cli.main", *args]
    # Unbuffered, the write itself would fail; buffered, only the flush does.
    env = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0


# Pipelines


@pytest.fixture
def pipeline(toy_stage: ModuleType, tmp_path: Path) -> Path:
    (tmp_path / "toy.toml").write_text("group_size = 4")
    path = tmp_path / "pipeline.toml"
    path.write_text(f"""
        [[stage]]
        stage = "toy"
        recipe = "{tmp_path}/toy.toml"
        name = "one"
        from = "nothing"

        [[stage]]
        stage = "toy"
        recipe = "{tmp_path}/toy.toml"
        name = "two"
        from = "previous"
        overrides = {{ group_size = 5, sampling = {{ temperature = 0.25 }} }}
    """)
    return path


def run_pipeline(path: Path) -> int:
    return cli.main(["pipeline", str(path), "--runs-dir", str(path.parent / "runs")])


def test_a_pipeline_starts_each_stage_from_the_one_before(pipeline: Path, toy_stage: ModuleType):
    assert run_pipeline(pipeline) == 0
    second = Config(init_from="one", group_size=5, sampling=Sampling(temperature=0.25))
    assert toy_stage.calls == [
        ("one", Config(init_from="nothing", group_size=4), False),
        ("two", second, False),
    ]


def test_a_pipeline_run_again_skips_what_is_finished(pipeline: Path, toy_stage: ModuleType):
    run_pipeline(pipeline)
    toy_stage.calls.clear()
    assert run_pipeline(pipeline) == 0
    assert toy_stage.calls == []


def test_a_stopped_pipeline_resumes_the_unfinished_stage_and_goes_on(pipeline: Path, toy_stage: ModuleType):
    toy_stage.stopped.add("one")
    with pytest.raises(SystemExit) as caught:
        run_pipeline(pipeline)
    assert caught.value.code == 130
    assert run_pipeline(pipeline) == 0
    assert [(name, resume) for name, _, resume in toy_stage.calls] == [("one", False), ("one", True), ("two", False)]


def test_a_pipeline_refuses_a_run_made_with_other_settings(
    pipeline: Path, toy_stage: ModuleType, capsys: pytest.CaptureFixture[str]
):
    run_pipeline(pipeline)
    pipeline.write_text(pipeline.read_text().replace("group_size = 5", "group_size = 6"))
    toy_stage.calls.clear()
    assert run_pipeline(pipeline) == 2
    assert "[[stage]] 2: run 'two' exists with another group_size; delete " in capsys.readouterr().err
    assert toy_stage.calls == []


def test_a_pipeline_refuses_a_run_whose_parent_is_gone(
    pipeline: Path, toy_stage: ModuleType, capsys: pytest.CaptureFixture[str]
):
    run_pipeline(pipeline)
    (pipeline.parent / "runs" / "one" / "run.json").unlink()
    toy_stage.calls.clear()
    assert run_pipeline(pipeline) == 2
    assert "run 'two' exists, but 'one' before it is not finished" in capsys.readouterr().err
    assert toy_stage.calls == []


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('from = "nothing"', 'from = "previous"', "[[stage]] 1: from = 'previous', but no stage comes before it"),
        ('name = "two"', 'name = "one"', "[[stage]] 2: an earlier stage is also named 'one'"),
        ('stage = "toy"', 'stage = "toi"', "[[stage]] 1: no stage 'toi' (did you mean 'toy'?)"),
        ('name = "two"', "", "[[stage]] 2: 'name' must be set"),
        ("group_size = 5", "grup_size = 5", "unknown key 'grup_size' (did you mean 'group_size'?)"),
        ("[[stage]]", "[[stages]]", "a pipeline is a list of [[stage]] tables and nothing else"),
    ],
)
def test_a_wrong_pipeline_is_refused_before_anything_starts(
    pipeline: Path, toy_stage: ModuleType, old: str, new: str, message: str, capsys: pytest.CaptureFixture[str]
):
    pipeline.write_text(pipeline.read_text().replace(old, new))
    assert run_pipeline(pipeline) == 2
    assert message in capsys.readouterr().err
    assert toy_stage.calls == []


# Use


def test_metrics_are_printed_with_their_intervals():
    lines = metric_lines({"pass@1": 0.25, "pass@1_low": 0.2, "pass@1_high": 0.3, "num_tasks": 1200})
    assert [line.split() for line in lines] == [["pass@1", "0.2500", "[0.2000,", "0.3000]"], ["num_tasks", "1,200"]]
