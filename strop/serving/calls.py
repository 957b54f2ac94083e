"""What a request asks for: JSON bodies of the three endpoints, checked and turned into engine requests."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from strop.serving.fields import ApiError, Fields, float_of
from strop.serving.limits import Limits
from strop.serving.models import ServedModel
from strop.types import Message, Request, SamplingParams

MAX_TOP, MAX_STOPS, MAX_STOP_LENGTH, MAX_BIASES, MAX_PROMPTS, MAX_MESSAGES = 20, 16, 1000, 300, 256, 1000
ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One request, understood."""

    served: ServedModel
    requests: tuple[Request, ...]
    prompts: tuple[str, ...] = ()
    """The prompts as text, for echo."""
    messages: tuple[Message, ...] = ()
    is_chat: bool = False
    is_generated: bool = True
    is_streamed: bool = False
    has_usage_chunk: bool = False
    has_echo: bool = False
    has_token_ids: bool = False
    prompt_top: int | None = None

    @property
    def top(self) -> int | None:
        """Alternatives to report per token; None without logprobs."""
        return self.requests[0].sampling.top_logprobs


def pick_model(fields: Fields, models: Mapping[str, ServedModel]) -> ServedModel:
    name = fields.text("model")
    if name not in models:
        raise ApiError(404, "there is no such model; /v1/models lists them", param="model", code="model_not_found")
    return models[name]


def parse_completion(body: dict[str, Any], models: Mapping[str, ServedModel], limits: Limits) -> Call:
    fields = Fields(body)
    served = pick_model(fields, models)
    prompts = _prompts(fields, served)
    has_echo = fields.boolean("echo")
    top = fields.integer("logprobs", None, low=0, high=MAX_TOP)
    max_tokens = fields.integer("max_tokens", 16, low=0 if has_echo else 1, high=2**31)
    n, seed, sampling = _sampling(fields, served, limits, max_tokens=max(max_tokens, 1), top=top)
    if fields.integer("best_of", n, low=1, high=2**31) != n:
        raise fields.error("best_of", "must equal n: every completion is returned")
    streaming = _streaming(fields)
    has_token_ids = fields.boolean("return_token_ids")
    fields.finish()
    return Call(
        served=served,
        requests=_requests(prompts, served, n=n, seed=seed, sampling=sampling, has_new=max_tokens > 0),
        prompts=tuple(served.tokenizer.decode(ids, skip_special_tokens=False) for ids in prompts) if has_echo else (),
        is_generated=max_tokens > 0,
        has_echo=has_echo,
        has_token_ids=has_token_ids,
        prompt_top=top if has_echo else None,
        **streaming,
    )


def parse_chat(body: dict[str, Any], models: Mapping[str, ServedModel], limits: Limits) -> Call:
    fields = Fields(body)
    served = pick_model(fields, models)
    messages = _messages(fields)
    try:
        prompt_ids = served.tokenizer.encode_untrusted_chat(messages)
    except ValueError:  # its message names files
        roles = ", ".join(str(message["role"]) for message in messages[:20])
        text = (
            f"the model's chat template does not take this chat (roles: {roles}), or it has none: see /v1/completions"
        )
        raise ApiError(400, text, param="messages") from None
    has_logprobs = fields.boolean("logprobs")
    top = fields.integer("top_logprobs", None, low=0, high=MAX_TOP)
    if top is not None and not has_logprobs:
        raise fields.error("top_logprobs", "needs logprobs: true")
    room = max(1, served.engine.max_length - len(prompt_ids))
    old = fields.integer("max_tokens", None, low=1, high=2**31)
    max_tokens = fields.integer("max_completion_tokens", old or room, low=1, high=2**31)
    if old not in (None, max_tokens):
        raise fields.error("max_tokens", "differs from max_completion_tokens")
    for name, allowed in (
        ("response_format", {"type": "text"}),
        ("tool_choice", "none"),
        ("tools", []),
        ("store", False),
    ):
        if (value := fields.take(name)) is not None and value != allowed:
            raise fields.error(name, "is not supported here", code="unsupported_parameter")
    n, seed, sampling = _sampling(
        fields, served, limits, max_tokens=max_tokens, top=(top or 0) if has_logprobs else None
    )
    streaming = _streaming(fields)
    has_token_ids = fields.boolean("return_token_ids")
    fields.finish()
    return Call(
        served=served,
        requests=_requests([prompt_ids], served, n=n, seed=seed, sampling=sampling),
        messages=messages,
        is_chat=True,
        has_token_ids=has_token_ids,
        **streaming,
    )


def parse_generate(body: dict[str, Any], models: Mapping[str, ServedModel], limits: Limits) -> Call:
    """vLLM's token-level call: ids in, ids out."""
    fields = Fields(body)
    served = pick_model(fields, models)
    if not _is_ids(prompt_ids := fields.take("token_ids")):
        raise fields.error("token_ids", "must be a list of token ids")
    _check_ids([prompt_ids], served, "token_ids")
    inner = Fields(fields.table("sampling_params"), where="sampling_params.")
    fields.ignore("request_id", "priority", "cache_salt")
    if fields.boolean("stream"):
        raise fields.error("stream", "is not supported here", code="unsupported_parameter")
    fields.finish()
    top = inner.integer("logprobs", None, low=0, high=MAX_TOP)
    prompt_top = inner.integer("prompt_logprobs", None, low=0, high=MAX_TOP)
    max_tokens = inner.integer("max_tokens", 16, low=1, high=2**31)
    n, seed, sampling = _sampling(inner, served, limits, max_tokens=max_tokens, top=top)
    inner.ignore("detokenize", "skip_special_tokens", "output_kind")
    inner.finish()
    requests = _requests([prompt_ids], served, n=n, seed=seed, sampling=sampling)
    return Call(served=served, requests=requests, prompt_top=prompt_top, has_token_ids=True)


def _sampling(
    fields: Fields, served: ServedModel, limits: Limits, *, max_tokens: int, top: int | None
) -> tuple[int, int, SamplingParams]:
    stop = fields.take("stop")
    stop = [stop] if isinstance(stop, str) else [] if stop is None else stop
    is_list = isinstance(stop, list) and len(stop) <= MAX_STOPS
    if not is_list or not all(isinstance(one, str) and 0 < len(one) <= MAX_STOP_LENGTH for one in stop):
        raise fields.error("stop", f"must be text or a list of at most {MAX_STOPS}, each 1 to {MAX_STOP_LENGTH} long")
    top_k = fields.integer("top_k", 0, low=-1, high=2**31)
    stop_ids = fields.items("stop_token_ids", _is_id, "token ids", most=MAX_BIASES)
    own_stops = () if fields.boolean("ignore_eos") else served.tokenizer.stop_token_ids
    sampling = SamplingParams(
        max_new_tokens=max_tokens,
        temperature=fields.number("temperature", 1.0, low=0, high=2),
        top_p=fields.number("top_p", 1.0, low=0, high=1, is_open=True),
        top_k=max(top_k, 0),
        min_p=fields.number("min_p", 0.0, low=0, high=1),
        stop=tuple(stop),
        stop_token_ids=tuple(dict.fromkeys((*own_stops, *stop_ids))),
        presence_penalty=fields.number("presence_penalty", 0.0, low=-2, high=2),
        frequency_penalty=fields.number("frequency_penalty", 0.0, low=-2, high=2),
        logit_bias=_biases(fields, served),
        top_logprobs=top,
    )
    n = fields.integer("n", 1, low=1, high=limits.max_n)
    seed = fields.integer("seed", None, low=-(2**63), high=2**63 - 1)
    fields.ignore("user", "metadata", "safety_identifier")
    return n, secrets.randbits(63) if seed is None else seed, sampling


def _biases(fields: Fields, served: ServedModel) -> tuple[tuple[int, float], ...]:
    biases: list[tuple[int, float]] = []
    given = fields.table("logit_bias")
    for token, bias in given.items():
        is_number = isinstance(bias, int | float) and not isinstance(bias, bool) and abs(float_of(bias)) <= 100
        is_token = token.isascii() and token.isdecimal() and len(token) < 10
        if len(given) > MAX_BIASES or not is_token or not is_number or int(token) >= served.model.config.vocab_size:
            raise fields.error("logit_bias", f"must map at most {MAX_BIASES} token ids to numbers from -100 to 100")
        biases.append((int(token), float(bias)))
    return tuple(biases)


def _streaming(fields: Fields) -> dict[str, Any]:
    is_streamed = fields.boolean("stream")
    options = Fields(fields.table("stream_options"), where="stream_options.")
    has_usage = options.boolean("include_usage")
    options.ignore("include_obfuscation")
    options.finish()
    if has_usage and not is_streamed:
        raise fields.error("stream_options", "needs stream: true")
    return {"is_streamed": is_streamed, "has_usage_chunk": has_usage}


def _requests(
    prompts: list[list[int]], served: ServedModel, *, n: int, seed: int, sampling: SamplingParams, has_new: bool = True
) -> tuple[Request, ...]:
    """Every prompt has the same seed: its completions do not depend on the prompts beside it."""
    limit = served.engine.max_length
    for prompt in prompts:
        wanted = len(prompt) + (sampling.max_new_tokens if has_new else 0)
        if wanted > limit:
            message = f"{len(prompt)} tokens of prompt and {wanted - len(prompt)} to write exceed this model's {limit}"
            raise ApiError(400, message, param="prompt", code="context_length_exceeded")
    return tuple(Request(prompt_ids=tuple(ids), sampling=sampling, num_samples=n, seed=seed) for ids in prompts)


def _prompts(fields: Fields, served: ServedModel) -> list[list[int]]:
    """OpenAI's four forms: text, texts, ids, lists of ids."""
    prompt: Any = fields.take("prompt")
    if isinstance(prompt, str) or _is_ids(prompt):
        prompt = [prompt]
    if not isinstance(prompt, list) or not 0 < len(prompt) <= MAX_PROMPTS:
        raise fields.error("prompt", f"must be text, token ids, or a list of 1 to {MAX_PROMPTS} of one of them")
    if all(isinstance(one, str) for one in prompt):
        encoded = [served.tokenizer.encode_prompt(str(text)) for text in prompt]
        if not all(encoded):
            raise fields.error("prompt", "is empty, and this model has no token to begin with")
        return encoded
    if not all(map(_is_ids, prompt)):
        raise fields.error("prompt", f"must be text, token ids, or a list of 1 to {MAX_PROMPTS} of one of them")
    _check_ids(prompt, served, "prompt")
    return prompt


def _check_ids(prompts: list[list[int]], served: ServedModel, param: str) -> None:
    size = served.model.config.vocab_size
    if any(token >= size for prompt in prompts for token in prompt):
        raise ApiError(400, f"{param} has a token id beyond this model's {size}", param=param)


def _messages(fields: Fields) -> tuple[Message, ...]:
    given = fields.take("messages")
    if not isinstance(given, list) or not 0 < len(given) <= MAX_MESSAGES:
        raise fields.error("messages", f"must be a list of 1 to {MAX_MESSAGES} messages")
    messages: list[Message] = []
    for place, message in enumerate(given):
        where = f"messages[{place}]"
        if not isinstance(message, dict):
            raise fields.error(where, "must be an object with role and content")
        one = Fields(message, where=f"{where}.")
        role, content = one.text("role"), one.take("content")
        if role not in ROLES:
            raise one.error("role", f"must be one of {', '.join(ROLES)}")
        if isinstance(content, list) and all(_is_text_part(part) for part in content):
            content = "".join(part["text"] for part in content)
        if not isinstance(content, str):
            raise one.error("content", "must be text, or a list of text parts")
        one.ignore("refusal", "annotations")
        one.finish()
        messages.append({"role": "system" if role == "developer" else role, "content": content})
    return tuple(messages)


def _is_text_part(part: object) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _is_ids(value: object) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(map(_is_id, value))
