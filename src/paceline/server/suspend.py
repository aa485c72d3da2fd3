"""`POST /pause`, `POST /resume`, `GET /is_paused`: suspending the whole deployment. Paths and modes as in vLLM."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from paceline.core.messages import SuspensionState
from paceline.core.requests import ControlAction
from paceline.core.standing import MODES
from paceline.server.client import Client
from paceline.server.errors import ApiError, bad, error_response

TIMEOUT_S = 60.0
DRAIN_TIMEOUT_S = 600.0
"""How long a call waits where it does not say: `wait` lasts as long as the longest answer."""
LONGEST_TIMEOUT_S = 86_400.0


def suspension_routes(client: Client) -> list[Route]:
    """The three routes."""

    async def pause(request: Request) -> Response:
        text = request.query_params.get("mode", "abort")
        mode = next((mode for mode in MODES if mode == text), None)
        if mode is None:
            raise bad("mode", f"must be keep, wait or abort, not {text[:40]!r}")
        return await _control(client, mode, _timeout_s(request, DRAIN_TIMEOUT_S if mode == "wait" else TIMEOUT_S))

    async def resume(request: Request) -> Response:
        return await _control(client, "resume", _timeout_s(request, TIMEOUT_S))

    async def is_paused(request: Request) -> Response:
        state = client.machine.suspension
        return JSONResponse({"is_paused": state.number % 2 == 1 and state.settled} | describe(state))

    return [
        control_route("/pause", "POST", pause),
        control_route("/resume", "POST", resume),
        control_route("/is_paused", "GET", is_paused),
    ]


def describe(state: SuspensionState) -> dict[str, object]:
    """The suspension, for a client."""
    suspended = state.number % 2 == 1
    words = ("pausing", "paused") if suspended else ("resuming", "resumed")
    return {
        "status": words[state.settled],
        "suspension": state.number,
        "mode": state.mode if suspended else None,
        "waiting_for": state.waiting_for,
    }


async def _control(client: Client, action: ControlAction, timeout_s: float) -> Response:
    verb = "resume" if action == "resume" else "pause"
    try:
        done = await client.control(action, timeout_s)
    except TimeoutError:
        missing = ", ".join(map(str, client.machine.suspension.waiting_for)) or "the coordinator"
        text = f"{verb} is not done after {timeout_s:g} s; waiting for rank {missing}. It stays asked for."
        raise ApiError(504, text, kind="server_error", code="timeout") from None
    if done.superseded:
        contrary = "pause" if action == "resume" else "resume"
        raise ApiError(409, f"a later call asked to {contrary}", code="superseded")
    return JSONResponse(describe(client.machine.suspension))


def _timeout_s(request: Request, default: float) -> float:
    text = request.query_params.get("timeout")
    if text is None:
        return default
    try:
        timeout_s = float(text)
    except ValueError:
        timeout_s = math.nan
    if not 0 < timeout_s <= LONGEST_TIMEOUT_S:
        raise bad("timeout", f"must be more than 0 and at most {LONGEST_TIMEOUT_S:g} seconds, not {text[:40]!r}")
    return timeout_s


def control_route(path: str, methods: str, answer: Callable[[Request], Awaitable[Response]]) -> Route:
    """A route of which `answer` may raise ApiError."""

    async def endpoint(request: Request) -> Response:
        request_id = request.headers.get("x-request-id")
        try:
            response = await answer(request)
        except ApiError as error:
            return error_response(error, request_id)
        if request_id is not None:
            response.headers["x-request-id"] = request_id
        return response

    return Route(path, endpoint, methods=methods.split())
