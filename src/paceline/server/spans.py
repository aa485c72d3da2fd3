"""A request as a trace: the spans that its finished timeline is, in plain values.

The first span is the request, its parts follow, one behind the other from its first byte to its last, with no time in
between. Of an answer of several choices each has its own parts from `queue` to `decode`. A fail-over is an event of the
request, and its parts at the next rank are spans as those at the first.

Attributes are named as OpenTelemetry's semantic conventions for generative AI have them, those of latencies and of
prompt and completion tokens as vLLM's traces do, and `paceline.…` what neither knows. No text of a prompt or an answer
is in a trace. `tracing.py` sends it; nothing here needs OpenTelemetry.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from msgspec import Struct

from paceline.core.frontend.timeline import Ended, Kept, Stay

CHOICES_SHOWN = 32
"""Of one answer, with spans of their own: one may have thousands."""
GOOD_ENDS = frozenset({"", "stop", "length", "abort"})

OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/messages": "chat",
    "/v1/responses": "chat",
    "/v1/completions": "text_completion",
    "/v1/embeddings": "embeddings",
}


class Asked(Struct, frozen=True):
    """What the request has asked for, once it has been read."""

    model: str
    prompt_tokens: int
    choices: int
    max_tokens: int
    temperature: float
    top_p: float
    stream: bool


class Event(Struct, frozen=True):
    name: str
    when: float
    attributes: dict[str, Any]


class Span(Struct):
    """`begin`, `end`: by the front-end's monotonic clock. `failed`: why, where it has."""

    name: str
    begin: float
    end: float
    attributes: dict[str, Any]
    events: list[Event] = []
    failed: str = ""


def spans_of(kept: Kept, asked: Asked | None) -> list[Span]:
    """The request, and its parts. `asked`: None where it was refused before it was read."""
    end = kept.received if kept.ended is None else kept.ended
    return [_request(kept, asked, end), *_parts(kept, end)]


# The request ----------------------------------------------------------------------------------------


def _request(kept: Kept, asked: Asked | None, end: float) -> Span:
    host, _, port = kept.client.rpartition(":")
    said: dict[str, Any] = {
        "http.request.method": "POST", "http.route": kept.path, "url.path": kept.path,
        "http.response.status_code": kept.status or None,
        "client.address": host or None, "client.port": int(port) if port.isdecimal() else None,
        "gen_ai.operation.name": OPERATIONS.get(kept.path), "gen_ai.provider.name": "paceline",
        "gen_ai.request.id": kept.name, "gen_ai.response.id": kept.also or None,
        "gen_ai.latency.e2e": _seconds(end - kept.received),
        "paceline.client_gone": True if kept.status == 0 else None,
    }  # fmt: skip
    said |= {} if asked is None else _asked(asked)
    said |= _made(kept) if kept.choices else {}
    ends = [one.reason for one in kept.choices if one.reason not in GOOD_ENDS]
    failed = ends[0] if ends and kept.status < 400 else f"HTTP {kept.status}" if kept.status >= 500 else ""
    said["error.type"] = str(kept.status) if kept.status >= 400 else failed or None
    moves = [_moved(before, stay) for one in kept.choices for before, stay in pairwise(one.stays)]
    return Span(f"POST {kept.path}", kept.received, end, _present(said), moves, failed)


def _asked(asked: Asked) -> dict[str, Any]:
    return {
        "gen_ai.request.model": asked.model, "gen_ai.response.model": asked.model,
        "gen_ai.request.max_tokens": asked.max_tokens, "gen_ai.request.temperature": asked.temperature,
        "gen_ai.request.top_p": asked.top_p, "gen_ai.request.n": asked.choices,
        "gen_ai.request.choice.count": asked.choices, "gen_ai.request.stream": asked.stream,
        "gen_ai.usage.input_tokens": asked.prompt_tokens, "gen_ai.usage.prompt_tokens": asked.prompt_tokens,
    }  # fmt: skip


def _made(kept: Kept) -> dict[str, Any]:
    choices = kept.choices
    tokens, cached = sum(one.tokens for one in choices), sum(one.cached_tokens for one in choices)
    firsts = [first for one in choices if (first := first_token(one)) is not None]
    said: dict[str, Any] = {
        "gen_ai.usage.output_tokens": tokens, "gen_ai.usage.completion_tokens": tokens,
        "gen_ai.usage.cache_read.input_tokens": cached, "gen_ai.usage.num_sequences": len(choices),
        "gen_ai.response.finish_reasons": [one.reason for one in choices[:CHOICES_SHOWN] if one.reason],
        "gen_ai.latency.time_to_first_token": _seconds(min(firsts) - kept.received) if firsts else None,
        "paceline.cached_tokens": cached,
        "paceline.ranks": list(dict.fromkeys(stay.rank for one in choices for stay in one.stays)),
        "paceline.moves": sum(max(0, len(one.stays) - 1) for one in choices),
        "paceline.longest_gap": _seconds(max(one.longest_s for one in choices)),
    }  # fmt: skip
    # Of several choices, which run side by side, the longest of each.
    for name, part in (("queue", "queue"), ("model_prefill", "prefill"), ("model_decode", "decode")):
        took = [sum(span.end - span.begin for span in _choice(one, kept) if span.name == part) for one in choices]
        said[f"gen_ai.latency.time_in_{name}"] = _seconds(max(took))
    return said


def _moved(before: Stay, stay: Stay) -> Event:
    said = {"paceline.rank.before": before.rank, "paceline.rank": stay.rank, "paceline.tokens.before": stay.tokens}
    return Event("paceline.moved", stay.since, said | ({"paceline.why": stay.why} if stay.why else {}))


# Its parts ------------------------------------------------------------------------------------------


def _parts(kept: Kept, end: float) -> Iterator[Span]:
    """Each begins where the one before it has ended; one that was never reached is none."""
    read = kept.read or end
    yield Span("read", kept.received, read, {})
    if not kept.read:
        return
    tokenized = kept.tokenized or end
    yield Span("tokenize", read, tokenized, {})
    if not kept.tokenized:
        return
    for number, one in enumerate(kept.choices[:CHOICES_SHOWN]):
        for span in _choice(one, kept):
            if len(kept.choices) > 1:
                span.attributes["paceline.choice"] = number
            yield span
    last = max((one.ended or end for one in kept.choices), default=tokenized)
    yield Span("respond", last, end, {})


def _choice(one: Ended, kept: Kept) -> Iterator[Span]:
    ended = one.ended or kept.ended or kept.received
    if not one.stays:
        yield Span("queue", kept.tokenized, ended, {}, failed="" if one.reason in GOOD_ENDS else one.reason)
        return
    waited = _seconds(one.coordinator_ms / 1000) if one.queued else None
    said = _present({"paceline.rank": one.stays[0].rank, "paceline.queue.coordinator": waited})
    yield Span("queue" if one.queued else "place", kept.tokenized, one.stays[0].since, said)
    first = first_token(one)
    ends = [(stay.since, stay.tokens) for stay in one.stays[1:]]
    for stay, (until, tokens) in zip(one.stays, [*ends, (ended, one.tokens)], strict=True):
        yield from _stay(stay, until, first, tokens - stay.tokens)


def _stay(stay: Stay, until: float, first: float | None, tokens: int) -> Iterator[Span]:
    """At a rank. What its own clock says is put behind the arrival there, as far as that fits."""
    rank = {"paceline.rank": stay.rank}
    if stay.door_us is None:
        yield Span("prefill", stay.since, until, rank | {"paceline.no_token": True})
        return
    begun = min(until, stay.since + stay.door_us / 1e6)
    token = min(until, begun + (stay.computed_us or 0) / 1e6)
    if first is not None and stay.since <= first <= until:
        token = first
        begun = min(begun, token)
    yield Span("send", stay.since, begun, rank)
    yield Span("prefill", begun, token, dict(rank))
    yield Span("decode", token, until, rank | {"paceline.tokens": tokens})


def first_token(one: Ended) -> float | None:
    """When it came."""
    stamps = array("d", one.stamps[:8])
    return stamps[0] if stamps else None


def _present(said: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in said.items() if value is not None}


def _seconds(value: float) -> float:
    return round(value, 6)
