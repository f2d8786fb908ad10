"""Every failure as an HTTP status and a body in OpenAI's form."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from idlm.errors import IdlmError, ResourceError

logger = logging.getLogger(__name__)

INVALID = "invalid_request_error"
SERVER = "server_error"


class ApiError(Exception):
    """A failure that a client is told about.

    Args:
        status: HTTP status.
        message: cause and remedy, for people.
        type: OpenAI's class of error.
        param: the field of the body at fault.
        code: a word for programs.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = INVALID,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, dict(headers or {})
        self.body = {"error": {"message": message, "type": type, "param": param, "code": code}}

    def content(self) -> bytes:
        """The body as JSON; ASCII, so that no text of a client can break it."""
        return json.dumps(self.body).encode("ascii")

    def response(self) -> Response:
        """The whole HTTP response."""
        return Response(self.content(), self.status, self.headers, "application/json")


def queue_full() -> ApiError:
    """More requests wait than the server lets wait."""
    return ApiError(
        429,
        "Too many requests are waiting; try again in a moment.",
        type="rate_limit_error",
        code="queue_full",
        headers={"Retry-After": "1"},
    )


def shutting_down() -> ApiError:
    """The server takes no more requests, or ended one because it stops."""
    return ApiError(
        503, "The server is shutting down; try another one.", type=SERVER, code="shutting_down"
    )


def timed_out(seconds: float) -> ApiError:
    """A request took longer than the server lets any take."""
    return ApiError(
        504,
        f"The request took longer than {seconds:g} seconds; ask for fewer tokens.",
        type=SERVER,
        code="timeout",
    )


def of(error: BaseException) -> ApiError:
    """What a client is told about ``error``; the cause of an internal one stays in the log."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ResourceError):
        return ApiError(503, str(error), type=SERVER, code="out_of_resources")
    if isinstance(error, IdlmError):
        return ApiError(400, str(error))
    return ApiError(
        500,
        "The server failed on this request; its log has the cause.",
        type=SERVER,
        code="internal_error",
    )


def install(app: FastAPI) -> None:
    """Make ``app`` answer every failure in OpenAI's form."""
    app.add_exception_handler(RequestValidationError, _on_invalid_body)
    app.add_exception_handler(HTTPException, _on_http_exception)
    for kind in (ApiError, IdlmError, Exception):
        app.add_exception_handler(kind, _on_exception)


def _on_invalid_body(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return _explain(error.errors()[0]).response()


def _explain(error: Mapping[str, Any]) -> ApiError:
    """A message for the first thing that is wrong with a body; without the body's own text."""
    kind = error["type"]
    if kind == "json_invalid":
        where, why = error["loc"][-1], error["ctx"]["error"]
        return ApiError(400, f"The body is not valid JSON: {why} at character {where}.")
    path = [str(part) for part in error["loc"][1:]]
    if not path:
        return ApiError(
            400,
            "The body must be a JSON object, with the header 'Content-Type: application/json'.",
        )
    name = ".".join(path)
    if kind == "extra_forbidden":
        message = f"There is no field {name!r}; leave it out."
        return ApiError(400, message, param=name, code="unknown_parameter")
    if kind == "none_required":
        message = f"{name!r} is not supported by this server; leave it out."
        return ApiError(400, message, param=name, code="unsupported_parameter")
    message = str(error["msg"]).removeprefix("Value error, ")
    return ApiError(400, f"{name}: {message}.".replace("..", "."), param=name)


def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = request.url.path
    messages = {
        400: "The body is not valid JSON in UTF-8.",
        404: f"There is nothing at {path}; /openapi.json lists what there is.",
        405: f"{path} does not take {request.method}; /openapi.json lists what it takes.",
    }
    message = messages.get(error.status_code, str(error.detail))
    return ApiError(error.status_code, message, headers=error.headers or {}).response()


def _on_exception(request: Request, error: Exception) -> Response:
    api_error = of(error)
    if api_error.status == 500:
        logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return api_error.response()
