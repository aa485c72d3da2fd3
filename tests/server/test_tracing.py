"""Traces of a real deployment, received by an OTLP server of this process. `make test-otel` installs what it needs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from paceline.control import Control, ControlError
from tests.pace import stretched
from tests.serving import Deployment, deployment, wait_until

pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="OpenTelemetry is not there (make test-otel)")
trace_service = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")
pytestmark = pytest.mark.slow

FLAGS = ("--engine", "timed", "-dp", "2", "--engine-option", "step_ms=20")
SOON = {"OTEL_BSP_SCHEDULE_DELAY": "100"}
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SERVER, FAILED = 2, 2
"""Of a span's `kind`, and of a status's `code`."""


class Collector(ThreadingHTTPServer):
    """Keeps all spans that it is sent. `status`: how it answers."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Receiver)
        self.spans: list[Any] = []
        self.services: Counter[str] = Counter()
        self.status, self.asked = 200, 0
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def of(self, name: str) -> list[Any]:
        """The spans of the request that is called so, its own one first; none until that has come."""
        for span in list(self.spans):
            if attributes(span).get("gen_ai.request.id") == name:
                rest = [one for one in self.spans if one.trace_id == span.trace_id and one is not span]
                return [span, *rest]
        return []


class Receiver(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        collector = self.server
        collector.asked += 1
        assert self.path == "/v1/traces"
        asked = trace_service.ExportTraceServiceRequest.FromString(body)
        if collector.status == 200:
            for resource in asked.resource_spans:
                said = {one.key: one.value.string_value for one in resource.resource.attributes}
                collector.services[said["service.name"]] += 1
                for scope in resource.scope_spans:
                    collector.spans += scope.spans
        self.send_response(collector.status)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


def attributes(span: Any) -> dict[str, Any]:
    def value(one: Any) -> Any:
        kind = one.WhichOneof("value")
        return [value(part) for part in one.array_value.values] if kind == "array_value" else getattr(one, kind)

    return {one.key: value(one.value) for one in span.attributes}


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    made = Collector()
    yield made
    made.shutdown()
    made.server_close()


@pytest.fixture(scope="module")
def server(collector: Collector) -> Iterator[Deployment]:
    with deployment(*FLAGS, "--otlp-traces-endpoint", collector.url, variables=SOON) as running:
        yield running


def complete(server: Deployment, name: str, tokens: int, **headers: str) -> Any:
    body = {"prompt": "hello", "max_tokens": tokens}
    return server.http.post("/v1/completions", json=body, headers={"x-request-id": name, **headers})


def add_up(spans: list[Any]) -> None:
    """A request's parts are its children, follow each other, and leave none of its time out."""
    whole, *parts = spans
    parts.sort(key=lambda span: (span.start_time_unix_nano, span.end_time_unix_nano))
    assert {(one.parent_span_id, one.trace_id) for one in parts} == {(whole.span_id, whole.trace_id)}
    assert len({one.span_id for one in spans}) == len(spans)
    # A double's nanoseconds of a machine that has run for long are only nearly so.
    took = sum(one.end_time_unix_nano - one.start_time_unix_nano for one in parts)
    assert took == pytest.approx(whole.end_time_unix_nano - whole.start_time_unix_nano, abs=10_000)


def test_a_request_is_a_trace_below_the_clients_span_and_its_parts_add_up(
    server: Deployment, collector: Collector
) -> None:
    sent = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "vendor=a"}
    answer = complete(server, "below", 5, **sent)
    spans = wait_until(lambda: collector.of("below"), "its trace comes")
    whole = spans[0]
    assert (whole.trace_id.hex(), whole.parent_span_id.hex(), whole.trace_state) == (TRACE, PARENT, "vendor=a")
    assert answer.headers["traceparent"] == f"00-{TRACE}-{whole.span_id.hex()}-01"
    assert answer.headers["tracestate"] == "vendor=a"
    assert (whole.name, whole.kind) == ("POST /v1/completions", SERVER)
    add_up(spans)
    assert [one.name for one in spans[1:]] == ["read", "tokenize", "place", "send", "prefill", "decode", "respond"]
    said = attributes(whole)
    assert said["gen_ai.response.id"] == answer.json()["id"]
    assert said["gen_ai.request.model"] == answer.json()["model"]
    assert said["gen_ai.usage.input_tokens"] == answer.json()["usage"]["prompt_tokens"]
    assert said["gen_ai.usage.output_tokens"] == 5
    assert said["gen_ai.response.finish_reasons"] == ["length"]
    assert 0 < said["gen_ai.latency.time_to_first_token"] <= said["gen_ai.latency.e2e"]
    assert str(said["paceline.ranks"][0]) == answer.headers["x-data-parallel-rank"]
    assert set(collector.services) == {"paceline"}


def test_without_a_parent_it_is_a_trace_of_its_own_and_what_is_not_sampled_is_not_sent(
    server: Deployment, collector: Collector
) -> None:
    unsampled = complete(server, "unsampled", 1, traceparent=f"00-{TRACE}-{PARENT}-00")
    assert unsampled.headers["traceparent"].startswith(f"00-{TRACE}-")
    assert unsampled.headers["traceparent"].endswith("-00")
    for name, sent in (("alone", {}), ("garbage", {"traceparent": "00-zz-1-01"})):
        answer = complete(server, name, 1, **sent)
        whole = wait_until(lambda name=name: collector.of(name), "its trace comes")[0]  # type: ignore[misc]
        assert not whole.parent_span_id
        assert answer.headers["traceparent"] == f"00-{whole.trace_id.hex()}-{whole.span_id.hex()}-01"
    refused = server.http.post("/v1/completions", json={"prompt": 1.5}, headers={"x-request-id": "wrong"})
    whole = wait_until(lambda: collector.of("wrong"), "the refused one's trace comes")[0]
    assert attributes(whole)["http.response.status_code"] == refused.status_code == 400
    assert whole.span_id.hex() in refused.headers["traceparent"]
    assert not collector.of("unsampled")


def test_a_killed_ranks_request_has_its_move_and_its_parts_at_both_ranks(
    server: Deployment, collector: Collector
) -> None:
    def under_way() -> dict[str, Any]:
        try:
            choice: Any = Control(server.url).requests("moves")[0]["choices"][0]  # type: ignore[index]
        except (ControlError, IndexError):
            return {}
        return dict(choice) if choice["tokens"] > 5 else {}

    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(complete, server, "moves", 100)
        rank = wait_until(under_way, "it has some tokens")["ranks"][0]["rank"]
        os.kill(server.pid_of(f"rank {rank}"), signal.SIGKILL)
        assert answer.result().status_code == 200
    spans = wait_until(lambda: collector.of("moves"), "its trace comes")
    add_up(spans)
    (move,) = spans[0].events
    said = attributes(move)
    assert move.name == "paceline.moved"
    assert (said["paceline.rank.before"], said["paceline.rank"]) == (rank, 1 - rank)
    assert said["paceline.why"].startswith(f"rank {rank}: ")
    decodes = [attributes(one) for one in spans if one.name == "decode"]
    assert [one["paceline.rank"] for one in decodes] == [rank, 1 - rank]
    assert sum(one["paceline.tokens"] for one in decodes) == 100
    assert attributes(spans[0])["paceline.moves"] == 1


def test_a_collector_that_fails_is_a_line_and_holds_up_nothing(server: Deployment, collector: Collector) -> None:
    asked, collector.status = collector.asked, 400
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda number: complete(server, f"lost-{number}", 1), range(80)))
    assert {answer.status_code for answer in answers} == {200}
    wait_until(lambda: collector.asked >= asked + 2, "it has been tried more than once")
    line = server.wait_line("traces to ")
    assert collector.url in line
    collector.status = 200
    complete(server, "again", 1)
    wait_until(lambda: collector.of("again"), "traces come again")
    assert server.output.count("traces to ") == 1
    assert "Traceback" not in server.output


def test_nobody_who_has_not_asked_for_traces_loads_opentelemetry() -> None:
    program = "import sys, paceline.server.process; sys.exit('opentelemetry' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=stretched(60)).returncode == 0


def test_what_is_left_is_sent_at_the_end_and_one_that_is_away_delays_no_end(collector: Collector) -> None:
    slowly = {"OTEL_BSP_SCHEDULE_DELAY": "600000", "OTEL_SERVICE_NAME": "mine"}
    with deployment(*FLAGS, "--otlp-traces-endpoint", f"{collector.url}/v1/traces", variables=slowly) as running:
        complete(running, "last", 1)
        running.signal(signal.SIGTERM)
        assert running.wait_end() == 0
    assert collector.of("last")
    assert collector.services["mine"] == 1
    nobody = "http://127.0.0.1:9/v1/traces"
    with deployment(*FLAGS, "--otlp-traces-endpoint", nobody, variables=SOON) as running:
        assert complete(running, "nowhere", 1).status_code == 200
        running.wait_line(f"traces to {nobody}: ")
        running.signal(signal.SIGTERM)
        assert running.wait_end() == 0
        assert "Traceback" not in running.output
