"""A server of the tiny checkpoint on a socket of its own, in this process, and the openai client for it."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
import uvicorn

from strop.runs import resolve
from strop.serving import Limits, ServedModel, Worker, build_app, serve_model


@dataclass(frozen=True)
class Running:
    url: str
    served: ServedModel
    worker: Worker

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])

    def client(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)

    def wait_idle(self, seconds: float = 20) -> None:
        deadline = time.monotonic() + seconds
        while self.worker.load:
            assert time.monotonic() < deadline, f"{self.worker.load} samples still hold slots"
            time.sleep(0.01)

    def raw(
        self, data: bytes, path: str = "/v1/completions", *, receive_buffer: int | None = None, **headers: str
    ) -> socket.socket:
        """A connection that has sent a POST and reads nothing."""
        connection = socket.socket()
        if receive_buffer is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        connection.settimeout(30)
        connection.connect(("127.0.0.1", self.port))
        lines = {"Host": "localhost", "Content-Type": "application/json", "Content-Length": str(len(data)), **headers}
        head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        connection.sendall(f"POST {path} HTTP/1.1\r\n{head}\r\n".encode() + data)
        return connection


@contextmanager
def running(
    folder: Path, *, limits: Limits | None = None, send_buffer: int | None = None, **settings: Any
) -> Iterator[Running]:
    limits = limits or Limits(num_slots=4, max_queue=600)
    served = serve_model("tiny", resolve(str(folder), "none"), dtype=torch.float32, device="cpu", limits=limits)
    listening = socket.create_server(("127.0.0.1", 0), backlog=512)
    if send_buffer is not None:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    with Worker([served], max_queue=limits.max_queue) as worker:
        app = build_app([served], worker, limits=limits, **settings)
        server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off", ws="none", http="h11"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        yield Running(f"http://127.0.0.1:{listening.getsockname()[1]}", served, worker)
        server.should_exit = True
        thread.join()
    listening.close()
    served.check_unchanged()


@pytest.fixture(scope="session")
def server(tiny_folder: Path) -> Iterator[Running]:
    """One for all tests that leave it as it was; its weights are hashed again at the end."""
    with running(tiny_folder) as one:
        yield one


@pytest.fixture
def run_server(tiny_folder: Path) -> Iterator[Callable[..., Running]]:
    """run_server(limits=..., key=...) starts one that ends with the test."""
    with ExitStack() as stack:
        yield lambda **settings: stack.enter_context(running(tiny_folder, **settings))
