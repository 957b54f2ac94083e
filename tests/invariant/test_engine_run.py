"""A run that requests join and leave between its steps gives what Engine.generate gives, and frees what it held."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from strop.generation import Engine
from strop.models import load_model
from strop.tokenizer import Tokenizer
from strop.types import Request, SamplingParams


@pytest.fixture(scope="module")
def engine(tiny_folder: Path) -> Engine:
    return Engine(load_model(tiny_folder, frozen=True), Tokenizer.load(tiny_folder), num_slots=3)


REQUESTS = [
    Request(
        prompt_ids=tuple(range(5, 6 + 3 * index)),
        sampling=SamplingParams(max_new_tokens=5 + 7 * (index % 4), stop=("e",) if index % 3 == 0 else ()),
        num_samples=1 + index % 3,
        seed=index,
    )
    for index in range(9)
]


@torch.inference_mode()
def drive(engine: Engine, arrivals: dict[int, list[int]], leaving: dict[int, int]) -> dict[int, dict[int, Any]]:
    """arrivals: step -> requests that join then; leaving: step -> the request that is cancelled then."""
    found: dict[int, dict[int, Any]] = {index: {} for index in range(len(REQUESTS))}

    def on_finished(key: Any, sample_index: int, completion: Any) -> None:
        found[key][sample_index] = completion

    run = engine.open(on_finished=on_finished)
    step = 0
    with engine.model.decoding(run.max_rows):
        while run.is_unfinished or step <= max(arrivals):
            if step in arrivals:
                run.add((index, REQUESTS[index]) for index in arrivals[step])
            if step in leaving:
                assert run.cancel(leaving[step]) > 0
                assert run.cancel(leaving[step]) == 0
            run.step()
            step += 1
    assert engine._cache is not None and not engine._cache.lengths_S.any()
    return found


def test_requests_that_arrive_one_by_one_get_what_they_get_together(engine: Engine) -> None:
    together = engine.generate(REQUESTS)
    apart = drive(engine, {0: [3], 2: [8, 0], 3: [1], 9: [2, 4, 5], 70: [6], 71: [7]}, {})
    for index, group in enumerate(together):
        assert [one.token_ids for one in group] == [apart[index][k].token_ids for k in range(len(group))]
        assert [one.text for one in group] == [apart[index][k].text for k in range(len(group))]


@pytest.mark.parametrize(("step", "leaving"), [(0, (1, 8)), (1, (1, 2, 5, 8)), (3, (1, 2, 5, 8)), (8, (1, 2, 5))])
def test_who_leaves_takes_nobody_along(engine: Engine, step: int, leaving: tuple[int, ...]) -> None:
    together = engine.generate(REQUESTS)
    for gone in leaving:
        order = [gone, *(index for index in range(9) if index != gone)]
        order = order if step > 1 else order[::-1]  # at the head of the queue, or still waiting
        found = drive(engine, {0: order}, {step: gone})
        for index, group in enumerate(together):
            if index != gone:
                assert [found[index][k].token_ids for k in range(len(group))] == [one.token_ids for one in group]
        assert len(found[gone]) < len(together[gone])
