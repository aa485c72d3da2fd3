"""The page at `/dashboard`: what the deployment does, pushed.

The page is one file (`dashboard.html`): no build step, nothing from outside. What it shows comes as server-sent events,
made twice a second while anybody looks, of what this front-end knows of all ranks and of what the others of its node
say of themselves (`peers.py`). What was before comes once, from the ring that each front-end fills from its start
(`core/frontend/history.py`).
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from paceline.core.frontend.history import DOING, SAMPLE_S, History
from paceline.net.frontend import FrontendShell
from paceline.server.errors import route
from paceline.server.feeds import Feed
from paceline.server.metrics import Metrics
from paceline.server.peers import Peers

PUSH_S = 0.4
LOOK_S = 0.5
WORDS_SHOWN = 60
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {"content-security-policy": POLICY, "referrer-policy": "no-referrer", "x-content-type-options": "nosniff"}


class Dashboard:
    """What the page is told. `index`: which of the node's front-ends this is; `peers`: set before it is asked."""

    def __init__(self, frontend: FrontendShell, metrics: Metrics, model: str, index: int) -> None:
        self.peers: Peers | None = None
        self.feed = Feed(self._push, PUSH_S)
        self._frontend, self._metrics, self._model, self._index = frontend, metrics, model, index
        self._page = Path(__file__).with_name("dashboard.html").read_text(encoding="utf-8")

    @property
    def _history(self) -> History:
        return self._frontend.history

    def beat(self) -> None:
        """Look at the deployment from here on, so that there is a history when somebody asks."""
        self._history.look(time.monotonic())
        asyncio.get_running_loop().call_later(LOOK_S, self.beat)

    def own(self) -> dict[str, Any]:
        """What this front-end says of itself to whichever shows the page."""
        machine, timelines = self._frontend.machine, self._frontend.timelines
        return {
            "index": self._index, "in_flight": machine.in_flight() + len(machine.waiting_for_grant()),
            "moved": machine.moved, "lag_ms": round(self._metrics.lag_s * 1000, 1), "rates": self._history.rates,
            "prompts": timelines.prompts, "cached": timelines.cached,
            "words": [
                {"at": said.at, "text": said.text, "urgent": said.urgent}
                for said in list(self._history.words)[-WORDS_SHOWN:]
            ],
        }  # fmt: skip

    async def _push(self) -> bytes:
        self._history.look(time.monotonic())
        assert self.peers is not None
        return msgspec.json.encode(self.now(await self.peers.ask("dashboard")))

    def now(self, front_ends: list[dict[str, Any]]) -> dict[str, Any]:
        """The deployment at this moment. `front_ends`: what each says of itself, this one first."""
        machine, history = self._frontend.machine, self._history
        now, wall = time.monotonic(), time.time()
        rates, prompts, cached = (_sum(front_ends, name) for name in ("rates", "prompts", "cached"))
        said, scaling = machine.statistics(), machine.scaling
        ranks = [
            [one.rank, one.doing, one.running, one.waiting, one.slots, one.prefill_tokens, round(one.kv, 3),
             round(cached[one.rank] / prompts[one.rank], 3) if prompts[one.rank] else None,
             round(rates[one.rank], 1), round(one.step_s * 1000, 2), one.hangs_s]
            for one in history.ranks()
        ]  # fmt: skip
        return {
            "at": round(wall, 1), "model": self._model, "lockstep": history.lockstep, "ranks": ranks,
            "queued": said["queued"], "waiting": said["waiting"], "wave": said["wave"], "running": said["running"],
            "pause": said["suspension"], "scaling": said["scaling"],
            "most_ranks": None if scaling is None else scaling.limit,
            "missing": said["missing"], "stalls": said["stalls"], "moved": sum(one["moved"] for one in front_ends),
            "coordinator": {
                "id": f"{machine.coordinator & 0xFFFFFFFF:08x}", "lives": len(history.lives),
                "since": round(wall - (now - history.lives[-1])) if history.lives else None,
            },
            "front_ends": [
                {name: one[name] for name in ("index", "in_flight", "lag_ms")}
                | {"rate": round(sum(one["rates"].values()), 1)}
                for one in sorted(front_ends, key=lambda one: int(one["index"]))
            ],
            "words": _words(front_ends, wall - now),
        }  # fmt: skip

    def before(self) -> dict[str, Any]:
        """The last 15 minutes, oldest first."""
        samples, wall = list(self._history.samples), time.time() - time.monotonic()
        return {
            "every_s": SAMPLE_S, "doing": DOING,
            "samples": [
                [round(one.at + wall, 1), one.queued, one.wave, one.running, one.doing, one.full] for one in samples
            ],
        }  # fmt: skip

    def routes(self) -> list[Route]:
        return [
            route("/dashboard", "GET", lambda _: HTMLResponse(self._page, headers=HEADERS)),
            route("/dashboard/events", "GET", lambda _: self.feed.response()),
            route("/dashboard/history", "GET", self._answer_before),
        ]

    def _answer_before(self, _: Request) -> Response:
        return Response(msgspec.json.encode(self.before()), media_type="application/json")


def _sum(front_ends: list[dict[str, Any]], name: str) -> Counter[int]:
    found: Counter[int] = Counter()
    for one in front_ends:
        # What has come as JSON has texts for keys.
        for rank, value in one[name].items():
            found[int(rank)] += value
    return found


def _words(front_ends: list[dict[str, Any]], wall: float) -> list[dict[str, Any]]:
    """All that was said, newest first. What all of them see is said once, by the first."""
    found: list[dict[str, Any]] = []
    for one in front_ends:
        known = {(said["text"], round(said["at"] / 5)) for said in found}
        found += [
            said for said in one["words"]
            if not {(said["text"], round(said["at"] / 5) + near) for near in (-1, 0, 1)} & known
        ]  # fmt: skip
    found.sort(key=lambda said: -said["at"])
    return [said | {"at": round(said["at"] + wall, 1)} for said in found[:WORDS_SHOWN]]
