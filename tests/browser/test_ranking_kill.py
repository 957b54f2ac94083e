"""Nothing acknowledged is lost, and nothing is stored twice, while the server is killed under those who rank."""

from __future__ import annotations

import http.client
import json
import re
import threading
import time
from collections.abc import Callable
from typing import Any

from strop.ranking import PreferenceStore

WRITERS, EACH = 6, 100


class Writer(threading.Thread):
    """One person: ranks items as they come, sends every answer twice, and insists until it is acknowledged."""

    def __init__(self, name: str, port: str) -> None:
        super().__init__(name=name)
        self._port = int(port)
        self._connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=10)
        self._headers = {"Host": f"127.0.0.1:{port}", "Origin": f"http://127.0.0.1:{port}"}
        self.acknowledged: list[str] = []
        self.failures = 0
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self._log_in()
            state = json.loads(self._ask("GET", "/item"))
            while len(self.acknowledged) < EACH:
                state = self._rank(state["item"])
        except BaseException as error:
            self.error = error
        finally:
            self._connection.close()

    def _rank(self, item: dict[str, Any]) -> dict[str, Any]:
        uuid = f"{self.name}-{len(self.acknowledged):06}"
        body = {"uuid": uuid, "item": item["id"], "ranks": list(range(1, len(item["completions"]) + 1))}
        answers = [self._ask("POST", "/rank", body) for _ in range(2)]
        self.acknowledged.append(uuid)
        return json.loads(answers[-1])

    def _log_in(self) -> None:
        page = self._ask("GET", "/login")
        for body in ({"name": self.name}, None):
            found = re.search(r'name="csrf" content="(\w+)"', page)
            assert found is not None
            self._headers["X-CSRF-Token"] = found.group(1)
            if body:
                self._ask("POST", "/login", body)
                page = self._ask("GET", "/")

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> str:
        headers = {**self._headers, **({} if body is None else {"Content-Type": "application/json"})}
        deadline = time.monotonic() + 60
        while True:
            try:
                self._connection.request(method, path, None if body is None else json.dumps(body), headers)
                response = self._connection.getresponse()
                text = response.read().decode()
            except (OSError, http.client.HTTPException):
                self.failures += 1
                self._connection.close()
                assert time.monotonic() < deadline, "the server did not come back"
                time.sleep(0.05)
                continue
            assert response.status == 200, (response.status, text)
            if cookie := response.headers.get("set-cookie"):
                self._headers["Cookie"] = cookie.split(";")[0]
            return text


def test_six_writers_and_two_kills(serve: Callable[..., Any], store: PreferenceStore):
    with store.transaction():
        # One more for each writer: the answer to the last ranking hands out an item that nobody will rank.
        for n in range(WRITERS * (EACH + 1)):
            store.add_item(f"prompt {n}", [f"a {n}", f"b {n}", f"c {n}"])
    server = serve(store.path)
    port = server.port
    writers = [Writer(f"writer{n}", port) for n in range(WRITERS)]
    for writer in writers:
        writer.start()
    for share in (0.3, 0.6):
        while sum(len(writer.acknowledged) for writer in writers) < share * WRITERS * EACH:
            assert all(writer.is_alive() for writer in writers), [writer.error for writer in writers]
            time.sleep(0.01)
        server.kill()
        server = serve(store.path, "--port", port)
    for writer in writers:
        writer.join(60)
    assert [writer.error for writer in writers] == [None] * WRITERS
    assert sum(writer.failures for writer in writers) >= WRITERS  # the kills were felt
    rows = store.query("SELECT uuid, item_id FROM rankings JOIN presentations ON presentations.id = presentation_id")
    assert sorted(row["uuid"] for row in rows) == sorted(uuid for writer in writers for uuid in writer.acknowledged)
    assert len(rows) == len({row["item_id"] for row in rows}) == WRITERS * EACH
    assert store.query("PRAGMA integrity_check")[0][0] == "ok"
