"""The shipped rules, board and autoscaler, read by a real Prometheus of a real deployment to which each fault is done.

Needs Debian's prometheus: `make test-prometheus` installs it. Of the rules only the times are made shorter.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.pace import stretched
from tests.serving import Deployment, deployment, wait_until

PROMETHEUS, PROMTOOL = shutil.which("prometheus"), shutil.which("promtool")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PROMETHEUS is None or PROMTOOL is None, reason="no prometheus here (make test-prometheus)"),
]

DEPLOY = Path(__file__).parents[2] / "deploy"
RULES = DEPLOY / "prometheus" / "alerts.yml"
BOARD = DEPLOY / "grafana" / "paceline.json"
AUTOSCALER = DEPLOY / "keda" / "scaledobject.yaml"
WINDOW = "[15s]"
SLOTS, MOST_WAITING = 2, 80
PATIENCE_S = 60.0


class Prometheus:
    """A running one that reads `target` each second and has the shipped rules with shorter times."""

    def __init__(self, folder: Path, target: str) -> None:
        rules = re.sub(r"for: \S+", "for: 1s", RULES.read_text())
        (folder / "rules.yml").write_text(re.sub(r"\[\d+m\]", "[8s]", rules))
        # JSON is YAML.
        (folder / "prometheus.yml").write_text(json.dumps({
            "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
            "rule_files": [str(folder / "rules.yml")],
            "scrape_configs": [{"job_name": "paceline", "static_configs": [{"targets": [target]}]}],
        }))  # fmt: skip
        self.process = subprocess.Popen(
            [str(PROMETHEUS), f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}",
             "--web.listen-address=127.0.0.1:0"],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self.process.stderr is not None
        said: list[str] = []
        for line in self.process.stderr:
            said.append(line)
            if found := re.search(r'msg="Listening on" address=(\S+)', line):
                break
        else:
            raise AssertionError("".join(said))
        # It would wait for somebody who reads what it says.
        self._reader = threading.Thread(target=self.process.stderr.read, daemon=True)
        self._reader.start()
        self._http = httpx2.Client(base_url=f"http://{found[1]}/api/v1", timeout=stretched(30))

    def close(self) -> None:
        self._http.close()
        self.process.kill()
        self.process.wait(stretched(30))
        self._reader.join(stretched(30))
        assert self.process.stderr is not None
        self.process.stderr.close()

    def _ask(self, path: str, **parameters: str) -> Any:
        answer = self._http.get(path, params=parameters)
        if answer.status_code == 503:
            # It is not up yet.
            return {}
        assert answer.status_code == 200, answer.text
        return answer.json()["data"]

    def values(self, query: str) -> list[float]:
        """What it answers, without what is no number."""
        found = [float(one["value"][1]) for one in self._ask("/query", query=query).get("result", [])]
        return [value for value in found if math.isfinite(value)]

    def rules(self) -> set[str]:
        return {rule["name"] for group in self._ask("/rules").get("groups", []) for rule in group["rules"]}

    def firing(self) -> set[str]:
        alerts = self._ask("/alerts").get("alerts", [])
        return {alert["labels"]["alertname"] for alert in alerts if alert["state"] == "firing"}


@contextlib.contextmanager
def prometheus(folder: Path, running: Deployment) -> Iterator[Prometheus]:
    made = Prometheus(folder, running.url.removeprefix("http://"))
    try:
        yield made
    finally:
        made.close()


def board_queries() -> dict[str, str]:
    """Every query of every panel, as Grafana would ask it, by the panel and the query's letter."""
    found = {}
    for panel in json.loads(BOARD.read_text())["panels"]:
        for target in panel["targets"]:
            query = target["expr"].replace("[$__rate_interval]", WINDOW).replace("$instance", ".+")
            assert "$" not in query
            found[f"{panel['title']} ({panel['id']}{target['refId']})"] = query
    return found


def without_data(asked: Prometheus, queries: dict[str, str]) -> list[str]:
    return [name for name, query in queries.items() if not asked.values(query)]


def ask(running: Deployment, tokens: int, rank: int | None = None) -> int:
    headers = {"connection": "close"} | ({} if rank is None else {"X-data-parallel-rank": str(rank)})
    body = {"prompt": "hello", "max_tokens": tokens, "ignore_eos": True}
    try:
        answer = running.http.post("/v1/completions", json=body, headers=headers, timeout=stretched(300))
    except (httpx2.HTTPError, RuntimeError):
        # The deployment has ended, and the client is closed.
        return 0
    return int(answer.status_code)


@contextlib.contextmanager
def load(running: Deployment, pool: ThreadPoolExecutor, tokens: int, every_s: float) -> Iterator[list[Future[int]]]:
    """Requests at a rate, whatever becomes of those before."""
    over, sent = threading.Event(), list[Future[int]]()

    def go_on() -> None:
        while not over.wait(every_s):
            sent.append(pool.submit(ask, running, tokens))

    source = threading.Thread(target=go_on)
    source.start()
    try:
        yield sent
    finally:
        over.set()
        source.join()


def test_the_shipped_rules_are_right() -> None:
    done = subprocess.run(
        [str(PROMTOOL), "check", "rules", "--lint-fatal", str(RULES)],
        capture_output=True,
        text=True,
        timeout=stretched(60),
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_autoscaler_scales_what_the_chart_makes() -> None:
    yaml = pytest.importorskip("yaml", reason="make test-prometheus installs what this needs")
    target = yaml.safe_load(AUTOSCALER.read_text())["spec"]["scaleTargetRef"]
    made = yaml.safe_load_all((DEPLOY / "kubernetes" / "statefulset.yaml").read_text())
    assert (target["apiVersion"], target["kind"], target["name"]) in {
        (one["apiVersion"], one["kind"], one["metadata"]["name"]) for one in made if one
    }


def test_every_panel_has_data_and_every_rule_fires(tmp_path: Path) -> None:
    flags = ["--engine", "tests.hanging_engines:Hanging", "--engine-option", f"folder={tmp_path}", "-dp", "3",
             "-asc", "2", "--engine-option", "step_ms=20", "--stall-timeout", "1", "--max-rank-restarts", "0",
             "--max-num-seqs", str(SLOTS), "--max-waiting", str(MOST_WAITING)]  # fmt: skip
    queries = board_queries()
    (queries["autoscaler"],) = re.findall(r"^ +query: (.+)$", AUTOSCALER.read_text(), re.MULTILINE)
    fired: set[str] = set()
    # The pool is left last: what it waits for ends with the deployment.
    with (
        ThreadPoolExecutor(2 * MOST_WAITING) as pool,
        deployment(*flags) as running,
        prometheus(tmp_path, running) as asked,
    ):

        def fires(name: str, fault: Callable[[], object]) -> None:
            assert name not in asked.firing(), "it fires without its fault"
            fault()
            wait_until(lambda: name in asked.firing(), name, PATIENCE_S)
            fired.add(name)

        def all_have_data(when: str) -> None:
            wait_until(lambda: not without_data(asked, queries), f"data {when} for each panel's query", PATIENCE_S)

        with load(running, pool, tokens=5, every_s=0.2):
            all_have_data("of a healthy deployment")
            wait_until(lambda: not asked.firing(), "nothing fires")
            (tmp_path / "hang-1").touch()
            fires("PacelineRankStalled", lambda: pool.submit(ask, running, 5, 1))
            fires("PacelineRankMissing", lambda: os.kill(running.pid_of("rank 2"), signal.SIGKILL))
            all_have_data("where a rank hangs and one is dead")
        # One rank is left, and its slots are taken for long.
        with load(running, pool, tokens=4000, every_s=1.0) as sent:
            fires("PacelineQueueGrowing", lambda: None)
            fires(
                "PacelineRequestsRefused",
                lambda: sent.extend([pool.submit(ask, running, 4000) for _ in range(MOST_WAITING)]),
            )
            # Front-ends take in some more than the limit while they do not know of each other's.
            wait_until(lambda: 429 in [answer.result() for answer in list(sent) if answer.done()], "a 429")
        fires("PacelineViewStale", lambda: os.kill(running.pid_of("coordinator"), signal.SIGSTOP))
        fires("PacelineGone", running.close)
        assert fired == asked.rules()
