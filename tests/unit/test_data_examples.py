"""Supervised examples: ids and masks are the tokenizer's, and what is too long is refused, dropped or cut as asked."""

from __future__ import annotations

import json

import pytest
from tokenizers import processors

from strop.data.examples import sft_examples
from strop.data.sources import Rows, load_rows
from strop.tokenizer import Tokenizer, train_bpe


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(["the sky is blue and the grass is green"] * 4, 300)


@pytest.fixture
def rows(tmp_path):
    def make(*content: dict) -> Rows:
        path = tmp_path / "f.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in content))
        return load_rows(str(path))

    return make


def counted_text(tokenizer: Tokenizer, example) -> str:
    ids = [int(token) for token, counts in zip(example.token_ids, example.loss_mask, strict=True) if counts]
    return tokenizer.decode(ids, skip_special_tokens=False)


def test_what_counts_is_the_text_the_assistant_or_the_completion_with_its_end(rows, tokenizer):
    chat = [{"role": "user", "content": "sky?"}, {"role": "assistant", "content": "blue"}]
    text, turns, completion = (
        sft_examples(rows(row), tokenizer, 99)[0]
        for row in ({"text": "the sky"}, {"messages": chat}, {"prompt": "the sky is", "completion": " blue"})
    )
    assert counted_text(tokenizer, text) == "the sky<|endoftext|>"
    assert counted_text(tokenizer, turns) == "blue<|im_end|>"
    assert counted_text(tokenizer, completion) == " blue<|endoftext|>"
    assert tokenizer.decode(completion.token_ids.tolist()) == "the sky is blue"


def test_a_bos_begins_a_text_for_tokenizers_that_use_one(rows):
    tokenizer = train_bpe(["the sky is blue"], 300, special_tokens=["<s>"])
    tokenizer.hf.bos_token = "<s>"
    tokenizer.hf.backend_tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore
        single="<s> $A", special_tokens=[("<s>", 3)]
    )
    example = sft_examples(rows({"text": "the sky"}), Tokenizer(tokenizer.hf, name="with BOS"), 99)[0]
    assert tokenizer.decode(example.token_ids.tolist(), skip_special_tokens=False) == "<s>the sky<|endoftext|>"


LONG = {"prompt": "the sky is", "completion": " blue and the grass is green"}
LONG_PROMPT = {"prompt": "the sky is blue and the grass is green and blue", "completion": " yes"}
SHORT = {"prompt": "sky", "completion": " is"}


def test_too_long_is_an_error_unless_asked_otherwise(rows, tokenizer):
    with pytest.raises(ValueError, match=r"f\.jsonl:2: \d+ tokens, but max_length is 6; raise it, or set on_too_long"):
        sft_examples(rows(SHORT, LONG), tokenizer, 6)
    length = len(sft_examples(rows(LONG), tokenizer, 99)[0].token_ids)
    assert len(sft_examples(rows(LONG), tokenizer, length)) == 1
    with pytest.raises(ValueError, match=f"{length} tokens, but max_length is {length - 1}"):
        sft_examples(rows(LONG), tokenizer, length - 1)


def test_too_long_dropped_is_counted_and_said(rows, tokenizer, capsys):
    examples = sft_examples(rows(SHORT, LONG, LONG_PROMPT, SHORT), tokenizer, 6, on_too_long="drop")
    assert [example.where.rpartition(":")[2] for example in examples] == ["1", "4"]
    assert (examples.num_dropped, examples.num_truncated, examples.num_emptied) == (2, 0, 0)
    assert "of 4 rows, longer than max_length 6: 0 truncated, 2 dropped" in capsys.readouterr().err


def test_too_long_truncated_keeps_the_beginning_and_drops_what_has_nothing_left_to_learn(rows, tokenizer, capsys):
    whole = sft_examples(rows(LONG), tokenizer, 99)[0]
    examples = sft_examples(rows(SHORT, LONG, LONG_PROMPT), tokenizer, 6, on_too_long="truncate")
    assert [example.where.rpartition(":")[2] for example in examples] == ["1", "2"]
    assert examples[1].token_ids.tolist() == whole.token_ids[:6].tolist()
    assert examples[1].loss_mask.tolist() == whole.loss_mask[:6].tolist()
    assert (examples.num_dropped, examples.num_truncated, examples.num_emptied) == (0, 1, 1)
    assert "1 truncated, 0 dropped, 1 dropped because nothing that counts" in capsys.readouterr().err


def test_nothing_is_said_when_everything_fits(rows, tokenizer, capsys):
    examples = sft_examples(rows(SHORT, LONG), tokenizer, 99, on_too_long="drop")
    assert (len(examples), capsys.readouterr().err) == (2, "")


def test_settings_and_data_that_leave_nothing_are_refused(rows, tokenizer):
    with pytest.raises(ValueError, match="no row fits max_length 3; raise it"):
        sft_examples(rows(LONG), tokenizer, 3, on_too_long="drop")
    with pytest.raises(ValueError, match="max_length must be at least 2"):
        sft_examples(rows(LONG), tokenizer, 1)
    with pytest.raises(ValueError, match='on_too_long must be "error", "drop" or "truncate", got \'cut\''):
        sft_examples(rows(LONG), tokenizer, 9, on_too_long="cut")  # pyright: ignore[reportArgumentType]


def test_what_the_tokenizer_refuses_is_named_with_its_row(rows, tokenizer):
    chat = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    tools = [{"type": "function", "function": {"name": "look"}}]
    with pytest.raises(ValueError, match=r"f\.jsonl:2: .*tools"):
        sft_examples(rows({"messages": chat}, {"messages": chat, "tools": tools}), tokenizer, 99)
