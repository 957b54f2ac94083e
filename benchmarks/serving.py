"""Throughput and first token of servers under 1, 8 and 32 clients: python -m benchmarks.serving [SYSTEM ...]

strop              strop serve
transformers       transformers serve (needs pip install 'transformers[serving]')
transformers-cb    transformers serve --continuous-batching
llama_cpp          llama-server, found on PATH or by $LLAMA_SERVER
llama_cpp_python   python -m llama_cpp.server (needs pip install 'llama-cpp-python[server]'); answers one at a time

All serve the same bfloat16 weights; llama.cpp's from MODEL.bf16.gguf beside the folder MODEL, or --gguf FILE:
strop export MODEL --to gguf MODEL.bf16.gguf --dtype bf16. Every client sends chat requests one after the other, greedy
and streamed, and reads them to the end. Tokens are counted by the model's own tokenizer on the text that arrived, for
all systems alike; the clock runs from the first request to the end of the last answer, or for --seconds: of those that
are not at their end by then, what has come counts. Systems take turns. Every measurement is a server of its own, warmed
up; --json FILE collects them over several calls, and the table is of all in it.
A system that is not installed has no row.
"""

from __future__ import annotations

import argparse
import http.client
import importlib.util
import json
import math
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import work
from benchmarks.__main__ import MODEL

NEW_TOKENS = 64
CLIENTS = (1, 8, 32)
READY_SECONDS = 120.0
CONTEXT = 512
"""Positions that a llama.cpp slot has."""
SYSTEMS = ("strop", "transformers", "transformers-cb", "llama_cpp", "llama_cpp_python")


class NotInstalledError(Exception):
    """The system is not here; the message says what is missing."""


@dataclass
class Load:
    """What the clients saw."""

    first_token: list[float | None] = field(default_factory=list)
    """None where it had not come when the time was over."""
    texts: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    num_cut: int = 0
    """Requests that were not at their end when the time was over."""


def settings_of(system: str, num_clients: int) -> list[str]:
    """The flags that are the same on every machine."""
    if system == "strop":
        return ["--dtype", "bfloat16"]
    if system.startswith("transformers"):
        # By default a step attends over all of a cache that fills the memory: 39 s to the first token.
        blocks = ["--cb-block-size", "32", "--cb-num-blocks", str(6 * num_clients), "--cb-max-batch-tokens", "256"]
        batching = ["--continuous-batching", *blocks] if system.endswith("-cb") else []
        return [*batching, "--device", "cpu", "--dtype", "bfloat16"]
    threads = str(os.cpu_count())
    if system == "llama_cpp":
        return ["-t", threads, "-np", str(num_clients), "-c", str(CONTEXT * num_clients), "-fa", "on"]
    # By default a new request ends the one that is under way.
    return ["--n_threads", threads, "--n_ctx", str(CONTEXT), "--interrupt_requests", "false"]


def command_of(system: str, model: Path, gguf: Path, port: int, num_clients: int) -> list[str]:
    """Raises NotInstalledError."""
    flags = [*settings_of(system, num_clients), "--port", str(port)]
    if system == "strop":
        return [sys.executable, "-m", "strop.cli.main", "serve", f"bench={model}", *flags]
    if system.startswith("transformers"):
        if importlib.util.find_spec("uvicorn") is None or importlib.util.find_spec("openai") is None:
            raise NotInstalledError("pip install 'transformers[serving]'")
        return [sys.executable, "-m", "transformers.cli.transformers", "serve", str(model), *flags]
    if not gguf.is_file():
        raise NotInstalledError(f"no {gguf.name} beside the model: strop export MODEL --to gguf FILE --dtype bf16")
    if system == "llama_cpp":
        program = os.environ.get("LLAMA_SERVER") or shutil.which("llama-server")
        if program is None:
            raise NotInstalledError("no llama-server on PATH, and none named by $LLAMA_SERVER")
        return [program, "-m", str(gguf), *flags]
    if any(importlib.util.find_spec(name) is None for name in ("llama_cpp", "sse_starlette", "starlette_context")):
        raise NotInstalledError("pip install 'llama-cpp-python[server]'")
    return [sys.executable, "-m", "llama_cpp.server", "--model", str(gguf), *flags]


def one_request(port: int, model: str, question: str, load: Load, deadline: float) -> None:
    """At the deadline what has come counts, and the rest is left."""
    body = {"model": model, "messages": [{"role": "user", "content": question}], "stream": True}
    body |= {"max_tokens": NEW_TOKENS, "temperature": 0.0}
    text, first = "", None
    started = time.perf_counter()
    connection = http.client.HTTPConnection("127.0.0.1", port)

    def bound() -> None:
        left = deadline - time.perf_counter()
        if left <= 0:
            raise TimeoutError
        if connection.sock is not None:
            connection.sock.settimeout(left)

    try:
        bound()
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        bound()
        response = connection.getresponse()
        if response.status != 200:
            load.errors.append(f"{response.status} {response.read(300)!r}")
            return
        for line in response:
            bound()
            if not line.startswith(b"data: {"):
                continue
            for choice in json.loads(line[6:]).get("choices", ()):
                piece = choice.get("delta", {}).get("content") or ""
                if piece and first is None:
                    first = time.perf_counter() - started
                text += piece
    except TimeoutError:
        load.num_cut += 1
    finally:
        connection.close()
    if not text and load.num_cut == 0:
        load.errors.append("no text came")
    load.texts.append(text)
    load.first_token.append(first)


def run_clients(port: int, model: str, num_clients: int, per_client: int, seconds: float = 600.0) -> tuple[Load, float]:
    """(what they saw, seconds)."""
    load = Load()
    questions = work.questions(num_clients * per_client)
    started = time.perf_counter()

    def client(number: int) -> None:
        for turn in range(per_client):
            try:
                one_request(port, model, questions[number * per_client + turn], load, started + seconds)
            except (OSError, http.client.HTTPException) as error:
                load.errors.append(f"{type(error).__name__}: {error}")

    threads = [threading.Thread(target=client, args=(number,)) for number in range(num_clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return load, time.perf_counter() - started


def wait_ready(port: int, process: subprocess.Popen[bytes], path: str = "/health") -> bool:
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
                if answer.status == 200:
                    return True
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    return False


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return listening.getsockname()[1]


@contextmanager
def started(command: Sequence[str], port: int, path: str = "/health") -> Iterator[subprocess.Popen[bytes]]:
    """A server that answers; it is ended at the end. SystemExit with its log's last line when it does not start."""
    with tempfile.TemporaryFile() as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            if not wait_ready(port, process, path):
                log.seek(0)
                last = log.read().decode(errors="replace").strip().splitlines()[-1:]
                raise SystemExit(f"the server did not start: {last}")
            yield process
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:  # some wait for connections that nobody will close
                process.kill()


def measure(
    system: str, model: Path, gguf: Path, num_clients: int, per_client: int, seconds: float, count_tokens: Any
) -> dict[str, Any]:
    """One record. Raises NotInstalledError; SystemExit when an answer is missing."""
    port = free_port()
    name = "bench" if system == "strop" else str(model)
    command = command_of(system, model, gguf, port, num_clients)
    with started(command, port, "/v1/models" if system == "llama_cpp_python" else "/health"):
        run_clients(port, name, min(num_clients, 2), 1)  # warm up
        load, seconds = run_clients(port, name, num_clients, per_client, seconds)
    if load.errors:
        raise SystemExit(f"{system}, {num_clients} clients: {len(load.errors)} errors, {load.errors[0]}")
    return {
        "system": system,
        "settings": " ".join(settings_of(system, num_clients)),
        "clients": num_clients,
        "requests": len(load.texts),
        "tokens": sum(map(count_tokens, load.texts)),
        "seconds": round(seconds, 3),
        "cut": load.num_cut,
        "first_token": [None if one is None else round(one, 3) for one in load.first_token],
    }


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that so many percent are not above."""
    ordered = sorted(values)
    return ordered[max(0, -(-int(percent * len(ordered)) // 100) - 1)]


def table(records: Sequence[dict[str, Any]]) -> str:
    """Markdown: medians over the measurements of a system, and how strop's compares."""
    rates: dict[tuple[str, int], float] = {}
    lines = [
        "| clients | system | tokens/s | strop / it | first token p50 | p95 | measurements, requests each |",
        "|---|---|---|---|---|---|---|",
    ]
    cells: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for record in records:
        cells.setdefault((record["clients"], record["system"]), []).append(record)
    for (clients, system), group in cells.items():
        rates[system, clients] = statistics.median(one["tokens"] / one["seconds"] for one in group)
    for (clients, system), group in sorted(cells.items(), key=lambda one: (one[0][0], SYSTEMS.index(one[0][1]))):
        first = [math.inf if second is None else second for one in group for second in one["first_token"]]
        ours = rates.get(("strop", clients))
        ratio = f"{ours / rates[system, clients]:.2f}" if ours and system != "strop" else ""
        lines.append(
            f"| {clients} | {system} | {rates[system, clients]:.1f} | {ratio} | {_seconds(percentile(first, 50))} | "
            f"{_seconds(percentile(first, 95))} | {len(group)} x {group[0]['requests']} |"
        )
    return "\n".join(lines) + "\n"


def _seconds(value: float) -> str:
    return f"{value:.3f} s" if math.isfinite(value) else "not in time"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("systems", nargs="*", metavar="SYSTEM", help=f"{', '.join(SYSTEMS)} (all)")
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--gguf", type=Path, help="what llama.cpp serves (MODEL.bf16.gguf)")
    parser.add_argument("--clients", type=int, nargs="+", default=list(CLIENTS))
    parser.add_argument("--per-client", type=int, default=2, help="requests of each client, one after the other")
    parser.add_argument("--seconds", type=float, default=60.0, help="of one measurement; what has come by then counts")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE", help="add the measurements to this file")
    options = parser.parse_args()
    if unknown := [one for one in options.systems if one not in SYSTEMS]:
        parser.error(f"no system {unknown[0]!r}; there are {', '.join(SYSTEMS)}")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = options.model.absolute()
    gguf = options.gguf or model.with_name(f"{model.name}.bf16.gguf")
    records: list[dict[str, Any]] = []
    if options.json is not None and options.json.exists():
        records = json.loads(options.json.read_text("utf-8"))
    for num_clients in options.clients:
        for _ in range(options.rounds):
            for system in options.systems or SYSTEMS:
                try:
                    record = measure(
                        system,
                        model,
                        gguf,
                        num_clients,
                        options.per_client,
                        options.seconds,
                        lambda text: len(tokenizer.encode(text, add_special_tokens=False)),
                    )
                except NotInstalledError as error:
                    print(f"{system}: not here ({error})", flush=True)
                    continue
                except SystemExit as error:
                    print(f"{system}: {error}", flush=True)
                    continue
                records.append(record)
                rate = record["tokens"] / record["seconds"]
                print(f"{system}, {num_clients} clients: {rate:.1f} tokens/s", flush=True)
                if options.json is not None:
                    lines = ",\n".join(map(json.dumps, records))
                    options.json.write_text(f"[\n{lines}\n]\n", "utf-8")
    print(table(records), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
