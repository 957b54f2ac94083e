"""The demo's recipes, and what `make demo` makes of them for another seed, folder or reward."""

from __future__ import annotations

import importlib.util
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from strop.cli.pipeline import Plan, read_plans

DEMO = Path(__file__).parents[2] / "recipes" / "demo"


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ModuleType]:
    """recipes/demo/run.py, in a folder that sees the recipes and has no runs yet."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(DEMO.parent)
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec = importlib.util.spec_from_file_location("demo_run", DEMO / "run.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "demo_run", module)
    spec.loader.exec_module(module)
    yield module


def plans(demo: ModuleType, part: str, **options: object) -> list[Plan]:
    arguments = demo.Arguments(**options)
    (arguments.runs_dir / "demo-data").mkdir(parents=True)
    return read_plans(demo.write_pipeline(part, arguments), arguments.runs_dir)


@pytest.mark.parametrize("part", ["scratch", "smollm2"])
def test_the_plain_demo_is_its_recipes(demo: ModuleType, part: str):
    assert plans(demo, part) == read_plans(DEMO / f"{part}.toml", Path("runs"))


def test_another_seed_and_folder_reach_every_stage(demo: ModuleType):
    found = plans(demo, "scratch", seed=3, runs_dir=Path("elsewhere"))
    assert [plan.entry.name for plan in found] == ["demo-base-seed3", "demo-sft-seed3", "demo-grpo-seed3"]
    base, sft, grpo = (plan.config for plan in found)
    assert (base.seed, sft.seed, grpo.seed) == (3, 3, 3)
    assert (sft.init_from, grpo.init_from) == ("demo-base-seed3", "demo-sft-seed3")
    paths = [*(source.path for source in base.data), base.eval_data, sft.data, grpo.tasks, grpo.eval.tasks]
    assert {str(Path(path).parent) for path in paths} == {"elsewhere/demo-data"}
    assert [source.weight for source in base.data] == [0.5, 0.5]


@pytest.mark.parametrize("part", ["scratch", "smollm2"])
def test_the_control_differs_in_the_answers_it_is_trained_on_alone(demo: ModuleType, part: str):
    honest = read_plans(DEMO / f"{part}.toml", Path("runs"))
    control = plans(demo, part, shuffled_rewards=True)
    assert control[:-1] == honest[:-1], "pre-training and SFT are shared"
    wanted, got = vars(honest[-1].config), vars(control[-1].config)
    assert {key for key in wanted if wanted[key] != got[key]} == {"tasks"}
    assert got["tasks"] == wanted["tasks"].replace(".jsonl", "_shuffled.jsonl")
    assert control[-1].entry.name == f"{honest[-1].entry.name}-shuffled"


def test_every_recipe_says_how_to_run_it_how_long_it_takes_and_what_to_expect():
    recipes = sorted(DEMO.glob("*.toml"))
    assert len(recipes) == 6
    for recipe in recipes:
        text = recipe.read_text(encoding="utf-8")
        head = text[: text.index("\n\n")]
        assert all(line.startswith("#") for line in head.splitlines()), recipe
        assert f"strop {'pipeline' if 'stage' in tomllib.loads(text) else ''}" in head
        assert f"recipes/demo/{recipe.name}" in head and "Minutes on 2 cores:" in head and "Expected:" in head


def test_it_says_where_to_start_it(
    demo: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    Path("recipes").unlink()
    assert demo.main([]) == 2
    assert "run this from the root of the repository" in capsys.readouterr().err
