"""Batches: impossible settings are refused with the remedy, and a position only fits what it was saved for."""

from __future__ import annotations

import json

import numpy as np
import pytest

from strop.data.batches import PackedBatches, PretrainBatches, TaskBatches, epoch_order
from strop.data.examples import Example
from strop.data.shards import SourceTokens, TokenShards
from strop.types import Task


def example(length: int) -> Example:
    return Example(
        token_ids=np.arange(length, dtype=np.int32), loss_mask=np.ones(length, dtype=bool), where=f"f:{length}"
    )


def shards(*lengths: int) -> TokenShards:
    ends = np.cumsum([0, *lengths]).astype(np.uint64)
    source = SourceTokens(
        source="a.txt",
        content_hash="hash",
        tokens=np.arange(int(ends[-1]), dtype=np.uint16),
        documents=np.stack([ends, ends], axis=1),
        chosen=np.arange(len(lengths)),
    )
    return TokenShards(sources=(source,), tokenizer_hash="hash")


def tasks(count: int) -> list[Task]:
    return [Task(id=f"t:{number}", prompt="p") for number in range(count)]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PackedBatches([example(9)], batch_tokens=7, seed=0), r"f:9: 8 label positions, but batch_tokens is 7"),
        (lambda: PackedBatches([], batch_tokens=7, seed=0), "there are no examples"),
        (lambda: PackedBatches([example(9)], seed=0), "either batch_tokens or batch_size"),
        (
            lambda: PackedBatches([example(9)], batch_tokens=9, batch_size=1, seed=0),
            "either batch_tokens or batch_size",
        ),
        (lambda: PackedBatches([example(9)], batch_size=2, seed=0), "between 1 and the number of examples 1, got 2"),
        (lambda: PackedBatches([example(9)], batch_size=1, seed=-1), "seed must not be negative"),
        (lambda: TaskBatches(tasks(3), batch_size=4, seed=0), "between 1 and the number of tasks 3, got 4"),
        (lambda: TaskBatches(tasks(3), batch_size=0, seed=0), "between 1 and the number of tasks 3, got 0"),
        (
            lambda: PretrainBatches(shards(9), batch_tokens=8, context_length=9, seed=0),
            "context_length 9 is larger than batch_tokens 8: .*raise batch_tokens or lower",
        ),
        (
            lambda: PretrainBatches(shards(9), batch_tokens=8, context_length=0, seed=0),
            "context_length must be at least",
        ),
        (lambda: PretrainBatches(shards(1), batch_tokens=8, context_length=8, seed=0), r"a\.txt: no document has two"),
        (
            lambda: PretrainBatches(shards(9), batch_tokens=8, context_length=8, seed=0, weights=[1, 2]),
            r"one positive number per source \(a\.txt\), got \[1, 2\]",
        ),
        (
            lambda: PretrainBatches(shards(9), batch_tokens=8, context_length=8, seed=0, weights=[0]),
            "one positive number per source",
        ),
    ],
)
def test_impossible_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_position_fits_only_the_data_and_settings_it_was_saved_for():
    examples = [example(length) for length in (3, 4, 5, 6)]
    state = PackedBatches(examples, batch_size=2, seed=0).state_dict()
    assert json.loads(json.dumps(state)) == state
    for other in (
        PackedBatches(examples[:3], batch_size=2, seed=0),
        PackedBatches(examples, batch_size=1, seed=0),
        PackedBatches(examples, batch_size=2, seed=1),
        PackedBatches(examples, batch_size=2, seed=0, shuffle=False),
    ):
        with pytest.raises(ValueError, match="the saved data position belongs to other data"):
            other.load_state_dict(state)
    with pytest.raises(ValueError, match="out of range: epoch 0, batch 2"):
        PackedBatches(examples, batch_size=2, seed=0).load_state_dict({**state, "batch": 2})


def test_batches_by_examples_have_that_many_and_the_last_what_is_left():
    batches = PackedBatches([example(length) for length in range(2, 12)], batch_size=4, seed=0)
    assert [len(batch.segments) for batch in batches.epoch_batches()] == [4, 4, 2]
    assert batches.num_batches_per_epoch == 3
    assert batches.num_batches(5) == 15


def test_the_seed_and_the_epoch_decide_the_order():
    def order(seed: int, epoch: int) -> tuple[int, ...]:
        batches = PackedBatches([example(length) for length in range(2, 40)], batch_size=38, seed=seed)
        return tuple(len(segment) for segment in next(batches.epoch_batches(epoch)).segments)

    assert order(0, 0) == order(0, 0)
    orders = {order(seed, epoch) for seed in (0, 1) for epoch in (0, 1)}
    assert len(orders) == 4
    assert tuple(range(1, 39)) not in orders


def test_unshuffled_batches_keep_the_order_of_the_data():
    batches = PackedBatches([example(length) for length in (5, 2, 4, 3)], batch_size=2, seed=0, shuffle=False)
    sizes = [[segment.trunk for segment in next(batches).segments] for _ in range(3)]
    assert sizes == [[4, 1], [3, 2], [4, 1]]
    assert batches.epoch == 1


def test_tasks_come_without_repetition_in_a_batch_and_unshuffled_in_a_circle():
    batches = TaskBatches(tasks(7), batch_size=3, seed=0)
    assert batches.num_batches_per_epoch == 2
    orders = []
    for epoch in range(3):
        assert batches.epoch == epoch
        ids = [task.id for _ in range(2) for task in next(batches)]
        assert len(set(ids)) == 6
        orders.append(ids)
    assert orders[0] != orders[1] != orders[2]
    circle = TaskBatches(tasks(5), batch_size=2, seed=0, shuffle=False)
    assert [task.id for _ in range(5) for task in next(circle)] == [f"t:{n}" for n in (0, 1, 2, 3, 4, 0, 1, 2, 3, 4)]


def test_sources_are_drawn_evenly_and_in_proportion():
    # Source 0 has 4 items, 10 drawn per epoch; source 1 has 6 items, 2 drawn per epoch.
    orders = [epoch_order([4, 6], [10, 2], seed=3, epoch=epoch, shuffle=True) for epoch in range(6)]
    for order in orders:
        assert (len(order), int((order < 4).sum())) == (12, 10)
    assert any(order.max() != order[-2:].max() for order in orders), "the sources are mixed, not one after the other"
    drawn = np.concatenate(orders)
    assert np.bincount(drawn, minlength=10).tolist() == [15] * 4 + [2] * 6
    for epoch in (0, 3):  # three epochs are one pass over source 1
        once = np.concatenate(orders[epoch : epoch + 3])
        assert sorted(once[once >= 4]) == list(range(4, 10))
