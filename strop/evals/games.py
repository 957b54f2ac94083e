"""How well a policy plays: wins, draws and losses against players that do not learn."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from strop.environments import Environment
from strop.evals.intervals import wilson_interval
from strop.rollouts.games import Game, Player, play


def evaluate_games(
    make: Callable[[], Environment],
    policy: Player,
    opponents: Sequence[Player],
    *,
    num_games: int,
    seed: int,
    max_moves: int = 1000,
) -> dict[str, float]:
    """Of num_games against each opponent, the seats taken in turn: {"random/win": 0.9, "random/loss": ...}.

    win, draw and loss are shares, by whether the policy's reward is above, at, or below 0; win and loss have 95 %
    intervals (_low, _high), and a share of each seat (win_seat0, loss_seat0, ...). illegal: games that the policy ended
    with a move that is not allowed, which are among the losses; opponent_illegal: those that the opponent ended so,
    which are among the draws. num_moves is the mean length of a game.
    """
    metrics: dict[str, float] = {}
    for opponent in opponents:
        num_seats = make().num_players
        seatings = [
            [policy if seat == index % num_seats else opponent for seat in range(num_seats)]
            for index in range(num_games)
        ]
        games = play(make, seatings, seed=seed, max_moves=max_moves)
        for name, value in results(games, policy.name).items():
            metrics[f"{opponent.name}/{name}"] = value
    return metrics


def results(games: Sequence[Game], name: str) -> dict[str, float]:
    """The shares of evaluate_games, of games that all have exactly one seat of this name."""
    own = [(game, game.seats.index(name)) for game in games]
    signs = [(game.rewards[seat] > 0) - (game.rewards[seat] < 0) for game, seat in own]
    seats = [seat for _, seat in own]
    found: dict[str, float] = {}
    for outcome, sign in (("win", 1), ("draw", 0), ("loss", -1)):
        count = signs.count(sign)
        found[outcome] = count / len(games)
        if sign:
            found[f"{outcome}_low"], found[f"{outcome}_high"] = wilson_interval(count, len(games))
            for seat in sorted(set(seats)):
                of_seat = [each for each, place in zip(signs, seats, strict=True) if place == seat]
                found[f"{outcome}_seat{seat}"] = of_seat.count(sign) / len(of_seat)
    for who, is_own in (("illegal", True), ("opponent_illegal", False)):
        found[who] = sum(game.is_illegal and (game.moves[-1].player == seat) == is_own for game, seat in own) / len(
            games
        )
    found["num_moves"] = sum(len(game.moves) for game in games) / len(games)
    return found
