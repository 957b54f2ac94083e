"""From a call to its answer on the wire: the job, its events, and a client that may go away."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from strop.serving.answers import Answer, TextStream
from strop.serving.calls import Call
from strop.serving.fields import ApiError
from strop.serving.limits import Limits
from strop.serving.worker import DamagedError, Event, Failed, Finished, Job, QueueFullError, Sampled, Scored, Worker
from strop.types import Completion, TokenLogprobs


class ClientGoneError(Exception):
    """Nobody waits for the answer any more."""


class Delivery:
    """One call under way. stop() frees its slots, whatever the reason.

    Example: delivery.start(), then await delivery.whole(http), and delivery.stop() in a finally.
    """

    def __init__(self, call: Call, worker: Worker, limits: Limits) -> None:
        self.call, self._worker, self._limits = call, worker, limits
        self._events: asyncio.Queue[list[Event]] = asyncio.Queue()
        self._job = Job(
            served=call.served,
            requests=call.requests,
            is_generated=call.is_generated,
            prompt_top=call.prompt_top,
            has_tokens=call.is_streamed,
            loop=asyncio.get_running_loop(),
            sink=self._events.put_nowait,
        )
        self.num_left = self._job.cost
        self.completions: dict[tuple[int, int], Completion] = {}
        self.scores: dict[int, list[TokenLogprobs]] = {}

    def start(self) -> None:
        if self._job.cost > self._worker.capacity:
            raise ApiError(
                400, f"prompts times n come to {self._job.cost}, more than {self._worker.capacity}", param="n"
            )
        try:
            self._worker.submit(self._job)
        except QueueFullError as error:
            headers = {"Retry-After": str(error.retry_after)}
            message = "too many requests wait already; try again later"
            raise ApiError(429, message, code="queue_full", headers=headers) from None
        except DamagedError:
            raise ApiError(503, "this model has failed and answers no more", code="model_failed") from None

    def stop(self) -> None:
        if self.num_left:
            self._worker.cancel(self._job)

    async def events(self) -> AsyncIterator[Sampled | Finished | Scored]:
        """Every event until all is there. ApiError when the model fails or the time is over."""
        deadline = asyncio.get_running_loop().time() + self._limits.request_seconds
        while self.num_left:
            try:
                async with asyncio.timeout_at(deadline):
                    events = await self._events.get()
            except TimeoutError:
                raise ApiError(504, "the request took too long", code="timeout") from None
            for event in events:
                if isinstance(event, Failed):
                    self.num_left = 0
                    raise ApiError(500, "the model could not answer", code="model_failed")
                if isinstance(event, Finished):
                    self.completions[event.prompt, event.sample] = event.completion
                if isinstance(event, Scored):
                    self.scores[event.prompt] = event.reports
                self.num_left -= not isinstance(event, Sampled)
                yield event
            await asyncio.sleep(0)  # neither a full queue nor an eager socket gives way: others, and a hang-up, wait

    async def whole(self, http: HttpRequest) -> None:
        """Wait for all of it. ClientGoneError as soon as the client has hung up."""

        async def collect() -> None:
            async for _ in self.events():
                pass

        await _while_connected(collect(), http.receive)


class EventStream(Response):
    """Server-sent events. A client that leaves, or that makes no room for so long, ends the delivery."""

    def __init__(
        self, delivery: Delivery, answer: Answer, limits: Limits, *, on_end: Callable[[], None] = lambda: None
    ) -> None:
        """on_end is called after the last token, before the client hears of the end."""
        super().__init__(media_type="text/event-stream")
        self.headers["Cache-Control"] = "no-store"
        del self.headers["content-length"]
        self._delivery, self._answer, self._limits, self._on_end = delivery, answer, limits, on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def write(data: bytes, *, more: bool = True) -> None:
            async with asyncio.timeout(self._limits.stall_seconds):
                await send({"type": "http.response.body", "body": data, "more_body": more})

        async def deliver() -> None:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            try:
                async for chunk in stream_chunks(self._delivery, self._answer):
                    await write(_event(chunk))
            except ApiError as error:
                await write(_event(error.body()))
            self._on_end()
            await write(b"data: [DONE]\n\n")
            await write(b"", more=False)

        try:
            await _while_connected(deliver(), receive)
        except (ClientGoneError, TimeoutError, OSError):
            pass  # nobody is there to be told
        finally:
            self._delivery.stop()


async def stream_chunks(delivery: Delivery, answer: Answer) -> AsyncIterator[dict[str, Any]]:
    """The chunks of OpenAI's streams, those of several choices interleaved as they come."""
    call = delivery.call
    tokenizer, sampling = call.served.tokenizer, call.requests[0].sampling
    n = call.requests[0].num_samples
    texts = [TextStream(tokenizer, sampling.stop, sampling.stop_token_ids) for _ in range(len(call.requests) * n)]
    offsets = [0] * len(texts)
    for index in range(len(texts)):
        if call.is_chat:
            first = answer.chunk(index, "")
            first["choices"][0]["delta"] = {"role": "assistant", "content": ""}
            yield first
        elif call.has_echo and call.prompt_top is None:
            offsets[index] = len(call.prompts[index // n])
            yield answer.chunk(index, call.prompts[index // n])
    held: dict[int, list[Sampled | Finished]] = {}  # with echo and logprobs the prompt's come first
    async for event in delivery.events():
        if isinstance(event, Scored):
            prompt = call.requests[event.prompt].prompt_ids
            logprobs = answer.text_logprobs(prompt[:1], event.reports, 0)
            reason = None if call.is_generated else "length"
            for index in range(event.prompt * n, (event.prompt + 1) * n):
                offsets[index] = len(call.prompts[event.prompt])
                yield answer.chunk(index, call.prompts[event.prompt], logprobs=logprobs, finish_reason=reason)
            ready = held.pop(event.prompt, [])
        elif call.has_echo and call.prompt_top is not None and event.prompt not in delivery.scores:
            held.setdefault(event.prompt, []).append(event)
            continue
        else:
            ready = [event]
        for one in ready:
            if isinstance(one, Sampled):
                index = one.prompt * n + one.sample
                text = texts[index].push(one.token_id)
                logprobs = None
                if one.report is not None and call.is_chat:
                    logprobs = answer.chat_logprobs([one.report])
                elif one.report is not None:
                    logprobs = answer.text_logprobs(
                        (), [one.report], offsets[index] + texts[index].num_given - len(text)
                    )
                if text or logprobs is not None or call.has_token_ids:
                    yield answer.chunk(index, text, logprobs=logprobs, token_ids=[one.token_id])
            else:
                index = one.prompt * n + one.sample
                rest = texts[index].finish(one.completion)
                if rest:
                    yield answer.chunk(index, rest)
                yield answer.chunk(index, "", finish_reason=one.completion.finish_reason)
    if call.has_usage_chunk:
        num_tokens = sum(len(one.token_ids) for one in delivery.completions.values())
        yield {**answer.head(is_chunk=True), "choices": [], "usage": answer.usage(num_tokens)}


async def _while_connected(work: Any, receive: Receive) -> None:
    """Await the work; cancel it and raise ClientGoneError when the client hangs up first."""

    async def hang_up() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, gone = asyncio.ensure_future(work), asyncio.ensure_future(hang_up())
    try:
        await asyncio.wait((working, gone), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGoneError
        await working
    finally:
        for task in (working, gone):
            task.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8", "replace") + b"\n\n"


def error_response(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body(), error.status, headers=error.headers)
