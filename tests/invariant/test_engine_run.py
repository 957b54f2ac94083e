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
def drive(
    engine: Engine, arrivals: dict[int, list[int]], leaving: dict[int, int], max_prefill: int | None = None
) -> dict[int, dict[int, Any]]:
    """arrivals: step -> requests that join then; leaving: step -> the request that is cancelled then."""
    found: dict[int, dict[int, Any]] = {index: {} for index in range(len(REQUESTS))}

    def on_finished(key: Any, sample_index: int, completion: Any) -> None:
        found[key][sample_index] = completion

    run = engine.open(on_finished=on_finished, max_prefill=max_prefill)
    step = 0
    with engine.model.decoding(run.max_rows):
        while run.is_unfinished or step <= max(arrivals):
            if step in arrivals:
                run.add((index, REQUESTS[index]) for index in arrivals[step])
            if step in leaving:
                assert run.cancel(leaving[step]) > 0
                assert run.cancel(leaving[step]) == 0
            before = engine.stats.prefill_tokens
            run.step()
            assert max_prefill is None or engine.stats.prefill_tokens - before <= max_prefill
            step += 1
    assert engine._cache is not None and not engine._cache.lengths_S.any()
    return found


@pytest.mark.parametrize("max_prefill", [None, 1, 4, 15, 100])
def test_requests_that_arrive_one_by_one_get_what_they_get_together(engine: Engine, max_prefill: int | None) -> None:
    together = engine.generate(REQUESTS)
    arrivals = {0: [3], 2: [8, 0], 3: [1], 9: [2, 4, 5], 70: [6], 71: [7]}
    apart = drive(engine, arrivals, {}, max_prefill)
    assert engine.stats.prefill_tokens == sum(len(request.prompt_ids) for request in REQUESTS)
    for index, group in enumerate(together):
        assert [one.token_ids for one in group] == [apart[index][k].token_ids for k in range(len(group))]
        assert [one.text for one in group] == [apart[index][k].text for k in range(len(group))]


@pytest.mark.parametrize("max_prefill", [None, 4])
@pytest.mark.parametrize(("step", "leaving"), [(0, (1, 8)), (1, (1, 2, 5, 8)), (3, (1, 2, 5, 8)), (8, (1, 2, 5))])
def test_who_leaves_takes_nobody_along(
    engine: Engine, step: int, leaving: tuple[int, ...], max_prefill: int | None
) -> None:
    together = engine.generate(REQUESTS)
    for gone in leaving:
        order = [gone, *(index for index in range(9) if index != gone)]
        order = order if step > 1 else order[::-1]  # at the head of the queue, or still waiting
        found = drive(engine, {0: order}, {step: gone}, max_prefill)
        for index, group in enumerate(together):
            if index != gone:
                assert [found[index][k].token_ids for k in range(len(group))] == [one.token_ids for one in group]
        assert len(found[gone]) < len(together[gone])


@torch.inference_mode()
def test_long_prompts_do_not_hold_up_those_who_run(engine: Engine) -> None:
    """A token at every step, though prompts of 25 times the bound arrive; they start in their order."""
    times: dict[Any, list[int]] = {}
    step = 0

    def on_token(key: Any, *_: Any) -> None:
        times.setdefault(key, []).append(step)

    run = engine.open(on_finished=lambda *_: None, on_token=on_token, max_prefill=4)
    sampling = SamplingParams(max_new_tokens=80)
    run.add([(0, Request(prompt_ids=(5, 6), sampling=sampling))])
    with engine.model.decoding(run.max_rows):
        while run.is_unfinished:
            if step == 3:
                long = SamplingParams(max_new_tokens=2)
                run.add((key, Request(prompt_ids=tuple(range(5, 105)), sampling=long)) for key in (1, 2))
            run.step()
            step += 1
    assert times[0] == list(range(80))
    assert (times[1][0], times[2][0]) == (3 + 24, 3 + 49)


@torch.inference_mode()
def test_a_prompt_that_leaves_half_prefilled_leaves_nothing_behind(engine: Engine) -> None:
    long, other = (
        Request(prompt_ids=tuple(range(5, end)), sampling=SamplingParams(max_new_tokens=9)) for end in (99, 44)
    )

    def completions(before: Request | None) -> dict[Any, Any]:
        found: dict[Any, Any] = {}
        run = engine.open(on_finished=lambda key, _, completion: found.update({key: completion}), max_prefill=4)
        run.add(([] if before is None else [("long", before)]) + [("other", other)])
        with engine.model.decoding(run.max_rows):
            if before is not None:
                for _ in range(5):
                    run.step()
                assert engine._cache is not None and int(engine._cache.lengths_S.max()) == 20
                assert run.cancel("long") == 1 and not engine._cache.lengths_S.any()
            while run.is_unfinished:
                run.step()
        return found

    assert completions(long) == completions(None)
