"""Preferences as tokens: what becomes of pairs, rankings and labels, and what is refused or counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from strop.data import ComparisonBatches, Comparisons, comparisons_from_rows, load_rows, pack_completions
from strop.data.formats import COMPARED, Format
from strop.models.heads import pack_scored
from strop.tokenizer import Tokenizer, train_bpe

EVERY: tuple[Format, ...] = (*COMPARED, "prompt/completion/label")
PAIR = {"prompt": "sky:", "chosen": " blue", "rejected": " green"}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(["the sky is blue and green"], 300)


@pytest.fixture
def read(tmp_path: Path, tokenizer: Tokenizer):
    def read(*rows: dict[str, Any], **options: Any) -> Comparisons:
        path = tmp_path / "f.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return comparisons_from_rows(
            load_rows(str(path)), tokenizer, **{"accepted": EVERY, "max_length": 100, **options}
        )

    return read


def test_a_pair_is_its_prompt_and_two_answers_each_with_its_eos(read, tokenizer: Tokenizer):
    [pair] = read({**PAIR, "margin": 2, "weight": 0.5})
    assert pair.prompt_ids == tuple(tokenizer.encode("sky:"))
    assert [a.token_ids for a in pair.answers] == [
        (*tokenizer.encode(text), tokenizer.eos_id) for text in (" blue", " green")
    ]
    assert (pair.pairs, pair.margin, pair.weight, pair.label) == ([(0, 1)], 2.0, 0.5, None)


def test_a_ranking_is_sorted_and_its_ties_stay(read, tokenizer: Tokenizer):
    [ranking] = read({"prompt": "sky:", "completions": [" c", " a", "", " b"], "ranks": [9, 1, 4, 4]})
    assert [tokenizer.decode(answer.token_ids) for answer in ranking.answers] == [" a", "", " b", " c"]
    assert ranking.ranks == (0, 1, 1, 2)
    assert ranking.pairs == [(0, 1), (0, 2), (0, 3), (1, 3), (2, 3)]


def test_a_chat_ends_with_the_token_at_which_a_policy_stops(read, tokenizer: Tokenizer):
    user = {"role": "user", "content": "sky?"}
    messages = [{"role": "assistant", "content": text} for text in ("blue", "green")]
    [chat] = read({"prompt": [user], "chosen": [messages[0]], "rejected": [messages[1]]})
    assert chat.prompt_ids == tuple(tokenizer.encode_prompt([user]))
    for answer, text in zip(chat.answers, ("blue", "green"), strict=True):
        assert tokenizer.decode(answer.token_ids, skip_special_tokens=False) == f"{text}<|im_end|>"
        assert all(answer.mask)
    # Text after a prompt of messages is the assistant's next turn.
    [ranking] = read({"prompt": [user], "completions": ["blue", "green"], "ranks": [1, 2]})
    assert (ranking.prompt_ids, ranking.answers) == (chat.prompt_ids, chat.answers)


def test_annotators_and_rows_have_weights(read):
    rows = [{**PAIR, "annotator": "ann", "weight": 3}, {**PAIR, "annotator": "bob"}, PAIR]
    assert [c.weight for c in read(*rows, annotator_weights={"ann": 0.5, "bob": 2})] == [1.5, 2.0, 1.0]
    with pytest.raises(ValueError, match=r"no row of .*f\.jsonl is by 'anne'; did you mean 'ann'\?"):
        read(*rows, annotator_weights={"anne": 2})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**PAIR, "rejected": " blue"}, "'chosen' and 'rejected' are equal"),
        ({**PAIR, "rejected": ""}, "column 'rejected' is empty"),
        ({**PAIR, "weight": -1}, "column 'weight' must not be negative"),
        ({**PAIR, "weight": "heavy"}, "column 'weight' must hold finite numbers"),
        ({**PAIR, "margin": float("nan")}, "column 'margin' must hold finite numbers"),
        ({**PAIR, "annotator": 7}, "column 'annotator' must be a name"),
        ({"prompt": "p", "completions": ["a"], "ranks": [1]}, "must be lists of one length, of two or more"),
        ({"prompt": "p", "completions": ["a", "b"], "ranks": [1]}, "must be lists of one length, of two or more"),
        ({"prompt": "p", "completions": ["a", "b"], "ranks": [1, "2"]}, "column 'ranks' must hold finite numbers"),
        ({"prompt": "p", "completions": ["a", 3], "ranks": [1, 2]}, "column 'completions', number 2 must be text"),
        ({"prompt": "p", "completions": ["a", "a"], "ranks": [1, 2]}, "no row is left to learn from: of 1, 1 alike"),
        ({"prompt": "p", "completions": ["a", "b"], "ranks": [1, 1]}, "no row is left to learn from: of 1, 1 all tied"),
    ],
)
def test_rows_that_say_nothing_are_refused_by_their_place(read, row: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=rf"f\.jsonl.*{message}"):
        read(row)


def test_only_ties_are_refused_even_where_ties_are_kept(read):
    tie = {"prompt": "p", "completions": ["a", "b"], "ranks": [1, 1]}
    with pytest.raises(ValueError, match="in every row all answers tie"):
        read(tie, tie, keep_ties=True)
    assert len(read(tie, tie_with_winner(), keep_ties=True)) == 2
    dropped = read(tie, tie_with_winner())
    assert len(dropped) == 1 and dropped.counts == {"all tied": 1}


def tie_with_winner() -> dict[str, Any]:
    return {"prompt": "p", "completions": ["a", "b", "c"], "ranks": [1, 1, 2]}


def test_what_truncation_does_is_counted_and_told(read, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]):
    prompt = len(tokenizer.encode("sky:"))
    late = {"prompt": "sky:", "chosen": " aaaaaaaa b", "rejected": " aaaaaaaa c"}
    early = {"prompt": "sky:", "chosen": " b aaaaaaaa", "rejected": " c"}
    long_prompt = {"prompt": "sky:" * 4, "chosen": " b", "rejected": " c"}
    with pytest.raises(ValueError, match=r"f\.jsonl:1: prompt and answer have \d+ tokens, but max_length is"):
        read(late, max_length=prompt + 4)
    cut = read(PAIR, late, early, long_prompt, max_length=prompt + 4, on_too_long="truncate")
    assert cut.counts["alike once truncated"] == 1 and cut.counts["no room after the prompt"] == 1
    assert all(len(c.prompt_ids) + len(a.token_ids) <= prompt + 4 for c in cut for a in c.answers)
    assert [c.where.rpartition(":")[2] for c in cut] == ["1", "3"]
    assert "1 alike once truncated" in capsys.readouterr().err
    short = {"prompt": "p", "chosen": "a", "rejected": "b"}
    dropped = read(early, short, max_length=prompt + 4, on_too_long="drop")
    assert dropped.counts == {"too long": 1} and len(dropped) == 1


def test_layouts_share_the_prompt(read, tokenizer: Tokenizer):
    [pair] = read(PAIR)
    prompt, (first, second) = list(pair.prompt_ids), (list(a.token_ids) for a in pair.answers)
    batch = pack_completions([pair.tree])
    assert batch.token_ids_T.tolist() == [*prompt[:-1], prompt[-1], *first[:-1], prompt[-1], *second[:-1]]
    assert batch.labels_T[batch.loss_mask_T].tolist() == first + second
    assert batch.position_ids_T()[batch.loss_mask_T].tolist() == [
        len(prompt) - 1 + place for answer in (first, second) for place in range(len(answer))
    ]
    scored = pack_scored([pair.tree])
    assert scored.token_ids_T.tolist() == prompt + first + second
    assert scored.token_ids_T[scored.loss_mask_T].tolist() == [tokenizer.eos_id] * 2
    assert scored.position_ids_T()[scored.loss_mask_T].tolist() == [len(prompt + first) - 1, len(prompt + second) - 1]


def test_batches_have_everything_once_an_epoch_and_resume(read):
    data = read(*({**PAIR, "chosen": f" {number}"} for number in range(10)))
    batches = ComparisonBatches(data, batch_size=4, seed=3)
    sizes = [len(next(batches)) for _ in range(4)]
    assert sizes == [4, 4, 2, 4]
    state, expected = batches.state_dict(), [c.where for c in next(batches)]
    again = ComparisonBatches(data, batch_size=4, seed=3)
    again.load_state_dict(state)
    assert [c.where for c in next(again)] == expected
    epochs = [[c.where for batch in batches.epoch_batches(epoch) for c in batch] for epoch in (0, 1)]
    assert epochs[0] != epochs[1] and sorted(epochs[0]) == sorted(epochs[1]) == sorted({c.where for c in data})
    with pytest.raises(ValueError, match="belongs to other data"):
        ComparisonBatches(data, batch_size=5, seed=3).load_state_dict(state)
    with pytest.raises(ValueError, match="batch_size must be between 1 and the number of comparisons 10"):
        ComparisonBatches(data, batch_size=11, seed=3)
