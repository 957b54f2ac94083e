"""Many games at once: seats, openings, what is kept of a game, and that one game knows nothing of the others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from strop.environments import load_environment, load_opponent
from strop.evals.games import evaluate_games, results
from strop.generation import Engine
from strop.models import load_model
from strop.rollouts.games import Game, Move, OpponentPlayer, Player, PolicyPlayer, Position, play
from strop.tokenizer import Tokenizer
from strop.types import Observation, SamplingParams, Transition


def tic_tac_toe():
    return load_environment("open_spiel:tic_tac_toe")


class Scripted:
    """Moves to the lowest free square, or says something that is no move from its `fails_at`-th move on."""

    def __init__(self, name: str, fails_at: int = 99) -> None:
        self.name = name
        self.fails_at = fails_at
        self.calls = 0

    def moves(self, positions: Sequence[Position]) -> list[Move]:
        self.calls += 1
        word = "pass" if self.calls >= self.fails_at else None
        return [
            Move(player=position.observation.player, text=word or (position.observation.legal or ("",))[0])
            for position in positions
        ]


def lot(name: str) -> OpponentPlayer:
    return OpponentPlayer(name, load_opponent("random"))


def test_seats_moves_and_rewards_of_a_game() -> None:
    first, second = Scripted("first"), Scripted("second")
    (game,) = play(tic_tac_toe, [[first, second]], seed=0)
    assert game.seats == ("first", "second") and game.rewards == (1.0, -1.0) and not game.is_illegal
    # x 0, o 1, x 2, o 3, x 4, o 5, x 6: the second diagonal.
    assert [(move.player, move.text) for move in game.moves] == [
        (0, "x(0,0)"), (1, "o(0,1)"), (0, "x(0,2)"), (1, "o(1,0)"), (0, "x(1,1)"), (1, "o(1,2)"), (0, "x(2,0)"),
    ]  # fmt: skip


def test_one_player_moves_at_once_in_all_games_that_wait_for_it() -> None:
    player = Scripted("self")
    games = play(tic_tac_toe, [[player, player]] * 5, seed=0)
    assert player.calls == 7 and len(set(games)) == 1


def test_a_move_that_is_not_allowed_is_the_end_of_that_game_only() -> None:
    careless, other = Scripted("careless", fails_at=2), Scripted("other")
    careless_first, fair = play(tic_tac_toe, [[careless, other], [other, other]], seed=0)
    assert careless_first.is_illegal and careless_first.rewards == (-1.0, 0.0)
    assert careless_first.moves[-1] == Move(player=0, text="pass") and len(careless_first.moves) == 3
    assert not fair.is_illegal and fair.rewards == (1.0, -1.0)


def test_a_game_is_decided_by_seed_and_place() -> None:
    def all_of(count: int, seed: int) -> list[Game]:
        return play(tic_tac_toe, [[lot("a"), lot("b")]] * count, seed=seed)

    assert all_of(6, seed=1)[:3] == all_of(3, seed=1)
    assert all_of(3, seed=1) != all_of(3, seed=2)
    assert len({game.moves for game in all_of(6, seed=1)}) > 1


def test_an_opening_is_drawn_by_lot_and_belongs_to_nobody() -> None:
    player = Scripted("self")
    games = play(tic_tac_toe, [[player, player]] * 40, seed=5, openings=[3] * 40)
    assert len({game.moves[0].text for game in games}) > 5 and len({game.moves[2].text for game in games}) > 5
    # After the opening the script goes on: the lowest free square.
    for game in games:
        taken = {int(move.text[2]) * 3 + int(move.text[4]) for move in game.moves[:3]}
        lowest = min(set(range(9)) - taken)
        assert game.moves[3].text == f"o({lowest // 3},{lowest % 3})"
    assert play(tic_tac_toe, [[player, player]], seed=5, openings=[0]) == play(tic_tac_toe, [[player, player]], seed=5)


class Endless:
    """Two players pass for ever; what a move pays, or whether it raises, is its text."""

    num_players = 2

    def reset(self, seed: int, task: object = None) -> Observation:
        return Observation(text="pass", player=0)

    def step(self, action: str) -> Transition:
        rewards = {"nan": (float("nan"), 0.0), "short": (1.0,)}.get(action, (0.0, 0.0))
        if action == "raise":
            raise KeyError("no such move")
        return Transition(observation=Observation(text="pass", player=7 if action == "nobody" else 1), rewards=rewards)

    def close(self) -> None:
        pass


class Says:
    name = "says"

    def __init__(self, text: str) -> None:
        self.text = text

    def moves(self, positions: Sequence[Position]) -> list[Move]:
        return [Move(player=position.observation.player, text=self.text) for position in positions]


def test_a_game_without_end_is_ended() -> None:
    (game,) = play(Endless, [[Says("pass")] * 2], seed=0, max_moves=5)
    assert game.is_truncated and not game.is_illegal and len(game.moves) == 5 and game.rewards == (0.0, 0.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nan", "not one number to each seat"),
        ("short", "not one number to each seat"),
        ("raise", "the game failed on the move 'raise' .KeyError"),
        ("nobody", "player 7, who has no seat"),
    ],
)
def test_what_a_game_of_ones_own_does_wrong_is_named(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        play(Endless, [[Says(text)] * 2], seed=0)


def test_results_count_from_the_policys_side() -> None:
    def game(seat: int, reward: float, is_illegal: bool = False) -> Game:
        seats = ("policy", "other") if seat == 0 else ("other", "policy")
        rewards = (reward, -reward) if seat == 0 else (-reward, reward)
        moves = (Move(player=seat, text=""),)
        return Game(seats=seats, moves=moves, rewards=rewards, is_illegal=is_illegal, is_truncated=False)

    games = [game(0, 1.0), game(0, 1.0), game(1, 1.0), game(1, -1.0, is_illegal=True), game(1, 0.0)]
    found = results(games, "policy")
    assert (found["win"], found["draw"], found["loss"]) == (0.6, 0.2, 0.2)
    assert (found["win_seat0"], found["loss_seat0"]) == (1.0, 0.0)
    assert found["win_seat1"] == pytest.approx(1 / 3) and found["loss_seat1"] == pytest.approx(1 / 3)
    assert found["illegal"] == 0.2 and found["opponent_illegal"] == 0.0 and found["num_moves"] == 1
    assert found["win_low"] < 0.6 < found["win_high"]


def test_matches_take_the_seats_in_turn() -> None:
    found = evaluate_games(tic_tac_toe, Scripted("policy"), [Scripted("mirror"), lot("lot")], num_games=4, seed=0)
    # The lowest square against the lowest square: whoever begins wins.
    assert (found["mirror/win"], found["mirror/win_seat0"], found["mirror/win_seat1"]) == (0.5, 1.0, 0.0)
    assert {name.partition("/")[0] for name in found} == {"mirror", "lot"}


@pytest.fixture(scope="module")
def engine(tiny_folder: Path) -> Engine:
    return Engine(load_model(tiny_folder), Tokenizer.load(tiny_folder), num_slots=4)


def test_a_language_model_is_asked_with_the_position_and_its_text_is_the_move(engine: Engine) -> None:
    sampling = SamplingParams(max_new_tokens=3, stop_token_ids=engine.tokenizer.stop_token_ids)
    policy: Player = PolicyPlayer("policy", engine, engine.tokenizer, sampling)
    games = play(tic_tac_toe, [[policy, lot("b")], [lot("b"), policy]], seed=3)
    for seat, game in enumerate(games):
        own = [move for move in game.moves if move.player == seat]
        assert game.is_illegal and game.rewards[seat] == -1.0, "random weights know no move"
        assert all(move.completion is not None and move.completion.text == move.text for move in own)
        prompt = engine.tokenizer.decode(own[0].prompt_ids, skip_special_tokens=False)
        assert prompt.endswith("move:") and f"player {seat}" in prompt
        assert all(move.completion is None and move.prompt_ids == () for move in game.moves if move.player != seat)


def test_a_position_that_does_not_fit_is_refused(engine: Engine) -> None:
    policy = PolicyPlayer("policy", engine, engine.tokenizer, SamplingParams(max_new_tokens=100))
    with pytest.raises(ValueError, match=r"128"):
        play(lambda: load_environment("open_spiel:breakthrough"), [[policy, policy]], seed=0)
