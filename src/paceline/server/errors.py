"""Errors as a client of the API sees them: the OpenAI shape, a status, and perhaps Retry-After."""

from __future__ import annotations

from starlette.responses import JSONResponse, Response

from paceline.core.requests import Output
from paceline.errors import PacelineError


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
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class Refused(PacelineError):
    """No rank serves the request, or none will go on with it.

    `reason` is one of `frontend_events.RefusalReason`, or "shutting-down"; `retry_after_s`: when to try again.
    """

    def __init__(self, reason: str, text: str, retry_after_s: int = 1) -> None:
        super().__init__(text)
        self.reason = reason
        self.retry_after_s = retry_after_s


def bad(param: str, text: str, code: str = "invalid_value") -> ApiError:
    """A 400 that names the field."""
    return ApiError(400, f"{param}: {text}", param=param, code=code)


def of_refusal(refusal: Refused) -> ApiError:
    """What the client of a refused request is told."""
    text, retry_after_s = str(refusal), refusal.retry_after_s
    match refusal.reason:
        case "unknown-rank":
            return ApiError(400, f"X-data-parallel-rank: {text}", param="X-data-parallel-rank", code="unknown_rank")
        case "overloaded":
            return ApiError(429, text, kind="rate_limit_error", code="overloaded", retry_after_s=retry_after_s)
        case _:
            code = refusal.reason.replace("-", "_")
            return ApiError(503, text, kind="server_error", code=code, retry_after_s=retry_after_s)


def of_output(output: Output) -> ApiError:
    """What the client of a request that failed at its rank is told."""
    return ApiError(500, output.error or "the rank failed", kind="server_error", code="engine_error")


def error_response(error: ApiError, request_id: str | None = None) -> Response:
    """The whole answer for an error."""
    headers: dict[str, str] = {}
    if request_id is not None:
        headers["x-request-id"] = request_id
    if error.retry_after_s is not None:
        headers["retry-after"] = str(error.retry_after_s)
    if error.status == 413:
        # The rest of the body is still coming and nobody will read it.
        headers["connection"] = "close"
    return JSONResponse(error.body, error.status, headers)
