"""The sockets of real processes, flooded while real requests go on: who is still there, how large, what was lost."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

from bench.chaos import ENGINES
from bench.chaos_mischief import Client, Tally, asks_of, flood_of

from tests.fuzz.blind import Row, rss_mb
from tests.fuzz.flood import OURS, Flood
from tests.pace import stretched
from tests.serving import Deployment, deployment, process_name, wait_until

CLIENTS = 3
WARM_UP_SHARE = 0.2
"""Of all inputs: what memory a process takes for its work, it has taken by then."""
MOST_GROWTH_MB = 24.0
OWNERS = {
    "front-publish": "coordinator", "back-output": "coordinator", "back-publish": "coordinator", "rank-": "rank",
    "group-": "rank", "http": "front-end",
}  # fmt: skip
"""Whose socket it is."""


def flood_sockets(engine: str, inputs: int, seed: int, progress: Callable[[Row], None] = lambda row: None) -> list[Row]:
    """So many inputs for each kind of socket of a deployment. A row each; what is wrong is in the first one."""
    with deployment(*ENGINES[engine], "-dp", "2") as running:
        tally = Tally()
        asks = asks_of(engine, model_of(running))
        texts = [text_of(running, ask) for ask in asks]
        readers = [Client(index, running, asks, texts, tally) for index in range(CLIENTS)]
        for reader in readers:
            reader.start()
        pids = processes_of(running)
        before: dict[str, float] = {}
        flood, begin = flood_of(running, seed, pause_s=0.0), time.monotonic()
        kinds = [name for name, _, _ in OURS if engine == "moe" or name != "group-"]
        flood.ways = [way for way in OURS if way[0] in kinds]
        flood.start()
        while min(flood.sent[name] for name in kinds) < inputs and flood.is_alive():
            flood.ways = [way for way in flood.ways if flood.sent[way[0]] < inputs]
            if not before and sum(flood.sent.values()) >= WARM_UP_SHARE * inputs * len(kinds):
                before = memory_of(pids)
            progress(Row(f"sockets, {engine}", sum(flood.sent.values()), time.monotonic() - begin))
            flood.join(0.5)
        flood.stop()
        for reader in readers:
            reader.over.set()
        for reader in readers:
            reader.join(stretched(60))
        return rows_of(engine, running, flood, tally, pids, before, time.monotonic() - begin)


def rows_of(
    engine: str, running: Deployment, flood: Flood, tally: Tally, pids: dict[str, int], before: dict[str, float],
    seconds: float,
) -> list[Row]:  # fmt: skip
    wrong = [*tally.lost, *tally.wrong, *(["a connection broke"] if tally.cut else [])]
    if processes_of(running) != pids:
        wrong.append(f"processes were {pids} and are {processes_of(running)}")
    if "Traceback" in running.output or not tally.requests:
        wrong.append(f"{tally.requests} requests, and the log says\n{running.output[-2000:]}")
    # What ZeroMQ keeps of connections that have ended, it gives back in a moment.
    settled = settle_memory(pids, before)
    rows = []
    for name, count in flood.sent.items():
        mine = [process for process in pids if process.startswith(OWNERS[name])]
        row = Row(f"{engine}: {name.strip('-')} ({OWNERS[name]})", count, seconds)
        row.rss_before_mb = max(before.get(process, 0.0) for process in mine)
        row.rss_after_mb = max(settled[process] for process in mine)
        if row.rss_after_mb > row.rss_before_mb + MOST_GROWTH_MB:
            wrong.append(f"{row.name} has grown from {row.rss_before_mb:.0f} to {row.rss_after_mb:.0f} MB")
        rows.append(row)
    rows[0].errors, rows[0].first_error = len(wrong), "; ".join(wrong[:5])
    rows[0].things = tally.requests
    return rows


def settle_memory(pids: dict[str, int], before: dict[str, float]) -> dict[str, float]:
    """Every process's memory once it does not shrink any more, or is small enough."""

    def small() -> bool:
        now = memory_of(pids)
        return all(now[name] <= before.get(name, 0.0) + MOST_GROWTH_MB for name in now)

    with contextlib.suppress(AssertionError):
        wait_until(small, "memory is as before", deadline_s=20.0)
    return memory_of(pids)


def processes_of(running: Deployment) -> dict[str, int]:
    named = {process_name(pid).removeprefix("pl:"): pid for pid in running.children()}
    return {name: pid for name, pid in named.items() if name.startswith(("rank", "front-end", "coordinator"))}


def memory_of(pids: dict[str, int]) -> dict[str, float]:
    found = {}
    for name, pid in pids.items():
        try:
            found[name] = rss_mb(pid)
        except (FileNotFoundError, StopIteration):
            found[name] = 0.0
    return found


def text_of(running: Deployment, ask: dict[str, object]) -> str:
    with running.openai as client:
        return str(client.completions.create(**ask).choices[0].text)  # type: ignore[call-overload]


def model_of(running: Deployment) -> str:
    return str(running.http.get("/v1/models").json()["data"][0]["id"])
