"""Errors as a client of the API sees them: the OpenAI shape, a status, and perhaps Retry-After."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route


class ApiError(Exception):
    """An error for the client. `body` is what it gets; `param` names the field that is wrong."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None,
        kind: str = "invalid_request_error", retry_after_s: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status = status
        self.param = param
        self.retry_after_s = retry_after_s
        self._made: tuple[Any, ...] = status, message, param, code, kind, retry_after_s
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    def __reduce__(self) -> tuple[Any, ...]:
        return _remade, self._made


def _remade(
    status: int, message: str, param: str | None, code: str | None, kind: str, retry_after_s: int | None
) -> ApiError:
    return ApiError(status, message, param=param, code=code, kind=kind, retry_after_s=retry_after_s)


def bad(param: str, text: str, code: str = "invalid_value") -> ApiError:
    """A 400 that names the field."""
    return ApiError(400, f"{param}: {text}", param=param, code=code)


def error_response(error: ApiError, request_id: str | None = None, body: object = None) -> Response:
    """The answer; `body` in another API's words."""
    headers: dict[str, str] = {}
    if request_id is not None:
        headers["x-request-id"] = request_id
    if error.retry_after_s is not None:
        headers["retry-after"] = str(error.retry_after_s)
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    if error.status in (401, 403, 413, 415):
        # The rest of the body is still coming and nobody will read it.
        headers["connection"] = "close"
    return JSONResponse(body or error.body, error.status, headers)


def route(path: str, methods: str, answer: Callable[[Request], Response | Awaitable[Response]]) -> Route:
    """A route of which `answer` may raise ApiError."""

    async def endpoint(request: Request) -> Response:
        request_id = request.headers.get("x-request-id")
        try:
            response = answer(request)
            response = response if isinstance(response, Response) else await response
        except ApiError as error:
            return error_response(error, request_id)
        if request_id is not None:
            response.headers["x-request-id"] = request_id
        return response

    return Route(path, endpoint, methods=methods.split())
