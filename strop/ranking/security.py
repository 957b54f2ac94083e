"""Who may talk to the ranking page: sessions, CSRF tokens, and a guard in front of every request."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import secrets
import time
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOOPBACK = ("127.0.0.1", "localhost", "::1")

MAX_BODY = 64 * 1024

SECURITY_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}

NAME_LENGTH = 40


class Guard:
    """ASGI middleware: foreign Host, foreign Origin, oversized or mistyped bodies are refused before any handler runs,
    and every answer carries the security headers.

    The Host check is what stops DNS rebinding, where a foreign page's own name resolves to this machine: its requests
    are "same origin" for the browser, and only the name gives them away.
    """

    def __init__(self, app: ASGIApp, *, allowed_hosts: Collection[str]) -> None:
        self.app = app
        self.allowed_hosts = {host.lower() for host in allowed_hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        refusal = self._refusal(scope)

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(SECURITY_HEADERS)
            await send(message)

        answer = self.app if refusal is None else JSONResponse({"error": refusal[1]}, refusal[0])
        await answer(scope, receive, send_with_headers)

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if hostname(host) not in self.allowed_hosts:
            return 400, "this server does not answer to that host name"
        if scope["method"] in ("GET", "HEAD"):
            return None
        origin = headers.get("origin", "")
        if origin not in (f"http://{host}", f"https://{host}"):
            return 403, "the request does not come from this page (Origin)"
        if headers.get("content-type", "").split(";")[0].strip() != "application/json":
            return 415, "send application/json"
        if not headers.get("content-length", "").isdecimal():
            return 411, "send a Content-Length"
        if int(headers["content-length"]) > MAX_BODY:
            return 413, f"at most {MAX_BODY} bytes"
        return None


def hostname(host: str) -> str:
    """The name in a Host header, in lower case: "LocalHost:8417" -> "localhost", "[::1]:80" -> "::1"; "" if broken."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """Who sent a request. annotator is "" before the login."""

    id: str
    annotator: str


class Sessions:
    """Signed cookies: nothing is kept on the server, so that a restart logs nobody out."""

    def __init__(self, secret: str) -> None:
        self._key = bytes.fromhex(secret)
        # Cookies know no ports: two stores on one machine must not take each other's.
        self.cookie = f"strop-{hmac.new(self._key, b'cookie', hashlib.sha256).hexdigest()[:8]}"

    def new(self, annotator: str = "") -> Session:
        return Session(id=secrets.token_hex(16), annotator=annotator)

    def to_cookie(self, session: Session) -> str:
        payload = base64.urlsafe_b64encode(json.dumps([session.id, session.annotator]).encode()).decode()
        return f"{payload}.{self._sign('session', payload)}"

    def from_cookie(self, value: str | None) -> Session | None:
        """The session, or None for a cookie that is missing, broken or not signed by this store."""
        payload, _, signature = (value or "").partition(".")
        if not hmac.compare_digest(signature.encode(), self._sign("session", payload).encode()):
            return None
        session_id, annotator = json.loads(base64.urlsafe_b64decode(payload))
        return Session(id=session_id, annotator=annotator)

    def csrf_token(self, session: Session) -> str:
        return self._sign("csrf", session.id)

    def is_csrf_token(self, session: Session, token: str) -> bool:
        return hmac.compare_digest(token.encode("utf-8", "replace"), self.csrf_token(session).encode())

    def _sign(self, purpose: str, text: str) -> str:
        return hmac.new(self._key, f"{purpose}\0{text}".encode("utf-8", "replace"), hashlib.sha256).hexdigest()


class AccessToken:
    """The one secret that everybody who ranks is given, where the page is open to a network. Kept as a hash."""

    PER_MINUTE = 10
    """Wrong tries per minute, of everybody together, so that a token cannot be guessed."""

    def __init__(self, token: str | None) -> None:
        self._digest = None if token is None else hashlib.sha256(token.encode()).digest()
        self._failures: deque[float] = deque(maxlen=self.PER_MINUTE)

    @property
    def is_needed(self) -> bool:
        return self._digest is not None

    @property
    def is_blocked(self) -> bool:
        return len(self._failures) == self.PER_MINUTE and time.monotonic() - self._failures[0] < 60

    def accepts(self, token: str) -> bool:
        if self._digest is None:
            return True
        given = hashlib.sha256(token.encode("utf-8", "replace")).digest()
        is_right = hmac.compare_digest(given, self._digest)
        if not is_right:
            self._failures.append(time.monotonic())
        return is_right


def checked_name(name: object) -> str:
    """A name to rank under, without space around it; ValueError for one that is empty, long or a judge's."""
    if not isinstance(name, str) or not name.strip() or not name.isprintable():
        raise ValueError("a name is needed to tell your rankings from others'")
    name = name.strip()
    if len(name) > NAME_LENGTH:
        raise ValueError(f"a name has at most {NAME_LENGTH} characters")
    if name.lower().startswith("judge:"):
        raise ValueError("names that begin with 'judge:' belong to synthetic judges")
    return name
