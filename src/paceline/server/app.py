"""The HTTP application: routes, the way of a request from its body to its answer, and errors.

The two endpoints that make text are plain ASGI, so that a streamed token passes through nothing but the
server; all else is Starlette's.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import uuid
from typing import Any

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response as PlainResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from paceline import __version__
from paceline.net.frontend import FrontendShell
from paceline.server.control import control_routes
from paceline.server.errors import ApiError, error_response, route
from paceline.server.http import ResponseWriter, read_body
from paceline.server.openapi import openapi_document
from paceline.server.requests import (
    ChatCompletionRequest,
    CompletionRequest,
    Decoder,
    GenerationRequest,
    Models,
    Prepared,
    prepare,
)
from paceline.server.responses import ENDED, CutOff, Response, Submitted

logger = logging.getLogger("paceline.front-end")

DEFECT = ApiError(500, "internal error", kind="server_error", code="internal_error")


class Api:
    """What the routes share. `draining` refuses new work while what runs finishes."""

    def __init__(
        self, frontend: FrontendShell, models: Models, started: int, max_body_bytes: int, most_ranks: int = 65_536
    ) -> None:
        self.frontend = frontend
        self.models = models
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

    def cut_off(self) -> None:
        """End what still runs, with an error to its clients."""
        for writer in list(self.writers):
            writer.handle(CutOff())


class Endpoint:
    """`/v1/completions` or `/v1/chat/completions`, as an ASGI application."""

    def __init__(self, api: Api, kind: type[GenerationRequest]) -> None:
        self._api = api
        self._decode = Decoder(kind).decode

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        api = self._api
        request_id = headers.get("x-request-id") or api.new_id()
        task = asyncio.current_task()
        assert task is not None
        api.running.add(task)
        try:
            if api.draining:
                text = "the server is shutting down"
                raise ApiError(503, text, kind="server_error", code="shutting_down", retry_after_s=5)
            request = self._decode(await read_body(receive, headers, api.max_body_bytes))
            prepared = prepare(request, headers, api.models, api.new_id())
            await self._answer(prepared, request_id, receive, send, task)
        except ApiError as error:
            await error_response(error, request_id)(scope, receive, send)
        except Exception as error:
            logger.error("internal error: %s: %s", type(error).__name__, error)
            logger.debug("traceback", exc_info=True)
            # An answer that has begun cannot become another one: uvicorn closes its connection.
            with contextlib.suppress(RuntimeError):
                await error_response(DEFECT, request_id)(scope, receive, send)
        finally:
            api.running.discard(task)

    async def _answer(
        self, prepared: Prepared, request_id: str, receive: Receive, send: Send, task: asyncio.Task[Any]
    ) -> None:
        """Ask the ranks, and let the response be written; until it has been, wait for the client to go away."""
        api, frontend = self._api, self._api.frontend
        requests: list[int] = []
        response = Response(
            prepared.form, request_id, [part.opening_text for part in prepared.parts], prepared.prompt_tokens,
            stream=prepared.stream, with_usage=prepared.with_usage, explain=prepared.explain,
        )  # fmt: skip
        writer = ResponseWriter(send, response, task.cancel)
        how = (prepared.rank, prepared.priority, prepared.session, prepared.explain)
        try:
            for part in prepared.parts:
                requests.append(frontend.submit(writer.handle, part.prompt_token_ids, part.params, *how))
                if response.phase is ENDED:
                    break
            writer.handle(Submitted(requests))
            api.writers.add(writer)
            # The end of the response is a disconnect too: this task has nothing else to do.
            while (await receive())["type"] != "http.disconnect":
                pass
        except asyncio.CancelledError:
            if not response.given_up:
                raise
            logger.warning("a client does not read its answer: given up")
        finally:
            api.writers.discard(writer)
            writer.close()
            frontend.abandon(requests)


def _plain_routes(api: Api) -> list[Route]:
    document = json.dumps(openapi_document()).encode()
    machine = api.frontend.machine
    return [
        route("/health", "GET", lambda _: _health(api)),
        route("/loads", "GET", lambda _: JSONResponse({"ranks": machine.loads(), "queued": machine.queued()})),
        route("/version", "GET", lambda _: JSONResponse({"version": __version__})),
        route("/v1/models", "GET", lambda _: JSONResponse({"object": "list", "data": [_model(api)]})),
        route("/openapi.json", "GET", lambda _: PlainResponse(document, media_type="application/json")),
    ]


def _health(api: Api) -> PlainResponse:
    statistics = api.frontend.machine.statistics()
    stalls = api.frontend.machine.stalls
    healthy = bool(statistics["ready"]) and not api.draining and not stalls
    if api.draining:
        status = "draining"
    elif stalls:
        status = f"rank {', '.join(str(stall.rank) for stall in stalls)} holds the group up"
    else:
        status = "ok" if healthy else "no rank is ready"
    return JSONResponse({"status": status} | statistics, 200 if healthy else 503)


def _model(api: Api) -> dict[str, Any]:
    return {
        "id": api.models.name,
        "object": "model",
        "created": api.started,
        "owned_by": "paceline",
        "max_model_len": api.models.limit,
    }


async def _on_http_exception(request: Request, error: Exception) -> PlainResponse:
    assert isinstance(error, HTTPException)
    texts = {404: f"there is no {request.url.path} here", 405: f"{request.method} is not allowed here"}
    code = "method_not_allowed" if error.status_code == 405 else "not_found"
    api_error = ApiError(error.status_code, texts.get(error.status_code, error.detail), code=code)
    response = error_response(api_error, request.headers.get("x-request-id"))
    response.headers.update(error.headers or {})
    return response


async def _on_defect(request: Request, error: Exception) -> PlainResponse:
    logger.error("internal error: %s: %s", type(error).__name__, error)
    return error_response(DEFECT)


def build_app(api: Api) -> ASGIApp:
    """The application of one front-end."""
    endpoints: dict[str, ASGIApp] = {
        "/v1/completions": Endpoint(api, CompletionRequest),
        "/v1/chat/completions": Endpoint(api, ChatCompletionRequest),
    }
    # Starlette wraps `send` three times for its errors, and each token would pay for it.
    rest = Starlette(
        routes=[
            *(Route(path, app, methods=["POST"]) for path, app in endpoints.items()),
            *_plain_routes(api),
            *control_routes(api.frontend, api.most_ranks),
        ],
        exception_handlers={HTTPException: _on_http_exception, 500: _on_defect},
    )

    async def application(scope: Scope, receive: Receive, send: Send) -> None:
        endpoint = endpoints.get(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        await (endpoint or rest)(scope, receive, send)

    return application
