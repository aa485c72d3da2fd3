"""`X-Paceline-Routing`: a client that sends it is told what the choice of its rank was based on."""

from __future__ import annotations

import msgspec
from starlette.datastructures import Headers

from paceline.core.routing.policy import Decision

ROUTING_HEADER = b"x-paceline-routing"
SESSION_HEADER = "x-session-id"
MAX_SESSION_CHARACTERS = 512
"""What of a session's key is looked at."""

MAX_DECISIONS = 4
MAX_VALUE_BYTES = 4096
"""Some proxies refuse longer headers."""

MAX_TEXT = 120


def asked_for(headers: Headers) -> bool:
    """Whether the client wants to be told: the header is there and says 1 or true."""
    return headers.get("x-paceline-routing", "").strip().lower() in {"1", "true"}


def session_of(headers: Headers, user: str | None) -> str | None:
    """The session's key: the header, else the body's `user`; None where neither is there or both are empty."""
    key = headers.get(SESSION_HEADER) or user
    return key[:MAX_SESSION_CHARACTERS] if key else None


def routing_value(decisions: list[Decision]) -> bytes:
    """The header's value: a JSON array of the first decisions, at most MAX_DECISIONS, in ASCII."""
    shown = [
        msgspec.structs.replace(one, policy=one.policy[:MAX_TEXT], reason=one.reason[:MAX_TEXT])
        for one in decisions[:MAX_DECISIONS]
    ]
    while True:
        # A policy of somebody else's may have any name and give any reason.
        value = msgspec.json.encode(shown).decode().encode("ascii", "replace")
        if len(value) <= MAX_VALUE_BYTES or len(shown) <= 1:
            return value
        shown.pop()
