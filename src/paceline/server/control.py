"""Control of the whole deployment over HTTP, with vLLM's paths, fields and modes.

`POST /pause`, `POST /resume`, `GET /is_paused`: pause all ranks and let them go on. `POST /scale_elastic_ep`, `GET`
and `POST /is_scaling_elastic_ep`: have more ranks or fewer.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import UNSET, Meta, Struct, UnsetType
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from paceline.core.messages import SuspensionState
from paceline.core.pause import MODES
from paceline.core.requests import ControlAction
from paceline.net.frontend import FrontendShell
from paceline.server.errors import ApiError, bad, route
from paceline.server.http import read_body
from paceline.server.requests import Decoder

TIMEOUT_S = 60.0
DRAIN_TIMEOUT_S = 600.0
"""How long a call waits where it does not say: `wait` lasts as long as the longest answer."""
MARGIN_S = 30.0
"""How much longer than its parts scaling may take: the coordinator may be away, ranks have to join."""
MOST_BYTES = 65_536

LONGEST_S = 86_400


class ResumeQuery(Struct):
    """What `/resume` may be asked."""

    timeout: (
        Annotated[
            float,
            Meta(gt=0, le=LONGEST_S, description="seconds to wait; 60, or 600 with mode=wait, where it is left out"),
        ]
        | UnsetType
    ) = UNSET


class PauseQuery(ResumeQuery):
    """What `/pause` may be asked."""

    mode: Annotated[
        str,
        Meta(
            description="what becomes of requests: kept as they are, waited for, or aborted",
            extra_json_schema={"enum": [*MODES]},
        ),
    ] = "abort"


class ScaleRequest(Struct, forbid_unknown_fields=True):
    """The body of `/scale_elastic_ep`."""

    new_data_parallel_size: Annotated[
        int, Meta(ge=1, description="ranks that the deployment is to have, up to --max-data-parallel-size")
    ]
    drain_timeout: Annotated[
        float,
        Meta(
            ge=0, le=LONGEST_S, description="seconds that ranks which leave get; what they have then goes on at others"
        ),
    ] = 120.0
    startup_timeout: Annotated[
        float, Meta(ge=0, le=LONGEST_S, description="seconds that new ranks get to load, or all is as it was")
    ] = 300.0


def control_routes(frontend: FrontendShell, most_ranks: int) -> list[Route]:
    """The routes. `most_ranks`: more are refused."""
    pauses, resumes, scales = Decoder(PauseQuery), Decoder(ResumeQuery), Decoder(ScaleRequest)

    async def pause(request: Request) -> Response:
        asked = pauses.convert(dict(request.query_params))
        mode = next((mode for mode in MODES if mode == asked.mode), None)
        if mode is None:
            raise bad("mode", f"must be keep, wait or abort, not {asked.mode[:40]!r}")
        usual_s = DRAIN_TIMEOUT_S if mode == "wait" else TIMEOUT_S
        return await _suspend(frontend, mode, usual_s if asked.timeout is UNSET else asked.timeout)

    async def resume(request: Request) -> Response:
        asked = resumes.convert(dict(request.query_params))
        return await _suspend(frontend, "resume", TIMEOUT_S if asked.timeout is UNSET else asked.timeout)

    async def is_paused(request: Request) -> Response:
        state = frontend.machine.suspension
        return JSONResponse({"is_paused": state.number % 2 == 1 and state.settled} | describe(state))

    async def scale(request: Request) -> Response:
        try:
            asked = scales.decode(await read_body(request.receive, request.headers, MOST_BYTES))
        except ApiError as error:
            raise error if error.param or error.status != 400 else bad("body", "must be a JSON object") from None
        return await _scale(frontend, asked, most_ranks)

    async def is_scaling(request: Request) -> Response:
        state = frontend.machine.scaling
        words = {} if state is None else state.in_words()
        return JSONResponse({"is_scaling_elastic_ep": state is not None and state.under_way} | words)

    return [
        route("/pause", "POST", pause),
        route("/resume", "POST", resume),
        route("/is_paused", "GET", is_paused),
        route("/scale_elastic_ep", "POST", scale),
        route("/is_scaling_elastic_ep", "GET POST", is_scaling),
    ]


# Pausing ---------------------------------------------------------------------------------------


def describe(state: SuspensionState) -> dict[str, object]:
    """The pause, for a client."""
    suspended = state.number % 2 == 1
    words = ("pausing", "paused") if suspended else ("resuming", "resumed")
    return {
        "status": words[state.settled],
        "suspension": state.number,
        "mode": state.mode if suspended else None,
        "waiting_for": state.waiting_for,
    }


async def _suspend(frontend: FrontendShell, action: ControlAction, timeout_s: float) -> Response:
    verb, contrary = ("resume", "pause") if action == "resume" else ("pause", "resume")
    try:
        done = await frontend.control(action, timeout_s)
    except TimeoutError:
        missing = ", ".join(map(str, frontend.machine.suspension.waiting_for)) or "the coordinator"
        text = f"{verb} is not done after {timeout_s:g} s; waiting for rank {missing}. It stays asked for."
        raise ApiError(504, text, kind="server_error", code="timeout") from None
    if done.superseded:
        raise ApiError(409, f"a later call asked to {contrary}", code="superseded")
    return JSONResponse(describe(frontend.machine.suspension))


# Scaling ------------------------------------------------------------------------------------------


async def _scale(frontend: FrontendShell, asked: ScaleRequest, most_ranks: int) -> Response:
    size, drain_s, startup_s = asked.new_data_parallel_size, asked.drain_timeout, asked.startup_timeout
    if size > most_ranks:
        raise bad("new_data_parallel_size", f"must be 1 to {most_ranks} (--max-data-parallel-size), not {size}")
    try:
        done = await frontend.scale(size, drain_s, startup_s, drain_s + startup_s + MARGIN_S)
    except TimeoutError:
        text = "scaling has not ended; the coordinator or a rank is away. It stays asked for."
        raise ApiError(504, text, kind="server_error", code="timeout") from None
    if done.state is None:
        now = frontend.machine.scaling
        under_way = "" if now is None or not now.under_way else f": from {now.size} to {now.target} ranks"
        raise ApiError(409, f"the deployment is being scaled already{under_way}", code="scaling")
    state = done.state
    match state.outcome:
        case "refused":
            raise bad("new_data_parallel_size", state.why, code="cannot_scale")
        case "failed" | "late":
            text = f"rolled back to {state.size} ranks: {state.why}"
            raise ApiError(500 if state.outcome == "failed" else 504, text, kind="server_error", code="rolled_back")
    text = f"Scaled from {done.before} to {size} data parallel ranks"
    return JSONResponse({"message": text, "before": done.before} | state.in_words())
