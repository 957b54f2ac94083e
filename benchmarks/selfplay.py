"""Does self-play learn Nim, and only from who won? Seeds, a control, and players of known strength.

    python -m benchmarks.selfplay --save selfplay            data, both models before it, and six runs
    python -m benchmarks.selfplay --seeds 0 --arms self-play a part; what is finished in runs/ is not redone

    self-play    recipes/selfplay/selfplay.toml
    lottery      the same, with the winner of every game drawn by lot: its rules can be learned, good moves cannot

All start from one SFT model that moves by lot. The matches are of frozen weights, in the real game, against players
that no run has met: 500 against each, seats in turn. "perfect" has worked the game out: who begins can win, so that
against it half of the games are the most that there is. Its own rows say what perfect play makes of the others.
"winning moves": of the 64 positions that the player to move can win (of either player; Bouton 1901: the exclusive or of
the piles is not 0), the share in which the model's likeliest move keeps the win.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.__main__ import ROOT, heading, origin
from strop.cli.config import build, read_toml, read_values
from strop.environments import load_environment, load_opponent
from strop.environments.open_spiel import OpenSpielGame
from strop.evals.games import evaluate_games
from strop.generation import Engine
from strop.models import load_model, tokenizer_folder
from strop.rollouts.games import OpponentPlayer, Player, PolicyPlayer, Position
from strop.rollouts.prompts import Sampling
from strop.runs import RunFolder, resolve
from strop.stages import selfplay
from strop.stages.selfplay_config import Matches
from strop.tokenizer import Tokenizer
from strop.types import Observation

RUNS = Path("runs")
RECIPES = ROOT / "recipes" / "selfplay"
GAMES = {"self-play": "open_spiel:nim(pile_sizes=1;3;4,is_misere=False)", "lottery": f"{RECIPES / 'lottery.py'}:nim"}
OPPONENTS = ("random", "mcts:20", "perfect")
NUM_GAMES = 500


def is_finished(name: str) -> bool:
    return (RUNS / name / "run.json").is_file() and RunFolder.open(RUNS, name).info["status"] == "finished"


def start() -> None:
    """The data, and the model that all runs start from."""
    subprocess.run([sys.executable, RECIPES / "data.py"], check=True)
    for stage, suffix in (("pretrain", "base"), ("sft", "sft")):
        if not is_finished(f"selfplay-{suffix}"):
            command = [sys.executable, "-m", "strop.cli.main", stage, RECIPES / f"{stage}.toml"]
            subprocess.run([*command, "--name", f"selfplay-{suffix}"], check=True)


def run(arm: str, seed: int) -> str:
    name = f"selfplay-{arm}-{seed}"
    if not is_finished(name):
        recipe = str(RECIPES / "selfplay.toml")
        values = read_values(read_toml(Path(recipe)), selfplay.Config, recipe)
        config = build(selfplay.Config, values, recipe)
        config = dataclasses.replace(config, game=GAMES[arm], seed=seed, eval=Matches(opponents=()))
        selfplay.train(config, name=name, runs_dir=RUNS, resume=(RUNS / name / "run.json").is_file())
    return name


def matches(name: str) -> dict[str, float]:
    """The frozen checkpoint's likeliest moves, or an opponent's, against every opponent and the SFT model."""
    opponents: list[Player] = [OpponentPlayer(opponent, load_opponent(opponent)) for opponent in OPPONENTS]
    policy = (
        OpponentPlayer("policy", load_opponent(name))
        if name in OPPONENTS
        else player(name, "policy", Sampling(max_new_tokens=3, temperature=0.0))
    )
    return evaluate_games(
        lambda: load_environment(GAMES["self-play"]),
        policy,
        [*opponents, player("selfplay-sft", "start", Sampling(max_new_tokens=3))],
        num_games=NUM_GAMES,
        seed=2026,
    )


def player(run_name: str, name: str, sampling: Sampling) -> PolicyPlayer:
    path = resolve(run_name, RUNS).path
    tokenizer = Tokenizer.load(tokenizer_folder(path))
    engine = Engine(load_model(path, frozen=True), tokenizer, num_slots=128)
    return PolicyPlayer(name, engine, tokenizer, sampling.params(tokenizer))


def winning_moves(name: str) -> float:
    """The share of the positions that can be won in which the checkpoint's likeliest move makes the exclusive or 0."""
    policy = player(name, "policy", Sampling(max_new_tokens=3, temperature=0.0))
    game = OpenSpielGame(GAMES["self-play"].removeprefix("open_spiel:"))
    positions: list[Position] = []
    to_take: list[set[str]] = []
    for mover, *piles in product(range(2), range(2), range(4), range(5)):
        nimber = piles[0] ^ piles[1] ^ piles[2]
        if not nimber:
            continue
        text = f"{game.name}, player {mover}\n({mover}): {' '.join(map(str, piles))}\nmove:"
        positions.append(Position(game=game, observation=Observation(text=text, player=mover), seed=0))
        # OpenSpiel's number of "take t from pile p" (from 0) is p + (t - 1) * piles.
        to_take.append(
            {str(p + (pile - (pile ^ nimber) - 1) * 3) for p, pile in enumerate(piles) if pile ^ nimber < pile}
        )
    said = [move.text.strip() for move in policy.moves(positions)]
    return sum(text in best for text, best in zip(said, to_take, strict=True)) / len(positions)


def winning_cell(row: dict[str, Any]) -> str:
    return f"{row['winning_moves']:.0%}" if "winning_moves" in row else "-"


def table(rows: list[dict[str, Any]]) -> str:
    heads = [*OPPONENTS, "start"]
    lines = ["| model | " + " | ".join(f"won against {name}" for name in heads) + " | illegal | winning moves |"]
    lines.append("|" + "---|" * (len(heads) + 3))
    for row in rows:
        cells = [
            f"{row[f'{name}/win']:.1%} [{row[f'{name}/win_low']:.1%}, {row[f'{name}/win_high']:.1%}]" for name in heads
        ]
        lines.append(
            f"| {row['model']} | " + " | ".join(cells) + f" | {row['random/illegal']:.1%} | {winning_cell(row)} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=GAMES, default=list(GAMES))
    parser.add_argument("--save", metavar="NAME", help="write benchmarks/results/NAME.md and .json")
    options = parser.parse_args()
    start()
    rows = [{"model": name, **matches(name)} for name in ("perfect", "random")]
    rows.append({"model": "selfplay-sft", **matches("selfplay-sft"), "winning_moves": winning_moves("selfplay-sft")})
    for arm in options.arms:
        for seed in options.seeds:
            name = run(arm, seed)
            rows.append({"model": f"{arm}, seed {seed}", **matches(name), "winning_moves": winning_moves(name)})
            print(table(rows[-1:]), flush=True)
    print(table(rows))
    if options.save:
        about = origin()
        stem = ROOT / "benchmarks" / "results" / options.save
        stem.with_suffix(".md").write_text(f"{heading(about)}\n\n{table(rows)}\n", encoding="utf-8")
        stem.with_suffix(".json").write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
