"""train_bpe against tokenizers' own ready-made byte-level BPE."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import ByteLevelBPETokenizer

from strop.tokenizer import StreamDecoder, Tokenizer, train_bpe

WORDS = ["the", "cat", "sat", ",", "and", "it's", "42", "1307", "é", "naïve", "日本語", "😀", "\n\n", "def", "f(x):"]
CORPUS = [" ".join(random.Random(i).choices(WORDS, k=60)) for i in range(40)]
TOKENIZER = train_bpe(CORPUS, 380)
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]

anything = st.lists(st.one_of(st.text(), st.sampled_from([*SPECIALS, *WORDS, "\r\n", "\u200d", "\ufffd"]))).map("".join)


def test_equals_tokenizers_byte_level_bpe():
    theirs = ByteLevelBPETokenizer(add_prefix_space=False)
    theirs.train_from_iterator(CORPUS, vocab_size=300, min_frequency=0, special_tokens=SPECIALS, show_progress=False)
    ours = train_bpe(CORPUS, 300, split_digits=False)
    assert ours.hf.get_vocab() == theirs.get_vocab()
    assert ours.vocab_size == 300
    assert train_bpe(CORPUS, 9999).vocab_size < 400  # nothing is left to merge
    for text in [*CORPUS[:5], "unseen words, 1307 😀\n\n  x"]:
        assert ours.encode(text) == theirs.encode(text).ids


def test_digits_are_split_unless_asked_otherwise():
    assert [TOKENIZER.decode([i]) for i in TOKENIZER.encode("1307 42")] == ["1", "3", "0", "7", " ", "4", "2"]
    assert len(train_bpe(CORPUS, 380, split_digits=False).encode("1307")) < 4


def test_same_corpus_gives_the_same_tokenizer_in_another_process():
    program = f"from strop.tokenizer import train_bpe; print(train_bpe({CORPUS!r}, 380).content_hash, end='')"
    other = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert other.stdout == TOKENIZER.content_hash
    assert train_bpe(CORPUS[1:], 380).content_hash != TOKENIZER.content_hash


@settings(max_examples=300, deadline=None)
@given(anything)
@example("\ufeff \u00a0\x00 e\u0301 \u0130")
def test_any_unicode_survives(text: str):
    assert TOKENIZER.decode(TOKENIZER.encode(text), skip_special_tokens=False) == text


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, TOKENIZER.vocab_size - 1)), st.booleans())
def test_streamed_text_equals_decoded_text(token_ids: list[int], skip: bool):
    stream = StreamDecoder(TOKENIZER, skip_special_tokens=skip)
    text = "".join([stream.push(i) for i in token_ids]) + stream.finish()
    assert text == TOKENIZER.decode(token_ids, skip_special_tokens=skip)


@settings(max_examples=200, deadline=None)
@given(anything)
def test_stream_gives_whole_characters_and_holds_back_only_the_open_one(text: str):
    text = text.replace("\ufffd", "")
    stream = StreamDecoder(TOKENIZER, skip_special_tokens=False)
    given_out = ""
    for i in TOKENIZER.encode(text):
        given_out += stream.push(i)
        assert text.startswith(given_out)
    assert given_out == text and stream.finish() == ""


def test_stream_holds_an_open_character_until_it_is_complete():
    smile = train_bpe(["x"], 259).encode("😀")
    tokenizer = train_bpe(["x"], 259)
    assert len(smile) == 4
    stream = StreamDecoder(tokenizer)
    assert [stream.push(i) for i in smile] == ["", "", "", "😀"]
    assert [stream.push(i) for i in smile[:2]] == ["", ""]
    assert stream.finish() == "\ufffd"
    assert stream.finish() == ""


@settings(max_examples=200, deadline=None)
@given(anything, anything)
def test_completion_never_changes_the_prompt_ids(prompt: str, completion: str):
    token_ids, mask = TOKENIZER.encode_prompt_completion(prompt, completion)
    prompt_ids = TOKENIZER.encode_prompt(prompt)
    assert token_ids[: len(prompt_ids)] == prompt_ids
    assert mask == [i >= len(prompt_ids) for i in range(len(token_ids))]
    assert token_ids[-1] == TOKENIZER.eos_id
    assert TOKENIZER.decode(token_ids[:-1], skip_special_tokens=False) == prompt + completion


@settings(max_examples=200, deadline=None)
@given(st.text(), anything, st.booleans())
def test_counted_chat_tokens_are_the_answer(question: str, answer: str, marked: bool):
    tokenizer = TOKENIZER if marked else PLAIN
    answer = answer.lstrip()  # a newline right after the header joins the header's own, and then does not count
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    for token_ids, mask in (
        tokenizer.encode_chat(messages),
        tokenizer.encode_prompt_completion(messages[:1], messages[1:]),
    ):
        counted = [i for i, counts in zip(token_ids, mask, strict=True) if counts]
        assert tokenizer.decode(counted, skip_special_tokens=False) == answer + "<|im_end|>"
        prompt_ids = tokenizer.encode_prompt(messages[:1])
        assert token_ids[: len(prompt_ids)] == prompt_ids


def unmarked() -> Tokenizer:
    tokenizer = train_bpe(CORPUS, 380)
    source = tokenizer.hf.chat_template
    tokenizer.hf.chat_template = source.replace("{%- generation %}", "").replace("{%- endgeneration %}", "")
    assert "generation %}" not in tokenizer.hf.chat_template
    return tokenizer


PLAIN = unmarked()


def test_a_newline_that_opens_the_answer_is_kept_apart_from_the_prompt():
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "\n\nyes"}]
    token_ids, mask = TOKENIZER.encode_prompt_completion(messages[:1], messages[1:])
    prompt_ids = TOKENIZER.encode_prompt(messages[:1])
    assert token_ids[: len(prompt_ids)] == prompt_ids
    assert TOKENIZER.decode([i for i, c in zip(token_ids, mask, strict=True) if c]) == "\n\nyes"


def test_training_rejects_what_cannot_work():
    with pytest.raises(ValueError, match="259"):
        train_bpe(CORPUS, 258)
    assert train_bpe(CORPUS, 259).vocab_size == 259
    with pytest.raises(ValueError, match="260"):
        train_bpe(CORPUS, 259, special_tokens=["<|pad|>"])
    for empty in ([], [""], iter(["", ""])):
        with pytest.raises(ValueError, match="empty"):
            train_bpe(empty, 300)
    with pytest.raises(ValueError, match="not one"):
        train_bpe("abc", 300)
    with pytest.raises(ValueError, match="differ"):
        train_bpe(CORPUS, 300, special_tokens=["<|im_end|>"])


def test_special_tokens_come_first_and_are_never_split():
    tokenizer = train_bpe(CORPUS, 380, special_tokens=["<think>"])
    assert [tokenizer.encode(token) for token in [*SPECIALS, "<think>"]] == [[0], [1], [2], [3]]
    assert tokenizer.eos_id == 0 and tokenizer.stop_token_ids == (0, 2)
