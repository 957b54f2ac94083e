"""The ranking page over HTTP, without a browser: who is refused, and what an answer gives away."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from strop.ranking import PreferenceStore
from strop.ranking.app import MAX_SHOWN, build_app, visible
from strop.ranking.serve import serve

HOST = "http://127.0.0.1:8417"
TOKEN = "correct horse battery"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[PreferenceStore]:
    made = PreferenceStore(tmp_path / "people.db", create=True, seed=1)
    for n in range(3):
        models = ["secret/1", "secret/2", "secret/2"]
        made.add_item(f"prompt {n}", [f"first {n}", f"second {n}", f"third {n}"], models=models)
    yield made
    made.close()


class Client:
    """A person's browser, as far as cookies and the CSRF token of the page go."""

    def __init__(self, store: PreferenceStore, name: str | None = "ann", token: str | None = None) -> None:
        self.http = TestClient(build_app(store, token=token), base_url=HOST, follow_redirects=False)
        self.csrf = self.csrf_of("/login")
        if name is not None:
            assert self.post("/login", name=name, token=token or "").status_code == 200
            self.csrf = self.csrf_of("/")

    def csrf_of(self, path: str) -> str:
        found = re.search(r'name="csrf" content="([0-9a-f]{64})"', self.http.get(path).text)
        assert found is not None
        return found.group(1)

    def post(self, path: str, headers: dict[str, str | None] | None = None, **body: Any):
        sent = {"Origin": HOST, "X-CSRF-Token": self.csrf, "Content-Type": "application/json", **(headers or {})}
        kept = {name: value for name, value in sent.items() if value is not None}
        return self.http.post(path, content=json.dumps(body), headers=kept)

    def item(self) -> dict[str, Any]:
        return self.http.get("/item").json()["item"]

    def rank(self, uuid: str = "uuid-00000001", headers: dict[str, str | None] | None = None, **fields: Any):
        return self.post("/rank", headers, uuid=uuid, item=self.item()["id"], **{"ranks": [1, 2, 3], **fields})


def num_rows(store: PreferenceStore) -> int:
    return store.query("SELECT count(*) FROM rankings")[0][0]


def test_a_ranking_is_stored_and_the_next_item_comes_back(store: PreferenceStore):
    client = Client(store)
    first = client.item()
    answer = client.rank(verdict="ranked", strength=None, comment="", milliseconds=5).json()
    assert answer["item"]["id"] != first["id"] and answer["progress"] == {"mine": 1, "done": 1, "wanted": 3}
    assert client.post("/undo", uuid="undo-00000001").json()["item"]["id"] == first["id"]


FORGERIES: dict[str, tuple[dict[str, str | None], int]] = {
    "no token": ({"X-CSRF-Token": None}, 403),
    "wrong token": ({"X-CSRF-Token": "0" * 64}, 403),
    "foreign origin": ({"Origin": "https://evil.example"}, 403),
    "no origin": ({"Origin": None}, 403),
    "null origin": ({"Origin": "null"}, 403),
    "origin of another port": ({"Origin": "http://127.0.0.1:9999"}, 403),
    "foreign host": ({"Host": "evil.example:8417", "Origin": "http://evil.example:8417"}, 400),
    "host that only begins right": ({"Host": "127.0.0.1.evil.example", "Origin": "http://127.0.0.1.evil.example"}, 400),
    "a form": ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
    "text that is JSON": ({"Content-Type": "text/plain"}, 415),
}


@pytest.mark.parametrize("case", FORGERIES)
def test_a_forged_request_is_refused(store: PreferenceStore, case: str):
    headers, status = FORGERIES[case]
    client = Client(store)
    assert client.rank(headers=headers).status_code == status
    assert num_rows(store) == 0
    assert client.rank().status_code == 200


def test_the_token_of_another_session_does_not_fit(store: PreferenceStore):
    ann, bob = Client(store, "ann"), Client(store, "bob")
    assert ann.rank(headers={"X-CSRF-Token": bob.csrf}).status_code == 403


@pytest.mark.parametrize("path", ["/", "/login", "/item", "/static/rank.js"])
def test_reading_under_a_foreign_name_is_refused_too(store: PreferenceStore, path: str):
    assert Client(store).http.get(path, headers={"Host": "rebound.example"}).status_code == 400


def test_a_cookie_that_this_store_did_not_sign_is_nobody(store: PreferenceStore, tmp_path: Path):
    client = Client(store)
    name, value = next(iter(client.http.cookies.items()))
    payload, _, signature = value.partition(".")
    for forged in (f"{payload}x.{signature}", f"{payload}.{'0' * 64}", "", "é", f"{payload}."):
        fresh = TestClient(build_app(store), base_url=HOST, follow_redirects=False)
        assert fresh.get("/item", headers={"Cookie": f"{name}={forged}".encode("latin-1")}).status_code == 401
    assert TestClient(build_app(store), base_url=HOST).get("/item", headers={"Cookie": f"{name}={value}"}).is_success


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"{", 400),
        (b"[]", 400),
        (b"[" * 50_000, 400),
        (b'{"uuid": "uuid-00000001"}', 400),
        (b'{"item": "1 OR 1=1", "uuid": "uuid-00000001"}', 400),
        (b'{"item": 99999999999999999999, "uuid": "uuid-00000001", "ranks": [1, 2, 3]}', 400),
        (b'{"item": 1, "ranks": [1, 2, 3]}', 400),
        (b'{"item": 1, "uuid": "uuid-00000001", "ranks": [1, 2, 3], "annotator": "bob"}', 400),
        (b'{"item": 1, "uuid": "uuid-00000001", "verdict": "all_good"}', 400),
        (b'{"item": 1, "uuid": ["uuid-00000001"], "ranks": [1, 2, 3]}', 400),
        (b'{"item": 1, "uuid": "uuid-00000001", "verdict": {}, "ranks": [1, 2, 3]}', 400),
        (b'{"item": 1, "uuid": "uuid-00000001", "ranks": [1, 2, 99999999999999999999]}', 200),
        (b" " * 65_537, 413),
    ],
)
def test_broken_and_oversized_bodies(store: PreferenceStore, body: bytes, status: int):
    client = Client(store)
    assert client.item()["id"] == 1
    headers = {"Origin": HOST, "X-CSRF-Token": client.csrf, "Content-Type": "application/json"}
    assert client.http.post("/rank", content=body, headers=headers).status_code == status
    assert num_rows(store) == (status == 200)


def test_nobody_sees_who_wrote_what_or_what_others_said(store: PreferenceStore):
    zoe, bob = Client(store, "zoe-17"), Client(store, "bob")
    zoe.rank(comment="only for the record")
    for path in ("/", "/item", "/agreement"):
        page = bob.http.get(path).text
        assert not [word for word in ("secret", "only for the record", "zoe-17") if word in page]
    assert set(bob.item()) == {"id", "prompt", "completions"}
    assert bob.post("/rank", uuid="uuid-00000009", item=1, ranks=[1, 2, 3]).status_code == 400


@pytest.mark.parametrize("path", ["/static/../app.py", "/static/%2e%2e/app.py", "/static/..%2fapp.py", "/export/x"])
def test_paths_lead_nowhere(store: PreferenceStore, path: str):
    assert Client(store).http.get(path).status_code == 404


def test_headers(store: PreferenceStore):
    answer = Client(store).http.get("/login")
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'") and "unsafe" not in policy
    assert answer.headers["x-content-type-options"] == "nosniff" and answer.headers["cache-control"] == "no-store"
    cookie = answer.headers["set-cookie"].lower()
    assert "httponly" in cookie and "samesite=strict" in cookie and "secure" not in cookie
    secure = TestClient(build_app(store), base_url="https://127.0.0.1").get("/login").headers["set-cookie"].lower()
    assert "; secure" in secure


def test_without_a_name_there_is_nothing_to_see(store: PreferenceStore):
    client = Client(store, None)
    assert client.http.get("/").headers["location"] == "/login"
    assert client.http.get("/agreement").headers["location"] == "/login"
    assert client.http.get("/item").status_code == 401
    assert client.post("/rank", uuid="uuid-00000001", item=1, ranks=[1, 2, 3]).status_code == 401
    for name in ("", "  ", "x" * 41, "judge:len", "Judge: x", "a\nb", 7):
        assert client.post("/login", name=name).status_code == 400


def test_a_token_is_asked_for_and_cannot_be_guessed(store: PreferenceStore):
    client = Client(store, None, TOKEN)
    assert "Access token" in client.http.get("/login").text
    for _ in range(10):
        assert client.post("/login", name="eve", token="wrong").status_code == 403
    assert client.post("/login", name="eve", token=TOKEN).status_code == 429
    assert store.query("SELECT count(*) FROM audit WHERE event = 'login refused'")[0][0] == 10
    assert Client(store, "ann", TOKEN).item() is not None


def test_the_session_id_changes_at_the_login(store: PreferenceStore):
    client = Client(store, None)
    planted = client.csrf
    client.post("/login", name="ann")
    assert client.csrf_of("/") != planted


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"host": "0.0.0.0"}, "give a --token-file too"),
        ({"host": "0.0.0.0", "token": "short"}, "needs at least 16"),
        ({"port": 99999}, "--port 99999"),
    ],
)
def test_an_unsafe_address_is_refused(store: PreferenceStore, flags: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        serve(store, **flags)


def test_what_cannot_be_seen_is_made_visible():
    assert visible("a\u202eb\x00c\x7f\ttab\nline") == "a⟨U+202E⟩b␀c␡\ttab\nline"
    assert visible("plain é 漢字 👩\u200d🔬") == "plain é 漢字 👩\u200d🔬"
    shown = visible("x" * 1_000_000)
    assert len(shown) < MAX_SHOWN + 100 and shown.endswith("[… 900,000 more characters are not shown]")
