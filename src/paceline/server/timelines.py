"""`GET /requests` and `/requests/{id}`: why a request was slow, of any front-end's requests; and the access log.

What is kept of each request is `core/frontend/timeline.py`'s to say. Front-ends keep their own, so whichever is asked
asks the others of its node (`peers.py`).
"""

from __future__ import annotations

import logging
import time
from hashlib import blake2b
from typing import Annotated, Any
from urllib.parse import quote

from msgspec import Meta, Struct
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Scope

from paceline.core.frontend.timeline import Kept, Timelines, shown
from paceline.log import about
from paceline.server.errors import ApiError, route
from paceline.server.fields import Decoder
from paceline.server.peers import Peers

access_logger = logging.getLogger("paceline.access")

NAME_CHARACTERS = 128
PLAIN = "".join(map(chr, range(0x20, 0x7F))).replace("%", "")


def name_of(given: str) -> str:
    """What a request is called everywhere: what its client calls it, in one word of a log. Another name for each: what
    is no ASCII is written as in an address, and what is too long ends in a hash of the whole.
    """
    name = given if given.isascii() and given.isprintable() else quote(given, safe=PLAIN, errors="replace")
    if len(name) > NAME_CHARACTERS:
        name = f"{name[: NAME_CHARACTERS - 17]}~{blake2b(name.encode(), digest_size=8).hexdigest()}"
    return name


def in_header(given: str) -> str:
    """A header's text as its client has it: what is no ASCII came as UTF-8, and is read as Latin-1."""
    try:
        return given.encode("latin-1").decode()
    except UnicodeError:
        return given


class RequestsQuery(Struct):
    """What `/requests` may be asked."""

    limit: Annotated[int, Meta(ge=1, le=1000, description="how many")] = 50
    slowest: Annotated[bool, Meta(description="the slowest of the last hour, and not the newest")] = False


class Found:
    """This front-end's part of the answers. `index`: which one it is."""

    def __init__(self, timelines: Timelines, index: int) -> None:
        self._timelines, self._index = timelines, index

    def find(self, name: str) -> list[dict[str, Any]]:
        return self._shown(self._timelines.find(name))

    def recent(self, limit: int, slowest: bool) -> list[dict[str, Any]]:
        return self._shown(self._timelines.slowest(limit) if slowest else self._timelines.newest(limit))

    def _shown(self, kept: list[Kept]) -> list[dict[str, Any]]:
        now, wall = time.monotonic(), time.time()
        return [shown(one, now, wall) | {"front_end": self._index} for one in kept]


def request_routes(peers: Peers) -> list[Route]:
    queries = Decoder(RequestsQuery)

    async def one(request: Request) -> Response:
        name = name_of(request.path_params["name"])
        found = [entry for entries in await peers.ask("find", name=name) for entry in entries]
        if not found:
            text = f"no request {name!r} is known: it was none, or there have been too many since"
            raise ApiError(404, text, param="request_id", code="not_found")
        return JSONResponse({"requests": sorted(found, key=lambda entry: -entry["received_at"])})

    async def recent(request: Request) -> Response:
        asked = queries.convert(dict(request.query_params))
        answers = await peers.ask("recent", limit=asked.limit, slowest=asked.slowest)
        order = "seconds" if asked.slowest else "received_at"
        found = sorted((entry for entries in answers for entry in entries), key=lambda entry: -entry[order])
        return JSONResponse({"requests": found[: asked.limit]})

    return [route("/requests", "GET", recent), route("/requests/{name:path}", "GET", one)]


def log_access(scope: Scope, status: int, seconds: float, name: str, kept: Kept | None = None) -> None:
    """A line for a request that has been answered, or whose client has gone (status 0)."""
    client = scope.get("client")
    whose = "-" if client is None else f"{client[0]}:{client[1]}"
    path = "".join(filter(str.isprintable, scope["path"]))[:200]
    line = f'{whose} "{scope["method"]} {path} HTTP/{scope["http_version"]}" {status or "gone"} {seconds:.3f} s'
    if kept is not None:
        prompt, made = (sum(getattr(one, field) for one in kept.choices) for field in ("prompt_tokens", "tokens"))
        line += f" {prompt} prompt tokens, {made} made"
    access_logger.info("%s", f"{line} {name}".rstrip(), extra=about(name))
