"""Traces over OTLP, for `--otlp-traces-endpoint`: the one module that imports OpenTelemetry (extra `otel`).

The event loop draws a request's identifiers when it comes, and when it has ended puts its timeline into the queue of
the SDK's batch processor, as it is. Spans are made of it, and sent, in that one's thread: a collector that is slow or
away holds up nothing. What does not fit in the queue is lost.

All that the SDK and its exporter complain about becomes one line a minute, without a traceback. `OTEL_…` variables mean
what they mean everywhere: headers, certificates, timeout, compression, sampler, resource, how long the queue is.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from urllib.parse import urlsplit

from msgspec import Struct
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags, get_current_span
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.datastructures import Headers

from paceline import __version__
from paceline.core.frontend.timeline import Kept
from paceline.server.requests import Prepared
from paceline.server.spans import Asked, Span, spans_of

logger = logging.getLogger("paceline.front-end")

PATH = "/v1/traces"
MOST_AT_ONCE = 32
"""Requests whose spans are made and sent together: the interpreter runs one thread at a time, tokens wait meanwhile."""
END_S = 2.0
"""What is still to be sent gets this long when the front-end ends."""
LINE_S = 60.0
TURN_S = 0.0001
"""How long the thread that makes spans runs on while the event loop wants to: the interpreter's own 5 ms stood between
tokens."""


class Trace:
    """One request's: `context` is its own span's, `parent` the client's, where that has sent one."""

    __slots__ = ("_processor", "asked", "context", "headers", "parent")

    def __init__(self, context: SpanContext, parent: SpanContext | None, processor: BatchSpanProcessor) -> None:
        self.context, self.parent, self._processor = context, parent, processor
        self.asked: Asked | None = None
        said = f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"
        self.headers = [(b"traceparent", said.encode())]
        if context.trace_state:
            self.headers.append((b"tracestate", context.trace_state.to_header().encode()))

    def read(self, prepared: Prepared) -> None:
        """The request has been read."""
        form, params = prepared.form, prepared.parts[0].params
        self.asked = Asked(
            form.model, form.wording.prompt_tokens, len(prepared.parts), params.max_tokens, params.temperature,
            params.top_p, prepared.stream,
        )  # fmt: skip

    def ended(self, kept: Kept) -> None:
        if self.context.trace_flags.sampled:
            clocks_ns = time.time_ns() - time.monotonic_ns()
            self._processor.on_end(Finished(self.context, self, kept, clocks_ns))


class Finished(Struct):
    """A request in the queue. `clocks_ns`: the wall clock's lead over the monotonic one."""

    context: SpanContext
    trace: Trace
    kept: Kept
    clocks_ns: int


class Tracing:
    """Of one front-end. `endpoint`: the collector's URL."""

    def __init__(self, endpoint: str) -> None:
        own = {} if "OTEL_SERVICE_NAME" in os.environ else {"service.name": "paceline"}
        # The provider is what reads the sampler's variables; it makes no spans here.
        provider = TracerProvider(
            resource=Resource.create(own | {"service.version": __version__}), shutdown_on_exit=False
        )
        self._sampler, self._ids = provider.sampler, RandomIdGenerator()
        self._contexts = TraceContextTextMapPropagator()
        url = endpoint if urlsplit(endpoint).path.strip("/") else endpoint.rstrip("/") + PATH
        sys.setswitchinterval(TURN_S)
        complaints = logging.getLogger("opentelemetry")
        complaints.handlers, complaints.propagate = [OneLine(url)], False
        logging.getLogger("urllib3").setLevel(logging.ERROR)
        exporter = Exporter(OTLPSpanExporter(endpoint=url), provider.resource)
        self._processor = BatchSpanProcessor(exporter, max_export_batch_size=MOST_AT_ONCE)

    def begin(self, headers: Headers) -> Trace:
        """A request has come."""
        around, parent = None, None
        if "traceparent" in headers:
            given = {name: headers.getlist(name) for name in ("traceparent", "tracestate")}
            around = self._contexts.extract(given)
            parent = get_current_span(around).get_span_context()
            parent = parent if parent.is_valid else None
        trace_id = parent.trace_id if parent else self._ids.generate_trace_id()
        sampled = self._sampler.should_sample(around, trace_id, "request", SpanKind.SERVER)
        flags = TraceFlags(TraceFlags.SAMPLED if sampled.decision.is_sampled() else TraceFlags.DEFAULT)
        span_id = self._ids.generate_span_id()
        return Trace(SpanContext(trace_id, span_id, False, flags, sampled.trace_state), parent, self._processor)

    def close(self) -> None:
        """Send what is left, as far as that is done soon."""
        ending = threading.Thread(target=self._processor.shutdown, daemon=True)
        ending.start()
        ending.join(END_S)


class Exporter:
    """What the batch processor hands finished requests to, in its thread: makes spans of them, and has these sent."""

    def __init__(self, collector: OTLPSpanExporter, resource: Resource) -> None:
        self._collector, self._resource = collector, resource
        self._scope, self._ids = InstrumentationScope("paceline", __version__), RandomIdGenerator()

    def export(self, batch: list[Finished]) -> object:
        return self._collector.export([span for one in batch for span in self._spans(one)])

    def shutdown(self) -> None:
        self._collector.shutdown()

    def _spans(self, one: Finished) -> list[ReadableSpan]:
        own = one.context
        whole, *parts = spans_of(one.kept, one.trace.asked)
        made = [self._span(whole, own, one.trace.parent, SpanKind.SERVER, one.clocks_ns)]
        for part in parts:
            context = SpanContext(own.trace_id, self._ids.generate_span_id(), False, own.trace_flags, own.trace_state)
            made.append(self._span(part, context, own, SpanKind.INTERNAL, one.clocks_ns))
        return made

    def _span(
        self, span: Span, context: SpanContext, parent: SpanContext | None, kind: SpanKind, clocks_ns: int
    ) -> ReadableSpan:
        def wall(when: float) -> int:
            return int(when * 1e9) + clocks_ns

        return ReadableSpan(
            span.name, context, parent, self._resource, span.attributes,
            [Event(event.name, event.attributes, wall(event.when)) for event in span.events], kind=kind,
            status=Status(StatusCode.ERROR, span.failed) if span.failed else Status(StatusCode.UNSET),
            start_time=wall(span.begin), end_time=wall(span.end), instrumentation_scope=self._scope,
        )  # fmt: skip


class OneLine(logging.Handler):
    """Makes one warning of ours a minute of all complaints about the collector, without tracebacks."""

    def __init__(self, url: str) -> None:
        super().__init__(logging.WARNING)
        # Who may send there can be a part of the address.
        parts = urlsplit(url)
        self._where = parts._replace(netloc=parts.netloc.rpartition("@")[2], query="").geturl()
        self._next = 0.0

    def emit(self, record: logging.LogRecord) -> None:
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + LINE_S
        text = record.getMessage()
        if record.exc_info and record.exc_info[1] is not None:
            text += f" {type(record.exc_info[1]).__name__}: {record.exc_info[1]}"
        text = " ".join(text.split())[:400]
        logger.warning("traces to %s: %s (said once a minute at most)", self._where, text)
