"""Mixed requests with faults against `strop serve`: python -m benchmarks.serving_faults [--requests N] [--output FILE]

A tiny random model in float32, so that every answer has one right value: after the server has ended, the engine's own,
of the same request in another process and another batch. Chats, completions and token-level calls with n, stop strings,
seeds, penalties, biases, logprobs and echo, whole and streamed; among them clients that hang up, clients that read a
few bytes at a time, bodies that are no request, prompts beyond the context and models that do not exist. A fifth of all
arrive at once, each on a connection of its own. A 429 is waited for and asked again. At the end SIGTERM reaches
the server with requests under way.
"""

from __future__ import annotations

import argparse
import http.client
import json
import math
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from strop.generation import Engine, prompt_logprobs
from strop.models import ModelConfig, init_model, load_model, save_model, weight_hash
from strop.tokenizer import Tokenizer, train_bpe
from strop.types import Completion, Request, SamplingParams

TEXT = "the quick brown fox jumps over the lazy dog and the quick cat sleeps"
CONTEXT = 256
CLIENTS = 16
TOLERANCE = 1e-4
"""Of logprobs, against the same model in another batch."""
ANSWERED = ("whole", "whole", "streamed", "streamed", "slow", "score")
FAULTS = {
    "vanish": None,
    "malformed": 400,
    "too long": 400,
    "too many": 400,
    "no model": 404,
    "no path": 404,
}
"""What is not to be answered, and the status that it is to get."""


@dataclass(frozen=True)
class Case:
    """One request of a client, and what the engine is asked for the same."""

    kind: str
    path: str
    body: Any
    request: Request | None = None
    has_echo: bool = False


@dataclass
class Report:
    """What became of all cases."""

    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    refused: int = 0
    """429s, each asked again."""
    resident_mib: dict[int, float] = field(default_factory=dict)
    hashes: set[str] = field(default_factory=set)
    finished_after_sigterm: int = 0
    seconds: float = 0.0
    exit: tuple[int, str] = (0, "")


def make_model(folder: Path) -> None:
    """A checkpoint of two layers with random weights, far from uniform."""
    tokenizer = train_bpe([TEXT], 300)
    config = ModelConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        max_position_embeddings=CONTEXT,
        eos_token_id=tokenizer.eos_id,
    )
    model = init_model(config, seed=7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
    save_model(model, folder)
    tokenizer.save(folder)


def make_cases(count: int, tokenizer: Tokenizer, seed: int = 0) -> list[Case]:
    rng = random.Random(seed)
    return [
        _answered(rng.choice(ANSWERED), rng, tokenizer) if rng.random() < 0.7 else _fault(rng) for _ in range(count)
    ]


def _answered(kind: str, rng: random.Random, tokenizer: Tokenizer) -> Case:
    words = " ".join(rng.choices(TEXT.split(), k=rng.randint(1, 30)))
    form = "text" if kind == "score" else rng.choice(("text", "text", "chat", "chat", "ids"))
    if form == "ids" and kind != "whole":
        form = "text"
    common = {
        "temperature": rng.choice((0.0, 0.7, 1.0, 1.0)),
        "top_p": rng.choice((1.0, 1.0, 0.8)),
        "stop": rng.choice(([], [], ["e"], ["q", "th"], ["o", "a t"])),
        "presence_penalty": rng.choice((0.0, 0.0, 0.5)),
        "frequency_penalty": rng.choice((0.0, 0.0, 0.3)),
        "seed": rng.randrange(1 << 40),
        "n": rng.choice((1, 1, 1, 2, 3)),
    }
    bias = rng.choice(({}, {}, {"5": 4.0, "80": -3.5}))
    max_tokens = rng.randint(1, 40)
    top = rng.choice((None, 0, 3))
    sampling = SamplingParams(
        max_new_tokens=max_tokens,
        temperature=common["temperature"],
        top_p=common["top_p"],
        stop=tuple(common["stop"]),
        stop_token_ids=tokenizer.stop_token_ids,
        presence_penalty=common["presence_penalty"],
        frequency_penalty=common["frequency_penalty"],
        logit_bias=tuple((int(token), number) for token, number in bias.items()),
        top_logprobs=top,
    )
    body = {"model": "tiny", **common, "logit_bias": bias, "max_tokens": max_tokens}
    has_echo = kind == "score"
    if form == "chat":
        messages = [{"role": "user", "content": words}]
        prompt_ids = tokenizer.encode_untrusted_chat(messages)  # type: ignore[arg-type]
        body |= {"messages": messages, "logprobs": top is not None, **({} if top is None else {"top_logprobs": top})}
    else:
        prompt_ids = tokenizer.encode_prompt(words)
        body |= {"prompt": words, "logprobs": top}
    if form == "ids":
        del body["prompt"], body["model"]
        body = {"model": "tiny", "token_ids": prompt_ids, "sampling_params": body}
    else:
        body |= {"return_token_ids": True, "stream": kind in ("streamed", "slow")}
    if has_echo:
        body["echo"] = True
    path = {"text": "/v1/completions", "chat": "/v1/chat/completions", "ids": "/inference/v1/generate"}[form]
    request = Request(prompt_ids=tuple(prompt_ids), sampling=sampling, num_samples=common["n"], seed=common["seed"])
    return Case(kind, path, body, request, has_echo)


def _fault(rng: random.Random) -> Case:
    kind, path = rng.choice(list(FAULTS)), "/v1/completions"
    body: Any = {"model": "tiny", "prompt": "the fox", "max_tokens": 100, "n": 2, "ignore_eos": True}
    if kind == "vanish":
        body["stream"] = rng.random() < 0.5
    elif kind == "malformed":
        wrong = ({"max_tokens": -1}, {"temperature": "hot"}, {"stop": 5}, {"seed": 0.5}, {"tools": [1]}, {"prompt": {}})
        body = rng.choice((b"{", b"[]", b'{"model": "tiny", "prompt": "\\ud800"}', *({**body, **one} for one in wrong)))
    elif kind == "too long":
        body["prompt"] = "fox " * (2 * CONTEXT)
    elif kind == "too many":
        body["n"] = 10_000
    elif kind == "no model":
        body["model"] = "other"
    else:
        path = "/v1/embeddings"
    return Case(kind, path, body)


class Clients:
    """Everybody who asks; what each got is kept by the case's number."""

    def __init__(self, port: int, cases: Sequence[Case]) -> None:
        self._port, self._cases = port, cases
        self.report = Report()
        self.answers: dict[int, dict[str, Any]] = {}
        self._lock = threading.Lock()
        self.before_body: Callable[[], object] | None = None
        """Called after connecting, before the body goes out."""

    def ask(self, number: int) -> None:
        """One case, from its connection to its outcome."""
        case = self._cases[number]
        try:
            outcome = self._ask(number, case)
        except Exception as error:  # whatever a client can meet is one lost request, not the end of this run
            with self._lock:
                self.report.lost.append(f"{number} ({case.kind}): {type(error).__name__}: {error}")
            return
        with self._lock:
            self.report.outcomes[outcome] += 1

    def _ask(self, number: int, case: Case) -> str:
        deadline = time.monotonic() + 120
        before_body = self.before_body
        while True:
            with closing(http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)) as connection:
                connection.connect()
                if case.kind == "slow":
                    connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                if before_body is not None:
                    before_body()
                    before_body = None
                data = case.body if isinstance(case.body, bytes) else json.dumps(case.body).encode()
                connection.request("POST", case.path, data, {"Content-Type": "application/json"})
                if case.kind == "vanish":
                    time.sleep(0.02 * (number % 4))
                    return "hung up"
                with connection.getresponse() as response:
                    if response.status != 429 or time.monotonic() > deadline:
                        return self._outcome(number, case, response)
                    wait = float(response.headers["Retry-After"])
            with self._lock:
                self.report.refused += 1
            time.sleep(wait)

    def _outcome(self, number: int, case: Case, response: http.client.HTTPResponse) -> str:
        if case.kind in FAULTS:
            error = json.loads(response.read())["error"]
            if response.status != FAULTS[case.kind] or not error["message"]:
                raise ValueError(f"status {response.status}, {error}")
            return f"refused, {response.status}"
        if response.status != 200:
            raise ValueError(f"status {response.status}: {response.read(300)!r}")
        answer = _read(response, case)
        with self._lock:
            self.answers[number] = answer
        return "answered" + (", streamed" if case.kind in ("streamed", "slow") else "")


def _read(response: http.client.HTTPResponse, case: Case) -> dict[str, Any]:
    """The answer; of a stream, what its chunks come to."""
    if case.kind not in ("streamed", "slow"):
        return json.loads(response.read())
    choices: dict[int, dict[str, Any]] = {}
    lines: list[bytes] = []
    for line in response:
        lines.append(line)
        if case.kind == "slow":
            time.sleep(0.004)
    if lines[-2:] != [b"data: [DONE]\n", b"\n"]:
        raise ValueError(f"the stream ends with {lines[-2:]}")
    for line in lines:
        if not line.startswith(b"data: {"):
            continue
        chunk = json.loads(line[6:])
        if "error" in chunk:
            raise ValueError(str(chunk))
        for piece in chunk["choices"]:
            one = choices.setdefault(piece["index"], {"text": "", "token_ids": [], "finish_reason": None})
            one["text"] += piece.get("text") or piece.get("delta", {}).get("content") or ""
            one["token_ids"] += piece.get("token_ids") or []
            one["finish_reason"] = piece["finish_reason"] or one["finish_reason"]
    return {"choices": [{"index": index, **one} for index, one in sorted(choices.items())]}


def differences(
    case: Case, answer: dict[str, Any], completions: Sequence[Completion], scored: Sequence[float], tokenizer: Tokenizer
) -> list[str]:
    """In what an answer is not the engine's own."""
    assert case.request is not None
    if [one["index"] for one in answer["choices"]] != list(range(len(completions))):
        return [f"{len(answer['choices'])} choices for n = {len(completions)}"]
    found = []
    before = tokenizer.decode(case.request.prompt_ids, skip_special_tokens=False) if case.has_echo else ""
    for choice, own in zip(answer["choices"], completions, strict=True):
        text = choice["message"]["content"] if "message" in choice else choice.get("text")
        if text is not None and text != before + own.text:
            found.append(f"text {text!r}, the engine's {before + own.text!r}")
        if choice["token_ids"] != list(own.token_ids):
            found.append(f"ids {choice['token_ids']}, the engine's {own.token_ids}")
        if choice["finish_reason"] != own.finish_reason:
            found.append(f"ended by {choice['finish_reason']}, the engine's by {own.finish_reason}")
        if (logprobs := choice.get("logprobs")) is not None:
            own_logprobs = [*scored, *(one.logprob for one in own.token_logprobs)]
            given = logprobs.get("token_logprobs") or [one["logprob"] for one in logprobs["content"]]
            given = [one for one in given if one is not None]
            if len(given) != len(own_logprobs) or not all(
                math.isclose(mine, theirs, abs_tol=TOLERANCE) for mine, theirs in zip(given, own_logprobs, strict=True)
            ):
                found.append(f"logprobs {given}, the engine's {own_logprobs}")
    return found


def check(folder: Path, cases: Sequence[Case], answers: dict[int, dict[str, Any]], report: Report) -> None:
    """Compare every answer with the engine's own."""
    model, tokenizer = load_model(folder, dtype=torch.float32, frozen=True), Tokenizer.load(folder)
    numbers = sorted(answers)
    requests = [request for number in numbers if (request := cases[number].request) is not None]
    own = Engine(model, tokenizer, num_slots=64).generate(requests)
    with torch.inference_mode():
        scores = [
            prompt_logprobs(model, [request.prompt_ids], [0])[0] if cases[number].has_echo else []
            for number, request in zip(numbers, requests, strict=True)
        ]
    for number, completions, scored in zip(numbers, own, scores, strict=True):
        found = differences(cases[number], answers[number], completions, [one.logprob for one in scored], tokenizer)
        report.wrong += [f"{number} ({cases[number].kind} {cases[number].path}): {one}" for one in found]
    report.hashes.add(weight_hash(model))


def served_hash(port: int) -> str:
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
        connection.request("GET", "/v1/models")
        with connection.getresponse() as response:
            return json.loads(response.read())["data"][0]["weights_sha256"]


def resident_mib(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))


def stop_amid(process: subprocess.Popen[str], clients: Clients, numbers: Sequence[int]) -> None:
    """SIGTERM once all these requests are on their way; they are to be answered nevertheless."""
    arrived = threading.Barrier(len(numbers) + 1)
    clients.before_body = arrived.wait
    with ThreadPoolExecutor(len(numbers)) as pool:
        done = [pool.submit(clients.ask, number) for number in numbers]
        arrived.wait()
        clients.before_body = None
        time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        at_signal = sum(one.done() for one in done)
    clients.report.finished_after_sigterm = len(numbers) - at_signal
    _, errors = process.communicate(timeout=60)
    clients.report.exit = process.returncode, errors.strip().splitlines()[-1] if errors.strip() else ""


def run(folder: Path, num_requests: int) -> Report:
    """Starts a server of the model, sends everything, ends it, and checks what came."""
    tokenizer = Tokenizer.load(folder)
    cases = make_cases(num_requests, tokenizer)
    rng = random.Random(1)
    num_last = max(8, num_requests // 50)
    cases += [_last(rng, tokenizer) for _ in range(num_last)]
    flags = ["--port", "0", "--dtype", "float32", "--max-length", str(CONTEXT)]
    command = [sys.executable, "-m", "strop.cli.main", "serve", f"tiny={folder}", *flags]
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            found = re.match(r"http://127\.0\.0\.1:(\d+)/ ", process.stdout.readline())
            if found is None:
                raise SystemExit(f"the server did not start: {process.communicate()[1]}")
            port = int(found[1])
            clients = Clients(port, cases)
            report = clients.report
            report.hashes.add(served_hash(port))
            num_burst = num_requests // 5
            blocks = [num_requests // 10, num_requests // 2, num_requests // 2 + num_burst, num_requests]
            for start, end in zip([0, *blocks], blocks, strict=False):
                num_clients = num_burst if end - start == num_burst and start == blocks[1] else CLIENTS
                if num_clients == num_burst:
                    clients.before_body = threading.Barrier(num_burst).wait
                with ThreadPoolExecutor(num_clients) as pool:
                    list(pool.map(clients.ask, range(start, end)))
                clients.before_body = None
                report.resident_mib[end] = resident_mib(process.pid)
            report.hashes.add(served_hash(port))
            stop_amid(process, clients, range(num_requests, len(cases)))
        finally:
            process.kill()
    report.seconds = time.perf_counter() - started
    check(folder, cases, clients.answers, report)
    return report


def _last(rng: random.Random, tokenizer: Tokenizer) -> Case:
    """Long enough that SIGTERM finds it under way."""
    sampling = SamplingParams(max_new_tokens=CONTEXT - 40)
    seed, kind = rng.randrange(1 << 40), rng.choice(("whole", "streamed"))
    body = {"model": "tiny", "prompt": TEXT[:20], "max_tokens": sampling.max_new_tokens, "seed": seed, "n": 2}
    body |= {"stream": kind == "streamed", "ignore_eos": True, "return_token_ids": True}
    request = Request(prompt_ids=tuple(tokenizer.encode_prompt(TEXT[:20])), sampling=sampling, num_samples=2, seed=seed)
    return Case(kind, "/v1/completions", body, request)


def written(report: Report, num_requests: int) -> str:
    outcomes = ", ".join(f"{count} {name}" for name, count in sorted(report.outcomes.items()))
    memory = ", ".join(f"{mib:.0f} MiB after {count}" for count, mib in report.resident_mib.items())
    one = len(report.hashes) == 1
    lines = [
        f"`python -m benchmarks.serving_faults --requests {num_requests}`: a tiny float32 model behind `strop serve`",
        "",
        f"- outcomes: {outcomes}; {report.refused} times 429, waited for and asked again",
        f"- lost: {len(report.lost)}; answers that are not the engine's own: {len(report.wrong)}",
        f"- {num_requests // 5} of them on as many connections at once, between request {num_requests // 2} and "
        f"{num_requests // 2 + num_requests // 5}",
        f"- resident memory of the server: {memory}",
        f"- SIGTERM with {report.finished_after_sigterm} requests under way, which count above; exit status "
        f"{report.exit[0]}, last words `{report.exit[1]}`",
        f"- weights: {'one hash' if one else f'DIFFERENT HASHES {report.hashes}'} before, after, and of the folder in "
        "another process",
        f"- {report.seconds:.0f} s in all",
    ]
    return "\n".join([*lines, *(f"- LOST {one}" for one in report.lost), *(f"- WRONG {one}" for one in report.wrong)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1000, help="at least 100 (1000)")
    parser.add_argument("--output", type=Path, metavar="FILE.md")
    options = parser.parse_args()
    if options.requests < 100:
        parser.error("--requests must be at least 100")
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder) / "tiny")
        report = run(Path(folder) / "tiny", options.requests)
    text = written(report, options.requests)
    print(text)
    if options.output is not None:
        options.output.write_text(text + "\n", encoding="utf-8")
    return int(bool(report.lost or report.wrong or len(report.hashes) > 1 or report.exit[0]))


if __name__ == "__main__":
    sys.exit(main())
