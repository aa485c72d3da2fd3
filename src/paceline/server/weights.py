"""New weights over HTTP, for trainers: one call that does all, and the calls of vLLM 0.33 by their names.

`POST /update_weights` with a `source` is all of it: pause, have all ranks make the weights ready, put them in force,
and resume where the deployment was not paused. With `update_info`, as a trainer of vLLM's says it, the deployment is
paused already: what is in it is one of our sources, or is handed to vLLM's own weight-transfer engine in every rank;
`POST /finish_weight_update` puts it in force. Where a rank cannot have the weights, all keep those that they have.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from paceline.core.requests import SuspendMode, WeightAction
from paceline.engines.base import EngineError
from paceline.engines.weights import KINDS, kind_of
from paceline.net.frontend import FrontendShell
from paceline.server.errors import ApiError, bad, route
from paceline.server.fields import Decoder
from paceline.server.http import read_body
from paceline.server.responses import DEFAULT_VERSION

MOST_BYTES = 1 << 20
LONGEST_S = 86_400
Version = Annotated[str, Meta(min_length=1, max_length=128)]
Timeout = Annotated[float, Meta(gt=0, le=LONGEST_S)]


class UpdateRequest(Struct, forbid_unknown_fields=True):
    """The body of `/update_weights`. `source`: one of `path`, `shared_memory`, `address`. `mode`: what becomes of
    requests meanwhile, as in `/pause`. `kv`: whether what runs is computed anew. `timeout`: seconds.
    """

    source: dict[str, Any] | None = None
    update_info: dict[str, Any] | list[dict[str, Any]] | None = None
    weight_version: Version | None = None
    mode: Literal["keep", "wait", "abort"] = "keep"
    kv: Literal["recompute", "keep"] = "recompute"
    timeout: Timeout = 600.0


class InitRequest(Struct):
    """The body of `/init_weight_transfer_engine`."""

    init_info: dict[str, Any]


class FinishRequest(Struct):
    """The body of `/finish_weight_update`."""

    weight_version: Version | None = None
    timeout: Timeout = 600.0


class RenameRequest(Struct):
    """The body of `/update_weight_version`."""

    new_version: Version


Suspend = Callable[[FrontendShell, Any, float], Awaitable[object]]
OnAll = Callable[..., Awaitable[Response]]


class Updates:
    """The calls of one front-end. `suspend`: pauses or resumes; `on_all`: has each rank's engine do something."""

    def __init__(self, frontend: FrontendShell, suspend: Suspend, on_all: OnAll) -> None:
        self._frontend, self._suspend, self._on_all = frontend, suspend, on_all
        self._bodies = {
            kind: Decoder(kind) for kind in (UpdateRequest, InitRequest, FinishRequest, RenameRequest)
        }  # fmt: skip

    def routes(self, asked: Callable[[Any], Any]) -> list[Route]:
        """`asked`: has the log say who asks."""
        posts = {
            "init_weight_transfer_engine": self.init, "start_weight_update": self.start, "update_weights": self.update,
            "finish_weight_update": self.finish, "update_weight_version": self.rename, "abort_requests": self.abort,
        }  # fmt: skip
        return [
            *(route(f"/{name}", "POST", asked(handler)) for name, handler in posts.items()),
            route("/weight_info", "GET", self.info),
        ]

    @property
    def _paused(self) -> bool:
        return self._frontend.machine.suspension.number % 2 == 1

    @property
    def _version(self) -> str:
        weights = self._frontend.machine.weights
        return (weights.version if weights is not None else "") or DEFAULT_VERSION

    async def init(self, request: Request) -> Response:
        asked = await self._body(request, InitRequest)
        await self._on_all(self._frontend, "init_weight_transfer_engine", {"init_info": asked.init_info})
        return JSONResponse({"message": "Weight transfer initialized"})

    async def start(self, request: Request) -> Response:
        if not self._paused:
            raise ApiError(409, "the ranks are not paused: POST /pause first", code="not_paused")
        return JSONResponse({"message": "Weight update started"})

    async def update(self, request: Request) -> Response:
        asked = await self._body(request, UpdateRequest)
        if (asked.source is None) == (asked.update_info is None):
            raise bad("source", "must be there, or update_info, and not both")
        if asked.source is not None:
            return await self._whole(asked, asked.source)
        info = asked.update_info
        if isinstance(info, dict) and len(info) == 1 and set(info) <= set(KINDS):
            await self._stage(asked, info, commit=False)
            return JSONResponse({"message": "Weights updated"})
        weights = self._frontend.machine.weights
        if weights is None or not weights.under_way:
            await self._stage(asked, {"transfer": True}, commit=False)
        try:
            await self._on_all(self._frontend, "update_weights", {"update_info": info}, None, asked.timeout)
        except ApiError:
            # Some ranks have a part of it: all go back to what they had.
            await self._do("drop", asked.timeout)
            raise
        return JSONResponse({"message": "Weights updated"})

    async def finish(self, request: Request) -> Response:
        asked = await self._body(request, FinishRequest)
        await self._do("commit", asked.timeout, version=asked.weight_version or "")
        return JSONResponse({"message": "Weight update finished", "weight_version": self._version})

    async def rename(self, request: Request) -> Response:
        asked = await self._body(request, RenameRequest)
        await self._do("rename", 60.0, version=asked.new_version)
        return JSONResponse({"success": True, "new_version": asked.new_version})

    async def abort(self, request: Request) -> Response:
        was_paused = self._paused
        await self._suspend(self._frontend, "abort", 60.0)
        if not was_paused:
            await self._suspend(self._frontend, "resume", 60.0)
        return JSONResponse({"status": "aborted"})

    async def info(self, request: Request) -> Response:
        weights = self._frontend.machine.weights
        under_way = weights is not None and weights.under_way
        return JSONResponse({"weight_version": self._version, "updating": under_way})

    async def _whole(self, asked: UpdateRequest, source: dict[str, Any]) -> Response:
        was_paused, mode = self._paused, asked.mode
        _check(source)
        await self._pause(mode, asked.timeout)
        try:
            await self._stage(asked, source, commit=True)
        finally:
            if not was_paused:
                await self._suspend(self._frontend, "resume", 60.0)
        return JSONResponse({"message": "Weights updated", "weight_version": self._version})

    async def _pause(self, mode: SuspendMode, timeout_s: float) -> None:
        await self._suspend(self._frontend, mode, timeout_s)

    async def _stage(self, asked: UpdateRequest, source: dict[str, Any], *, commit: bool) -> None:
        _check(source)
        text = msgspec.json.encode(source).decode()
        await self._do(
            "stage", asked.timeout, version=asked.weight_version or "", source=text, keep_kv=asked.kv == "keep",
            commit=commit, timeout_ms=round(asked.timeout * 1000),
        )  # fmt: skip

    async def _do(self, action: WeightAction, timeout_s: float, **given: Any) -> None:
        """Raises ApiError where it is not done, naming who has not."""
        try:
            # The coordinator gives up at the time-out, and says so in a moment.
            done = await self._frontend.update(timeout_s + 5.0, action, **given)
        except TimeoutError:
            missing = ", ".join(map(str, self._frontend.machine.suspension.waiting_for)) or "the coordinator"
            text = f"the weights are not updated after {timeout_s:g} s; waiting for rank {missing}"
            raise ApiError(504, text, kind="server_error", code="timeout") from None
        if done.why and not done.number:
            raise ApiError(409, done.why, code="cannot_update")
        if done.why:
            text = f"all ranks keep the weights that they had: {done.why}"
            raise ApiError(500, text, kind="server_error", code="update_failed")

    async def _body(self, request: Request, kind: Any) -> Any:
        body = await read_body(request.receive, request.headers, MOST_BYTES)
        return self._bodies[kind].decode(body or b"{}")


def _check(source: dict[str, Any]) -> None:
    try:
        kind_of(source)
    except EngineError as error:
        raise ApiError(400, str(error), param="source") from None
