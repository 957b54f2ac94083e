"""The demo's recipes, and what `make demo` makes of them for another seed, folder or reward."""

from __future__ import annotations

import importlib.util
import sys
import tomllib
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import ModuleType

import pytest

from recipes.demo.preferences import taste, upside_down, write_rankings
from strop.cli.pipeline import Plan, read_plans
from strop.ranking import PreferenceStore

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
    recipes = demo.write_pipelines(part, arguments)
    return [plan for recipe in recipes for plan in read_plans(recipe, arguments.runs_dir)]


def recipe_plans(demo: ModuleType, part: str) -> list[Plan]:
    return [plan for name in demo.PIPELINES[part] for plan in read_plans(DEMO / f"{name}.toml", Path("runs"))]


@pytest.mark.parametrize("part", ["scratch", "smollm2"])
def test_the_plain_demo_is_its_recipes(demo: ModuleType, part: str):
    found, wanted = plans(demo, part), recipe_plans(demo, part)
    assert [(plan.entry.stage, plan.entry.name, plan.config) for plan in found] == [
        (plan.entry.stage, plan.entry.name, plan.config) for plan in wanted
    ]


def test_every_policy_starts_from_the_same_sft_and_ppo_has_the_recipe_of_grpo(demo: ModuleType):
    found = {plan.entry.name: plan.config for plan in plans(demo, "scratch")}
    learners = ("demo-grpo", "demo-ppo", "demo-reward", "demo-ppo-model", "demo-dpo")
    assert {found[name].init_from for name in learners} == {"demo-sft"}
    grpo, ppo = vars(found["demo-grpo"]), vars(found["demo-ppo"])
    of_the_recipe = {"init_from", "tasks", "rewards", "prompts_per_step", "sampling", "optimizer", "eval"}
    assert {key for key in of_the_recipe if grpo[key] != ppo[key]} == set()


def test_another_seed_and_folder_reach_every_stage(demo: ModuleType):
    found = plans(demo, "scratch", seed=3, runs_dir=Path("elsewhere"))
    names = ["demo-base", "demo-sft", "demo-grpo", "demo-ppo", "demo-reward", "demo-ppo-model", "demo-dpo"]
    assert [plan.entry.name for plan in found] == [f"{name}-seed3" for name in names]
    base, sft, grpo, ppo, reward, ppo_model, dpo = (plan.config for plan in found)
    assert {plan.config.seed for plan in found} == {3}
    assert sft.init_from == "demo-base-seed3"
    assert {config.init_from for config in (grpo, ppo, reward, ppo_model, dpo)} == {"demo-sft-seed3"}
    assert ppo_model.rewards[-1].options["model"] == ppo_model.critic.start == "demo-reward-seed3"
    paths = [*(source.path for source in base.data), base.eval_data, sft.data, grpo.tasks, grpo.eval.tasks]
    paths += [ppo.tasks, ppo_model.tasks, ppo_model.eval.tasks, dpo.eval_tasks]
    paths += [reward.data, reward.eval_data, dpo.data, dpo.eval_data]
    assert {str(Path(path).parent) for path in paths} == {"elsewhere/demo-data"}
    assert reward.data == dpo.data == "elsewhere/demo-data/preferences-seed3.jsonl", "made of this seed's answers"
    assert reward.eval_data == dpo.eval_data == "elsewhere/demo-data/preferences_held_out-seed3.jsonl"
    assert [source.weight for source in base.data] == [0.5, 0.5]


@pytest.mark.parametrize("part", ["scratch", "smollm2"])
def test_the_control_differs_in_the_answers_and_rankings_it_is_trained_on_alone(demo: ModuleType, part: str):
    honest = {plan.entry.name: plan for plan in recipe_plans(demo, part)}
    for plan in plans(demo, part, shuffled_rewards=True):
        twin = honest.pop(plan.entry.name.removesuffix("-shuffled"))
        wanted, got = vars(twin.config), vars(plan.config)
        different = {key for key in wanted if wanted[key] != got[key]}
        if plan.entry.stage in ("pretrain", "sft"):
            assert (plan.entry.name, different) == (twin.entry.name, set()), "shared with the demo"
            continue
        assert plan.entry.name == f"{twin.entry.name}-shuffled"
        if plan.entry.stage in ("grpo", "ppo"):
            assert got["tasks"] == wanted["tasks"].replace(".jsonl", "_shuffled.jsonl")
        else:
            assert got["data"] == wanted["data"].replace(".jsonl", "-shuffled.jsonl")
        allowed = {"grpo": {"tasks"}, "ppo": {"tasks"}, "reward-model": {"data", "eval_data"}}
        allowed["dpo"] = allowed["reward-model"]
        if twin.entry.name == "demo-ppo-model":
            allowed["ppo"] = {"tasks", "rewards", "critic"}
            assert got["rewards"][-1].options["model"] == "demo-reward-shuffled"
        assert different == allowed[plan.entry.stage]
    assert not honest


def test_the_judge_prefers_the_right_sum_then_the_nearer_one_then_the_shorter_text():
    prompt = [{"role": "user", "content": "What is 3 + 8 + 5?"}]
    best_first = ["16", " 16", "15", "017", "8", "-", "16.", "9999", "16 apples"]
    scores = taste(prompt, best_first)
    assert scores == sorted(scores, reverse=True) and len(set(scores)) == len(scores)
    assert taste(prompt, ["15", "17"]) == taste(prompt, ["17", "15"]), "as near, as short: a tie"
    assert upside_down(prompt, best_first) == [-score for score in scores]


def test_answers_of_other_weights_are_never_taken_for_the_checkpoints(tiny_folder: Path, tmp_path: Path):
    with closing(PreferenceStore(tmp_path / "preferences-seed3.db", create=True, seed=3)) as store:
        store.add_policy("demo-sft/60", "the hash of weights that are gone")
    with pytest.raises(ValueError, match=r"preferences-seed3\.db holds answers of another .*; delete"):
        write_rankings(str(tiny_folder), tmp_path, tmp_path, seed=3, suffix="-seed3")


def test_every_recipe_says_how_to_run_it_how_long_it_takes_and_what_to_expect():
    recipes = sorted(DEMO.glob("*.toml"))
    assert len(recipes) == 10
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
