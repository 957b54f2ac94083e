"""Batches over whole epochs: every label once, no two documents together, resumed = uninterrupted, no global RNG."""

from __future__ import annotations

import json
import random
from collections import Counter
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from strop.data.batches import PackedBatches, PretrainBatches, TaskBatches
from strop.data.examples import Example, sft_examples
from strop.data.packing import split_packed
from strop.data.shards import SourceTokens, TokenShards, build_shards
from strop.data.sources import load_rows
from strop.tokenizer import train_bpe
from strop.types import PackedBatch, Task


def documents_of(batch: PackedBatch) -> list[tuple[list[int], list[bool]]]:
    """The unshifted documents of a batch, by its segments: the first input, then every label."""
    found = []
    begin = 0
    for segment in batch.segments:
        end = begin + len(segment)
        inputs, labels = batch.token_ids_T[begin:end].tolist(), batch.labels_T[begin:end].tolist()
        assert inputs[1:] == labels[:-1], "a label is the next input of the same document"
        assert batch.position_ids_T()[begin:end].tolist() == list(range(len(segment)))
        found.append(([inputs[0], *labels], batch.loss_mask_T[begin:end].tolist()))
        begin = end
    assert begin == len(batch.token_ids_T)
    return found


def same(first: PackedBatch, second: PackedBatch) -> bool:
    return tuple(first.segments) == tuple(second.segments) and all(
        torch.equal(getattr(first, name), getattr(second, name)) for name in ("token_ids_T", "labels_T", "loss_mask_T")
    )


def numbered_examples(lengths: list[int]) -> list[Example]:
    """Examples that share no token, so that a token tells its document."""
    ends = np.cumsum([0, *lengths])
    return [
        Example(
            token_ids=np.arange(begin, end, dtype=np.int32),
            loss_mask=np.arange(end - begin) % 3 > 0,
            where=f"f:{number}",
        )
        for number, (begin, end) in enumerate(pairwise(ends.tolist()))
    ]


def numbered_shards(*sources: list[int]) -> TokenShards:
    """Shards of documents of these lengths; no token occurs twice in all the sources."""
    made = []
    first = 0
    for number, lengths in enumerate(sources):
        ends = np.cumsum([0, *lengths]).astype(np.uint64)
        made.append(
            SourceTokens(
                source=f"{number}.txt",
                content_hash=str(number),
                tokens=np.arange(first, first + int(ends[-1]), dtype=np.uint32),
                documents=np.stack([ends, ends], axis=1),
                chosen=np.arange(len(lengths)),
            )
        )
        first += int(ends[-1])
    return TokenShards(sources=tuple(made), tokenizer_hash="hash")


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(2, 20), min_size=1, max_size=60), st.integers(19, 64), st.integers(0, 3), st.booleans())
def test_an_epoch_has_every_example_once_whole_and_alone(lengths, batch_tokens, seed, shuffle):
    examples = numbered_examples(lengths)
    batches = PackedBatches(examples, batch_tokens=batch_tokens, seed=seed, shuffle=shuffle)
    expected = [(example.token_ids.tolist(), example.loss_mask[1:].tolist()) for example in examples]
    for epoch in range(2):
        assert batches.epoch == epoch
        count = batches.num_batches_per_epoch
        epoch_batches = list(islice(batches, count))
        assert all(len(batch.token_ids_T) <= batch_tokens for batch in epoch_batches)
        assert sorted(document for batch in epoch_batches for document in documents_of(batch)) == expected
    assert batches.epoch == 2


def test_epochs_and_seeds_differ_and_num_batches_is_what_comes():
    examples = numbered_examples(list(range(2, 40)) * 3)

    def order(seed: int, epoch: int) -> list[int]:
        batches = PackedBatches(examples, batch_tokens=100, seed=seed)
        return [int(batch.token_ids_T[0]) for batch in batches.epoch_batches(epoch)]

    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4
    batches = PackedBatches(examples, batch_tokens=100, seed=0)
    total = batches.num_batches(3)
    for _ in range(total):
        assert batches.epoch < 3
        next(batches)
    assert batches.epoch == 3


def test_long_documents_do_not_all_come_first():
    lengths = np.random.default_rng(0).integers(2, 100, size=2048).tolist()
    batches = PackedBatches(numbered_examples(lengths), batch_tokens=99, seed=0)
    longest = [max(len(segment) for segment in batch.segments) for batch in batches.epoch_batches()]
    halves = np.mean(longest[: len(longest) // 2]), np.mean(longest[len(longest) // 2 :])
    assert abs(halves[0] - halves[1]) < 10


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 70), min_size=1, max_size=20), min_size=1, max_size=3),
    st.integers(1, 20),
    st.integers(0, 20),
)
def test_pretraining_predicts_every_token_but_the_first_of_each_document_once(sources, context_length, more):
    sources = [[2, *lengths] for lengths in sources]
    shards = numbered_shards(*sources)
    batches = PretrainBatches(shards, batch_tokens=context_length + more, context_length=context_length, seed=1)
    document_of = np.repeat(np.arange(sum(map(len, sources))), [n for lengths in sources for n in lengths])
    starts = {int(number) for number in np.unique(document_of, return_index=True)[1]}
    for _ in range(2):
        labels: Counter[int] = Counter()
        for batch in islice(batches, batches.num_batches_per_epoch):
            assert len(batch.token_ids_T) <= context_length + more
            assert bool(batch.loss_mask_T.all())
            for tokens, _ in documents_of(batch):
                assert len(tokens) <= context_length + 1
                assert tokens == list(range(tokens[0], tokens[0] + len(tokens)))
                assert len(set(document_of[tokens].tolist())) == 1
                labels.update(tokens[1:])
        assert labels == Counter(set(range(len(document_of))) - starts)
    assert batches.num_labels == len(document_of) - len(starts)
    assert batches.epoch == 2


def test_weights_are_shares_of_labels_and_no_chunk_repeats_before_its_source_is_through():
    shards = numbered_shards([9] * 200, [9] * 50)
    batches = PretrainBatches(shards, batch_tokens=64, context_length=4, seed=0, weights=[1, 3])
    boundary = 200 * 9
    seen: Counter[int] = Counter()
    for epoch in range(4):
        labels = [label for batch in batches.epoch_batches(epoch) for label in batch.labels_T.tolist()]
        assert len(labels) == batches.num_labels
        assert sum(label >= boundary for label in labels) == 0.75 * batches.num_labels
        seen.update(labels)
        for low, high in ((0, boundary), (boundary, 250 * 9)):
            counts = [seen[label] for label in range(low, high) if (label - low) % 9]
            assert max(counts) - min(counts) <= 1


def batch_makers():
    examples = numbered_examples(list(range(2, 30)) * 2)
    shards = numbered_shards([30, 2, 17] * 5, [5] * 12)
    tasks = [Task(id=f"t:{number}", prompt="p") for number in range(11)]
    return {
        "tokens": lambda seed: PackedBatches(examples, batch_tokens=60, seed=seed),
        "examples": lambda seed: PackedBatches(examples, batch_size=5, seed=seed),
        "pretrain": lambda seed: PretrainBatches(shards, batch_tokens=40, context_length=16, seed=seed),
        "weights": lambda seed: PretrainBatches(shards, batch_tokens=40, context_length=16, seed=seed, weights=[1, 2]),
        "tasks": lambda seed: TaskBatches(tasks, batch_size=3, seed=seed),
    }


@pytest.mark.parametrize("name", ["tokens", "examples", "pretrain", "weights", "tasks"])
def test_resumed_anywhere_the_rest_is_what_it_would_have_been(name):
    make = batch_makers()[name]
    batches = make(0)
    states, expected = [], []
    for _ in range(3 * batches.num_batches_per_epoch + 2):
        states.append(json.dumps(batches.state_dict()))
        expected.append(next(batches))
    assert batches.epoch >= 2
    for start in range(len(states)):
        resumed = make(0)
        next(resumed)
        resumed.load_state_dict(json.loads(states[start]))
        for batch, wanted in zip(islice(resumed, 4), expected[start:], strict=False):
            assert batch == wanted if isinstance(wanted, tuple) else same(batch, wanted)


@pytest.mark.parametrize("name", ["tokens", "examples", "pretrain", "weights", "tasks"])
def test_global_generators_are_neither_read_nor_moved(name):
    def run(global_seed: int) -> list[str]:
        random.seed(global_seed)
        np.random.seed(global_seed)
        torch.manual_seed(global_seed)
        batches = batch_makers()[name](0)
        found = [str(next(batches)) for _ in range(8)]
        after = (random.random(), np.random.random(), float(torch.rand(())))
        random.seed(global_seed)
        np.random.seed(global_seed)
        torch.manual_seed(global_seed)
        assert after == (random.random(), np.random.random(), float(torch.rand(())))
        return found

    assert run(1) == run(2)


def test_an_evaluation_pass_does_not_move_the_position():
    make = batch_makers()["tokens"]
    batches, untouched = make(0), make(0)
    next(batches), next(untouched)
    assert sum(1 for _ in batches.epoch_batches(5)) > 1
    assert batches.state_dict() == untouched.state_dict()
    assert same(next(batches), next(untouched))


def test_files_to_micro_batches_and_back_to_text(tmp_path: Path):
    """The whole way with a real tokenizer: decoding what counts in the micro-batches gives back every completion."""
    pairs = [(f"{a} + {b} =", f" {a + b}") for a in range(8) for b in range(8)]
    path = tmp_path / "sums.jsonl"
    path.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in pairs))
    tokenizer = train_bpe([p + c for p, c in pairs], 300)
    examples = sft_examples(load_rows(str(path)), tokenizer, 32)
    batches = PackedBatches(examples, batch_tokens=120, seed=0)
    found = []
    for batch in batches.epoch_batches():
        micro_batches = split_packed(batch, 40)
        assert sum(int(micro.loss_mask_T.sum()) for micro in micro_batches) == int(batch.loss_mask_T.sum())
        for micro in micro_batches:
            assert len(micro.token_ids_T) <= 40
            for ids, mask in documents_of(micro):
                completion = [token for token, counts in zip(ids[1:], mask, strict=True) if counts]
                assert completion[-1] == tokenizer.eos_id
                prompt = ids[: len(ids) - len(completion)]
                found.append((tokenizer.decode(prompt), tokenizer.decode(completion)))
    assert sorted(found) == sorted(pairs)


def test_corpus_to_batches_and_back_to_text(tmp_path: Path):
    texts = [f"Line {n}.\n" * (n % 5 + 1) + "é" for n in range(40)]
    path = tmp_path / "corpus.txt"
    path.write_text("\n<|endoftext|>\n".join(texts))
    tokenizer = train_bpe(texts, 300)
    shards = build_shards([str(path)], tokenizer, tmp_path / "shards")
    training, validation = shards.split(0.2)
    for part, count in ((training, 32), (validation, 8)):
        batches = PretrainBatches(part, batch_tokens=256, context_length=256, seed=0)
        documents = [ids for batch in batches.epoch_batches() for ids, _ in documents_of(batch)]
        assert all(ids[-1] == tokenizer.eos_id and tokenizer.eos_id not in ids[:-1] for ids in documents)
        decoded = [tokenizer.decode(ids) for ids in documents]
        assert len(decoded) == count
        assert set(decoded) <= set(texts)
        assert sum(len(text.encode()) for text in decoded) == part.num_bytes
