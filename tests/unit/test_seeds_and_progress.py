"""Derived seeds, and what a log shows of a run's progress."""

from __future__ import annotations

import io
import itertools

import numpy as np
import pytest
import torch
from rich.console import Console

from strop.runs import Progress, derive_seed, generator


def test_seeds_are_fixed_for_ever():
    """A change would silently give every recorded run other random numbers. From coreutils, for instance
    printf "(17, 'rollout', 3)" | b2sum -l 64, without the last bit."""
    assert derive_seed(0) == 7210762507766007076
    assert derive_seed(17, "rollout", 3) == derive_seed(17, "rollout", np.int64(3)) == 7139009221228740628
    assert derive_seed(5, "ä") == 6316582257896663872


def test_every_part_and_its_place_matters():
    parts = [(), ("a",), ("a", "bc"), ("ab", "c"), ("abc",), (1,), ("1",), (1, 2), (2, 1), (12,), ("a", 1), ("a'", 1)]
    seeds = [derive_seed(seed, *part) for seed in (0, 1, 2**70) for part in parts]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_seeds_use_all_their_bits():
    seeds = [derive_seed(5, "x", index) for index in range(2000)]
    for bit in range(63):
        ones = sum(seed >> bit & 1 for seed in seeds)
        assert 880 < ones < 1120, f"bit {bit}"  # five standard deviations


def test_generators_are_the_same_again_and_differ_by_purpose():
    def draw(*parts: str | int) -> list[float]:
        return torch.rand(4, generator=generator(3, *parts)).tolist()

    assert draw("data", 1) == draw("data", 1)
    draws = [tuple(draw(purpose, step)) for purpose, step in itertools.product(("data", "init"), (1, 2))]
    assert len(set(draws)) == 4


def console(is_terminal: bool = False) -> tuple[Console, io.StringIO]:
    output = io.StringIO()
    return Console(file=output, width=100, force_terminal=is_terminal, color_system=None), output


def test_a_log_gets_plain_lines_and_not_every_step(monkeypatch):
    monkeypatch.delenv("STROP_PROGRESS", raising=False)
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    target, output = console()
    with Progress("grpo", total_steps=112, start_step=10, console=target) as progress:
        for step in range(11, 113):
            now[0] += 4.0
            progress.update(step, {"reward": 0.123456, "tokens/s": 5312.7})
    lines = output.getvalue().splitlines()
    assert lines[0] == "grpo  step 11/112  reward 0.1235  tokens/s 5313  6:44 left"
    assert lines[1].startswith("grpo  step 14/112 ") and lines[-1].endswith("0:00 left")
    assert len(lines) == 35 and "\x1b" not in output.getvalue()


def test_a_terminal_gets_a_bar_and_off_means_off(monkeypatch):
    monkeypatch.delenv("STROP_PROGRESS", raising=False)
    target, output = console(is_terminal=True)
    with Progress("sft", total_steps=3, console=target) as progress:
        progress.update(3, {"loss": 1.5})
    assert "\x1b[?25l" in output.getvalue() and "3/3" in output.getvalue() and "loss 1.5" in output.getvalue()
    monkeypatch.setenv("STROP_PROGRESS", "off")
    target, output = console()
    with Progress("sft", total_steps=3, console=target) as progress:
        progress.update(3, {"loss": 1.5})
    assert output.getvalue() == ""
    monkeypatch.setenv("STROP_PROGRESS", "loud")
    with pytest.raises(ValueError, match="STROP_PROGRESS=loud"):
        Progress("sft", total_steps=3)
