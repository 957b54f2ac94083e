"""Files of the self-play recipe: positions of Nim, each with a move that the rules allow, drawn by lot.

    python recipes/selfplay/data.py        writes runs/selfplay-data

Three piles of 1, 3 and 4; in turn the players take as many as they like from one pile; who takes the last has won. The
model learns from these files how a position is read and a move is written, and nothing about which move is good.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from strop.environments import load_opponent
from strop.environments.open_spiel import OpenSpielGame
from strop.tokenizer import train_bpe

GAME = "nim(pile_sizes=1;3;4,is_misere=False)"
OUTPUT = Path("runs/selfplay-data")
NUM_GAMES = 3000
VOCABULARY = 320


def write_selfplay_data(folder: Path, *, seed: int = 0, num_games: int = NUM_GAMES) -> None:
    """tokenizer/, positions.txt (pre-training) and sft.jsonl, of games between two players who move by lot.

    The tokenizer has tokens for words, but none for two piles: what lies where is then told by a token's place. A move
    is its number in the game, so that one or two tokens are a whole move.
    """
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(seed)
    game, player = OpenSpielGame(GAME), load_opponent("random")
    rows: list[dict[str, str]] = []
    for index in range(num_games):
        observation = game.reset(seed=index)
        while observation is not None:
            move = player.move(game, observation, draw)
            rows.append({"prompt": observation.text, "completion": str(game.state.string_to_action(move))})
            observation = game.step(move).observation
    words = [f"{game.name}, player {player}\n\nmove:" for player in (0, 1)]
    train_bpe(words * 10, VOCABULARY).save(folder / "tokenizer")
    draw.shuffle(rows)
    text = "\n<|endoftext|>\n".join(row["prompt"] + row["completion"] for row in rows[:2000])
    (folder / "positions.txt").write_text(text + "\n", encoding="utf-8")
    (folder / "sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    write_selfplay_data(OUTPUT)
    print(OUTPUT)
