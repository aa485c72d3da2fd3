"""Schemathesis against a real server: the OpenAPI document says what is so, and nothing ends in a 5xx.

What the document cannot say, and so schema-valid requests are refused for: what depends on the model's size, and what
two fields may not be together (`positive_data_acceptance`).
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.pace import stretched
from tests.serving import Deployment, deployment, wait_until

pytestmark = pytest.mark.slow

EXAMPLES = "20"


@pytest.fixture(scope="module")
def server() -> Iterator[Deployment]:
    """Two ranks and two front-ends that answer at once."""
    with deployment("--engine", "timed", "-dp", "2", "-asc", "2", "--max-model-len", "128", "--engine-option",
                    "step_ms=0", "--max-body-bytes", "100000", "--max-data-parallel-size", "3") as running:  # fmt: skip
        yield running


def schemathesis(server: Deployment, folder: Path, *arguments: str, exclude: tuple[str, ...] = ()) -> str:
    """Run it; returns what it found, empty where nothing."""
    command = [
        str(Path(sys.executable).with_name("schemathesis")), "run", f"{server.url}/openapi.json", "--checks", "all",
        "--exclude-checks", ",".join(("positive_data_acceptance", *exclude)),
        "--max-examples", EXAMPLES, "--seed", "1", "--no-shrink", "--continue-on-failure", "--request-timeout", "30",
        "--generation-database", "none", *arguments,
    ]  # fmt: skip
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=stretched(110), check=False)
    return "" if done.returncode == 0 else done.stdout + done.stderr


ENGINES = "sleep|wake_up|is_sleeping|reset_prefix_cache|collective_rpc"
STREAMS = "loads"
"""What has no end where it is asked to push."""
SERVING = ("--exclude-path-regex", f"^/(pause|resume|scale_elastic_ep|{ENGINES}|{STREAMS})$")


def test_random_values_of_every_field(server: Deployment, tmp_path: Path) -> None:
    found = schemathesis(server, tmp_path, *SERVING, "--phases", "fuzzing")
    assert not found, found


def test_the_edges_of_every_field(server: Deployment, tmp_path: Path) -> None:
    """Here a header that no document knows is among the invalid, and it is right to answer all the same."""
    found = schemathesis(server, tmp_path, *SERVING, "--phases", "coverage", exclude=("negative_data_rejection",))
    assert not found, found


def test_pausing_resuming_and_scaling(server: Deployment, tmp_path: Path) -> None:
    """What is not done in the time that it gives is answered with 504, as the document says."""
    changing = ("--include-path-regex", "/(pause|resume|scale_elastic_ep)", "--phases", "coverage,fuzzing")
    found = schemathesis(server, tmp_path, *changing, exclude=("not_a_server_error",))
    assert not found, found
    assert server.http.post("/resume").status_code == 200
    answer = server.http.post("/scale_elastic_ep", json={"new_data_parallel_size": 2, "drain_timeout": 0})
    assert answer.json()["size"] == 2


def test_it_goes_on_afterwards_with_nothing_left(server: Deployment) -> None:
    with server.openai as client:
        answer = client.completions.create(model="timed", prompt="Once", max_tokens=4)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 4
    assert "Traceback" not in server.output
    assert "internal error" not in server.output
    wait_until(lambda: all(not entry["waiting"] + entry["running"] for entry in ranks_of(server)), "nothing left")


def ranks_of(server: Deployment) -> list[dict[str, Any]]:
    return list(server.http.get("/loads").json()["ranks"])
