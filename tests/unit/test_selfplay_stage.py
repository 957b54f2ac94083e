"""Self-play: what is wrong with a recipe is said at once; whose moves count, and against which average."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from strop.cli.main import main
from strop.models import load_model
from strop.rollouts.games import Game, Move
from strop.runs import RunFolder, read_lines
from strop.stages import selfplay
from strop.stages.selfplay_config import Config
from strop.stages.selfplay_past import PastSelves
from strop.types import Completion

GAME = "open_spiel:tic_tac_toe"
RECIPE = """
from = "tiny"
game = "open_spiel:tic_tac_toe"
num_steps = 3
games_per_step = 6
past_every = 2
dtype = "float32"
sampling = { max_new_tokens = 2 }
eval = { opponents = ["start", "random", "mcts:5", "perfect"], every = 2, num_games = 4 }
"""


@pytest.fixture
def here(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STROP_PROGRESS", "off")
    Path("tiny").symlink_to(tiny_folder)
    Path("selfplay.toml").write_text(RECIPE)
    return tmp_path


def refused(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    assert main(["selfplay", "selfplay.toml", *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("strop: error: "), error
    assert list(Path("runs").glob("*")) == [], "a failed start left something behind"
    return error


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--game", "open_spiel:tictactoe"], "did you mean tic_tac_toe"),
        (["--game", "nowhere.py:game"], "there is no file nowhere.py"),
        (["--eval.opponents", "minimax"], 'no opponent "minimax"'),
        (["--past-share", "1.5"], "past_share=1.5 must be between 0 and 1"),
        (["--past-every", "0"], "past_every=0 must be at least 1"),
        (["--games-per-step", "0"], "games_per_step=0 must be at least 1"),
        (["--opening-moves", "-1"], "opening_moves=-1 must be at least 0"),
        (["--sampling.temperature", "0"], "greedy games against oneself are all the same"),
        (["--sampling.max-new-tokens", "120"], "128"),
        (["--from", "nothing"], "'nothing' is neither a run"),
    ],
)
def test_what_is_wrong_is_named(here: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str) -> None:
    assert message in refused(capsys, *flags)


def test_an_opponent_that_cannot_play_the_game_is_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--game", "open_spiel:kuhn_poker", "--eval.opponents", "perfect"]
    assert "has chance, secrets" in refused(capsys, *flags)


def test_a_run_has_matches_samples_and_past_selves(here: Path) -> None:
    assert main(["selfplay", "selfplay.toml"]) == 0
    run = RunFolder.open("runs", "selfplay")
    assert run.info["status"] == "finished" and run.info["stage"] == "selfplay"
    lines = list(read_lines(run.path / "metrics.jsonl"))
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert all("eval/perfect/loss" in lines[step] for step in (0, 2, 3)) and "eval/perfect/loss" not in lines[1]
    assert lines[3]["past_step"] in (0, 2) and lines[1]["past_step"] == 0
    assert [path.name for path in (run.path / "past").iterdir()] == ["step-000002"]
    games = [json.loads(line) for line in (run.path / "samples.jsonl").read_text().splitlines()]
    assert [game["seats"] for game in games[:2]] == [["self", "self"], ["self", "past"]]
    assert all(game["is_illegal"] and game["moves"] for game in games), "random weights know no move"
    # The past self is the policy of its step.
    kept, last = (
        load_model(run.path / place, dtype=torch.float32) for place in ("past/step-000002", "checkpoints/step-000003")
    )
    start = load_model("tiny", dtype=torch.float32)
    weights = [next(iter(model.named_parameters()))[1] for model in (start, kept, last)]
    assert not weights[0].equal(weights[1]) and not weights[1].equal(weights[2])


def move(player: int, token: int, prompt: int) -> Move:
    completion = Completion(text="", token_ids=(token,), sampling_logprobs=(-1.0,), finish_reason="stop")
    return Move(player=player, text="", prompt_ids=(1, prompt), completion=completion)


def ended(seats: tuple[str, str], moves: list[Move], rewards: tuple[float, float]) -> Game:
    return Game(seats=seats, moves=tuple(moves), rewards=rewards, is_illegal=False, is_truncated=False)


GAMES = [
    ended(("self", "self"), [move(0, 10, 7), move(1, 11, 8), move(0, 12, 9)], (1.0, -1.0)),
    ended(("self", "self"), [Move(player=0, text="lot"), move(1, 13, 8)], (0.0, 0.0)),
    ended(("past", "self"), [move(0, 14, 7), move(1, 15, 8)], (1.0, -1.0)),
]


class HasBaselines:
    def __init__(self, baselines: dict[str, float]) -> None:
        self.baselines = baselines
        self.policy = torch.nn.Linear(1, 1)
        self.policy.device = torch.device("cpu")  # type: ignore[assignment]


def advantages(baselines: dict[str, float], seat_weight: float = math.inf, kl_coef: float = 0.0) -> dict[int, float]:
    config = Config(init_from="", game=GAME, num_steps=1, seat_weight=seat_weight, kl_coef=kl_coef)
    batch = selfplay.make_batch(HasBaselines(baselines), GAMES, config)  # type: ignore[arg-type]
    assert batch.advantages_BT is not None
    return {
        tokens[0]: round(float(value), 6)
        for tokens, value in zip(batch.completions, batch.advantages_BT[:, 0], strict=True)
    }


def test_a_moves_advantage_is_its_seats_reward_minus_what_that_seat_usually_gets() -> None:
    baselines = {"self/0": 0.25, "self/1": -0.5, "past/1": -0.75}
    assert advantages(baselines) == {10: 0.75, 12: 0.75, 11: -0.5, 13: 0.5, 15: -0.25}


def test_moves_of_a_past_self_or_by_lot_teach_nothing_and_neither_does_an_expected_result() -> None:
    # Without averages a draw is what is expected, so that the second game is left out.
    assert advantages({}) == {10: 1.0, 12: 1.0, 11: -1.0, 15: -1.0}
    # The KL has a gradient there.
    assert advantages({}, kl_coef=0.1) == {10: 1.0, 12: 1.0, 11: -1.0, 13: 0.0, 15: -1.0}


def test_a_position_that_others_passed_too_says_what_was_to_be_expected_there() -> None:
    # Three moves from position 8: rewards -1, 0 and -1, of seats that usually get -0.5, -0.5 and 0.
    found = advantages({"self/1": -0.5}, seat_weight=2.0)
    assert found[11] == pytest.approx(-1 - (0 - 1 + 2 * -0.5) / 4)
    assert found[13] == pytest.approx(0 - (-1 - 1 + 2 * -0.5) / 4)
    assert found[15] == pytest.approx(-1 - (-1 + 0 + 0) / 4)
    assert found[12] == 1.0, "alone at its position"
    outcomes = [
        selfplay.Outcome(game=game, reward=reward, usual=0.2) for game, reward in ((0, 1.0), (1, -1.0), (2, 0.5))
    ]
    assert selfplay.position_baseline(outcomes, 0.0) == [-0.25, 0.75, 0.0]
    # A game that passes a position twice learns there from the others only.
    twice = [*outcomes, selfplay.Outcome(game=0, reward=1.0, usual=0.2)]
    assert selfplay.position_baseline(twice, 0.0)[::3] == [-0.25, -0.25]


def test_averages_move_by_seat_and_by_kind_of_game() -> None:
    moved = selfplay.moved_baselines({"self/0": 0.2}, GAMES, 0.9)
    assert moved == pytest.approx({"self/0": 0.9 * 0.2 + 0.1 * 0.5, "self/1": -0.1 * 0.5, "past/1": -0.1})


def test_which_past_self_a_step_meets_follows_from_step_and_seed(tmp_path: Path) -> None:
    first: Any = "first"
    past = PastSelves(tmp_path / "past", first, every=5, load=lambda path: cast(Any, path))
    assert {past.draw(step, seed=0)[0] for step in range(1, 6)} == {0}
    met = [past.draw(step, seed=0) for step in range(6, 61)]
    assert {step for step, _ in met} == set(range(0, 60, 5))
    assert met == [past.draw(step, seed=0) for step in range(6, 61)]
    assert all(model == (tmp_path / "past" / f"step-{step:06}" if step else "first") for step, model in met)
    assert all(step < 6 + index for index, (step, _) in enumerate(met)), "nobody meets a self that is yet to come"
