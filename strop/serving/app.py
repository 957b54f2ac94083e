"""The routes: OpenAI's, a token-level one, and the page."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from strop.ranking.security import LOOPBACK
from strop.serving.answers import Answer
from strop.serving.calls import Call, parse_chat, parse_completion, parse_generate
from strop.serving.delivery import ClientGoneError, Delivery, EventStream, error_response
from strop.serving.fields import ApiError, Fields, parse_object
from strop.serving.guard import Guard
from strop.serving.limits import Limits
from strop.serving.models import ServedModel
from strop.serving.preferences import Preferences
from strop.serving.worker import Worker

STATIC = Path(__file__).parent / "static"

Parse = Callable[[dict[str, Any], Mapping[str, ServedModel], Limits], Call]


def build_app(
    models: Sequence[ServedModel],
    worker: Worker,
    *,
    limits: Limits,
    allowed_hosts: Collection[str] = LOOPBACK,
    key: str | None = None,
    preferences: Preferences | None = None,
) -> Starlette:
    """The server as an ASGI application; the worker must run for as long as it is used."""
    api = Api(models, worker, limits, preferences)
    return Starlette(
        routes=[
            Route("/", api.page),
            Route("/health", api.health),
            Route("/v1/models", api.list_models),
            Route("/v1/models/{name:path}", api.show_model),
            Route("/v1/completions", api.complete, methods=["POST"]),
            Route("/v1/chat/completions", api.chat, methods=["POST"]),
            Route("/inference/v1/generate", api.generate, methods=["POST"]),
            Route("/preferences", api.prefer, methods=["POST"]),
            Mount("/static", StaticFiles(directory=STATIC)),
        ],
        middleware=[Middleware(Guard, allowed_hosts=allowed_hosts, key=key, max_requests=limits.max_requests)],
        exception_handlers={ApiError: _api_error, HTTPException: _http_error, Exception: _internal_error},
    )


class Api:
    """The handlers. No message of an error from below goes out: those may name files."""

    def __init__(
        self, models: Sequence[ServedModel], worker: Worker, limits: Limits, preferences: Preferences | None
    ) -> None:
        self.models = {served.name: served for served in models}
        self.worker, self.limits, self.preferences = worker, limits, preferences

    async def page(self, request: Request) -> Response:
        return FileResponse(STATIC / "chat.html")

    async def health(self, request: Request) -> Response:
        damaged = self.worker.damaged
        return JSONResponse({"status": "failed" if damaged else "ok"}, 503 if damaged else 200)

    async def list_models(self, request: Request) -> Response:
        data = [self._described(served) for served in self.models.values()]
        return JSONResponse({"object": "list", "data": data, "can_prefer": self.preferences is not None})

    async def show_model(self, request: Request) -> Response:
        served = self.models.get(request.path_params["name"])
        if served is None:
            raise ApiError(404, "there is no such model", param="model", code="model_not_found")
        return JSONResponse(self._described(served))

    async def complete(self, request: Request) -> Response:
        return await self._answer(request, parse_completion)

    async def chat(self, request: Request) -> Response:
        return await self._answer(request, parse_chat)

    async def generate(self, request: Request) -> Response:
        return await self._answer(request, parse_generate, is_token_level=True)

    async def prefer(self, request: Request) -> Response:
        if self.preferences is None:
            raise ApiError(404, "this server keeps no preferences (--preferences STORE)")
        fields = Fields(await self._body(request))
        chosen, rejected = fields.text("chosen"), fields.text("rejected")
        fields.finish()
        return JSONResponse({"id": await run_in_threadpool(self.preferences.prefer, chosen, rejected)})

    async def _answer(self, request: Request, parse: Parse, *, is_token_level: bool = False) -> Response:
        body = await self._body(request)
        call = await run_in_threadpool(parse, body, self.models, self.limits)
        delivery, answer = Delivery(call, self.worker, self.limits), Answer(call)
        delivery.start()
        if call.is_streamed:
            return EventStream(delivery, answer, self.limits, on_end=lambda: self._keep(answer, delivery))
        try:
            await delivery.whole(request)
        except ClientGoneError:
            return Response(status_code=499)
        finally:
            delivery.stop()
        self._keep(answer, delivery)
        build = answer.generated if is_token_level else answer.whole
        return JSONResponse(await run_in_threadpool(build, delivery.completions, delivery.scores))

    def _keep(self, answer: Answer, delivery: Delivery) -> None:
        if self.preferences is not None and answer.call.is_chat and (0, 0) in delivery.completions:
            self.preferences.keep(answer.id, answer.call, delivery.completions[0, 0])

    async def _body(self, request: Request) -> dict[str, Any]:
        data = bytearray()
        try:
            async with asyncio.timeout(self.limits.stall_seconds):
                async for piece in request.stream():
                    data += piece
                    if len(data) > self.limits.max_body:
                        raise ApiError(413, f"the body has more than {self.limits.max_body} bytes")
        except TimeoutError:
            raise ApiError(408, "the body did not arrive in time") from None
        except ClientDisconnect:
            raise ApiError(400, "the body is incomplete") from None
        return parse_object(bytes(data))

    def _described(self, served: ServedModel) -> dict[str, Any]:
        return {
            "id": served.name,
            "object": "model",
            "created": served.created,
            "owned_by": "strop",
            "max_model_len": served.engine.max_length,
            "weights_sha256": served.weights_sha256,
            "checkpoint_sha256": served.content_hash,
            "write_protected": served.is_protected,
        }


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error_response(error)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return error_response(ApiError(error.status_code, error.detail, headers=error.headers))


async def _internal_error(request: Request, error: Exception) -> Response:
    return error_response(ApiError(500, "an error inside the server; its log says more"))
