"""Throughput and first token of servers under 1, 8 and 32 clients: python -m benchmarks.serving [SYSTEM ...]

strop          strop serve, bfloat16 or whatever --dtype auto means here
transformers   transformers serve with continuous batching (needs its extra: pip install 'transformers[serving]')
llama_cpp      llama-server on PATH, with MODEL.gguf beside the folder (4-bit; see benchmarks.run_llama_cpp)

Every client sends chat requests one after the other, streamed, and reads them to the end. Tokens are counted by the
model's own tokenizer on the text that arrived, for all systems alike. A system that is not installed has no row.
--memory sends 1,000 requests to strop and prints its resident memory on the way.
"""

from __future__ import annotations

import argparse
import http.client
import json
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
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import work
from benchmarks.__main__ import MODEL

NEW_TOKENS = 64
CLIENTS = (1, 8, 32)
READY_SECONDS = 300.0


@dataclass
class Load:
    """What the clients saw."""

    first_token: list[float] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


def command_of(system: str, model: Path, port: int) -> list[str] | None:
    """The command that serves the model on this port; None where the system is not installed."""
    if system == "strop":
        return [sys.executable, "-m", "strop.cli.main", "serve", f"bench={model}", "--port", str(port)]
    if system == "transformers":
        program = shutil.which("transformers", path=str(Path(sys.executable).parent)) or shutil.which("transformers")
        flags = ["--continuous-batching", "--device", "cpu", "--dtype", "bfloat16", "--port", str(port)]
        return [program, "serve", str(model), *flags] if program else None
    program, weights = shutil.which("llama-server"), model.with_suffix(".gguf")
    if program is None or not weights.is_file():
        return None
    slots = str(max(CLIENTS))
    return [program, "-m", str(weights), "--port", str(port), "-np", slots, "-c", str(512 * max(CLIENTS))]


def one_request(port: int, model: str, question: str, load: Load) -> None:
    body = {"model": model, "messages": [{"role": "user", "content": question}], "stream": True}
    body |= {"max_tokens": NEW_TOKENS, "temperature": 1.0}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    started = time.perf_counter()
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        load.errors.append(f"{response.status} {response.read(300)!r}")
        return
    text, first = "", None
    for line in response:
        if not line.startswith(b"data: {"):
            continue
        for choice in json.loads(line[6:]).get("choices", ()):
            piece = choice.get("delta", {}).get("content") or ""
            if piece and first is None:
                first = time.perf_counter() - started
            text += piece
    connection.close()
    load.texts.append(text)
    if first is not None:
        load.first_token.append(first)


def run_clients(port: int, model: str, num_clients: int, per_client: int) -> tuple[Load, float]:
    """(what they saw, seconds)."""
    load = Load()
    questions = work.questions(num_clients * per_client)

    def client(number: int) -> None:
        for turn in range(per_client):
            one_request(port, model, questions[number * per_client + turn], load)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(num_clients)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return load, time.perf_counter() - started


def wait_ready(port: int, process: subprocess.Popen[bytes]) -> bool:
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
                if answer.status == 200:
                    return True
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    return False


def resident_mib(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return listening.getsockname()[1]


def measure(system: str, model: Path, *, memory: bool, per_client: int) -> None:
    from transformers import AutoTokenizer

    port = free_port()
    command = command_of(system, model, port)
    if command is None:
        print(f"{system}: not installed here")
        return
    tokenizer = AutoTokenizer.from_pretrained(model)
    name = "bench" if system == "strop" else str(model)
    with tempfile.TemporaryFile() as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            if not wait_ready(port, process):
                log.seek(0)
                print(f"{system}: did not start: {log.read().decode(errors='replace').strip().splitlines()[-1:]}")
                return
            run_clients(port, name, 2, 1)  # warm up
            if memory:
                for block in range(10):
                    load, _ = run_clients(port, name, 10, 10)
                    assert not load.errors, load.errors[0]
                    print(f"{system}: {100 * (block + 1)} requests, {resident_mib(process.pid):.0f} MiB", flush=True)
                return
            for num_clients in CLIENTS:
                load, seconds = run_clients(port, name, num_clients, per_client)
                if load.errors or not load.first_token:
                    print(f"{system}, {num_clients} clients: {(load.errors or ['no text came'])[0]}", flush=True)
                    continue
                num_tokens = sum(len(tokenizer.encode(text, add_special_tokens=False)) for text in load.texts)
                first = sorted(load.first_token)
                print(
                    f"{system}, {num_clients} clients: {num_tokens / seconds:.1f} tokens/s, first token median "
                    f"{statistics.median(first):.3f} s, slowest {first[-1]:.3f} s, {len(load.texts)} requests",
                    flush=True,
                )
        finally:
            process.terminate()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("systems", nargs="*", metavar="SYSTEM", help="strop, transformers, llama_cpp (all)")
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--memory", action="store_true", help="1,000 requests to strop, and its memory on the way")
    parser.add_argument("--per-client", type=int, default=3, help="requests of each client, one after the other")
    options = parser.parse_args()
    known = ["strop", "transformers", "llama_cpp"]
    if unknown := [one for one in options.systems if one not in known]:
        parser.error(f"no system {unknown[0]!r}; there are {', '.join(known)}")
    for system in options.systems or (["strop"] if options.memory else known):
        measure(system, options.model.absolute(), memory=options.memory, per_client=options.per_client)
    return 0


if __name__ == "__main__":
    sys.exit(main())
