"""Where a judge's marks come from: a local model's next-token law, or an OpenAI-compatible server."""

from __future__ import annotations

import http.client
import json
import os
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from strop.types import Message, PackedBatch, Segment

Question = Sequence[Message]

MAX_REPLY_BYTES = 1 << 20
FIRST_PAUSE = 0.25
"""Seconds before the first retry; twice as long before each further one."""

_MARK = re.compile(r"(?<![0-9.])[0-9](?![0-9]|\.[0-9])")


class JudgeError(Exception):
    """Why there is no mark."""


class LocalModel:
    """sum_d d * p(d | question) over the digits 0 to 9, renormalised: deterministic, and one forward pass."""

    def __init__(self, folder: str, *, device: str = "cpu", micro_batch_tokens: int = 8192) -> None:
        """folder is a Hugging Face folder. Raises ValueError when a digit is not one token of its tokenizer."""
        from strop.models import load_model, weight_hash
        from strop.models.precision import name_of
        from strop.tokenizer import Tokenizer

        self._model = load_model(folder, device=device, frozen=True)
        self._tokenizer = Tokenizer.load(folder)
        self._tokenizer.check_fits(self._model.config.vocab_size)
        digits = [self._tokenizer.encode(str(digit)) for digit in range(10)]
        if any(len(ids) != 1 for ids in digits):
            raise ValueError(f"the judge {folder} has no single token for some digit, so that it cannot give a mark")
        self._digits = [ids[0] for ids in digits]
        self._micro_batch_tokens = micro_batch_tokens
        in_int8 = " in int8" if name_of(self._model.dtype) == "int8" else ""  # other marks than in bfloat16
        self.identity = f"local {weight_hash(self._model)}{in_int8}"

    def marks(self, questions: Sequence[Question]) -> list[float | JudgeError]:
        prompts = [self._tokenizer.encode_prompt(question) for question in questions]
        limit = self._model.config.max_position_embeddings
        marks: list[float | JudgeError] = [
            JudgeError(f"task and answer have {len(ids)} tokens, the judge's limit is {limit}") for ids in prompts
        ]
        micro: list[int] = []
        for place, ids in enumerate(prompts):
            if len(ids) > limit:
                continue
            if micro and sum(len(prompts[other]) for other in micro) + len(ids) > self._micro_batch_tokens:
                self._fill(marks, prompts, micro)
                micro = []
            micro.append(place)
        if micro:
            self._fill(marks, prompts, micro)
        return marks

    def close(self) -> None:
        """Nothing to stop."""

    def _fill(self, marks: list[float | JudgeError], prompts: Sequence[list[int]], places: Sequence[int]) -> None:
        import torch

        ids = [token for place in places for token in prompts[place]]
        token_ids_T = torch.tensor(ids, dtype=torch.int64)
        nothing_T = torch.zeros_like(token_ids_T)
        lengths = [len(prompts[place]) for place in places]
        batch = PackedBatch(
            token_ids_T=token_ids_T,
            labels_T=nothing_T,
            loss_mask_T=nothing_T.bool(),
            segments=tuple(Segment(trunk=length) for length in lengths),
        )
        last_B = torch.tensor(lengths).cumsum(0) - 1
        with torch.no_grad():
            hidden_BD = self._model.hidden(batch.to(self._model.device))[last_B.to(self._model.device)]
            law_B10 = self._model.logits(hidden_BD)[:, self._digits].double().softmax(1).cpu()
        expected_B = law_B10 @ torch.arange(10, dtype=torch.float64)
        for place, mark in zip(places, expected_B.tolist(), strict=True):
            marks[place] = mark


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to a server that nobody named."""

    def redirect_request(self, *args: object, **options: object) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirect)


class Endpoint:
    """The digit that a served model writes, over POST {endpoint}/chat/completions."""

    def __init__(
        self, endpoint: str, model: str, *, api_key_env: str, timeout: float, retries: int, concurrency: int
    ) -> None:
        """Raises ValueError for a URL that is not http(s), or a key that the environment does not have."""
        if urllib.parse.urlsplit(endpoint).scheme not in ("http", "https"):
            raise ValueError(f"the judge's endpoint {endpoint!r} is no http or https URL")
        if api_key_env and not os.environ.get(api_key_env):
            raise ValueError(f"the judge's key: the environment variable {api_key_env} is not set")
        self._url = endpoint.rstrip("/") + "/chat/completions"
        self._model = model
        self._key = os.environ[api_key_env] if api_key_env else ""
        self._timeout = timeout
        self._retries = retries
        self._threads = ThreadPoolExecutor(concurrency, thread_name_prefix="judge")
        self.identity = f"{endpoint.rstrip('/')} {model}"

    def marks(self, questions: Sequence[Question]) -> list[float | JudgeError]:
        return list(self._threads.map(self._mark, questions))

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _mark(self, question: Question) -> float | JudgeError:
        error = JudgeError("never asked")
        for attempt in range(self._retries + 1):
            if attempt:
                time.sleep(FIRST_PAUSE * 2 ** (attempt - 1))
            try:
                return read_mark(self._ask(question))
            except urllib.error.HTTPError as refusal:
                error = JudgeError(f"the judge's server answered {refusal.code} {refusal.reason}")
                refusal.close()
                if refusal.code < 500 and refusal.code not in (408, 429):
                    break
            except (OSError, http.client.HTTPException) as failure:
                error = JudgeError(f"the judge's server cannot be reached: {failure}")
            except JudgeError as failure:
                error = failure
        return error

    def _ask(self, question: Question) -> str:
        body = {"model": self._model, "messages": list(map(dict, question)), "temperature": 0, "max_tokens": 8}
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(self._url, data=json.dumps(body).encode(), headers=headers)
        with _OPENER.open(request, timeout=self._timeout) as reply:
            raw = reply.read(MAX_REPLY_BYTES)
        try:
            text = json.loads(raw)["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError):
            raise JudgeError(f"the judge's server answered something else: {raw[:80]!r}") from None
        if not isinstance(text, str):
            raise JudgeError("the judge's server answered without text")
        return text


def read_mark(reply: str) -> float:
    """The digit in the reply. Raises JudgeError for none, or for several: which one counts would be a guess."""
    found = _MARK.findall(reply)
    if len(found) != 1:
        raise JudgeError(f"the judge gave no mark from 0 to 9: {reply[:80]!r}")
    return float(found[0])
