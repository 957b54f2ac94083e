"""The ranking page: HTTP in front of a preference store."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Collection
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from strop.ranking.agreement import agreement
from strop.ranking.answers import SKIP_REASONS, Answer, ConflictError, submit, undo
from strop.ranking.queue import Presentation, next_item, progress
from strop.ranking.security import LOOPBACK, AccessToken, Guard, Session, Sessions, checked_name
from strop.ranking.store import PreferenceStore

HERE = Path(__file__).parent

MAX_SHOWN = 100_000
"""Characters of one text that the page shows: a browser lays out more only with pain, and nobody reads it."""


def build_app(
    store: PreferenceStore, *, allowed_hosts: Collection[str] = LOOPBACK, token: str | None = None
) -> Starlette:
    """The page as an ASGI application. token is asked for at the login; without one, a name is enough."""
    page = Page(store, token)
    return Starlette(
        routes=[
            Route("/", page.index),
            Route("/login", page.login_form, methods=["GET"]),
            Route("/login", page.login, methods=["POST"]),
            Route("/logout", page.logout, methods=["POST"]),
            Route("/item", page.item),
            Route("/rank", page.rank, methods=["POST"]),
            Route("/undo", page.undo, methods=["POST"]),
            Route("/agreement", page.agreement),
            Mount("/static", StaticFiles(directory=HERE / "static")),
        ],
        middleware=[Middleware(Guard, allowed_hosts=allowed_hosts)],
        exception_handlers={HTTPException: _error},
    )


class Page:
    """The handlers. Each finds out who asks, does one thing in the store, and answers with what the page needs next."""

    def __init__(self, store: PreferenceStore, token: str | None) -> None:
        self.store = store
        self.sessions = Sessions(store.meta("secret"))
        self.token = AccessToken(token)
        # Autoescape: whatever a template is given is text, never markup.
        self.templates = Environment(
            loader=FileSystemLoader(HERE / "templates"), autoescape=True, undefined=StrictUndefined
        )

    async def index(self, request: Request) -> Response:
        session = self._session(request)
        if session is None or not session.annotator:
            return RedirectResponse("/login", 303)
        return self._html("rank.html", session, reasons=SKIP_REASONS)

    async def login_form(self, request: Request) -> Response:
        session = self._session(request) or self.sessions.new()
        response = self._html("login.html", session, needs_token=self.token.is_needed)
        self._set_cookie(request, response, session)
        return response

    async def login(self, request: Request) -> Response:
        _, body = await self._posted(request, needs_name=False)
        if self.token.is_blocked:
            raise HTTPException(429, "too many wrong tokens; wait a minute")
        if not self.token.accepts(str(body.get("token", ""))):
            await run_in_threadpool(self.store.record, "login refused", "wrong token")
            raise HTTPException(403, "wrong token")
        name = _or_400(checked_name, body.get("name"))
        await run_in_threadpool(self.store.record, "login", name)
        response = JSONResponse({})
        # A new session id at every login: one that somebody planted before it is worth nothing after it.
        self._set_cookie(request, response, self.sessions.new(name))
        return response

    async def logout(self, request: Request) -> Response:
        await self._posted(request)
        response = JSONResponse({})
        response.delete_cookie(self.sessions.cookie, httponly=True, samesite="strict")
        return response

    async def item(self, request: Request) -> Response:
        session = self._session(request)
        if session is None or not session.annotator:
            raise HTTPException(401, "log in again")
        return JSONResponse(await run_in_threadpool(self._state, session.annotator))

    async def rank(self, request: Request) -> Response:
        session, body = await self._posted(request)
        presentation_id = body.pop("item", None)
        if not isinstance(presentation_id, int) or not 0 < presentation_id < 2**63:  # what SQLite can look for
            raise HTTPException(400, "item must be the number of one")
        if unknown := body.keys() - Answer.__dataclass_fields__.keys():
            raise HTTPException(400, f"unknown field {min(unknown)!r}")
        if "uuid" not in body or body.get("verdict") == "all_good":
            raise HTTPException(400, "uuid is missing" if "uuid" not in body else "no such verdict on this page")
        await run_in_threadpool(_or_400, submit, self.store, presentation_id, session.annotator, Answer(**body))
        return JSONResponse(await run_in_threadpool(self._state, session.annotator))

    async def undo(self, request: Request) -> Response:
        session, body = await self._posted(request)
        undone = await run_in_threadpool(_or_400, undo, self.store, session.annotator, body.get("uuid"))
        if undone is None:
            raise HTTPException(409, "there is nothing to take back")
        return JSONResponse(await run_in_threadpool(self._state, session.annotator))

    async def agreement(self, request: Request) -> Response:
        session = self._session(request)
        if session is None or not session.annotator:
            return RedirectResponse("/login", 303)
        report = await run_in_threadpool(agreement, self.store)
        # Everybody sees the figures of all together and their own; those of others by name are for --report.
        me = next((person for person in report.people if person.name == session.annotator), None)
        return self._html("agreement.html", session, report=report, me=me, reasons=SKIP_REASONS)

    def _state(self, annotator: str) -> dict[str, Any]:
        """What the page shows next. No id, name or order that would tell which policy wrote what."""
        item = next_item(self.store, annotator)
        counts = progress(self.store, annotator)
        return {
            "item": None if item is None else _item_as_json(item),
            "progress": {"mine": counts.mine, "done": counts.done, "wanted": counts.wanted},
        }

    def _session(self, request: Request) -> Session | None:
        return self.sessions.from_cookie(request.cookies.get(self.sessions.cookie))

    async def _posted(self, request: Request, *, needs_name: bool = True) -> tuple[Session, dict[str, Any]]:
        """The session and the JSON object of a POST whose CSRF token is that of its session."""
        session = self._session(request)
        if session is None or (needs_name and not session.annotator):
            raise HTTPException(401, "log in again")
        if not self.sessions.is_csrf_token(session, request.headers.get("x-csrf-token", "")):
            raise HTTPException(403, "the page is out of date or forged (CSRF token); reload it")
        try:
            body = json.loads(await request.body())
        except (ValueError, RecursionError):
            raise HTTPException(400, "broken JSON") from None
        if not isinstance(body, dict):
            raise HTTPException(400, "send a JSON object")
        return session, body

    def _html(self, template: str, session: Session, **values: Any) -> HTMLResponse:
        text = self.templates.get_template(template).render(
            csrf=self.sessions.csrf_token(session), annotator=session.annotator, **values
        )
        return HTMLResponse(text)

    def _set_cookie(self, request: Request, response: Response, session: Session) -> None:
        response.set_cookie(
            self.sessions.cookie,
            self.sessions.to_cookie(session),
            max_age=90 * 24 * 3600,
            httponly=True,
            samesite="strict",
            secure=request.url.scheme == "https",
        )


def visible(text: str) -> str:
    """The text with what a reader cannot see made visible: control characters as ␀, U+202E and its like as ⟨U+202E⟩.

    Invisible characters can make an answer look like another than the one that is ranked; line feeds and tabs stay.
    Cut at MAX_SHOWN characters, saying so.
    """
    shown = "".join(_visible_character(character) for character in text[:MAX_SHOWN])
    if len(text) > MAX_SHOWN:
        shown += f"\n\n[… {len(text) - MAX_SHOWN:,} more characters are not shown]"
    return shown


def _visible_character(character: str) -> str:
    code = ord(character)
    if character in "\n\t\u200d" or character.isprintable():
        return character
    if code < 32 or code == 127:
        return chr(0x2421 if code == 127 else 0x2400 + code)
    return f"⟨U+{code:04X}⟩" if unicodedata.category(character) in ("Cf", "Cc", "Cs", "Co", "Cn") else " "


def _item_as_json(item: Presentation) -> dict[str, Any]:
    messages = [{"role": "", "content": item.prompt}] if isinstance(item.prompt, str) else item.prompt
    return {
        "id": item.id,
        "prompt": [{"role": visible(str(one.get("role", ""))), "content": visible(_content(one))} for one in messages],
        "completions": [visible(text) for text in item.completions],
    }


def _content(message: Any) -> str:
    """The text of a turn, with any tool calls below it."""
    calls = message.get("tool_calls")
    text = str(message.get("content") or "")
    return f"{text}\n{json.dumps(calls, ensure_ascii=False, indent=2)}".strip() if calls else text


def _or_400(function: Any, *arguments: Any) -> Any:
    """function(*arguments); its ValueError is the sender's fault, its ConflictError a race that the sender lost."""
    try:
        return function(*arguments)
    except ValueError as error:
        raise HTTPException(400, str(error)) from error
    except ConflictError as error:
        raise HTTPException(409, str(error)) from error


async def _error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, error.status_code)
