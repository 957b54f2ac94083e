"""What arrivals do to a stream that runs: python -m benchmarks.serving_stream [--model FOLDER] [--prompt-tokens N]

One client streams 400 tokens from `strop serve`. After its 50th, 32 requests of N prompt tokens each arrive at once, on
connections of their own. Printed: the time between two tokens of the stream, before and from then on. To compare with
another state of the code, run this file in its folder.
"""

from __future__ import annotations

import argparse
import http.client
import json
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.__main__ import MODEL
from benchmarks.serving import free_port, percentile, started

ARRIVALS, BEFORE, TOKENS, NEW_TOKENS = 32, 50, 400, 16


def post(port: int, body: dict[str, Any]) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=170)
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    assert response.status == 200, response.read()
    return response


def gaps(port: int, prompt_tokens: int) -> tuple[list[float], list[float]]:
    """(seconds between tokens before the arrivals, and from then until the last of them has its answer)."""
    common = {"model": "bench", "temperature": 0.0, "ignore_eos": True}
    times: list[float] = []
    arrived, over = 0.0, float("inf")
    has_begun = threading.Event()

    def arrive(number: int) -> None:
        prompt = [1000 + (7 * number + 13 * place) % 20_000 for place in range(prompt_tokens)]
        post(port, {**common, "prompt": prompt, "max_tokens": NEW_TOKENS}).read()

    def all_arrive() -> None:
        nonlocal arrived, over
        has_begun.wait()
        arrived = time.perf_counter()
        with ThreadPoolExecutor(ARRIVALS) as pool:
            list(pool.map(arrive, range(ARRIVALS)))
        over = time.perf_counter()

    others = threading.Thread(target=all_arrive)
    others.start()
    body = {**common, "prompt": "Once", "max_tokens": TOKENS, "stream": True, "return_token_ids": True}
    for line in post(port, body):
        if line.startswith(b"data: {"):
            times += [time.perf_counter()] * len(json.loads(line[6:])["choices"][0].get("token_ids") or ())
            if len(times) == BEFORE:
                has_begun.set()
    others.join()
    steps = list(pairwise(times))
    before = [end - start for start, end in steps if end <= arrived]
    return before[5:], [end - start for start, end in steps if end > arrived and start < over]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--prompt-tokens", type=int, default=256)
    options = parser.parse_args()
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "strop.cli.main",
        "serve",
        f"bench={options.model.absolute()}",
        "--port",
        str(port),
    ]
    with started([*command, "--dtype", "bfloat16", "--num-slots", str(ARRIVALS + 1)], port):
        before, during = gaps(port, options.prompt_tokens)
    for name, some in ("alone", before), (f"while {ARRIVALS} prompts of {options.prompt_tokens} tokens arrive", during):
        middle, high, most = (1e3 * percentile(some, percent) for percent in (50, 99, 100))
        print(f"{name}: p50 {middle:.1f} ms, p99 {high:.1f} ms, longest {most:.1f} ms, {len(some)} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main())
