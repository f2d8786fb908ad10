"""What one client may ask for, and the two checks that come before a body is read."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from idlm.server.errors import ApiError

PROTECTED = "/v1/"
DISCARD_SECONDS, DISCARD_BYTES = 5, 64 * 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds on requests.

    Attributes:
        max_body_bytes: of a request body; 413 beyond.
        max_prompt_tokens, max_output_tokens: None: what the model's context holds.
        max_choices: prompts times ``n`` of one request.
        max_waiting: texts that wait besides those that run; 429 beyond.
        timeout_seconds: for one request, waiting included; 504 beyond.
    """

    max_body_bytes: int = 2 * 1024 * 1024
    max_prompt_tokens: int | None = None
    max_output_tokens: int | None = None
    max_choices: int = 16
    max_waiting: int = 256
    timeout_seconds: float = 600.0


class BodyLimit:
    """ASGI middleware: refuses a body that is too large, whether or not it says so itself."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app, self._limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        declared = headers.get("content-length", "")
        if declared.isdigit() and int(declared) > self._limit:
            if "expect" not in headers:  # else the client has sent nothing yet
                await _discard(receive)
            await self._refusal().response()(scope, receive, send)
            return
        size = 0

        async def counted() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self._limit:
                raise _TooLargeError
            return message

        try:
            await self._app(scope, counted, send)
        except _TooLargeError:
            await _discard(receive)
            await self._refusal().response()(scope, receive, send)

    def _refusal(self) -> ApiError:
        return ApiError(
            413,
            f"The body is larger than {self._limit} bytes; send less.",
            code="body_too_large",
        )


async def _discard(receive: Receive) -> None:
    """Read on for a while: closing a connection on unread bytes would take the answer with it."""
    read = 0
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DISCARD_SECONDS):
            while read < DISCARD_BYTES:
                message = await receive()
                read += len(message.get("body", b""))
                if not message.get("more_body", False):
                    return


class _TooLargeError(BaseException):
    """Not an `Exception`: those that read the body make a 400 of every exception."""


class ApiKey:
    """ASGI middleware: the API wants ``Authorization: Bearer KEY``."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app, self._expected = app, f"bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith(PROTECTED):
            given = dict(scope["headers"]).get(b"authorization", b"")
            scheme, _, key = given.partition(b" ")
            if not hmac.compare_digest(scheme.lower() + b" " + key.strip(), self._expected):
                refusal = ApiError(
                    401,
                    "The API key is missing or wrong; send 'Authorization: Bearer KEY'.",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
                await refusal.response()(scope, receive, send)
                return
        await self._app(scope, receive, send)
