"""What brokered binding costs the coordinator: CPU a request that waits in its queue, at 1 to 1,024 ranks.

    python bench/broker_cost.py [--turn N] [--json]

The real machine, driven as its process drives it, frames decoded and encoded: each request is asked for, granted, told
of, taken by its rank and ended there. The same requests bound at arrival (the notice of the send, which is there
without a broker too, and the rank's reports) are the measure: the difference is what the queue costs. Views are left
out on both sides: they go out by the clock, whatever the number of requests. Rounds of both alternate; the medians
count. `--turn`: requests that end at the same moment, so that what is said of them is read in one go, as it is in a
busy coordinator.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable

from paceline.core import codec
from paceline.core.coordinator import events as coordinator
from paceline.core.coordinator.machine import Coordinator
from paceline.core.load import Load
from paceline.core.messages import (
    PROTOCOL_VERSION,
    Ask,
    Descriptor,
    FrontendHello,
    Grants,
    RankHello,
    RankReport,
    Send,
    SendNotice,
)

SLOTS = 16
FRONTENDS = 4
REQUESTS = 4000
ROUNDS = 7
QUEUED = 256
"""Requests that wait at any time."""
FAR = 1e9


class Rig:
    """A coordinator with full ranks, and what front-ends and ranks would say to it, encoded beforehand."""

    def __init__(self, ranks: int) -> None:
        self.machine = Coordinator(ranks, 1, FAR, lockstep=False)
        self.ranks = ranks
        self.sent = [0] * ranks
        self.ended = [0] * ranks
        self._frontend = codec.from_frontend().decode
        self._rank = codec.from_rank().decode
        for rank in range(ranks):
            hello = RankHello(PROTOCOL_VERSION, rank, 10 + rank, "ipc://x", True)
            self.machine.handle(coordinator.RankSaid(hello), 0.0)
        for frontend in range(FRONTENDS):
            hello_front = FrontendHello(PROTOCOL_VERSION, 100 + frontend, brokered=True)
            self.machine.handle(coordinator.FrontendSaid(hello_front), 0.0)
        self.told = [0] * FRONTENDS
        self.asks = [0] * FRONTENDS

    def report(self, rank: int, running: int) -> bytes:
        load = Load(0, running, SLOTS, 0, 100, 10**6, step_tokens=2048, finished=self.ended[rank], kv_reserved=100)
        taken = {100 + frontend: self.sent[rank] for frontend in range(FRONTENDS)}
        return codec.encode(RankReport(rank, 10 + rank, self.ended[rank], 0, False, load, taken))

    def ask(self, frontend: int, request: int) -> bytes:
        self.asks[frontend] += 1
        descriptor = Descriptor(request, 500, 200)
        return codec.encode(Ask(100 + frontend, self.asks[frontend], 10**6, [descriptor]))

    def notice(self, frontend: int, rank: int, request: int) -> bytes:
        self.told[frontend] += 1
        self.sent[rank] += 1
        send = Send(rank, 10 + rank, self.sent[rank], 500, 200, request)
        return codec.encode(SendNotice(100 + frontend, [send], self.told[frontend]))

    def hear_ranks(self, frames: list[bytes]) -> list[Grants]:
        return self._out(coordinator.RanksReported([self._rank(frame) for frame in frames]))  # type: ignore[misc]

    def hear_frontends(self, frames: list[bytes]) -> list[Grants]:
        return self._out(coordinator.FrontendsSaid([self._frontend(frame) for frame in frames]))  # type: ignore[misc]

    def _out(self, event: coordinator.Event) -> list[Grants]:
        grants = []
        for effect in self.machine.handle(event, 1.0):
            if isinstance(effect, coordinator.ToFrontends):
                codec.encode(effect.message)
                if isinstance(effect.message, Grants):
                    grants.append(effect.message)
        return grants


def clock(spent: list[float], action: Callable[[], list[Grants]]) -> list[Grants]:
    begin = time.process_time()
    found = action()
    spent[0] += time.process_time() - begin
    return found


def run(ranks: int, late_binding: bool, turn: int) -> float:
    rig = Rig(ranks)
    rig.hear_ranks([rig.report(rank, SLOTS) for rank in range(ranks)])
    number, spent, done = 0, [0.0], 0
    for _ in range(QUEUED if late_binding else 0):
        number += 1
        rig.hear_frontends([rig.ask(number % FRONTENDS, number)])
    while done < REQUESTS:
        # Some ranks after the others end a request each, and are sent the next one.
        ending = [(done + place) % ranks for place in range(min(turn, ranks))]
        for rank in ending:
            rig.ended[rank] += 1
        freed = [rig.report(rank, SLOTS - 1) for rank in ending]
        grants = clock(spent, lambda frames=freed: rig.hear_ranks(frames))  # type: ignore[misc]
        given = [grant for message in grants for grant in message.grants]
        assert len(given) == late_binding * len(ending), f"{len(given)} grants where {len(ending)} slots are free"
        if late_binding:
            said = [rig.notice(grant.frontend - 100, grant.rank, grant.request) for grant in given]
            for _ in ending:
                number += 1
                said.append(rig.ask(number % FRONTENDS, number))
        else:
            said = [rig.notice(rank % FRONTENDS, rank, 0) for rank in ending]
        clock(spent, lambda frames=said: rig.hear_frontends(frames))  # type: ignore[misc]
        taken = [rig.report(rank, SLOTS) for rank in ending]
        clock(spent, lambda frames=taken: rig.hear_ranks(frames))  # type: ignore[misc]
        done += len(ending)
    return spent[0] / done * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--ranks", type=int, nargs="*", default=[1, 8, 32, 128, 512, 1024])
    parser.add_argument("--turn", type=int, default=1)
    arguments = parser.parse_args()
    rows = []
    for ranks in arguments.ranks:
        both: tuple[list[float], list[float]] = ([], [])
        for _ in range(ROUNDS):
            for late_binding in (False, True):
                gc.collect()
                both[late_binding].append(run(ranks, late_binding, arguments.turn))
        arrival, dispatcher = (statistics.median(one) for one in both)
        rows.append({"ranks": ranks, "arrival_us": arrival, "broker_us": dispatcher, "queue_us": dispatcher - arrival})
    if arguments.json:
        print(json.dumps(rows))
        return
    print("| ranks | bound at arrival, us | brokered, us | the queue, us |\n|---|---|---|---|")
    for row in rows:
        print(f"| {row['ranks']} | {row['arrival_us']:.1f} | {row['broker_us']:.1f} | {row['queue_us']:.1f} |")


if __name__ == "__main__":
    main()
