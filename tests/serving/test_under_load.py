"""Many clients, clients that vanish, slow readers, a full queue, a stop in the middle, files that change."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from strop.models import load_model, weight_hash
from strop.models.protect import protect
from strop.serving import Limits


def test_200_clients_get_what_each_would_get_alone(server: Any) -> None:
    client = server.client()

    def ask(seed: int) -> str:
        answer = client.completions.create(model="tiny", prompt="the cat", seed=seed, max_tokens=4 + seed % 9)
        return answer.choices[0].text

    with ThreadPoolExecutor(200) as pool:
        together = list(pool.map(ask, range(200)))
    assert [together[seed] for seed in range(0, 200, 17)] == [ask(seed) for seed in range(0, 200, 17)]
    assert len(set(together)) > 150


def test_mixed_requests_with_faults_lose_nothing_and_change_nothing(server: Any) -> None:
    client = server.client()
    expected = client.completions.create(model="tiny", prompt="the", seed=1, max_tokens=10).choices[0].text

    def ask(number: int) -> bool:
        if number % 7 == 0:
            server.raw(json.dumps({"model": "tiny", "prompt": "a", "max_tokens": 100, "n": 5}).encode()).close()
            return True
        if number % 11 == 0:
            with pytest.raises(openai.BadRequestError):
                client.completions.create(model="tiny", prompt="a", n=10_000)
            return True
        if number % 5 == 0:
            chunks = client.completions.create(model="tiny", prompt="the", seed=1, max_tokens=10, stream=True)
            return "".join(chunk.choices[0].text for chunk in chunks) == expected
        answer = client.completions.create(model="tiny", prompt="the", seed=1, max_tokens=10)
        return answer.choices[0].text == expected

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(ask, range(200)))
    server.wait_idle()
    assert server.served.check_unchanged() == client.models.list().data[0].weights_sha256  # type: ignore[attr-defined]


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_client_that_vanishes_frees_its_slots(server: Any, is_streamed: bool) -> None:
    server.wait_idle()
    # So many samples that the hang-up is heard long before the last, also on a busy machine.
    call = {"model": "tiny", "prompt": ["a"] * 4, "max_tokens": 120, "n": 64, "stream": is_streamed, "ignore_eos": True}
    connection = server.raw(json.dumps(call).encode())
    while server.worker.load < 4 * 64:
        time.sleep(0.002)
    if is_streamed:
        connection.recv(100)
    before = server.served.engine.stats.completion_tokens
    connection.close()
    server.wait_idle()
    assert server.served.engine.stats.completion_tokens - before < 4 * 64 * 120 / 2


def test_a_reader_that_never_reads_holds_up_nobody(server: Any) -> None:
    call = {"model": "tiny", "prompt": "a", "max_tokens": 120, "n": 64, "stream": True, "logprobs": 20}
    slow = server.raw(json.dumps(call).encode())
    answer = server.client().completions.create(model="tiny", prompt="the", max_tokens=5)
    assert answer.usage is not None and answer.usage.completion_tokens <= 5
    server.wait_idle()  # its slots are free though nothing was read
    slow.close()


def test_a_stalled_reader_is_given_up(run_server: Callable[..., Any]) -> None:
    server = run_server(limits=Limits(num_slots=4, stall_seconds=0.3), send_buffer=8192)
    call = {"model": "tiny", "prompt": "a", "max_tokens": 120, "n": 64, "stream": True, "logprobs": 20}
    slow = server.raw(json.dumps(call).encode(), receive_buffer=4096)
    server.wait_idle()
    time.sleep(2)
    data = b""
    while piece := slow.recv(1 << 20):  # what had been sent before, and then the end
        data += piece
    slow.close()
    assert b"[DONE]" not in data


def test_a_full_queue_says_when_to_come_back(run_server: Callable[..., Any]) -> None:
    server = run_server(limits=Limits(num_slots=2, max_queue=6))
    client = server.client()
    call: Any = {"model": "tiny", "prompt": "a", "max_tokens": 120, "extra_body": {"ignore_eos": True}}
    stream = client.completions.create(**call, n=8, stream=True)
    next(stream)
    with pytest.raises(openai.RateLimitError) as error:
        client.completions.create(**call, n=8)
    assert int(error.value.response.headers["retry-after"]) >= 1
    with pytest.raises(openai.BadRequestError):
        client.completions.create(**call, n=9)
    stream.close()
    server.wait_idle()
    assert client.completions.create(**call, n=8).usage.completion_tokens == 8 * 120


def test_a_request_has_its_time(run_server: Callable[..., Any]) -> None:
    server = run_server(limits=Limits(num_slots=1, request_seconds=0.05))
    with pytest.raises(openai.APIStatusError) as error:
        server.client().completions.create(model="tiny", prompt="a", max_tokens=120, n=32)
    assert error.value.status_code == 504
    server.wait_idle()


def start(folder: Path, *flags: str) -> tuple[subprocess.Popen[str], str]:
    command = [sys.executable, "-m", "strop.cli.main", "serve", f"tiny={folder}", "--port", "0", "--dtype", "float32"]
    process = subprocess.Popen([*command, *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    found = re.match(r"(http://127\.0\.0\.1:\d+)/ ", line := process.stdout.readline())
    assert found, (line, process.communicate())
    return process, found[1]


def test_sigterm_finishes_what_is_under_way_and_the_file_on_disk_means_nothing(
    tiny_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(tiny_folder, folder)
    process, url = start(folder, "--num-slots", "1")
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    before = client.completions.create(model="tiny", prompt="the", seed=1, max_tokens=20).choices[0].text
    damaged = bytearray((folder / "model.safetensors").read_bytes())
    damaged[len(damaged) // 2 :] = os.urandom(len(damaged) - len(damaged) // 2)
    with open(folder / "model.safetensors", "r+b") as file:  # in place: a mapping of the file would see it
        file.write(damaged)
    call: Any = {"model": "tiny", "prompt": "the", "seed": 1, "extra_body": {"ignore_eos": True}}
    stream = client.completions.create(**call, max_tokens=100, n=20, stream=True)
    texts = [""] * 20
    texts[0] += next(stream).choices[0].text
    process.send_signal(signal.SIGTERM)
    for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert all(texts) and texts[0][:5] == before[:5]
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 0 and "unchanged" in errors, errors
    with pytest.raises(openai.APIConnectionError):
        client.models.list()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--host", "0.0.0.0"), "give an --api-key-file too"),
        (("--adapter", "{folder}"), "is no LoRA adapter"),
        (("--max-queue", "0"), "max_queue=0 must be at least 1"),
        (("--host", "0.0.0.0", "--api-key-file", "{key}"), "at least 16"),
    ],
)
def test_flags_that_cannot_be_honoured_are_refused(
    tiny_folder: Path, tmp_path: Path, flags: tuple[str, ...], message: str
) -> None:
    from strop.cli.serve import run

    (tmp_path / "key").write_text("short\n")
    with pytest.raises(ValueError, match=message):
        run("serve", [f"tiny={tiny_folder}", *(one.format(folder=tiny_folder, key=tmp_path / "key") for one in flags)])


def test_a_write_to_the_weights_ends_the_process(tiny_folder: Path) -> None:
    code = (
        "import sys, torch\nfrom strop.models import load_model\nfrom strop.models.protect import protect\n"
        "model = load_model(sys.argv[1], frozen=True)\nassert protect(model)\n"
        "print('before', flush=True)\nwith torch.no_grad(): model.layers[0].mlp.down.weight[0, 0] = 1.0\nprint('after')"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tiny_folder)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (-signal.SIGSEGV, "before\n")


def test_protected_weights_are_the_same_weights(tiny_folder: Path) -> None:
    model: Any = load_model(tiny_folder, dtype=torch.bfloat16, frozen=True)
    before = weight_hash(model)
    assert protect(model) and weight_hash(model) == before
    assert model.lm_head_weight.data_ptr() == model.embedding.weight.data_ptr()


def test_health_needs_no_key(run_server: Callable[..., Any]) -> None:
    server = run_server(key="k" * 20)
    with urllib.request.urlopen(f"{server.url}/health") as answer:
        assert json.load(answer) == {"status": "ok"}


def test_an_adapter_is_served_beside_its_base(tiny_folder: Path, tmp_path: Path) -> None:
    from strop.models import LoraConfig, save_model
    from strop.models.adapters import add_adapter

    model: Any = load_model(tiny_folder)
    add_adapter(model, LoraConfig(rank=2), seed=0, base=tiny_folder)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(len(name)))
    save_model(model, tmp_path / "adapter")
    on_disk = {path.name: path.read_bytes() for path in tiny_folder.iterdir() if path.is_file()}
    process, url = start(tiny_folder, "--adapter", f"skill={tmp_path / 'adapter'}")
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    before = [one.weights_sha256 for one in client.models.list().data]  # type: ignore[attr-defined]
    names = [one.id for one in client.models.list().data]
    texts = [client.completions.create(model=one, prompt="the", seed=1).choices[0].text for one in names]
    hashes = [one.weights_sha256 for one in client.models.list().data]  # type: ignore[attr-defined]
    process.terminate()
    process.communicate(timeout=30)
    assert names == ["tiny", "skill"] and texts[0] != texts[1]
    alone, url = start(tiny_folder)
    with urllib.request.urlopen(f"{url}/v1/models") as answer:
        [base] = json.load(answer)["data"]
    alone.terminate()
    alone.communicate(timeout=30)
    assert hashes == before and hashes[0] == base["weights_sha256"] != hashes[1]
    assert on_disk == {path.name: path.read_bytes() for path in tiny_folder.iterdir() if path.is_file()}
