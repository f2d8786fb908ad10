"""The HTTP application: routes, and how a request becomes a response or a stream of events."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

from fastapi import APIRouter, FastAPI, Request
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from starlette.responses import FileResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import Receive, Scope, Send

import idlm
from idlm.llm import LLM
from idlm.server import errors
from idlm.server.generation import Generation, Plan, Planner
from idlm.server.limits import ApiKey, BodyLimit, Limits
from idlm.server.logs import RequestLog
from idlm.server.metrics import CONTENT_TYPE, Metrics
from idlm.server.protocol import (
    ERRORS,
    ChatCompletion,
    ChatCompletionBody,
    ChatCompletionChunk,
    Completion,
    CompletionBody,
    Health,
    ModelCard,
    ModelList,
)
from idlm.server.replies import ChatReplies, CompletionReplies, Part, Replies
from idlm.server.worker import Worker

logger = logging.getLogger(__name__)

T = TypeVar("T")

STATIC = Path(str(files("idlm.server") / "static"))

_TEXT: dict[str, Any] = {"content": {"text/plain": {"schema": {"type": "string"}}}}
DONE = b"data: [DONE]\n\n"
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


@dataclass(frozen=True)
class Server:
    """What the routes work with."""

    llm: LLM
    name: str
    limits: Limits
    worker: Worker
    planner: Planner
    metrics: Metrics
    created: int

    @property
    def card(self) -> ModelCard:
        """The served model."""
        method = self.worker.method
        return ModelCard(
            id=self.name,
            created=self.created,
            max_model_len=self.llm.config.max_position_embeddings,
            layout=method.layout,
            stride=method.stride,
            verification=method.verification,
        )


def create_app(
    llm: LLM,
    name: str,
    limits: Limits | None = None,
    api_key: str | None = None,
    *,
    own_thread: bool = True,
) -> FastAPI:
    """An application that serves ``llm`` under ``name``; ``app.state.server`` is its `Server`.

    Args:
        own_thread: run the worker in a thread while the app runs; else the caller calls
            `Worker.run`, which the end of the app ends.
    """
    limits, metrics = limits or Limits(), Metrics()
    worker = Worker(llm, limits.max_waiting, metrics.job)
    planner = Planner(llm, worker.method, limits, name)
    server = Server(llm, name, limits, worker, planner, metrics, int(time.time()))
    metrics.watch(worker.load, lambda: worker.step_failures)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        if own_thread:
            worker.start()
        yield
        await asyncio.to_thread(worker.stop)

    app = FastAPI(
        title="idlm",
        version=idlm.__version__,
        description="OpenAI-compatible API of idlm.",
        lifespan=lifespan,
        docs_url=None,  # those pages load scripts from elsewhere
        redoc_url=None,
    )
    app.state.server = server
    app.include_router(_routes(server))
    app.mount("/static", _PageFiles(directory=STATIC))
    errors.install(app)
    app.openapi = lambda: _schema(app)  # type: ignore[method-assign]
    if api_key is not None:
        app.add_middleware(ApiKey, key=api_key)
    app.add_middleware(BodyLimit, limit=limits.max_body_bytes)
    app.add_middleware(RequestLog, metrics=metrics)
    return app


def _routes(server: Server) -> APIRouter:
    router = APIRouter()

    @router.get("/", include_in_schema=False)
    async def page() -> Response:
        return FileResponse(STATIC / "index.html", headers=PAGE_HEADERS)

    @router.post(
        "/v1/chat/completions",
        response_model=ChatCompletion,
        responses={200: _events(ChatCompletionChunk), **ERRORS},
    )
    async def chat_completions(body: ChatCompletionBody, request: Request) -> Response:
        """Answer a conversation."""
        plan = await asyncio.to_thread(server.planner.chat, body)
        replies = ChatReplies(body, server.name, server.llm.tokenizer)
        return await _answer(server, plan, replies, bool(body.stream), request)

    @router.post(
        "/v1/completions",
        response_model=Completion,
        responses={200: _events(Completion), **ERRORS},
    )
    async def completions(body: CompletionBody, request: Request) -> Response:
        """Continue one or several prompts."""
        plan = await asyncio.to_thread(server.planner.completion, body)
        replies = CompletionReplies(body, server.name, server.llm.tokenizer)
        return await _answer(server, plan, replies, bool(body.stream), request)

    @router.get("/v1/models", responses={401: ERRORS[401]})
    async def models() -> ModelList:
        """The served models: one."""
        return ModelList(data=[server.card])

    @router.get("/v1/models/{model:path}", responses={401: ERRORS[401], 404: ERRORS[404]})
    async def model(model: str) -> ModelCard:
        """The served model of this name."""
        server.planner.check_model(model)
        return server.card

    @router.get("/health", responses={503: {"model": Health, "description": "Shutting down."}})
    async def health() -> Response:
        """Whether the server takes requests."""
        load, draining = server.worker.load(), server.worker.draining
        state = Health(
            status="shutting down" if draining else "ok",
            running=load.running,
            waiting=load.waiting,
        )
        return _json(state, 503 if draining else 200)

    @router.get(
        "/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}}
    )
    async def metrics() -> Response:
        """Metrics in Prometheus's text format."""
        return Response(server.metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    return router


async def _answer(
    server: Server, plan: Plan, replies: Replies, stream: bool, request: Request
) -> Response:
    """The response to a plan: a stream, or one body when all of it is there."""
    generation = Generation(plan, server.worker, streamed=stream, detailed=replies.detailed)
    log = request.state.log
    if stream:
        # Refused before the status is sent; the stream then ends what was begun here.
        generation.submit()
        return EventStream(generation, replies, server.limits.timeout_seconds, log)
    try:
        generation.submit()
        async with asyncio.timeout(server.limits.timeout_seconds):
            body = await _unless_gone(_whole(generation, replies), request.receive)
    except TimeoutError:
        raise errors.timed_out(server.limits.timeout_seconds) from None
    finally:
        generation.close()
        log.update(generation.log)
    return Response(status_code=499) if body is None else _json(body)


async def _whole(generation: Generation, replies: Replies) -> BaseModel:
    parts = {job.index: Part(job.index) for job in generation.jobs}
    async for update in generation.updates():
        parts[update.job.index].add(replies.part(update))
    return replies.whole(list(parts.values()), generation)


async def _unless_gone(work: Awaitable[T], receive: Receive) -> T | None:
    """The result of ``work``, or None as soon as the client has gone."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = (asyncio.ensure_future(work), asyncio.ensure_future(gone()))
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0].done() else None
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class EventStream(Response):
    """Server-sent events of a generation, which ends when the client goes away."""

    media_type = "text/event-stream"

    def __init__(
        self, generation: Generation, replies: Replies, timeout: float, log: dict[str, Any]
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._generation, self._replies = generation, replies
        self._timeout, self._log = timeout, log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await _unless_gone(self._send_all(send), receive)
        finally:
            self._generation.close()
            self._log.update(self._generation.log)

    async def _send_all(self, send: Send) -> None:
        await send(
            {
                "type": "http.response.start",
                "status": self.status_code,
                "headers": self.raw_headers,
            }
        )
        try:
            # A client that does not read holds up `send`: that too ends by the timeout.
            async with asyncio.timeout(self._timeout):
                await self._send_events(send)
        except Exception as error:
            timeout = isinstance(error, TimeoutError)
            failure = errors.timed_out(self._timeout) if timeout else errors.of(error)
            if failure.status == 500:
                logger.error("a stream failed", exc_info=error)
            self._log["error"] = failure.body["error"]["code"]
            async with asyncio.timeout(1):
                await _send_part(send, b"data: " + failure.content() + b"\n\n")
        await send({"type": "http.response.body", "body": b""})

    async def _send_events(self, send: Send) -> None:
        async for updates in self._generation.batches():
            events = [e for u in updates for e in self._replies.events(u, self._generation)]
            if events:
                await _send_part(send, b"".join(map(_event, events)))
        last = self._replies.last_events(self._generation)
        await _send_part(send, b"".join(map(_event, last)) + DONE)


async def _send_part(send: Send, body: bytes) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": True})


def _event(model: BaseModel) -> bytes:
    return b"data: " + model.model_dump_json().encode() + b"\n\n"


def _json(model: BaseModel, status: int = 200) -> Response:
    return Response(model.model_dump_json(), status, media_type="application/json")


class _PageFiles(StaticFiles):
    """The files of the page, with headers that keep it from loading anything from elsewhere."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers.update(PAGE_HEADERS)
        return response


def _events(chunk: type[BaseModel]) -> dict[str, Any]:
    """For the schema: what a 200 is with ``stream``."""
    return {
        "description": f"One JSON object or, with `stream`, events of type `{chunk.__name__}`.",
        "content": {"text/event-stream": {}},
    }


def _schema(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI schema; without 422, which this server never answers."""
    if app.openapi_schema is None:
        schema = get_openapi(
            title=app.title, version=app.version, description=app.description, routes=app.routes
        )
        for path in schema["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        app.openapi_schema = schema
    return app.openapi_schema
