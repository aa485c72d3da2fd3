"""The HTTP application: routes, the way of a request from its body to its answer, and errors.

The two endpoints that make text are plain ASGI, so that a streamed token passes through nothing but the
server; all else is Starlette's.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import msgspec
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response as PlainResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from paceline import __version__
from paceline.core.frontend.timeline import Timeline
from paceline.log import about
from paceline.net.frontend import FrontendShell
from paceline.server.control import control_routes
from paceline.server.dashboard import Dashboard
from paceline.server.embeddings import EmbeddingsRequest
from paceline.server.errors import ApiError, bad, error_response, route
from paceline.server.feeds import Feed, LoadsQuery
from paceline.server.fields import ChatCompletionRequest, CompletionRequest, Decoder
from paceline.server.guard import Guard
from paceline.server.http import ClientGone, ResponseWriter, read_body, unless_gone
from paceline.server.messages import MessagesRequest
from paceline.server.metrics import Metrics
from paceline.server.openai_responses import ResponsesFormat, ResponsesRequest
from paceline.server.openapi import openapi_document
from paceline.server.peers import Peers
from paceline.server.requests import FORMATS, Kind, Prepared, Preparer
from paceline.server.responses import DEFECT, CutOff, Phase, RawHeaders, Response
from paceline.server.tenants import Tenant, TenantNames, deadline_of, too_late, weights_of
from paceline.server.timelines import in_header, log_access, name_of, request_routes
from paceline.server.tokenize import tokenize_routes

if TYPE_CHECKING:
    from paceline.server.tracing import Tracing

logger = logging.getLogger("paceline.front-end")

BEAT_S = 5.0
"""A stream that has nothing to say for so long says a comment."""


class Api:
    """What the routes share. `draining` refuses new work while what runs finishes."""

    def __init__(
        self, frontend: FrontendShell, preparer: Preparer, guard: Guard, metrics: Metrics, peers: Peers,
        dashboard: Dashboard, started: int,
        max_body_bytes: int, most_ranks: int = 65_536, *, access_log: bool = False,
        tenant_weight: str | None = None, interval_s: float = 0.1, tracing: Tracing | None = None,
    ) -> None:  # fmt: skip
        self.peers = peers
        self.dashboard = dashboard
        self.loads = Feed(lambda: msgspec.json.encode(_loads(self)), interval_s)
        self.access_log, self.tracing = access_log, tracing
        self.metrics = metrics
        weights = weights_of(tenant_weight)
        self.tenants = TenantNames(guard.api_keys, weights)
        metrics.told_of_tenants(self.tenants.name_of, set(weights))
        self.frontend = frontend
        self.guard = guard
        self.preparer = preparer
        self.started = started
        self.max_body_bytes = max_body_bytes
        self.most_ranks = most_ranks
        self.draining = False
        self.running: set[asyncio.Task[Any]] = set()
        """Of requests for text, until they are answered; `writers`: those that write."""
        self.writers: set[ResponseWriter] = set()
        self._id_prefix = uuid.uuid4().hex[:20]
        self._ids = 0

    def new_id(self) -> str:
        """An id that no other request has: random for this front-end's life, then counted."""
        self._ids += 1
        return f"{self._id_prefix}{self._ids:012x}"

    async def wait_idle(self, timeout_s: float) -> None:
        """Until nothing runs, or for so long."""
        if self.running:
            await asyncio.wait(self.running, timeout=timeout_s)

    def beat(self) -> None:
        """Let those who wait for long know that they do; from here on again every `BEAT_S`."""
        for writer in list(self.writers):
            writer.beat()
        asyncio.get_running_loop().call_later(BEAT_S, self.beat)

    def end_streams(self) -> None:
        """End what has no end of its own; the server waits for all that it has begun."""
        self.loads.close()
        self.dashboard.feed.close()

    def cut_off(self) -> None:
        """End what still runs, with an error to its clients."""
        for writer in list(self.writers):
            writer.handle(CutOff())


class Endpoint:
    """What makes text for requests of a kind, as an ASGI application."""

    def __init__(self, api: Api, kind: Kind) -> None:
        self._api = api
        self._kind = kind

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        api = self._api
        request_id = headers.get("x-request-id") or api.new_id()
        timeline = Timeline(name_of(in_header(request_id)), scope["path"], _client_of(scope), time.monotonic())
        trace = timeline.trace = None if api.tracing is None else api.tracing.begin(headers)
        status = 0
        task = asyncio.current_task()
        assert task is not None
        api.running.add(task)
        try:
            if api.draining:
                text = "the server is shutting down"
                raise ApiError(503, text, kind="server_error", code="shutting_down", retry_after_s=5)
            tenant, deadline = api.tenants.of(headers), deadline_of(headers, timeline.received)
            prepared = await self._read_until(deadline, headers, receive, timeline)
            timeline.tokenized, timeline.also = time.monotonic(), prepared.form.response_id
            if trace is not None:
                trace.read(prepared)
            await self._answer(prepared, (tenant, deadline), request_id, timeline, scope, receive, send)
        except ClientGone as error:
            await self._fail(error, request_id, timeline)(scope, receive, send)
        except ApiError as error:
            status = error.status
            await self._fail(error, request_id, timeline)(scope, receive, send)
        except Exception:
            status = DEFECT.status
            logger.exception("internal error in request %s", timeline.name, extra=about(timeline.name))
            # An answer that has begun cannot become another one: uvicorn closes its connection.
            with contextlib.suppress(RuntimeError):
                await self._fail(DEFECT, request_id, timeline)(scope, receive, send)
        finally:
            api.running.discard(task)
            if not timeline.tokenized:
                now = time.monotonic()
                if api.access_log:
                    log_access(scope, status, now - timeline.received, timeline.name)
                if trace is not None:
                    trace.ended(timeline.kept(now, status))

    async def _read_until(self, deadline: float, headers: Headers, receive: Receive, timeline: Timeline) -> Prepared:
        if deadline == float("inf"):
            return await self._read(headers, receive, timeline)
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                return await self._read(headers, receive, timeline)
        except TimeoutError:
            raise too_late() from None

    async def _read(self, headers: Headers, receive: Receive, timeline: Timeline) -> Prepared:
        api = self._api
        body = await read_body(receive, headers, api.max_body_bytes)
        timeline.read = time.monotonic()
        # One of a response finds that again: nobody is to find another's by counting.
        identity = uuid.uuid4().hex if self._kind is ResponsesRequest else api.new_id()
        work = (self._kind, body, headers, identity)
        prepared = api.preparer.at_once(*work)
        if prepared is not None:
            return prepared
        return await unless_gone(receive, api.preparer.apart(*work))

    def _fail(self, error: ApiError, request_id: str, timeline: Timeline) -> PlainResponse:
        response = error_response(error, request_id, FORMATS[self._kind].error_body(error))
        response.raw_headers.extend(_headers_of(timeline))
        return response

    async def _answer(
        self, prepared: Prepared, due: tuple[Tenant, float], request_id: str, timeline: Timeline, scope: Scope,
        receive: Receive, send: Send,
    ) -> None:  # fmt: skip
        """Ask the ranks, and let the response be written; until it has been, wait for the client to go away."""
        api, frontend, task = self._api, self._api.frontend, asyncio.current_task()
        assert task is not None
        requests: list[int] = []
        response = Response(
            prepared.form, request_id, [part.opening_text for part in prepared.parts],
            stream=prepared.stream, explain=prepared.explain, headers=_headers_of(timeline),
        )  # fmt: skip
        tenant, deadline = due
        how = (prepared.rank, prepared.priority, prepared.session, prepared.explain, timeline,
               tenant.identity, tenant.weight, deadline)  # fmt: skip
        last: tuple[Sequence[int], list[int]] = [], []
        frontend.timelines.began(timeline)

        def submit(choice: int) -> int:
            nonlocal last
            part = prepared.parts[choice]
            if part.prompt_token_ids is not last[0]:
                # Choices of one prompt share its tokens.
                last = part.prompt_token_ids, list(part.prompt_token_ids)
            requests.append(frontend.submit(writer.handle, last[1], part.params, *how))
            return requests[-1]

        def keep() -> Future[None] | None:
            # The client may ask for it as soon as it has its end.
            form, store = prepared.form, api.preparer.store
            if isinstance(form, ResponsesFormat) and form.kept and store is not None:
                return store.put(form.kept, form.weight)
            return None

        writer = ResponseWriter(send, response, submit, task.cancel, keep)
        try:
            writer.submit_more()
            api.writers.add(writer)
            # The end of the response is a disconnect too: this task has nothing else to do.
            while (await receive())["type"] != "http.disconnect":
                pass
        except asyncio.CancelledError:
            if not response.given_up:
                raise
            text = "the client of request %s does not read its answer: given up"
            logger.warning(text, timeline.name, extra=about(timeline.name))
        finally:
            api.writers.discard(writer)
            writer.close()
            frontend.abandon(requests)
            # Where it was not sent whole, its client has gone away, or was given up.
            kept = frontend.ended(timeline, writer.status if response.phase is Phase.ENDED else 0)
            if api.access_log:
                log_access(scope, kept.status, (kept.ended or 0.0) - kept.received, kept.name, kept)
            if timeline.trace is not None:
                timeline.trace.ended(kept)


def _headers_of(timeline: Timeline) -> RawHeaders:
    """Of an answer: its trace, for who has asked."""
    return () if timeline.trace is None else timeline.trace.headers


def _client_of(scope: Scope) -> str:
    client = scope.get("client")
    return "" if client is None else f"{client[0]}:{client[1]}"


def _plain_routes(api: Api) -> list[Route]:
    document = json.dumps(openapi_document()).encode()
    return [
        route("/health", "GET", lambda _: _health(api)),
        route("/ping", "GET POST", lambda _: _health(api)),
        route("/livez", "GET", lambda _: JSONResponse({"status": "ok"})),
        route("/readyz", "GET", lambda _: _ready(api)),
        route("/startupz", "GET", lambda _: JSONResponse({"status": "ok"})),
        route("/load", "GET", lambda _: JSONResponse({"server_load": len(api.running)})),
        route("/server_info", "GET", lambda _: _server_info(api)),
        route("/loads", "GET", lambda request: _answer_loads(api, request)),
        route("/metrics", "GET", lambda _: _metrics(api)),
        route("/version", "GET", lambda _: JSONResponse({"version": __version__})),
        route("/v1/models", "GET", lambda _: _models(api)),
        route("/v1/models/{name:path}", "GET", lambda request: _models(api, request.path_params["name"])),
        route("/v1/responses/{name}", "GET DELETE", lambda request: _response(api, request)),
        route("/openapi.json", "GET", lambda _: PlainResponse(document, media_type="application/json")),
    ]


def _health(api: Api) -> PlainResponse:
    return JSONResponse({"status": _status(api)} | api.frontend.machine.statistics(), 200 if _serves(api) else 503)


def _serves(api: Api) -> bool:
    """Whether requests are answered. The others serve in place of a rank that hangs."""
    machine = api.frontend.machine
    return bool(machine.ready_ranks()) and not api.draining and all(stall.hangs for stall in machine.stalls)


def _status(api: Api) -> str:
    machine = api.frontend.machine
    if api.draining:
        return "draining"
    for hangs, text in ((False, "holds the group up"), (True, "hangs in a step")):
        if named := [str(stall.rank) for stall in machine.stalls if stall.hangs is hangs]:
            return f"rank {', '.join(named)} {text}"
    return "ok" if machine.ready_ranks() else "no rank is ready"


def _metrics(api: Api) -> PlainResponse:
    text, kind = api.metrics.text()
    return PlainResponse(text, headers={"content-type": kind})


def _loads(api: Api) -> dict[str, Any]:
    said = api.frontend.machine.statistics()
    shown = {name: said[name] for name in ("queued", "missing", "suspension")}
    return {"ranks": api.frontend.machine.loads(), "status": _status(api)} | shown


_loads_queries = Decoder(LoadsQuery)


def _answer_loads(api: Api, request: Request) -> PlainResponse:
    asked = _loads_queries.convert(dict(request.query_params))
    if asked.stream and not api.draining:
        return api.loads.response(asked.interval)
    return JSONResponse(_loads(api))


def _ready(api: Api) -> PlainResponse:
    """Whether a request that comes now would be served: the probe after which traffic is sent here, or not."""
    machine, pause = api.frontend.machine, api.frontend.machine.suspension
    reasons = {
        "draining": api.draining,
        "paused": pause.number % 2 == 1,
        "no rank is ready": not machine.statistics()["ready"],
    }
    why = [reason for reason, holds in reasons.items() if holds]
    return JSONResponse({"status": ", ".join(why) or "ok"}, 503 if why else 200)


def _server_info(api: Api) -> PlainResponse:
    models = api.preparer.models
    said = {"version": __version__, "models": models.names, "max_model_len": models.limit}
    said["task"] = "embed" if models.embedding_size else "generate"
    return JSONResponse(said | {"supports": sorted(models.supports), "sampling_defaults": dict(models.defaults)})


def _models(api: Api, name: str | None = None) -> PlainResponse:
    models = api.preparer.models
    entries = [
        {
            "id": one,
            "object": "model",
            "created": api.started,
            "owned_by": "paceline",
            "root": models.names[0],
            "parent": None,
            "max_model_len": models.limit,
        }
        for one in models.names
    ]
    if name is None:
        return JSONResponse({"object": "list", "data": entries})
    if name not in models.names:
        raise ApiError(404, f"model: {name[:200]!r} is not served here", param="model", code="model_not_found")
    return JSONResponse(entries[models.names.index(name)])


def _response(api: Api, request: Request) -> PlainResponse:
    """One that is kept: show it, or forget it."""
    name, store = request.path_params["name"], api.preparer.store
    if request.query_params.get("stream", "false").lower() != "false":
        raise bad("stream", "a response that is kept is not streamed again", "unsupported")
    if request.method == "DELETE" and store is not None and store.delete(name):
        return JSONResponse({"id": name, "object": "response", "deleted": True})
    kept = None if store is None else store.shown(name)
    if kept is None:
        raise ApiError(404, f"no response {name[:80]!r} is kept here", param="response_id", code="not_found")
    return PlainResponse(kept, media_type="application/json")


async def _on_http_exception(request: Request, error: Exception) -> PlainResponse:
    assert isinstance(error, HTTPException)
    texts = {404: f"there is no {request.url.path} here", 405: f"{request.method} is not allowed here"}
    code = "method_not_allowed" if error.status_code == 405 else "not_found"
    api_error = ApiError(error.status_code, texts.get(error.status_code, error.detail), code=code)
    response = error_response(api_error, request.headers.get("x-request-id"))
    response.headers.update(error.headers or {})
    return response


async def _on_defect(request: Request, error: Exception) -> PlainResponse:
    logger.error("internal error", exc_info=error)
    return error_response(DEFECT)


def _logged(app: ASGIApp) -> ASGIApp:
    """The same with a line of the access log for each request. Those that make text have their own way: here every
    part of an answer costs a call more.
    """

    async def logged(scope: Scope, receive: Receive, send: Send) -> None:
        begin, status = time.monotonic(), 0

        async def watched(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await app(scope, receive, watched)
        finally:
            name = name_of(in_header(Headers(scope=scope).get("x-request-id") or ""))
            log_access(scope, status, time.monotonic() - begin, name)

    return logged


def build_app(api: Api) -> ASGIApp:
    """The application of one front-end."""
    endpoints: dict[str, ASGIApp] = {
        "/v1/completions": Endpoint(api, CompletionRequest),
        "/v1/chat/completions": Endpoint(api, ChatCompletionRequest),
        "/v1/messages": Endpoint(api, MessagesRequest),
        "/v1/responses": Endpoint(api, ResponsesRequest),
        "/v1/embeddings": Endpoint(api, EmbeddingsRequest),
    }
    # Starlette wraps `send` three times for its errors, and each token would pay for it.
    rest = Starlette(
        routes=[
            *(Route(path, app, methods=["POST"]) for path, app in endpoints.items()),
            *_plain_routes(api),
            *tokenize_routes(api.preparer, api.max_body_bytes),
            *request_routes(api.peers),
            *api.dashboard.routes(),
            *control_routes(api.frontend, api.most_ranks),
        ],
        exception_handlers={HTTPException: _on_http_exception, 500: _on_defect},
    )

    others: ASGIApp = _logged(rest) if api.access_log else rest

    async def application(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        refused = api.guard.refusal(scope)
        if refused is not None:
            # The body is not read: who may not ask is not to cost us its size.
            request_id = Headers(scope=scope).get("x-request-id")
            await error_response(refused, request_id)(scope, receive, send)
            if api.access_log:
                log_access(scope, refused.status, 0.0, name_of(in_header(request_id or "")))
            return
        endpoint = endpoints.get(scope["path"]) if scope["method"] == "POST" else None
        await (endpoint or others)(scope, receive, send)

    if not api.guard.origins:
        return application
    origins = list(api.guard.origins)
    shared = CORSMiddleware(application, allow_origins=origins, allow_methods=["*"], allow_headers=["*"],
                            expose_headers=["x-request-id", "x-data-parallel-rank"])  # fmt: skip

    async def for_pages(scope: Scope, receive: Receive, send: Send) -> None:
        # Only a page's request names where it comes from, and only its answer goes through one wrapper more.
        asks = scope["type"] == "http" and any(name == b"origin" for name, _ in scope["headers"])
        await (shared if asks else application)(scope, receive, send)

    return for_pages
