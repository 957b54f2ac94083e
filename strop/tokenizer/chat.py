"""Chats rendered by a template, and which of their characters the assistant produced."""

from __future__ import annotations

import json
import re
import warnings
from bisect import bisect_left
from collections.abc import Collection, Mapping, Sequence
from typing import Any, cast

from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from strop.types import Message

Span = tuple[int, int]
"""Characters [start, end) of a rendered chat."""

_GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


class ChatTemplate:
    """A tokenizer's chat template, rendered in transformers' sandbox (jinja2's ImmutableSandboxedEnvironment).

    Every failure of a template, which comes from outside like any other file, is a ValueError that names it.
    """

    def __init__(self, hf: PreTrainedTokenizerFast, name: str):
        self._hf = hf
        self._name = name

    def render(
        self, messages: Sequence[Message], tools: Sequence[Any] | None = None, *, add_generation_prompt: bool = False
    ) -> str:
        """Returns the chat as text. With add_generation_prompt it ends where the assistant would start to write; if
        its last message is the assistant's, it ends inside that message, which the assistant would then continue.

        Raises ValueError if the template fails, or has no place for the tools.
        """
        messages = _checked(messages)
        self._check_tools(messages, tools)
        return self._render(messages, tools, add_generation_prompt=add_generation_prompt)[0]

    def render_with_spans(
        self, messages: Sequence[Message], tools: Sequence[Any] | None = None, *, num_context: int = 0
    ) -> tuple[str, list[Span]]:
        """Returns the chat as text and the spans that the assistant wrote, from the end of the generation prompt to
        the end of its turn. Nothing in the first num_context messages, a given prompt, counts.

        A template's {% generation %} marks decide where it has them (without what the generation prompt provides).
        Otherwise a turn starts where the generation prompt of the messages before it ends, which needs a template
        that does not rewrite what it has already rendered. A turn whose text as history differs from its text as the
        last turn (Qwen3 drops earlier reasoning) is not what the model would have written there: it gets no span and
        a warning, and a chat in which no turn is left raises ValueError.
        """
        messages = _checked(messages)
        self._check_tools(messages, tools)
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant" and i >= num_context]
        if _GENERATION_MARK.search(self._source(tools)):
            text, spans = self._render(messages, tools, track=True)
            header = self._generation_prompt(messages, turns, tools)
            spans = [(_skipped(text, header, start), end) for start, end in spans]
            problem = "its {% generation %} marks cover no assistant turn"
        else:
            text = self._render(messages, tools)[0]
            spans = [span for i in turns if (span := self._span_of_turn(text, messages, i, tools)) is not None]
            problem = (
                "no assistant turn continues its own prompt (a chat that opens with it, or a template that moves the "
                "system prompt or tools to the last user message, or drops earlier reasoning)"
            )
            if 0 < len(spans) < len(turns):
                # Worded without the row, so that Python's default filter shows it once.
                warnings.warn(
                    f"{self._name}: assistant turns that open the chat, or that its chat template renders differently "
                    "once more messages follow, are not trained on. Use one row per turn, or {% generation %} marks",
                    stacklevel=3,
                )
        if num_context:
            given = self._render(messages[:num_context], tools, add_generation_prompt=True, continue_last=False)[0]
            if not text.startswith(given):
                spans, problem = [], "it renders the prompt differently once the completion follows"
            spans = [(max(start, len(given)), end) for start, end in spans if end > len(given)]
        if turns and not spans:
            raise ValueError(
                f"the chat template of {self._name} cannot be trained on this chat: {problem}. Mark the assistant's "
                "text with {% generation %} in the template, or rewrite the row (system prompt inside the first user "
                "message, one row per assistant turn)"
            )
        return text, spans

    def _span_of_turn(
        self, text: str, messages: list[dict[str, Any]], i: int, tools: Sequence[Any] | None
    ) -> Span | None:
        if i == 0:
            return None  # nothing was asked: no generation prompt leads here
        # Not the continuation of a message: two assistant messages in a row are two turns.
        prompt = self._render(messages[:i], tools, add_generation_prompt=True, continue_last=False)[0]
        as_last = self._render(messages[: i + 1], tools)[0]
        if not (text.startswith(prompt) and text.startswith(as_last)):
            return None
        return len(prompt), max(len(prompt), len(as_last))

    def _generation_prompt(self, messages: list[dict[str, Any]], turns: list[int], tools: Sequence[Any] | None) -> str:
        asked = next((i for i in turns if i > 0), None)
        if asked is None:
            return ""
        plain = self._render(messages[:asked], tools)[0]
        asking = self._render(messages[:asked], tools, add_generation_prompt=True, continue_last=False)[0]
        return asking.removeprefix(plain) if asking.startswith(plain) else ""

    def _check_tools(self, messages: list[dict[str, Any]], tools: Sequence[Any] | None) -> None:
        if tools and self._render(messages, tools) == self._render(messages, None):
            raise ValueError(f"the chat template of {self._name} ignores tools: use a model whose template shows them")

    def _source(self, tools: Sequence[Any] | None) -> str:
        if self._hf.chat_template is None:
            raise ValueError(
                f"{self._name} has no chat template, so that it cannot read messages: give plain text, or put a "
                "chat_template.jinja into its folder"
            )
        try:
            return self._hf.get_chat_template(None, list(tools) if tools else None)
        except ValueError as error:
            raise ValueError(
                f"{self._name} has several chat templates and none is called 'default': {error}"
            ) from error

    def _render(
        self,
        messages: list[dict[str, Any]],
        tools: Sequence[Any] | None,
        *,
        add_generation_prompt: bool = False,
        continue_last: bool = True,
        track: bool = False,
    ) -> tuple[str, list[Span]]:
        source = self._source(tools)
        special_tokens: dict[str, Any] = dict(self._hf.special_tokens_map)
        continues = add_generation_prompt and continue_last and messages[-1]["role"] == "assistant"
        try:
            texts, spans = render_jinja_template(
                [messages],  # pyright: ignore[reportArgumentType]
                tools=list(tools) if tools else None,
                chat_template=source,
                return_assistant_tokens_mask=track,
                continue_final_message=continues,
                add_generation_prompt=add_generation_prompt and not continues,
                **special_tokens,
            )
        except Exception as error:  # a template may raise anything at all
            roles = ", ".join(str(message["role"]) for message in messages)
            raise ValueError(
                f"the chat template of {self._name} failed on messages with the roles ({roles}): "
                f"{type(error).__name__}: {error}"
            ) from error
        return texts[0], cast("list[Span]", spans[0]) if track else []


def _skipped(text: str, header: str, start: int) -> int:
    """Returns start, or the end of the generation prompt that it lies in: marks may enclose what is never generated."""
    found = text.rfind(header, 0, start + len(header))
    return found + len(header) if start < found + len(header) and found >= 0 else start


def produced_tokens(
    text: str, token_ids: Sequence[int], extents: Sequence[Span], spans: Sequence[Span], stop_token_ids: Collection[int]
) -> list[bool]:
    """Returns one bool per token: True where the assistant would have sampled it.

    A token that starts before its span belongs to the prompt. The stop token is the last that counts, since generation
    ends there: the newline that many templates put after it does not, and a stop token that follows a span at once
    does, whether or not the template marks it. Without it a model would never learn to stop.
    """
    starts = [start for start, _ in extents]
    mask = [False] * len(token_ids)
    for span_start, span_end in spans:
        first, end = bisect_left(starts, span_start), bisect_left(starts, span_end)
        last = end - 1
        while last >= first and token_ids[last] not in stop_token_ids and not text[slice(*extents[last])].strip():
            last -= 1
        if last >= first and token_ids[last] in stop_token_ids:
            end = last + 1
        elif end < len(token_ids) and token_ids[end] in stop_token_ids:
            end += 1
        mask[first:end] = [True] * (end - first)
    return mask


def _checked(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Returns the messages as templates expect them: no None values, tool calls with their arguments as objects.

    OpenAI's format carries arguments as a JSON string, which templates would serialise a second time.
    """
    if isinstance(messages, (str, Mapping)) or not messages:
        raise ValueError("a chat must be a list with at least one message, like [{'role': 'user', 'content': 'Hi'}]")
    checked = []
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(f"messages[{i}] must be an object with a 'role' and a 'content', got {message!r:.200}")
        message = {key: value for key, value in message.items() if value is not None}
        if "content" not in message and "tool_calls" not in message:
            raise ValueError(f"messages[{i}] (role {message['role']!r}) has neither 'content' nor 'tool_calls'")
        if "tool_calls" in message:
            message["tool_calls"] = [_with_parsed_arguments(call, i) for call in message["tool_calls"]]
        checked.append(message)
    return checked


def _with_parsed_arguments(call: Any, i: int) -> Any:
    if not isinstance(call, Mapping):
        raise ValueError(f"messages[{i}]: a tool call must be an object, got {call!r:.200}")
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _with_parsed_arguments(call["function"], i)}
    if not isinstance(call.get("arguments"), str):
        return call
    try:
        return {**call, "arguments": json.loads(call["arguments"])}
    except json.JSONDecodeError as error:
        raise ValueError(f"messages[{i}]: the tool call's arguments are not JSON: {error}") from error
