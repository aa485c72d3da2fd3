"""The sockets of the coordinator under vLLM, flooded; ranks and front-ends speak as vLLM's do."""

from __future__ import annotations

import os
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable

from tests.fuzz.blind import Row, rss_mb
from tests.fuzz.flood import VLLM, Flood
from tests.fuzz.sockets import MOST_GROWTH_MB, WARM_UP_SHARE
from tests.pace import stretched
from tests.serving import is_alive, wait_until
from tests.vllm_plugin.test_vllm_coordinator import Deployment, deployment


def flood_vllm(inputs: int, seed: int, progress: Callable[[Row], None] = lambda row: None) -> list[Row]:
    """So many inputs for each of its sockets; afterwards a wave begins and ends as ever. A row each."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    os.environ["PACELINE_VLLM_STATUS"] = f"127.0.0.1:{port}"
    try:
        with deployment(2) as running:
            return _flooded(running.greeted(), port, inputs, seed, progress)
    finally:
        del os.environ["PACELINE_VLLM_STATUS"]


def _flooded(running: Deployment, port: int, inputs: int, seed: int, progress: Callable[[Row], None]) -> list[Row]:
    publish, output = running.coordinator.get_engine_socket_addresses()
    front, child, watchdog = (
        running.coordinator.get_stats_publish_address(),
        running.child(),
        running.coordinator.proc.pid,
    )
    addresses = {"front": front, "output": output, "publish": publish, "status": f"tcp://127.0.0.1:{port}"}
    flood, begin = Flood(lambda: addresses, VLLM, seed), time.monotonic()
    before: dict[str, float] = {}
    flood.start()
    while min(flood.sent[name] for name in addresses) < inputs and flood.is_alive():
        flood.ways = [way for way in flood.ways if flood.sent[way[0]] < inputs]
        if not before and sum(flood.sent.values()) >= WARM_UP_SHARE * inputs * len(addresses):
            before = {"coordinator": rss_mb(child), "watchdog": rss_mb(watchdog)}
        progress(Row("sockets, vllm", sum(flood.sent.values()), time.monotonic() - begin))
        flood.join(0.5)
    flood.stop()
    seconds = time.monotonic() - begin
    wrong = [] if is_alive(child) and running.child() == child else ["the coordinator has been started again"]
    wrong += [] if _answers(port) else ["the status port does not answer"]
    wrong += _no_wave(running)
    after = {"coordinator": rss_mb(child), "watchdog": rss_mb(watchdog)}
    rows = []
    for name, count in flood.sent.items():
        owner = "watchdog" if name == "status" else "coordinator"
        rows.append(Row(f"vllm: {name} ({owner})", count, seconds, 0, 0, before.get(owner, 0.0), after[owner]))
        if after[owner] > before.get(owner, 0.0) + MOST_GROWTH_MB:
            wrong.append(f"{rows[-1].name} has grown to {after[owner]:.0f} MB")
    rows[0].errors, rows[0].first_error = len(wrong), "; ".join(wrong)
    return rows


def _answers(port: int) -> bool:
    def asked() -> bool:
        try:
            return urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=stretched(5)).status == 200
        except urllib.error.HTTPError as error:
            return error.code == 503 and b"stalls" in error.read()
        except OSError:
            return False

    return bool(wait_until(asked, "the status port answers"))


def _no_wave(running: Deployment) -> list[str]:
    """Bad frames may have moved the wave, and made it run: it ends, and for the next one all must be woken."""
    _, known, _ = running.last_view()
    running.says(0, complete=known)
    running.wait_view(lambda _, wave, runs: wave == known + 1 and not runs)
    running.notices(1, known + 1)
    running.wait_wake(0, known + 1)
    running.wait_wake(1, known + 1)
    return []
