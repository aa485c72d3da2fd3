"""What brokered binding costs the coordinator: CPU a request that waits in its queue, at 1 to 1,024 ranks.

    python bench/broker_cost.py [--json]

The real machine, driven as its process drives it, frames decoded and encoded: each request is asked for, granted, told
of, taken by its rank and ended there. The same requests bound at arrival (the notice of the send, which is there
without a broker too, and the rank's reports) are the measure: the difference is what the queue costs. Views are left
out on both sides: they go out by the clock, whatever the number of requests. Rounds of both alternate; the medians
count.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable

from paceline.protocol import codec
from paceline.protocol import coordinator_events as coordinator
from paceline.protocol.coordinator import Coordinator
from paceline.protocol.messages import (
    PROTOCOL_VERSION,
    Ask,
    Descriptor,
    FrontEndHello,
    Grants,
    Load,
    RankHello,
    RankReport,
    Send,
    SendNotice,
)  # fmt: skip

SLOTS = 16
FRONT_ENDS = 4
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
        self._front_end = codec.from_front_end().decode
        self._rank = codec.from_rank().decode
        for rank in range(ranks):
            hello = RankHello(PROTOCOL_VERSION, rank, 10 + rank, "ipc://x", True)
            self.machine.handle(coordinator.RankSaid(hello), 0.0)
        for front_end in range(FRONT_ENDS):
            hello_front = FrontEndHello(PROTOCOL_VERSION, 100 + front_end, brokered=True)
            self.machine.handle(coordinator.FrontEndSaid(hello_front), 0.0)
        self.told = [0] * FRONT_ENDS
        self.asks = [0] * FRONT_ENDS

    def report(self, rank: int, running: int) -> bytes:
        load = Load(0, running, SLOTS, 0, 100, 10**6, step_tokens=2048, finished=self.ended[rank], kv_reserved=100)
        taken = {100 + front_end: self.sent[rank] for front_end in range(FRONT_ENDS)}
        return codec.encode(RankReport(rank, 10 + rank, self.ended[rank], 0, False, load, taken))

    def ask(self, front_end: int, request: int) -> bytes:
        self.asks[front_end] += 1
        descriptor = Descriptor(request, 500, 200)
        return codec.encode(Ask(100 + front_end, self.asks[front_end], 10**6, [descriptor]))

    def notice(self, front_end: int, rank: int, request: int) -> bytes:
        self.told[front_end] += 1
        self.sent[rank] += 1
        send = Send(rank, 10 + rank, self.sent[rank], 500, 200, request)
        return codec.encode(SendNotice(100 + front_end, [send], self.told[front_end]))

    def hear_rank(self, frame: bytes) -> list[Grants]:
        return self._out(coordinator.RankSaid(self._rank(frame)))

    def hear_front_end(self, frame: bytes) -> list[Grants]:
        return self._out(coordinator.FrontEndSaid(self._front_end(frame)))

    def _out(self, event: coordinator.Event) -> list[Grants]:
        grants = []
        for effect in self.machine.handle(event, 1.0):
            if isinstance(effect, coordinator.ToFrontEnds):
                codec.encode(effect.message)
                if isinstance(effect.message, Grants):
                    grants.append(effect.message)
        return grants


def clock(spent: list[float], action: Callable[[], list[Grants]]) -> list[Grants]:
    """Do it and add what it took."""
    begin = time.process_time()
    found = action()
    spent[0] += time.process_time() - begin
    return found


def run(ranks: int, brokered: bool) -> float:
    """Microseconds of the coordinator's a request."""
    rig = Rig(ranks)
    for rank in range(ranks):
        rig.hear_rank(rig.report(rank, SLOTS))
    number, spent, done = 0, [0.0], 0
    for _ in range(QUEUED if brokered else 0):
        number += 1
        rig.hear_front_end(rig.ask(number % FRONT_ENDS, number))
    while done < REQUESTS:
        # One rank after the other ends a request, and is sent the next one.
        rank = done % ranks
        rig.ended[rank] += 1
        freed = rig.report(rank, SLOTS - 1)
        grants = clock(spent, lambda frame=freed: rig.hear_rank(frame))  # type: ignore[misc]
        given = [grant for message in grants for grant in message.grants]
        assert len(given) == brokered, f"{len(given)} grants where one slot is free"
        front_end, request = (given[0].front_end - 100, given[0].request) if given else (done % FRONT_ENDS, 0)
        frames = [rig.notice(front_end, given[0].rank if given else rank, request)]
        if brokered:
            number += 1
            frames.append(rig.ask(number % FRONT_ENDS, number))
        for frame in frames:
            clock(spent, lambda frame=frame: rig.hear_front_end(frame))  # type: ignore[misc]
        taken = rig.report(rank, SLOTS)
        clock(spent, lambda frame=taken: rig.hear_rank(frame))  # type: ignore[misc]
        done += 1
    return spent[0] / done * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--ranks", type=int, nargs="*", default=[1, 8, 32, 128, 512, 1024])
    arguments = parser.parse_args()
    rows = []
    for ranks in arguments.ranks:
        both: tuple[list[float], list[float]] = ([], [])
        for _ in range(ROUNDS):
            for brokered in (False, True):
                gc.collect()
                both[brokered].append(run(ranks, brokered))
        arrival, broker = (statistics.median(one) for one in both)
        rows.append({"ranks": ranks, "arrival_us": arrival, "broker_us": broker, "queue_us": broker - arrival})
    if arguments.json:
        print(json.dumps(rows))
        return
    print("| ranks | bound at arrival, us | brokered, us | the queue, us |\n|---|---|---|---|")
    for row in rows:
        print(f"| {row['ranks']} | {row['arrival_us']:.1f} | {row['broker_us']:.1f} | {row['queue_us']:.1f} |")


if __name__ == "__main__":
    main()
