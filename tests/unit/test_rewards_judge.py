"""A learned judge: a real local model against transformers, and a real HTTP server that misbehaves in every way."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from strop.rewards import judge_backends
from strop.rewards.base import WeightedRewards
from strop.rewards.judge import JudgeReward
from strop.rewards.load import load_reward
from strop.types import Completion, Task

Reply = tuple[int, str]


def task(prompt: str = "Say hello.") -> Task:
    return Task(id="train.jsonl:7", prompt=({"role": "user", "content": prompt},))


def completion(text: str) -> Completion:
    return Completion(token_ids=(1,), sampling_logprobs=(0.0,), finish_reason="stop", text=text)


def chat(text: object) -> Reply:
    return 200, json.dumps({"choices": [{"message": {"content": text}}]})


class Server:
    """Answers POSTs by a function of (how many came before, the request)."""

    def __init__(self, answer: Callable[[int, dict], Reply]) -> None:
        self.requests: list[tuple[str, str | None, dict]] = []
        outer, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    number = len(outer.requests)
                    outer.requests.append((self.path, self.headers.get("Authorization"), body))
                status, text = answer(number, body)
                self.send_response(status)
                if status == 302:
                    self.send_header("Location", "/elsewhere")
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *args: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}/v1"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., tuple[JudgeReward, Server]]]:
    monkeypatch.setattr(judge_backends, "FIRST_PAUSE", 0.01)
    made: list[JudgeReward | Server] = []

    def make(answer: Callable[[int, dict], Reply], **options: object) -> tuple[JudgeReward, Server]:
        server = Server(answer)
        spec = {"name": "judge", "rubric": "polite", "endpoint": server.url, "endpoint_model": "m", "timeout": 5.0}
        reward = load_reward(spec | options)
        assert isinstance(reward, JudgeReward)
        made.extend((reward, server))
        return reward, server

    yield make
    for thing in made:
        thing.close()


def test_a_server_marks_each_answer_once_and_sees_rubric_task_and_answer(served, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "sesame")
    reward, server = served(
        lambda _, body: chat("9" if "good day" in body["messages"][0]["content"] else "Mark: 3"),
        api_key_env="JUDGE_KEY",
    )
    verdicts = reward.score([task()] * 3, [completion(text) for text in ("good day", "no", "good day")])
    assert [verdict.score for verdict in verdicts] == [1.0, pytest.approx(1 / 3), 1.0]
    assert len(server.requests) == 2
    path, key, body = server.requests[0]
    assert path == "/v1/chat/completions" and key == "Bearer sesame" and body["temperature"] == 0
    text = body["messages"][0]["content"]
    assert "polite" in text and "user: Say hello." in text
    reward.score([task()], [completion("no")])
    assert len(server.requests) == 2, "the cache was not asked"


def test_failures_that_pass_are_retried(served):
    replies = [(503, "busy"), (429, "slow down"), chat("I cannot say"), chat("7")]
    reward, server = served(lambda number, _: replies[number])
    (verdict,) = reward.score([task()], [completion("hello")])
    assert verdict.status == "ok" and verdict.score == pytest.approx(7 / 9)
    assert len(server.requests) == 4


@pytest.mark.parametrize(
    ("reply", "num_requests", "reason"),
    [
        ((401, "no"), 1, "401"),
        ((302, ""), 1, "302"),
        ((500, "oops"), 4, "500"),
        ((200, "<html>"), 4, "something else"),
        ((200, '{"choices": []}'), 4, "something else"),
        (chat(None), 4, "without text"),
        (chat("10"), 4, "no mark"),
        (chat("7.5"), 4, "no mark"),
        (chat("3 or 4"), 4, "no mark"),
        (chat(""), 4, "no mark"),
    ],
)
def test_a_judge_without_a_mark_is_an_infra_error_and_no_zero(served, reply, num_requests, reason):
    reward, server = served(lambda number, body: reply)
    (verdict,) = reward.score([task()], [completion("hello")])
    assert verdict.status == "infra_error" and reason in verdict.detail
    assert len(server.requests) == num_requests
    with pytest.raises(RuntimeError, match="failed on 1 of 1"):
        WeightedRewards([(reward, 1.0)]).score([task()], [completion("hello")])


def test_a_judge_that_hangs_or_is_not_there_is_given_up(served):
    reward, _ = served(lambda number, body: (time.sleep(3), chat("5"))[1], timeout=0.2, retries=1)
    started = time.monotonic()
    (verdict,) = reward.score([task()], [completion("hello")])
    assert verdict.status == "infra_error" and time.monotonic() - started < 2.0
    gone = JudgeReward(rubric="r", endpoint="http://127.0.0.1:9/v1", endpoint_model="m", retries=1)
    assert gone.score([task()], [completion("hello")])[0].status == "infra_error"
    gone.close()


def test_many_answers_are_judged_at_once(served):
    reward, _ = served(lambda number, body: (time.sleep(0.2), chat("5"))[1], concurrency=8)
    started = time.monotonic()
    reward.score([task()] * 16, [completion(str(number)) for number in range(16)])
    assert time.monotonic() - started < 1.6


def test_the_cache_outlives_the_run_and_a_line_cut_short(served, tmp_path: Path):
    path = tmp_path / "cache" / "marks.jsonl"
    first, _ = served(lambda number, body: chat("4"), cache=str(path))
    first.score([task()] * 2, [completion("a"), completion("b")])
    path.write_bytes(path.read_bytes()[:-20])
    endpoint = first._judge
    second, server = served(lambda number, body: chat("6"), cache=str(path))
    second._judge.identity = endpoint.identity  # another port, the same judge
    for _ in range(2):
        verdicts = second.score([task()] * 2, [completion("a"), completion("b")])
        assert sorted(verdict.score for verdict in verdicts) == [pytest.approx(4 / 9), pytest.approx(6 / 9)]
    assert len(server.requests) == 1
    third, server = served(lambda number, body: chat("8"), cache=str(path))
    third._judge.identity = endpoint.identity
    third.score([task()] * 2, [completion("a"), completion("b")])
    assert len(server.requests) == 0


def test_a_local_judge_gives_the_expected_digit_of_transformers(tiny_folder: Path):
    from transformers import AutoModelForCausalLM

    from strop.tokenizer import Tokenizer

    reward = JudgeReward(rubric="r", model=str(tiny_folder), max_answer_chars=5)
    # Its 128 positions are too few for the whole instruction, so the question is asked directly.
    questions = [({"role": "user", "content": f"the {word} fox"},) for word in ("quick", "lazy", "brown brown")]
    marks = reward._judge.marks(questions)
    tokenizer = Tokenizer.load(tiny_folder)
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    for question, mark in zip(questions, marks, strict=True):
        ids = torch.tensor([tokenizer.encode_prompt(question)])
        digits = [tokenizer.encode(str(digit))[0] for digit in range(10)]
        law = model(ids).logits[0, -1, digits].double().softmax(0)
        assert mark == pytest.approx(float(sum(d * p for d, p in enumerate(law.tolist()))), abs=1e-4)
    assert len({round(mark, 6) for mark in marks}) == 3
    (verdict,) = reward.score([task()], [completion("hello")])
    assert verdict.status == "infra_error" and "limit is 128" in verdict.detail


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, "either model"),
        ({"model": "m", "endpoint": "http://x"}, "either model"),
        ({"endpoint": "http://x"}, "endpoint_model"),
        ({"endpoint": "ftp://x", "endpoint_model": "m"}, "no http"),
        ({"endpoint": "http://x", "endpoint_model": "m", "api_key_env": "NOT_SET_ANYWHERE"}, "NOT_SET_ANYWHERE"),
        ({"endpoint": "http://x", "endpoint_model": "m", "rubric": " "}, "rubric is empty"),
        ({"endpoint": "http://x", "endpoint_model": "m", "retries": -1}, "retries"),
        ({"endpoint": "http://x", "endpoint_model": "m", "timeout": 0}, "timeout"),
    ],
)
def test_impossible_options_are_refused(options, reason):
    with pytest.raises(ValueError, match=reason):
        JudgeReward(**({"rubric": "r"} | options))
