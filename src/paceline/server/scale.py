"""`POST /scale_elastic_ep`, `GET` and `POST /is_scaling_elastic_ep`: more ranks or fewer. Names are vLLM's."""

from __future__ import annotations

import json
import math

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from paceline.core.messages import Scaling
from paceline.server.client import Client
from paceline.server.errors import ApiError, bad
from paceline.server.suspend import control_route

DRAIN_TIMEOUT_S = 120.0
STARTUP_TIMEOUT_S = 300.0
LONGEST_TIMEOUT_S = 86_400.0
MARGIN_S = 30.0
"""How much longer than that a call may take: the coordinator may be away, ranks have to join."""
MOST_BYTES = 65_536
FIELDS = ("new_data_parallel_size", "drain_timeout", "startup_timeout")


def scaling_routes(client: Client, most_ranks: int) -> list[Route]:
    """The routes. `most_ranks`: more are refused."""

    async def scale(request: Request) -> Response:
        fields = _fields(await _body(request))
        size = _size(fields.get("new_data_parallel_size"), most_ranks)
        drain_s = _seconds(fields, "drain_timeout", DRAIN_TIMEOUT_S)
        startup_s = _seconds(fields, "startup_timeout", STARTUP_TIMEOUT_S)
        try:
            done = await client.scale(size, drain_s, startup_s, drain_s + startup_s + MARGIN_S)
        except TimeoutError:
            text = "scaling has not ended; the coordinator or a rank is away. It stays asked for."
            raise ApiError(504, text, kind="server_error", code="timeout") from None
        if done.state is None:
            state = client.machine.scaling
            under_way = "" if state is None or not state.under_way else f": from {state.size} to {state.target} ranks"
            raise ApiError(409, f"the deployment is being scaled already{under_way}", code="scaling")
        _check(done.state)
        text = f"Scaled from {done.before} to {size} data parallel ranks"
        return JSONResponse({"message": text, "before": done.before} | done.state.in_words())

    async def is_scaling(request: Request) -> Response:
        state = client.machine.scaling
        words = {} if state is None else state.in_words()
        return JSONResponse({"is_scaling_elastic_ep": state is not None and state.under_way} | words)

    return [
        control_route("/scale_elastic_ep", "POST", scale),
        control_route("/is_scaling_elastic_ep", "GET POST", is_scaling),
    ]


def _check(state: Scaling) -> None:
    """Raise ApiError where the size is not what was asked for."""
    match state.outcome:
        case "refused":
            raise bad("new_data_parallel_size", state.why, code="cannot_scale")
        case "failed" | "late":
            text = f"rolled back to {state.size} ranks: {state.why}"
            raise ApiError(500 if state.outcome == "failed" else 504, text, kind="server_error", code="rolled_back")


async def _body(request: Request) -> bytes:
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > MOST_BYTES:
            raise ApiError(413, f"the body is larger than {MOST_BYTES} bytes", code="body_too_large")
    return body


def _fields(body: bytes) -> dict[str, object]:
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        raise bad("body", "must be a JSON object") from None
    if not isinstance(fields, dict):
        raise bad("body", "must be a JSON object")
    for name in fields:
        if name not in FIELDS:
            raise bad(str(name)[:40], f"is not a field; there are {', '.join(FIELDS)}")
    return fields


def _size(value: object, most: int) -> int:
    if value is None:
        raise bad("new_data_parallel_size", "is required", code="missing_field")
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        text = f"must be an integer, 1 to {most} (--max-data-parallel-size), not {json.dumps(value)[:40]}"
        raise bad("new_data_parallel_size", text)
    return value


def _seconds(fields: dict[str, object], name: str, default: float) -> float:
    value = fields.get(name, default)
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not good or not 0 <= value <= LONGEST_TIMEOUT_S:  # type: ignore[operator]
        text = f"must be 0 to {LONGEST_TIMEOUT_S:g} seconds, not {json.dumps(value)[:40]}"
        raise bad(name, text)
    return float(value)  # type: ignore[arg-type]
