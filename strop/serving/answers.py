"""Answers in OpenAI's form: one JSON object, or the chunks of a stream."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from strop.serving.calls import Call
from strop.tokenizer import StreamDecoder, Tokenizer
from strop.types import Completion, TokenLogprobs

LOWEST = -9999.0
"""What stands for minus infinity, which JSON lacks (as at OpenAI)."""


class TextStream:
    """A growing sample's text as far as it is sure: neither half a character nor what may become a stop string."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], stop_token_ids: Sequence[int]) -> None:
        self._stream = StreamDecoder(tokenizer)
        self._stop = stop
        self._stop_token_ids = stop_token_ids
        self._held = ""
        self.num_given = 0

    def push(self, token_id: int) -> str:
        """What can be given out now."""
        text = self._held + ("" if token_id in self._stop_token_ids else self._stream.push(token_id))
        sure = len(text) - max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[sure:]
        self.num_given += sure
        return text[:sure]

    def finish(self, completion: Completion) -> str:
        """The rest of the completion's text, which the engine has cut before the stop string."""
        return completion.text[self.num_given :]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of the text that the stop string starts with; all of what follows a whole one."""
    if (found := text.find(stop)) >= 0:
        return len(text) - found
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)


class Answer:
    """How one call is answered; id, time and model are the same in every chunk."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self.id = f"{'chatcmpl' if call.is_chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._tokenizer = call.served.tokenizer

    def head(self, *, is_chunk: bool) -> dict[str, Any]:
        kind = f"chat.completion{'.chunk' if is_chunk else ''}" if self.call.is_chat else "text_completion"
        fingerprint = f"fp_{self.call.served.weights_sha256[:16]}"
        return {
            "id": self.id,
            "object": kind,
            "created": self._created,
            "model": self.call.served.name,
            "system_fingerprint": fingerprint,
        }

    def whole(
        self, completions: dict[tuple[int, int], Completion], scores: dict[int, list[TokenLogprobs]]
    ) -> dict[str, Any]:
        call = self.call
        places = [(p, k) for p, request in enumerate(call.requests) for k in range(request.num_samples)]
        choices = [
            self._choice(index, prompt, completions.get((prompt, sample)), scores.get(prompt))
            for index, (prompt, sample) in enumerate(places)
        ]
        usage = self.usage(sum(len(one.token_ids) for one in completions.values()))
        return {**self.head(is_chunk=False), "choices": choices, "usage": usage}

    def _choice(
        self, index: int, prompt: int, completion: Completion | None, scored: list[TokenLogprobs] | None
    ) -> dict[str, Any]:
        call = self.call
        text = completion.text if completion is not None else ""
        reports = completion.token_logprobs if completion is not None else ()
        choice: dict[str, Any] = {
            "index": index,
            "finish_reason": completion.finish_reason if completion is not None else "length",
            "logprobs": None,
        }
        if call.is_chat:
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
            if call.top is not None:
                choice["logprobs"] = self.chat_logprobs(reports)
        else:
            choice["text"] = (call.prompts[prompt] if call.has_echo else "") + text
            if call.top is not None:
                first = call.requests[prompt].prompt_ids[:1] if call.has_echo else ()
                choice["logprobs"] = self.text_logprobs(first, [*(scored or ()), *reports], 0)
        if call.has_token_ids:
            choice["token_ids"] = list(completion.token_ids) if completion is not None else []
            choice["prompt_token_ids"] = list(call.requests[prompt].prompt_ids)
        return choice

    def generated(
        self, completions: dict[tuple[int, int], Completion], scores: dict[int, list[TokenLogprobs]]
    ) -> dict[str, Any]:
        """The answer of /inference/v1/generate. sampling_logprobs are of the law that was really sampled from."""
        choices = []
        for (_, sample), completion in sorted(completions.items()):
            content = [self._named(one, f"token_id:{one.token_id}") for one in completion.token_logprobs]
            choices.append(
                {
                    "index": sample,
                    "token_ids": list(completion.token_ids),
                    "sampling_logprobs": [max(one, LOWEST) for one in completion.sampling_logprobs],
                    "logprobs": {"content": content} if self.call.top is not None else None,
                    "finish_reason": completion.finish_reason,
                }
            )
        prompt_logprobs = None
        if self.call.prompt_top is not None:
            prompt_logprobs = [None, *(_by_id(one) for one in scores[0])]
        usage = self.usage(sum(len(one.token_ids) for one in completions.values()))
        return {"request_id": self.id, "choices": choices, "prompt_logprobs": prompt_logprobs, "usage": usage}

    def chunk(
        self, index: int, text: str, *, logprobs: Any = None, finish_reason: str | None = None, token_ids: Any = None
    ) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": index, "finish_reason": finish_reason, "logprobs": logprobs}
        if self.call.is_chat:
            choice["delta"] = {"content": text} if text or finish_reason is None else {}
        else:
            choice["text"] = text
        if self.call.has_token_ids and token_ids is not None:
            choice["token_ids"] = token_ids
        return {**self.head(is_chunk=True), "choices": [choice]}

    def usage(self, num_completion: int) -> dict[str, int]:
        num_prompt = sum(len(request.prompt_ids) for request in self.call.requests)
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_completion,
            "total_tokens": num_prompt + num_completion,
        }

    def chat_logprobs(self, reports: Sequence[TokenLogprobs]) -> dict[str, Any]:
        return {"content": [self._named(one) for one in reports], "refusal": None}

    def text_logprobs(self, first: Sequence[int], reports: Sequence[TokenLogprobs], offset: int) -> dict[str, Any]:
        """The lists of /v1/completions; `first` is a prompt's first token, of which no logprob exists."""
        token_ids = [*first, *(one.token_id for one in reports)]
        stream = StreamDecoder(self._tokenizer, skip_special_tokens=False)
        offsets = []
        for token_id in token_ids:
            offsets.append(offset)
            offset += len(stream.push(token_id))
        alternatives = []
        for one in reports:
            top: dict[str, float] = {}
            for token_id, logprob in (*one.top, (one.token_id, one.logprob)):
                top.setdefault(self.token_text(token_id), max(logprob, LOWEST))  # two ids may have one text
            alternatives.append(top)
        return {
            "tokens": [self.token_text(token_id) for token_id in token_ids],
            "token_logprobs": [*[None] * len(first), *(max(one.logprob, LOWEST) for one in reports)],
            "top_logprobs": [*[None] * len(first), *alternatives],
            "text_offset": offsets,
        }

    def token_text(self, token_id: int) -> str:
        """The token as text; of half a character, its bytes as OpenAI writes them."""
        data = self._tokenizer.token_bytes(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def _named(self, report: TokenLogprobs, name: str | None = None) -> dict[str, Any]:
        def entry(token_id: int, logprob: float) -> dict[str, Any]:
            text = f"token_id:{token_id}" if name is not None else self.token_text(token_id)
            data = list(self._tokenizer.token_bytes(token_id))
            return {"token": text, "logprob": max(logprob, LOWEST), "bytes": data}

        return {
            **entry(report.token_id, report.logprob),
            "top_logprobs": [entry(token_id, logprob) for token_id, logprob in report.top],
        }


def _by_id(report: TokenLogprobs) -> dict[str, Any]:
    entries = {report.token_id: report.logprob, **dict(report.top)}
    return {str(token_id): {"logprob": max(logprob, LOWEST)} for token_id, logprob in entries.items()}
