"""strop play: a person at the terminal against frozen weights."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from strop.cli.main import main

GAME = "open_spiel:tic_tac_toe"


def play(
    folder: Path, lines: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *flags: str
) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    status = main(["play", str(folder), "--dtype", "float32", "--max-new-tokens", "3", *flags])
    out, err = capsys.readouterr()
    return status, out, err


def test_a_person_moves_and_a_model_that_says_nonsense_loses_its_own_game(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = play(tiny_folder, "9\n?\n4\n", monkeypatch, capsys, "--game", GAME)
    assert status == 0 and out.count("allowed: 0 = x(0,0), 1 = x(0,1)") == 2
    assert "player 0\n...\n...\n...\n" in out
    assert out.endswith("which is not allowed, and lost.\n")
    assert "unchanged" in err


def test_the_second_seat_and_giving_up(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, _ = play(tiny_folder, "", monkeypatch, capsys, "--game", GAME, "--seat", "1")
    assert status == 0 and "The model has said" in out and "player" not in out, "it began, and that was not a move"
    for lines in ("/quit\n", ""):
        status, out, _ = play(tiny_folder, lines, monkeypatch, capsys, "--game", GAME)
        assert status == 0 and out.endswith("You gave up.\n")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "is no self-play run: say what to play"),
        (("--game", GAME, "--seat", "2"), "has the seats 0 to 1"),
        (("--game", "open_spiel:tictactoe"), "did you mean tic_tac_toe"),
    ],
)
def test_what_is_wrong_is_named(
    tiny_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: tuple[str, ...],
    message: str,
) -> None:
    status, _, err = play(tiny_folder, "", monkeypatch, capsys, *flags)
    assert status == 2 and message in err
