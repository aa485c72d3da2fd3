"""Control of the whole deployment over HTTP, with vLLM's paths, fields and modes.

`POST /pause`, `POST /resume`, `GET /is_paused`: pause all ranks and let them go on. `POST /scale_elastic_ep`, `GET`
and `POST /is_scaling_elastic_ep`: have more ranks or fewer. `POST /sleep`, `/wake_up`, `/reset_prefix_cache`,
`/collective_rpc`, `GET /is_sleeping`: have the ranks' engines do something; each answer says its rank.
`POST /revive`: start ranks again that were given up.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Annotated, Any, Generic, TypeVar

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from paceline.core.frontend.control import in_words
from paceline.core.messages import SuspensionState
from paceline.core.requests import ControlAction
from paceline.core.transaction import MODES
from paceline.net.frontend import FrontendShell
from paceline.server.errors import ApiError, bad, route
from paceline.server.fields import Decoder
from paceline.server.http import read_body
from paceline.server.weights import Updates

logger = logging.getLogger("paceline.front-end")

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
    ] = "keep"


class SleepQuery(PauseQuery):
    """What `/sleep` may be asked."""

    level: Annotated[int, Meta(ge=0, le=2, description="0: only pause; 1: weights to the CPU; 2: nothing is kept")] = 1


class RpcRequest(Struct, forbid_unknown_fields=True):
    """The body of `/collective_rpc`. `ranks`: those that are asked; all where it is left out."""

    method: Annotated[str, Meta(min_length=1, max_length=128)]
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    timeout: Annotated[float, Meta(gt=0, le=LONGEST_S)] | None = None
    ranks: list[Annotated[int, Meta(ge=0, lt=65536)]] | None = None


class ReviveQuery(ResumeQuery):
    """What `/revive` may be asked."""

    rank: (
        Annotated[int, Meta(ge=0, description="the rank to start again; all that are missing without it")] | UnsetType
    ) = UNSET


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


Q = TypeVar("Q", bound=Struct)


class Question(Generic[Q]):
    """What a call asks: in its query, as with vLLM, or in a JSON object as its body; where both, the query holds."""

    def __init__(self, kind: type[Q]) -> None:
        self._names = kind.__struct_fields__
        self._query, self._body = Decoder(kind), Decoder(kind, strict=True)

    async def of(self, request: Request) -> Q:
        """Raises ApiError naming the field."""
        body = await read_body(request.receive, request.headers, MOST_BYTES)
        query = self._query.convert(dict(request.query_params))
        said = self._body.decode(body if body.strip() else b"{}")
        named = [name for name in self._names if name in request.query_params]
        return msgspec.structs.replace(said, **{name: getattr(query, name) for name in named})


Handler = Callable[[Request], Awaitable[Response]]


def _asked(handler: Handler) -> Handler:
    """Has the log say who asks, and what came of it."""

    async def said(request: Request) -> Response:
        client = "somebody" if request.client is None else f"{request.client.host}:{request.client.port}"
        program = "".join(filter(str.isprintable, request.headers.get("user-agent", "unknown")))[:80]
        what = f"{request.url.path[1:]} {request.url.query}".strip()[:200]
        logger.info("%s: asked by %s (%s)", what, client, program)
        begin, came = time.monotonic(), "it failed"
        try:
            answer = await handler(request)
            came = f"status {answer.status_code}"
            return answer
        except ApiError as error:
            came = f"status {error.status}, {error}"
            raise
        finally:
            logger.info("%s: %s after %.3f s", what, came, time.monotonic() - begin)

    return said


def control_routes(frontend: FrontendShell, most_ranks: int) -> list[Route]:
    """The routes. `most_ranks`: more are refused."""
    pauses, resumes, scales = Question(PauseQuery), Question(ResumeQuery), Decoder(ScaleRequest)
    revives = Question(ReviveQuery)

    async def pause(request: Request) -> Response:
        asked = await pauses.of(request)
        mode = next((mode for mode in MODES if mode == asked.mode), None)
        if mode is None:
            raise bad("mode", f"must be keep, wait or abort, not {asked.mode[:40]!r}")
        usual_s = DRAIN_TIMEOUT_S if mode == "wait" else TIMEOUT_S
        return await _suspend(frontend, mode, usual_s if asked.timeout is UNSET else asked.timeout)

    async def resume(request: Request) -> Response:
        asked = await resumes.of(request)
        return await _suspend(frontend, "resume", TIMEOUT_S if asked.timeout is UNSET else asked.timeout)

    async def revive(request: Request) -> Response:
        asked = await revives.of(request)
        size = most_ranks if frontend.machine.scaling is None else frontend.machine.scaling.size
        if asked.rank is not UNSET and asked.rank >= size:
            raise bad("rank", f"must be 0 to {size - 1}, not {asked.rank}")
        timeout_s = TIMEOUT_S if asked.timeout is UNSET else asked.timeout
        try:
            revived = await frontend.revive(None if asked.rank is UNSET else asked.rank, timeout_s)
        except TimeoutError:
            missing = ", ".join(map(str, frontend.machine.missing))
            text = f"rank {missing} is not back after {timeout_s:g} s"
            raise ApiError(504, text, kind="server_error", code="timeout") from None
        return JSONResponse({"revived": revived, "missing": frontend.machine.missing})

    async def is_paused(request: Request) -> Response:
        state = frontend.machine.suspension
        return JSONResponse({"is_paused": state.number % 2 == 1 and state.settled} | describe(state))

    async def scale(request: Request) -> Response:
        try:
            asked = scales.decode(await read_body(request.receive, request.headers, MOST_BYTES))
        except ApiError as error:
            raise error if error.param or error.status != 400 else bad("body", str(error)) from None
        return await _scale(frontend, asked, most_ranks)

    async def is_scaling(request: Request) -> Response:
        state = frontend.machine.scaling
        words = {} if state is None else in_words(state)
        return JSONResponse({"is_scaling_elastic_ep": state is not None and state.under_way} | words)

    return [
        *engine_routes(frontend),
        *Updates(frontend, _suspend, _on_all).routes(_asked),
        route("/pause", "POST", _asked(pause)),
        route("/resume", "POST", _asked(resume)),
        route("/is_paused", "GET", is_paused),
        route("/revive", "POST", _asked(revive)),
        route("/scale_elastic_ep", "POST", _asked(scale)),
        route("/is_scaling_elastic_ep", "GET POST", is_scaling),
    ]


def engine_routes(frontend: FrontendShell) -> list[Route]:
    """What the ranks' engines do beside serving."""
    sleeps, rpcs = Question(SleepQuery), Decoder(RpcRequest)

    async def sleep(request: Request) -> Response:
        asked = await sleeps.of(request)
        mode = next((mode for mode in MODES if mode == asked.mode), None)
        if mode is None:
            raise bad("mode", f"must be keep, wait or abort, not {asked.mode[:40]!r}")
        timeout_s = DRAIN_TIMEOUT_S if asked.timeout is UNSET else asked.timeout
        was_paused = frontend.machine.suspension.number % 2 == 1
        await _suspend(frontend, mode, timeout_s)
        if not asked.level:
            return JSONResponse({"results": []})
        try:
            return await _on_all(frontend, "sleep", {"level": asked.level})
        except ApiError:
            # Engines that cannot sleep are not left paused.
            if not was_paused:
                await _suspend(frontend, "resume", TIMEOUT_S)
            raise

    async def wake_up(request: Request) -> Response:
        tags = request.query_params.getlist("tags") or None
        done = await _on_all(frontend, "wake_up", {"tags": tags})
        if tags is None:
            # Of parts that are awake nothing can be computed yet.
            await _suspend(frontend, "resume", TIMEOUT_S)
        return done

    async def reset_prefix_cache(request: Request) -> Response:
        running = request.query_params.get("reset_running_requests", "").lower() in {"1", "true"}
        return await _on_all(frontend, "reset_prefix_cache", {"reset_running_requests": running})

    async def collective_rpc(request: Request) -> Response:
        asked = rpcs.decode(await read_body(request.receive, request.headers, MOST_BYTES))
        arguments = {"method": asked.method, "args": asked.args, "kwargs": asked.kwargs, "timeout": asked.timeout}
        return await _on_all(frontend, "collective_rpc", arguments, asked.ranks, asked.timeout or TIMEOUT_S)

    async def is_sleeping(request: Request) -> Response:
        return await _on_all(frontend, "is_sleeping", {})

    return [
        route("/sleep", "POST", _asked(sleep)),
        route("/wake_up", "POST", _asked(wake_up)),
        route("/is_sleeping", "GET", is_sleeping),
        route("/reset_prefix_cache", "POST", _asked(reset_prefix_cache)),
        route("/collective_rpc", "POST", _asked(collective_rpc)),
    ]


async def _on_all(
    frontend: FrontendShell, method: str, arguments: dict[str, Any], ranks: Sequence[int] | None = None,
    timeout_s: float = TIMEOUT_S,
) -> Response:  # fmt: skip
    """Each rank's answer. Raises ApiError where one of them has none."""
    try:
        done = await frontend.call_ranks(method, msgspec.json.encode(arguments).decode(), ranks, timeout_s)
    except TimeoutError:
        text = f"{method}: not all ranks have answered within {timeout_s:g} s"
        raise ApiError(504, text, kind="server_error", code="timeout") from None
    if done.errors or not done.said:
        why = "; ".join(f"rank {rank}: {error}" for rank, error in sorted(done.errors.items())) or "no rank is ready"
        raise ApiError(500 if done.errors else 503, f"{method}: {why}", kind="server_error", code="engine_error")
    results = [{"rank": rank, "result": msgspec.json.decode(text)} for rank, text in sorted(done.said.items())]
    return JSONResponse({"results": results})


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
    missing = frontend.machine.missing
    if missing:
        text += f"; rank {', '.join(map(str, missing))} of them does not serve"
    return JSONResponse({"message": text, "before": done.before, "missing": missing} | in_words(state))
