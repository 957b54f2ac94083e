"""Games as text, and players that do not learn: rules are OpenSpiel's, what happens around them is checked here."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest

from strop.environments import Environment, Opponent, load_environment, load_opponent

TICTACTOE = "open_spiel:tic_tac_toe"


def match(first: Opponent, second: Opponent, num_games: int) -> Counter[int]:
    """Who won so many games of tic-tac-toe: 1 the first, -1 the second, 0 nobody."""
    game = load_environment(TICTACTOE)
    outcomes: Counter[int] = Counter()
    for seed in range(num_games):
        observation, draw = game.reset(seed), random.Random(seed)
        while observation is not None:
            mover = (first, second)[observation.player]
            transition = game.step(mover.move(game, observation, draw))
            observation = transition.observation
        assert sum(transition.rewards) == 0 and not transition.is_illegal
        outcomes[int(transition.rewards[0])] += 1
    return outcomes


def test_a_position_and_its_moves_are_text() -> None:
    game = load_environment(TICTACTOE)
    first = game.reset(seed=0)
    assert first.text == "tic_tac_toe, player 0\n...\n...\n...\nmove:" and first.player == 0
    assert first.legal is not None and len(first.legal) == 9 and "x(1,1)" in first.legal
    second = game.step(" x(1,1)\n").observation
    assert second is not None and second.player == 1
    assert second.text == "tic_tac_toe, player 1\n...\n.x.\n...\nmove:" and "o(1,1)" not in (second.legal or ())
    third = game.step("0").observation  # its number instead of its name
    assert third is not None and third.text.splitlines()[1] == "o.."


def test_a_move_that_is_not_allowed_ends_the_game_and_wins_it_for_nobody() -> None:
    for move in ("x(1,1)", "o(1,1)", "4", "", "o(0,0) x(0,1)", "9" * 30):
        game = load_environment(TICTACTOE)
        game.reset(seed=0)
        game.step("x(1,1)")
        transition = game.step(move)
        assert transition.is_illegal and transition.observation is None
        assert transition.rewards == (0.0, -1.0)
        with pytest.raises(RuntimeError, match="has ended"):
            game.step("o(0,0)")


def test_saying_nonsense_is_never_cheaper_than_losing() -> None:
    game = load_environment("open_spiel:leduc_poker")
    game.reset(seed=0)
    assert game.step("nonsense").rewards == (-13.0, 0.0)


def test_the_last_move_pays() -> None:
    game = load_environment(TICTACTOE)
    game.reset(seed=0)
    for move in ("x(0,0)", "o(1,0)", "x(0,1)", "o(1,1)"):
        assert game.step(move).rewards == (0.0, 0.0)
    end = game.step("x(0,2)")
    assert end.observation is None and end.rewards == (1.0, -1.0) and not end.is_illegal


def test_a_card_is_seen_by_its_player_only_and_the_seed_deals_it() -> None:
    game = load_environment("open_spiel:kuhn_poker")
    seen = []
    for seed in (3, 3, *range(40)):
        first = game.reset(seed)
        second = game.step("Pass").observation
        assert second is not None
        seen.append((first.text, second.text))
    assert seen[0] == seen[1]
    assert len({first for first, _ in seen}) == 3, "three cards"
    # The same first card with either of the two others: player 0 cannot tell them apart.
    by_first: dict[str, set[str]] = {}
    for first, second in seen:
        by_first.setdefault(first, set()).add(second)
    assert all(len(others) == 2 for others in by_first.values())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("open_spiel:tictactoe", "no game tictactoe; did you mean tic_tac_toe"),
        ("open_spiel:matrix_rps", "not played in turns"),
        ("open_spiel:tic_tac_toe(size=4)", "OpenSpiel refuses"),
        ("chess", 'write "open_spiel:GAME"'),
        ("open_spiel:", 'write "open_spiel:GAME"'),
        ("games.py", 'write "open_spiel:GAME"'),
        ("nowhere.py:game", "there is no file nowhere.py"),
    ],
)
def test_names_that_are_no_game(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        load_environment(name)


def test_a_game_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    (tmp_path / "own_words.py").write_text("SIZE = 3\n")
    file.write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\nfrom own_words import SIZE\n"
        "from strop.environments import load_environment\n\n@dataclass\nclass Board:\n    size: int = SIZE\n\n"
        f"def ttt():\n    assert Board().size == 3\n    return load_environment({TICTACTOE!r})\n"
    )
    game: Environment = load_environment(f"{file}:ttt")
    assert game.num_players == 2
    with pytest.raises(ValueError, match="has no function other"):
        load_environment(f"{file}:other")


def test_random_play_has_its_known_odds() -> None:
    """Exact: 0.5849, 0.1270 and 0.2881; four standard deviations of 4,000 games."""
    outcomes = match(load_opponent("random"), load_opponent("random"), 4000)
    assert outcomes[1] / 4000 == pytest.approx(0.5849, abs=0.032)
    assert outcomes[0] / 4000 == pytest.approx(0.1270, abs=0.022)


def test_perfect_play_never_loses_and_has_its_known_odds() -> None:
    """Against random moves, exactly: 0.9678 won as the first and 0.7775 as the second, the rest drawn."""
    perfect, lot = load_opponent("perfect"), load_opponent("random")
    as_first, as_second = match(perfect, lot, 1000), match(lot, perfect, 1000)
    assert as_first[-1] == as_second[1] == 0
    assert as_first[1] / 1000 == pytest.approx(0.9678, abs=0.023)
    assert as_second[-1] / 1000 == pytest.approx(0.7775, abs=0.053)
    assert match(perfect, perfect, 30) == {0: 30}


def test_search_plays_better_than_lot() -> None:
    outcomes = match(load_opponent("mcts:50"), load_opponent("random"), 60)
    assert outcomes[1] > 50


@pytest.mark.parametrize("name", ["mcts", "mcts:0", "mcts:x", "minimax", ""])
def test_names_that_are_no_opponent(name: str) -> None:
    with pytest.raises(ValueError, match="no opponent"):
        load_opponent(name)


def test_perfect_play_is_refused_where_it_cannot_be_worked_out() -> None:
    refusals = (
        ("open_spiel:kuhn_poker", "perfect", "has chance, secrets"),
        ("open_spiel:connect_four", "perfect", "too many"),
        ("open_spiel:kuhn_poker", "mcts:10", "would cheat"),
    )
    for name, opponent, why in refusals:
        game = load_environment(name)
        observation = game.reset(seed=0)
        with pytest.raises(ValueError, match=why):
            load_opponent(opponent).move(game, observation, random.Random(0))
