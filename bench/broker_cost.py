"""What brokered binding costs: CPU of the coordinator a request that waits in its queue, at 1 to 1,024 ranks; and what
it adds to the time to first token while ranks are idle.

    python -m bench.broker_cost [--turn N] [--json] [--idle]

The queue. The real machine, driven as its process drives it, frames decoded and encoded: each request is asked for,
granted, told of, taken by its rank and ended there. The same requests bound at arrival (the notice of the send, which
is there without a broker too, and the rank's reports) are the measure: the difference is what the queue costs. Views
are left out on both sides: they go out by the clock, whatever the number of requests. Rounds of both alternate; the
medians count. `--turn`: requests that end at the same moment, so that what is said of them is read in one go, as it is
in a busy coordinator.

`--idle`: two deployments of the `timed` engine (no step time) side by side, one with each `--bind`, asked in turn, one
request at a time over one kept connection each; medians, and the difference of the medians.
"""

from __future__ import annotations

import argparse
import gc
import http.client
import json
import statistics
import time
from collections.abc import Callable

from tests.serving import Command

from paceline.core import binding, codec, messages
from paceline.core.coordinator import events as coordinator
from paceline.core.coordinator.machine import Coordinator
from paceline.core.load import Load

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
            hello = messages.RankHello(messages.PROTOCOL_VERSION, rank, 10 + rank, "ipc://x", True)
            self.machine.handle(coordinator.RankSaid(hello), 0.0)
        for frontend in range(FRONTENDS):
            hello_front = messages.FrontendHello(messages.PROTOCOL_VERSION, 100 + frontend, brokered=True)
            self.machine.handle(coordinator.FrontendSaid(hello_front), 0.0)
        self.told = [0] * FRONTENDS
        self.asks = [0] * FRONTENDS

    def report(self, rank: int, running: int) -> bytes:
        load = Load(0, running, SLOTS, 0, 100, 10**6, step_tokens=2048, finished=self.ended[rank], kv_reserved=100)
        taken = {100 + frontend: self.sent[rank] for frontend in range(FRONTENDS)}
        return codec.encode(messages.RankReport(rank, 10 + rank, self.ended[rank], 0, False, load, taken))

    def ask(self, frontend: int, request: int) -> bytes:
        self.asks[frontend] += 1
        descriptor = binding.Descriptor(request, 500, 200)
        return codec.encode(binding.Ask(100 + frontend, self.asks[frontend], 10**6, [descriptor]))

    def notice(self, frontend: int, rank: int, request: int) -> bytes:
        self.told[frontend] += 1
        self.sent[rank] += 1
        send = binding.Send(rank, 10 + rank, self.sent[rank], 500, 200, request)
        return codec.encode(binding.SendNotice(100 + frontend, [send], self.told[frontend]))

    def hear_ranks(self, frames: list[bytes]) -> list[binding.Grants]:
        return self._out(coordinator.RanksReported([self._rank(frame) for frame in frames]))  # type: ignore[misc]

    def hear_frontends(self, frames: list[bytes]) -> list[binding.Grants]:
        return self._out(coordinator.FrontendsSaid([self._frontend(frame) for frame in frames]))  # type: ignore[misc]

    def _out(self, event: coordinator.Event) -> list[binding.Grants]:
        grants = []
        for effect in self.machine.handle(event, 1.0):
            if isinstance(effect, coordinator.ToFrontends):
                codec.encode(effect.message)
                if isinstance(effect.message, binding.Grants):
                    grants.append(effect.message)
        return grants


def clock(spent: list[float], action: Callable[[], list[binding.Grants]]) -> list[binding.Grants]:
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


# An idle deployment ------------------------------------------------------------------------------

IDLE_REQUESTS = 1500
COSTS = ("step_ms", "prefill_ms", "decode_ms")
PROMPTS = ("hello", "a prompt of some length " * 8)


class Served(Command):
    """`paceline serve` with one way of binding."""

    def __init__(self, bind: str, frontends: int) -> None:
        costs = (f"--engine-option={name}=0" for name in COSTS)
        ranks = ("--engine", "timed", "-dp", "4", "-asc", str(frontends))
        super().__init__("serve", "--port", "0", "--bind", bind, *ranks, *costs)
        self.connect()
        self._connection = http.client.HTTPConnection(self.url.removeprefix("http://"))

    def ask(self, prompt: str) -> float:
        body = json.dumps({"prompt": prompt, "max_tokens": 1, "stream": True})
        begin = time.perf_counter()
        self._connection.request("POST", "/v1/completions", body)
        answer = self._connection.getresponse()
        answer.readline()
        took = time.perf_counter() - begin
        answer.read()
        return took * 1000


def idle() -> None:
    print("| front-ends | prompt | arrival p50, ms | broker p50, ms | difference, ms |\n|---|---|---|---|---|")
    for frontends in (1, 2):
        both = [Served(bind, frontends) for bind in ("arrival", "broker")]
        try:
            for prompt in PROMPTS:
                took: list[list[float]] = [[], []]
                for number in range(IDLE_REQUESTS):
                    for which in (0, 1) if number % 2 else (1, 0):
                        took[which].append(both[which].ask(prompt))
                arrival, late = (statistics.median(one[IDLE_REQUESTS // 10 :]) for one in took)
                print(f"| {frontends} | {len(prompt)} tokens | {arrival:.2f} | {late:.2f} | {late - arrival:+.2f} |")
        finally:
            for served in both:
                served.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--ranks", type=int, nargs="*", default=[1, 8, 32, 128, 512, 1024])
    parser.add_argument("--turn", type=int, default=1)
    parser.add_argument("--idle", action="store_true", help="idle deployments, not the queue")
    arguments = parser.parse_args()
    if arguments.idle:
        idle()
        return
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
