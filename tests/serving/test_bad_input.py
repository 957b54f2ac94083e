"""Bodies that are wrong in every field, and clients who may not ask."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import openai
import pytest

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "max_tokens": 2}
TEXT = {"model": "tiny", "prompt": "a", "max_tokens": 2}
TOKENS = {"model": "tiny", "token_ids": [5], "sampling_params": {"max_tokens": 2}}
PATHS = {"/v1/chat/completions": CHAT, "/v1/completions": TEXT, "/inference/v1/generate": TOKENS}
JUNK = [-1, 0, 10**400, 1e308, True, "", "x" * 50, "\ud800", [], [[]], [None], {}, {"a": {"b": []}}, [1, "a"], -0.5]
FIELDS = {
    "/v1/chat/completions": [
        *("model", "messages", "n", "stop", "max_tokens", "max_completion_tokens", "temperature", "top_p", "seed"),
        *("logprobs", "top_logprobs", "stream_options", "logit_bias", "presence_penalty", "frequency_penalty"),
        *("tools", "response_format", "chat_template", "functions", "top_k", "min_p", "stop_token_ids", "unheard_of"),
    ],
    "/v1/completions": ["model", "prompt", "echo", "logprobs", "suffix", "best_of", "max_tokens", "n", "stop"],
    "/inference/v1/generate": ["model", "token_ids", "sampling_params", "stream", "features"],
}


def post(server: Any, path: str, data: bytes, **headers: str) -> tuple[int, dict[str, str], Any]:
    connection = server.raw(data, path, **{"Connection": "close", **headers})
    answer = b""
    while piece := connection.recv(65536):
        answer += piece
    connection.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    named = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:])}
    return int(lines[0].split()[1]), named, json.loads(body)


@pytest.mark.parametrize("path", list(FIELDS))
def test_no_junk_in_any_field_breaks_the_server(server: Any, path: str) -> None:
    statuses = set()
    for name in FIELDS[path]:
        for junk in JUNK:
            status, _, body = post(server, path, json.dumps({**PATHS[path], name: junk}).encode())
            assert status in (200, 400, 404), (name, junk, body)
            if status != 200:
                assert set(body["error"]) == {"message", "type", "param", "code"}
                assert "/" not in body["error"]["message"].replace("/v1/", "") and "Traceback" not in str(body)
            statuses.add(status)
    assert statuses >= {400, 404}
    assert post(server, path, json.dumps(PATHS[path]).encode())[0] == 200


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"n": 10_000}, "n"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"logit_bias": {"320": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"chat_template": "{{ 1 }}"}, "chat_template"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "god", "content": "a"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "a", "x": 1}]}, "messages[0].x"),
        ({"max_completion_tokens": 3}, "max_tokens"),
    ],
)
def test_what_is_wrong_is_named(server: Any, change: dict[str, Any], param: str) -> None:
    status, _, body = post(server, "/v1/chat/completions", json.dumps({**CHAT, **change}).encode())
    assert (status, body["error"]["param"]) == (400, param)


def test_the_client_sees_its_own_error_classes(server: Any) -> None:
    client = server.client()
    with pytest.raises(openai.NotFoundError, match="no such model"):
        client.completions.create(model="gpt-4", prompt="a")
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(model="tiny", prompt=[5] * 120, max_tokens=20)
    assert error.value.code == "context_length_exceeded"


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[]", b"\xff", b'{"model": NaN}', b"[" * 100_000, b'"a"', b"null", b'{"a": Infinity}']
)
def test_what_is_no_json_object_is_refused(server: Any, data: bytes) -> None:
    assert post(server, "/v1/completions", data)[0] == 400


def test_bodies_have_a_limit_whatever_they_say_of_their_length(server: Any) -> None:
    data = json.dumps({**TEXT, "prompt": "a" * (1 << 20)}).encode()
    assert post(server, "/v1/completions", data)[0] == 413


def test_other_sites_and_other_types_are_refused(server: Any) -> None:
    data = json.dumps(TEXT).encode()
    own = f"http://localhost:{server.port}"
    assert post(server, "/v1/completions", data, Host="evil.example")[0] == 400
    assert post(server, "/v1/completions", data, Origin="http://evil.example")[0] == 403
    assert post(server, "/v1/completions", data, Origin=own, Host=f"localhost:{server.port}")[0] == 200
    assert post(server, "/v1/completions", data, **{"Content-Type": "text/plain"})[0] == 415
    assert post(server, "/v1/nothing", data)[0] == 404


def test_with_a_key_nothing_answers_without_it(run_server: Callable[..., Any]) -> None:
    server = run_server(key="k" * 20)
    for key in ("k" * 19, "none"):
        with pytest.raises(openai.AuthenticationError):
            server.client(key).models.list()
    assert server.client("k" * 20).models.list().data[0].id == "tiny"
    status, headers, _ = post(server, "/inference/v1/generate", json.dumps(TOKENS).encode())
    assert (status, headers["www-authenticate"]) == (401, "Bearer")
