"""A policy learns a game from nothing but who won, by playing against itself; with results drawn by lot it does not."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from strop.environments import load_environment
from strop.optim import OptimizerConfig
from strop.rollouts.prompts import Sampling
from strop.runs import read_lines
from strop.stages import selfplay, sft
from strop.stages.selfplay_config import Config, Matches

RACE = '''
"""Two players add 1 or 2 in turn; who reaches 7 wins. The one who leaves 1 or 4 to the other cannot be beaten."""

import random

from strop.types import Observation, Transition

GOAL = 7


class Race:
    num_players = 2
    by_lot = False

    def reset(self, seed, task=None):
        self.draw = random.Random(seed)
        self.total, self.player = 0, 0
        return self.observation()

    def observation(self):
        legal = tuple(str(number) for number in (1, 2) if self.total + number <= GOAL)
        return Observation(text=f"{self.total} of {GOAL}, add", player=self.player, legal=legal)

    def step(self, action):
        mover = self.player
        if action.strip() not in self.observation().legal:
            rewards = (-1.0, 0.0) if mover == 0 else (0.0, -1.0)
            return Transition(observation=None, rewards=rewards, is_illegal=True)
        self.total += int(action.strip())
        self.player = 1 - mover
        if self.total < GOAL:
            return Transition(observation=self.observation(), rewards=(0.0, 0.0))
        winner = self.draw.randrange(2) if self.by_lot else mover
        return Transition(observation=None, rewards=tuple(1.0 if seat == winner else -1.0 for seat in (0, 1)))

    def close(self):
        pass


def race():
    return Race()


def lottery():
    game = Race()
    game.by_lot = True
    return game
'''


@pytest.fixture(scope="module")
def folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy that moves by lot, but hardly ever against the rules: the run "taught"."""
    root = tmp_path_factory.mktemp("selfplay")
    (root / "race.py").write_text(RACE)
    game, draw, rows = load_environment(f"{root}/race.py:race"), random.Random(0), []
    for seed in range(400):
        observation = game.reset(seed)
        while observation is not None:
            assert observation.legal is not None
            move = draw.choice(observation.legal)
            rows.append({"prompt": observation.text, "completion": f" {move}"})
            observation = game.step(move).observation
    (root / "sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sft.train(
        sft.Config(
            init_from=str(tiny_folder),
            data=str(root / "sft.jsonl"),
            num_steps=150,
            batch_tokens=1024,
            micro_batch_tokens=1024,
            max_length=64,
            optimizer=OptimizerConfig(lr=5e-3, schedule="cosine", warmup_steps=10),
            save_every=1000,
            dtype="float32",
        ),
        name="taught",
        runs_dir=root,
        resume=False,
    )
    return root


def results_of(folder: Path, game: str, name: str, measured_in: str | None = None) -> list[dict[str, float]]:
    config = Config(
        init_from="taught",
        game=f"{folder}/race.py:{game}",
        num_steps=60,
        games_per_step=48,
        opening_moves=2,
        past_every=10,
        sampling=Sampling(max_new_tokens=4),
        optimizer=OptimizerConfig(lr=3e-3, warmup_steps=5),
        eval=Matches(opponents=("start", "random"), every=60, num_games=200, temperature=1.0),
        save_every=1000,
        dtype="float32",
    )
    run = selfplay.train(config, name=name, runs_dir=folder, resume=False)
    if measured_in is not None:  # the result of a game by lot says nothing: one more step of nothing, in the real one
        config = Config(
            init_from=name,
            game=f"{folder}/race.py:{measured_in}",
            num_steps=1,
            games_per_step=1,
            optimizer=OptimizerConfig(lr=0.0),
            sampling=config.sampling,
            eval=Matches(opponents=("random",), every=1, num_games=200, temperature=1.0),
            dtype="float32",
        )
        run = selfplay.train(config, name=f"{name}-measured", runs_dir=folder, resume=False)
    return [line for line in read_lines(run / "metrics.jsonl") if "eval/random/win" in line]


def test_self_play_learns_the_game_and_a_lottery_teaches_nothing(folder: Path) -> None:
    before, after = results_of(folder, "race", "learned")
    control, _ = results_of(folder, "lottery", "control", measured_in="race")
    print({name: value for name, value in after.items() if name.startswith("eval/")})
    print(before["eval/random/win"], control["eval/random/win"])
    assert before["eval/random/illegal"] < 0.1 and 0.35 < before["eval/random/win"] < 0.6
    # Perfect play wins 94 % against moves by lot: all as the first player, 7 of 8 as the second.
    assert after["eval/random/win"] > 0.8 and after["eval/start/win"] > 0.8
    assert control["eval/random/win"] < 0.65
