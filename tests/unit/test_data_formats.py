"""TRL's formats: what each row becomes, which format a file has, and what is refused."""

from __future__ import annotations

import json

import pytest

from strop.data.formats import (
    MessagesRow,
    PreferenceRow,
    PromptCompletionRow,
    TextRow,
    UnpairedRow,
    read_preferences,
    read_supervised,
    read_unpaired,
)
from strop.data.sources import Rows, load_rows
from strop.data.tasks import tasks_from_rows

USER = {"role": "user", "content": "What colour is the sky?"}
BLUE = {"role": "assistant", "content": "Blue."}
GREEN = {"role": "assistant", "content": "Green."}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {}}}


@pytest.fixture
def rows(tmp_path):
    def make(*content: dict) -> Rows:
        path = tmp_path / "f.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in content))
        return load_rows(str(path))

    return make


def test_supervised_formats_are_read_as_they_are(rows):
    def read(row):
        return next(read_supervised(rows(row)))

    where = rows({"text": "x"}).where(0)
    assert read({"text": "The sky.", "id": 3}) == TextRow(where=where, text="The sky.")
    assert read({"messages": [USER, BLUE]}) == MessagesRow(where=where, messages=(USER, BLUE))
    assert read({"prompt": "The sky is", "completion": " blue."}) == PromptCompletionRow(
        where=where, prompt="The sky is", completion=" blue."
    )
    assert read({"prompt": [USER], "completion": [BLUE], "tools": json.dumps([TOOL])}) == PromptCompletionRow(
        where=where, prompt=(USER,), completion=(BLUE,), tools=(TOOL,)
    )
    # A question repeated beside the whole conversation is a spare column, as in several published datasets.
    assert read({"prompt": "sky?", "prompt_id": "7", "messages": [USER, BLUE]}) == MessagesRow(
        where=where, messages=(USER, BLUE)
    )


def test_a_call_of_a_tool_needs_no_content_and_other_keys_pass_through(rows):
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "look", "arguments": {}}}]}
    answer = {"role": "tool", "name": "look", "content": ""}
    row = next(read_supervised(rows({"messages": [USER, call, answer, BLUE], "tools": [TOOL]})))
    assert isinstance(row, MessagesRow)
    assert row.messages == (USER, {**call, "content": ""}, answer, BLUE)
    assert row.tools == (TOOL,)


def test_preferences_with_and_without_a_prompt(rows):
    def read(row):
        return next(read_preferences(rows(row)))

    where = rows({"text": "x"}).where(0)
    text = PreferenceRow(where=where, prompt="The sky is", chosen=" blue.", rejected=" green.")
    assert read({"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}) == text
    assert read({"chosen": "The sky is blue.", "rejected": "The sky is green."}) == text
    chat = PreferenceRow(where=where, prompt=(USER,), chosen=(BLUE,), rejected=(GREEN,))
    assert read({"prompt": [USER], "chosen": [BLUE], "rejected": [GREEN]}) == chat
    assert read({"chosen": [USER, BLUE], "rejected": [USER, GREEN]}) == chat
    assert read({"prompt": USER["content"], "chosen": [USER, BLUE], "rejected": [USER, GREEN]}) == chat


def test_unpaired_answers_keep_their_label(rows):
    both = rows(
        {"prompt": "The sky is", "completion": " blue.", "label": True},
        {"prompt": "The sky is", "completion": " green.", "label": 0},
    )
    liked, disliked = read_unpaired(both)
    assert liked == UnpairedRow(where=both.where(0), prompt="The sky is", completion=" blue.", label=True)
    assert disliked == UnpairedRow(where=both.where(1), prompt="The sky is", completion=" green.", label=False)
    assert disliked.label is False


def test_imitating_rejected_answers_needs_to_be_asked_for(rows):
    kto = rows({"prompt": "The sky is", "completion": " green.", "label": False})
    with pytest.raises(ValueError, match=r"f\.jsonl:1: .* is prompt/completion/label, but this stage reads text or"):
        list(read_supervised(kto))
    assert next(read_supervised(kto, format="prompt/completion")) == PromptCompletionRow(
        where=kto.where(0), prompt="The sky is", completion=" green."
    )


def test_a_file_that_fits_two_formats_needs_a_name(rows):
    both = rows({"text": "user: sky?", "messages": [USER, BLUE]})
    with pytest.raises(ValueError, match=r"f\.jsonl:1: .* fits text and messages; name the format"):
        list(read_supervised(both))
    assert next(read_supervised(both, format="text")) == TextRow(where=both.where(0), text="user: sky?")
    with pytest.raises(ValueError, match="format 'prompt/completion/label' is not one that this stage reads"):
        list(read_supervised(both, format="prompt/completion/label"))


def test_the_first_row_of_each_file_decides_its_format(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "plain"}\n')
    (tmp_path / "b.jsonl").write_text('{"prompt": "p", "completion": "c"}\n{"prompt": "p", "text": "t"}\n')
    reader = read_supervised(load_rows(str(tmp_path)))
    assert [type(next(reader)) for _ in range(2)] == [TextRow, PromptCompletionRow]
    with pytest.raises(
        ValueError, match=r"b\.jsonl:2: column 'completion' is missing; this file is read as prompt/com"
    ):
        next(reader)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "q", "answer": "a"}, r"columns are 'question', 'answer', but this stage reads text or messages"),
        ({"text": None}, "columns are none"),
        ({"conversations": [{"from": "human", "value": "x"}]}, "rename 'conversations' to 'messages'"),
        ({"chosen": "a b", "rejected": "a c"}, "is prompt/chosen/rejected, but this stage reads"),
        ({"messages": "hello"}, "column 'messages' must be a list of messages"),
        ({"messages": []}, "column 'messages' must be a list of messages"),
        ({"messages": [USER]}, "no assistant message"),
        ({"messages": [USER, "blue"]}, "'messages', message 2: must be an object"),
        ({"messages": [{"from": "human", "value": "x"}]}, "message 1: 'role' is missing; rename from/value"),
        ({"messages": [USER, {"role": "assistant"}]}, "message 2: 'content' must be text, found NoneType"),
        ({"messages": [USER, {"role": "assistant", "content": ""}]}, "message 2: 'content' is empty"),
        ({"messages": [{**USER, "content": [{"type": "text"}]}, BLUE]}, "message 1: 'content' is a list of parts"),
        ({"prompt": "p", "completion": ""}, "column 'completion' is empty"),
        ({"prompt": "p", "completion": 4}, "column 'completion' must be text or a list of messages, found int"),
        ({"prompt": "p", "completion": [BLUE]}, "'prompt' and 'completion' must be both text or both messages"),
        ({"prompt": [USER], "completion": [USER]}, "column 'completion' has no assistant message"),
        ({"messages": [USER, BLUE], "tools": "[{"}, "column 'tools' is broken JSON"),
        ({"messages": [USER, BLUE], "tools": ["look"]}, "column 'tools' must be a list of JSON schemas"),
        ({"messages": [USER, BLUE], "chat_template_kwargs": {"a": 1}}, "'chat_template_kwargs' is not supported"),
    ],
)
def test_a_bad_supervised_row_is_named(rows, row, message):
    with pytest.raises(ValueError, match=rf"f\.jsonl:1: .*{message}"):
        list(read_supervised(rows(row)))


@pytest.mark.parametrize(
    ("reader", "row", "message"),
    [
        (read_preferences, {"prompt": "p", "chosen": "a", "rejected": "a"}, "'chosen' and 'rejected' are equal"),
        (read_preferences, {"chosen": "blue", "rejected": "green"}, "column 'prompt' is missing"),
        (read_preferences, {"chosen": "The sky is", "rejected": "The sky"}, "do not share a beginning"),
        (read_preferences, {"chosen": [USER, BLUE], "rejected": [USER]}, "do not share a beginning"),
        (read_preferences, {"chosen": [BLUE], "rejected": "Green."}, "'chosen' and 'rejected' must be both text"),
        (read_preferences, {"prompt": [USER], "chosen": "a", "rejected": "b"}, "'prompt' and 'chosen' must be both"),
        (read_preferences, {"prompt": "p", "chosen": "a"}, "this stage reads prompt/chosen/rejected"),
        (read_unpaired, {"prompt": "p", "completion": "c", "label": "yes"}, "'label' must be true or false"),
        (read_unpaired, {"prompt": "p", "completion": "c", "label": -1}, "'label' must be true or false"),
        (read_unpaired, {"prompt": "p", "completion": "c"}, "this stage reads prompt/completion/label"),
    ],
)
def test_a_bad_preference_row_is_named(rows, reader, row, message):
    with pytest.raises(ValueError, match=rf"f\.jsonl:1: .*{message}"):
        list(reader(rows(row)))


def test_tasks_keep_every_other_column_for_the_rewards(rows):
    content = rows({"prompt": "2 + 2", "answer": "4", "level": 1}, {"prompt": [USER], "answer": "blue", "level": None})
    first, second = tasks_from_rows(content)
    assert (first.id, first.prompt, first.columns) == (content.where(0), "2 + 2", {"answer": "4", "level": 1})
    assert (second.id, second.prompt) == (content.where(1), (USER,))
    assert second.columns == {"answer": "blue", "level": None}
    assert tasks_from_rows(rows({"question": "2 + 2", "prompt": "x"}), prompt_column="question")[0].columns == {
        "prompt": "x"
    }


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "q"}, "column 'prompt' is missing; the row has 'question'"),
        ({"prompt": ""}, "column 'prompt' is empty"),
        ({"prompt": []}, "column 'prompt' must be a list of messages that is not empty"),
        ({"prompt": {"role": "user"}}, "column 'prompt' must be text, found dict"),
        ({"prompt": "p", "chat_template_kwargs": {"a": 1}}, "column 'chat_template_kwargs' is not supported"),
    ],
)
def test_a_bad_task_is_named(rows, row, message):
    with pytest.raises(ValueError, match=rf"f\.jsonl:2: {message}"):
        tasks_from_rows(rows({"prompt": "fine"}, row))
