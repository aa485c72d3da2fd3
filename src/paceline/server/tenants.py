"""Whose a request is, which part of the queue is theirs, and until when it must be answered.

Where several API keys are given out, each is a tenant (or those with one name in the file); else `X-Tenant` says it: a
gateway in front may be believed, a client that has a key of its own not. Weights are by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from msgspec import Struct
from starlette.datastructures import Headers

from paceline.core.routing.session import session_name
from paceline.errors import ConfigError
from paceline.server.errors import ApiError
from paceline.server.guard import Key, key_of

MOST_CHARACTERS = 128
"""Of a tenant's name."""
MOST_WEIGHT = 1_000_000.0
TENANT, DEADLINE = "X-Tenant", "X-Request-Deadline-Ms"
MOST_MS = 86_400_000
NAMES_KEPT = 1024


class Tenant(Struct, frozen=True):
    """`identity`: 0 for nobody's. `weight`: its part of the queue, beside 1 of each other."""

    identity: int = 0
    weight: float = 1.0


NOBODY = Tenant()


class TenantNames:
    """Whom the requests of one front-end are of, and what they are called. `weights`: by name."""

    def __init__(self, keys: list[Key], weights: Mapping[str, float]) -> None:
        self._weights = weights
        self._names: dict[int, str] = {0: ""}
        """Of those that were here lately."""
        self._of_key: dict[bytes, Tenant] = {}
        if len({key.name or key.digest.hex() for key in keys}) > 1:
            for key in keys:
                digest = key.digest.hex()
                shown = key.name or f"key {digest[:8]}"
                self._of_key[key.digest] = self._named(key.name or digest, shown)

    def of(self, headers: Headers) -> Tenant:
        """Whose this request is. Raises ApiError where the header is wrong."""
        if self._of_key:
            return self._of_key.get(key_of(headers), NOBODY)
        name = headers.get(TENANT, "").strip()
        if not name:
            return NOBODY
        if len(name) > MOST_CHARACTERS:
            raise ApiError(400, f"{TENANT}: has at most {MOST_CHARACTERS} characters", param=TENANT)
        return self._named(name)

    def name_of(self, identity: int) -> str:
        """What a tenant is called where people read it: of a key without a name the beginning of its digest."""
        return self._names.get(identity, f"{identity:x}")

    def _named(self, name: str, shown: str | None = None) -> Tenant:
        found = Tenant(session_name(name), self._weights.get(name, 1.0))
        self._names[found.identity] = name if shown is None else shown
        if len(self._names) > NAMES_KEPT:
            # The one that was named first, behind nobody.
            del self._names[next(identity for identity in self._names if identity)]
        return found


def weights_of(text: str | None) -> dict[str, float]:
    """Those of `--tenant-weight`, NAME=WEIGHT with commas. Raises ConfigError."""
    found: dict[str, float] = {}
    for part in filter(None, (text or "").split(",")):
        name, _, number = (piece.strip() for piece in part.rpartition("="))
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if not name or not 0 < weight <= MOST_WEIGHT:
            raise ConfigError(f"--tenant-weight: {part.strip()[:40]!r} is not NAME=WEIGHT with a weight above 0")
        if name in found or len(name) > MOST_CHARACTERS:
            why = "is named twice" if name in found else f"has more than {MOST_CHARACTERS} characters"
            raise ConfigError(f"--tenant-weight: {name[:40]!r} {why}")
        found[name] = weight
    return found


def too_late() -> ApiError:
    """What a client is told whose request was still read when its time was over."""
    text = f"{DEADLINE}: it cannot be answered in time any more"
    return ApiError(429, text, kind="rate_limit_error", param=DEADLINE, code="deadline", retry_after_s=1)


def deadline_of(headers: Headers, received: float) -> float:
    """When the answer to a request must be there that was received then, infinite for no time. Raises ApiError."""
    text = headers.get(DEADLINE)
    if text is None:
        return float("inf")
    text = text.strip()
    if not (text.isascii() and text.isdigit() and len(text) <= 8 and 0 < int(text) <= MOST_MS):
        raise ApiError(400, f"{DEADLINE}: {text[:40]!r} is no number of milliseconds, 1 to {MOST_MS}", param=DEADLINE)
    return received + int(text) / 1000
