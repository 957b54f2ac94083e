"""TRL's row formats, read as they are and checked: what the columns of a file mean.

    text                        {"text": "The sky is blue."}
    messages                    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", ...}]}
    prompt/completion           {"prompt": "The sky is", "completion": " blue."}
    prompt/chosen/rejected      {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}
                                without a prompt: it is what chosen and rejected share at their beginning
    prompt/completion/label     {"prompt": "The sky is", "completion": " green.", "label": false}      (KTO)
    prompt/completions/ranks    {"prompt": "The sky is", "completions": [" blue.", " green."], "ranks": [1, 2]}
                                ours, what people's rankings are exported as: a lower rank is better, equal ones tie

prompt, completion, chosen and rejected are either all text or all lists of messages; a ranking's completions may also
be text after a prompt of messages, the assistant's next turn. A column `tools` (a list of JSON schemas, or that list as
JSON text) may stand beside messages; beside preferences `weight` (a number), `annotator` (a name) and, with a pair,
`margin` (how clear the preference was). Other columns are not looked at.

The format is decided once per file, by its first row; a later row of that file that does not have it is an error.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from strop.data.sources import Rows, checked_text, text_column
from strop.types import Message

Format = Literal[
    "text",
    "messages",
    "prompt/completion",
    "prompt/chosen/rejected",
    "prompt/completion/label",
    "prompt/completions/ranks",
]

COLUMNS: Mapping[Format, tuple[str, ...]] = {
    "text": ("text",),
    "messages": ("messages",),
    "prompt/completion": ("prompt", "completion"),
    "prompt/chosen/rejected": ("chosen", "rejected"),
    "prompt/completion/label": ("prompt", "completion", "label"),
    "prompt/completions/ranks": ("prompt", "completions", "ranks"),
}
"""What a row must have to be of a format (the prompt of a preference pair may be implicit)."""

SUPERVISED: tuple[Format, ...] = ("text", "messages", "prompt/completion")
COMPARED: tuple[Format, ...] = ("prompt/chosen/rejected", "prompt/completions/ranks")

Prompt = str | tuple[Message, ...]
Tools = tuple[Mapping[str, Any], ...] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRow:
    """A plain document. Example: TextRow(where="corpus.txt:1", text="The sky is blue.")"""

    where: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MessagesRow:
    """A conversation; the loss counts on what the assistant says in it.

    Example: MessagesRow(where="chat.jsonl:1", messages=({"role": "user", ...}, {"role": "assistant", ...}))
    """

    where: str
    messages: tuple[Message, ...]
    tools: Tools = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptCompletionRow:
    """A prompt and how to go on: both text or both messages. The loss counts on the completion.

    Example: PromptCompletionRow(where="sft.jsonl:1", prompt="2 + 2 = ", completion="4")
    """

    where: str
    prompt: Prompt
    completion: Prompt
    tools: Tools = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferenceRow:
    """Two answers to one prompt, the first preferred. The prompt is never part of chosen or rejected.

    Example: PreferenceRow(where="pairs.jsonl:1", prompt="The sky is", chosen=" blue.", rejected=" green.")
    """

    where: str
    prompt: Prompt
    chosen: Prompt
    rejected: Prompt
    tools: Tools = None
    weight: float = 1.0
    annotator: str | None = None
    margin: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RankingRow:
    """Several answers to one prompt and how somebody ranked them.

    Example: RankingRow(where="ranks.jsonl:1", prompt="The sky is", completions=(" blue.", " green."), ranks=(1, 2))
    """

    where: str
    prompt: Prompt
    completions: tuple[Prompt, ...]
    ranks: tuple[float, ...]
    """One per completion; lower is better, equal is a tie."""
    tools: Tools = None
    weight: float = 1.0
    annotator: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class UnpairedRow:
    """One answer with a thumb up (label True) or down: KTO's data.

    Example: UnpairedRow(where="kto.jsonl:1", prompt="The sky is", completion=" green.", label=False)
    """

    where: str
    prompt: Prompt
    completion: Prompt
    label: bool
    tools: Tools = None
    weight: float = 1.0
    annotator: str | None = None


SupervisedRow = TextRow | MessagesRow | PromptCompletionRow
FeedbackRow = PreferenceRow | RankingRow | UnpairedRow


def read_supervised(rows: Rows, *, format: Format | None = None) -> Iterator[SupervisedRow]:
    """The rows as text, messages or prompt/completion, in order.

    A file whose rows also carry KTO's `label` is refused: imitating answers that people rejected is never meant. Naming
    `format` overrides this, and settles a file that has the columns of two formats.
    """
    for where, row, chosen in _with_format(rows, SUPERVISED, format):
        if chosen == "text":
            yield TextRow(where=where, text=text_column(row, "text", where))
        elif chosen == "messages":
            yield MessagesRow(
                where=where,
                messages=_conversation(row["messages"], "column 'messages'", where),
                tools=_tools(row, where),
            )
        else:
            prompt, completion = _prompt_and(row, "completion", where)
            if not isinstance(completion, str):
                _require_assistant(completion, "column 'completion'", where)
            yield PromptCompletionRow(where=where, prompt=prompt, completion=completion, tools=_tools(row, where))


def read_preferences(rows: Rows) -> Iterator[PreferenceRow]:
    """The rows as preference pairs; an implicit prompt is split off from what chosen and rejected share.

    As in TRL, of text the common beginning is the prompt, but a space at its end belongs to the answers, since
    tokenizers join a space to the word behind it. A pair whose answers are equal is an error: it says nothing.
    """
    for where, row, _ in _with_format(rows, ("prompt/chosen/rejected",), None):
        yield _preference(row, where)


def read_unpaired(rows: Rows) -> Iterator[UnpairedRow]:
    """The rows as single answers with a label (true = wanted)."""
    for where, row, _ in _with_format(rows, ("prompt/completion/label",), None):
        yield _unpaired(row, where)


def read_feedback(rows: Rows, accepted: Sequence[Format]) -> Iterator[FeedbackRow]:
    """The rows as pairs, rankings or single answers with a label, each file's format decided by its first row."""
    parsers = {
        "prompt/chosen/rejected": _preference,
        "prompt/completions/ranks": _ranking,
        "prompt/completion/label": _unpaired,
    }
    for where, row, found in _with_format(rows, accepted, None):
        yield parsers[found](row, where)


def _preference(row: Mapping[str, Any], where: str) -> PreferenceRow:
    chosen = _text_or_messages(row["chosen"], "column 'chosen'", where)
    rejected = _text_or_messages(row["rejected"], "column 'rejected'", where)
    _require_same_kind(chosen, rejected, "'chosen' and 'rejected'", where)
    if chosen == rejected:
        raise ValueError(f"{where}: columns 'chosen' and 'rejected' are equal; remove the row")
    prompt = row.get("prompt")
    # Some datasets repeat the question as text beside whole conversations: the prompt is implicit there too.
    if prompt is None or (isinstance(prompt, str) and not isinstance(chosen, str)):
        prompt, chosen, rejected = _split_shared(chosen, rejected, where)
    else:
        prompt = _text_or_messages(prompt, "column 'prompt'", where)
        _require_same_kind(prompt, chosen, "'prompt' and 'chosen'", where)
    margin = None if row.get("margin") is None else _number(row["margin"], "margin", where)
    return PreferenceRow(
        where=where, prompt=prompt, chosen=chosen, rejected=rejected, margin=margin, **_source(row, where)
    )


def _unpaired(row: Mapping[str, Any], where: str) -> UnpairedRow:
    prompt, completion = _prompt_and(row, "completion", where)
    label = row["label"]
    if not isinstance(label, bool) and label not in (0, 1):
        raise ValueError(
            f"{where}: column 'label' must be true or false, found {label!r} (values of CSV are text: use JSONL)"
        )
    return UnpairedRow(where=where, prompt=prompt, completion=completion, label=bool(label), **_source(row, where))


def _ranking(row: Mapping[str, Any], where: str) -> RankingRow:
    prompt = _text_or_messages(row["prompt"], "column 'prompt'", where)
    values, ranks = row["completions"], row["ranks"]
    if not isinstance(values, list) or not isinstance(ranks, list) or len(values) != len(ranks) or len(values) < 2:
        raise ValueError(f"{where}: columns 'completions' and 'ranks' must be lists of one length, of two or more")
    completions: list[Prompt] = []
    for number, value in enumerate(values, start=1):
        name = f"column 'completions', number {number}"
        # Unlike a written answer, one that a policy sampled may be empty: it stopped at once, and was ranked for it.
        text = value if value == "" else _text_or_messages(value, name, where)
        if isinstance(text, str) and not isinstance(prompt, str):
            text = ({"role": "assistant", "content": text},)
        _require_same_kind(prompt, text, "'prompt' and 'completions'", where)
        completions.append(text)
    return RankingRow(
        where=where,
        prompt=prompt,
        completions=tuple(completions),
        ranks=tuple(_number(rank, "ranks", where) for rank in ranks),
        **_source(row, where),
    )


def _source(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What every preference may say of itself: whose it is, how much it counts, which tools the prompt had."""
    weight = 1.0 if row.get("weight") is None else _number(row["weight"], "weight", where)
    if weight < 0:
        raise ValueError(f"{where}: column 'weight' must not be negative, found {weight}")
    annotator = row.get("annotator")
    if annotator is not None and not isinstance(annotator, str):
        raise ValueError(f"{where}: column 'annotator' must be a name, found {annotator!r}")
    return {"weight": weight, "annotator": annotator, "tools": _tools(row, where)}


def _number(value: Any, column: str, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{where}: column {column!r} must hold finite numbers, found {value!r}")
    return float(value)


def detect_format(columns: Sequence[str], accepted: Sequence[Format], where: str) -> Format:
    """The one accepted format that these columns make up; ValueError where none or more than one does.

    The more specific format wins: prompt, completion and label are KTO's, not prompt/completion with a spare column.
    """
    present: list[Format] = [name for name, needed in COLUMNS.items() if set(needed) <= set(columns)]
    present = [name for name in present if not any(set(COLUMNS[name]) < set(COLUMNS[other]) for other in present)]
    usable: list[Format] = [name for name in present if name in accepted]
    if len(usable) == 1:
        return usable[0]
    found = f"{where}: the columns are {', '.join(map(repr, columns)) or 'none'}"
    wanted = " or ".join(accepted)
    if usable:
        raise ValueError(f"{found}, which fits {' and '.join(usable)}; name the format, or remove the columns of one")
    if present:
        raise ValueError(f"{found}, which is {' and '.join(present)}, but this stage reads {wanted}")
    if "conversations" in columns:
        raise ValueError(f"{found}; rename 'conversations' to 'messages', and in it from/value to role/content")
    raise ValueError(f"{found}, but this stage reads {wanted}; rename the columns")


def check_messages(value: Any, name: str, where: str) -> tuple[Message, ...]:
    """The turns of a conversation, each with a role and text content; keys beside these pass through untouched.

    A turn with tool calls may lack content, and gets the empty text, so that templates need not tell null from missing.
    """
    if not isinstance(value, list) or not value:
        raise ValueError(f"{where}: {name} must be a list of messages that is not empty, found {value!r:.60}")
    messages: list[Message] = []
    for number, message in enumerate(value, start=1):
        turn = f"{name}, message {number}"
        if not isinstance(message, dict):
            raise ValueError(
                f"{where}: {turn}: must be an object with role and content, found {type(message).__name__}"
            )
        if not isinstance(message.get("role"), str) or not message["role"]:
            remedy = "; rename from/value to role/content" if "from" in message else ""
            raise ValueError(f"{where}: {turn}: 'role' is missing{remedy}")
        content = message.get("content")
        if message.get("tool_calls") and not content:
            messages.append({**message, "content": ""})
            continue
        if isinstance(content, list):
            raise ValueError(f"{where}: {turn}: 'content' is a list of parts; only text is supported: join its text")
        # A system or tool turn may say nothing; a user or assistant turn without text is a hole in the data.
        if content != "" or message["role"] in ("user", "assistant"):
            checked_text(content, f"{turn}: 'content'", where)
        messages.append(message)
    return tuple(messages)


def _with_format(
    rows: Rows, accepted: Sequence[Format], named: Format | None
) -> Iterator[tuple[str, dict[str, Any], Format]]:
    if named is not None and named not in accepted:
        raise ValueError(f"format {named!r} is not one that this stage reads: {', '.join(accepted)}")
    formats: dict[str, Format] = {}
    for index, row in enumerate(rows):
        where, file = rows.where(index), rows.file(index)
        present = [column for column, value in row.items() if value is not None]
        is_first = file not in formats
        if is_first:
            formats[file] = named or detect_format(present, accepted, where)
        missing = [column for column in COLUMNS[formats[file]] if column not in present]
        if missing:
            raise ValueError(
                f"{where}: column {missing[0]!r} is missing; this file is read as {formats[file]}"
                f"{' (as asked)' if named else ' (decided by its first row)'}, and the row has "
                f"{', '.join(map(repr, present)) or 'no columns'}"
            )
        if row.get("chat_template_kwargs"):
            raise ValueError(f"{where}: column 'chat_template_kwargs' is not supported; remove it or set the template")
        yield where, row, formats[file]


def _prompt_and(row: Mapping[str, Any], column: str, where: str) -> tuple[Prompt, Prompt]:
    prompt = _text_or_messages(row["prompt"], "column 'prompt'", where)
    answer = _text_or_messages(row[column], f"column {column!r}", where)
    _require_same_kind(prompt, answer, f"'prompt' and {column!r}", where)
    return prompt, answer


def _text_or_messages(value: Any, name: str, where: str) -> Prompt:
    if isinstance(value, list):
        return check_messages(value, name, where)
    if not isinstance(value, str):
        raise ValueError(f"{where}: {name} must be text or a list of messages, found {type(value).__name__}")
    return checked_text(value, name, where)


def _conversation(value: Any, name: str, where: str) -> tuple[Message, ...]:
    messages = check_messages(value, name, where)
    _require_assistant(messages, name, where)
    return messages


def _require_assistant(messages: Sequence[Message], name: str, where: str) -> None:
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError(f"{where}: {name} has no assistant message, so there is nothing to learn; remove the row")


def _require_same_kind(first: Prompt, second: Prompt, names: str, where: str) -> None:
    if isinstance(first, str) != isinstance(second, str):
        raise ValueError(f"{where}: columns {names} must be both text or both messages")


def _split_shared(chosen: Prompt, rejected: Prompt, where: str) -> tuple[Prompt, Prompt, Prompt]:
    pairs = enumerate(zip(chosen, rejected, strict=False))
    length = next((index for index, (first, second) in pairs if first != second), min(len(chosen), len(rejected)))
    if length and chosen[length - 1] == " ":
        length -= 1
    if not length or len(chosen) == length or len(rejected) == length:
        raise ValueError(
            f"{where}: column 'prompt' is missing, and 'chosen' and 'rejected' do not share a beginning that both go "
            "on from; add the prompt"
        )
    return chosen[:length], chosen[length:], rejected[length:]


def _tools(row: Mapping[str, Any], where: str) -> Tools:
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: column 'tools' is broken JSON ({error.msg} at {error.pos})") from error
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(f"{where}: column 'tools' must be a list of JSON schemas, or that list as JSON text")
    return tuple(tools)
