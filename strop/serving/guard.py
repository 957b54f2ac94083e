"""In front of every request: who asks, under which name, and whether there is room."""

from __future__ import annotations

from collections.abc import Collection

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from strop.ranking.security import SECURITY_HEADERS, AccessToken, hostname
from strop.serving.delivery import error_response
from strop.serving.fields import ApiError

OPEN = ("/", "/health", "/static/chat.js", "/static/chat.css", "/static/icon.svg")
"""What needs no key: the page asks for it by itself, and these show nothing."""


class Guard:
    """ASGI middleware. A foreign Host (DNS rebinding), a foreign Origin or a body that is not JSON is refused: any page
    on the web may send such requests to a server on this machine. With a key, everything but the page needs it."""

    def __init__(self, app: ASGIApp, *, allowed_hosts: Collection[str], key: str | None, max_requests: int) -> None:
        self.app = app
        self.allowed_hosts = {host.lower() for host in allowed_hosts}
        self.key = AccessToken(key)
        self.max_requests = max_requests
        self._num_open = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(SECURITY_HEADERS)
            await send(message)

        refusal = self._refusal(scope)
        if refusal is not None:
            await error_response(refusal)(scope, receive, send_with_headers)
            return
        self._num_open += 1
        try:
            await self.app(scope, receive, send_with_headers)
        finally:
            self._num_open -= 1

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers = Headers(scope=scope)
        host, origin = headers.get("host", ""), headers.get("origin")
        if hostname(host) not in self.allowed_hosts:
            return ApiError(400, "this server does not answer to that host name")
        if origin is not None and origin not in (f"http://{host}", f"https://{host}"):
            return ApiError(403, "requests from other sites' pages are refused")
        if scope["path"] not in OPEN and self.key.is_needed:
            scheme, _, given = headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not self.key.accepts(given.strip()):
                refused = {"WWW-Authenticate": "Bearer"}
                return ApiError(401, "send the API key as a bearer token", code="invalid_api_key", headers=refused)
        if scope["method"] == "POST" and headers.get("content-type", "").split(";")[0].strip() != "application/json":
            return ApiError(415, "send application/json")
        if self._num_open >= self.max_requests and scope["path"] != "/health":
            return ApiError(503, "too many requests at once", code="overloaded", headers={"Retry-After": "1"})
        return None
