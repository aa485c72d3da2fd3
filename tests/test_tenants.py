"""One tenant's flood and another's requests, and requests with a deadline, on real processes."""

from __future__ import annotations

from typing import Any

import pytest

from bench import tenants
from tests.serving import deployment, wait_until

pytestmark = pytest.mark.slow


def test_a_flood_harms_nobody_else() -> None:
    """A short run of `make bench-tenants`, with less of a flood: here others use the machine, too."""
    alone, flooded, apart = tenants.run(6.0, flood=4.0).values()
    assert alone.refused == 0
    assert flooded.refused > flooded.served
    assert apart.refused == 0
    assert apart.served == alone.served
    assert apart.p50_s < flooded.p50_s


def test_what_cannot_be_in_time_is_429_and_says_when() -> None:
    with deployment("--engine", "timed", "--engine-option", "step_ms=20") as running:
        ask = {"prompt": "a", "max_tokens": 100, "ignore_eos": True}
        assert running.http.post("/v1/completions", json=ask).status_code == 200

        def refused() -> Any:
            answer = running.http.post("/v1/completions", json=ask, headers={"X-Request-Deadline-Ms": "200"})
            return answer if answer.status_code == 429 else None

        answer = wait_until(refused, "what such an answer takes is known")
        assert int(answer.headers["retry-after"]) >= 1
        assert answer.json()["error"]["code"] == "deadline"
        in_time = running.http.post("/v1/completions", json=ask, headers={"X-Request-Deadline-Ms": "600000"})
        assert in_time.status_code == 200
        wrong = running.http.post("/v1/completions", json=ask, headers={"X-Request-Deadline-Ms": "soon"})
        assert wrong.status_code == 400
        assert wrong.json()["error"]["param"] == "X-Request-Deadline-Ms"
