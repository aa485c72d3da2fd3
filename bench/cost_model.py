"""Predicted against measured time to first token: `make bench-cost-model`.

Real ranks and a real coordinator; the front-end's machine is in this process, so that the prediction is made from what
it believes at the very moment of sending. Each part is a deployment and an engine of its own: warmed up, then loaded
with requests at random moments, first lightly, in the end beyond what it can carry.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from cost_model_fleet import DatedFrontEnd, Fleet, connected
from cost_model_report import Sample, plot, to_console, to_markdown
from msgspec.structs import replace

from paceline.net.frontend import FrontendShell
from paceline.protocol.cost import predicted_wait
from paceline.protocol.frontend_events import Placed, Refuse
from paceline.protocol.messages import Load, Output
from paceline.protocol.sampling import SamplingParams

RESULTS = Path(__file__).resolve().parent / "results"
PROMPTS = (8, 600)
ANSWERS = (8, 48)
LOADS = {"light": 0.5, "medium": 0.9, "heavy": 1.5}
"""Load to its share of what the ranks can carry, by their own costs after warming up."""

FEW_SLOTS = 2
WARMING_UP = 4
SEED = 4


class Sink:
    """Takes one answer: when its first token came, when its last."""

    def __init__(self) -> None:
        self.rank = -1
        self.first: float | None = None
        self.load: Load | None = None
        self.now_believed: Callable[[], Load] | None = None
        self.done = asyncio.Event()

    def handle(self, news: Placed | Output | Refuse) -> None:
        match news:
            case Placed(_, rank):
                self.rank = rank
            case Refuse():
                self.done.set()
            case Output():
                if self.first is None and news.token_ids:
                    self.first = time.monotonic()
                if news.finish_reason is not None:
                    # By now the report of the step that made the first token is there.
                    self.load = self.now_believed() if self.now_believed is not None else None
                    self.done.set()


class Loader:
    """Sends random requests through one front-end, and keeps what was predicted and what came."""

    def __init__(self, client: FrontendShell, machine: DatedFrontEnd, vocabulary: int) -> None:
        self._client, self._machine, self._vocabulary = client, machine, vocabulary
        self._chance = random.Random(SEED)
        self._open: list[tuple[Sink, Sample]] = []

    def send(self, part: str, load: str) -> None:
        """One request."""
        chance = self._chance
        tokens = [chance.randrange(self._vocabulary // 100, self._vocabulary) for _ in range(chance.randint(*PROMPTS))]
        params = SamplingParams(max_tokens=chance.randint(*ANSWERS), temperature=0.0)
        now = time.monotonic()
        believed = {rank: (self._machine.believed(rank), self._machine.age_s(rank, now)) for rank in self.ranks}
        sink = Sink()
        sent = time.monotonic()
        self._client.submit(sink.handle, tokens, params)
        rank = sink.rank
        sink.now_believed = partial(self._machine.believed, rank)
        known, age_s = believed[rank]
        predicted = predicted_wait(known, len(tokens), age_s)
        undated = predicted_wait(known, len(tokens))
        self._open.append((sink, Sample(part, load, rank, len(tokens), predicted, undated, age_s, sent, known)))

    @property
    def ranks(self) -> list[int]:
        return self._machine.ready_ranks()

    def load(self, rank: int) -> Load:
        """What is believed of a rank."""
        return self._machine.believed(rank)

    async def poisson(self, part: str, load: str, rate: float, seconds: float) -> None:
        """Requests at random moments, `rate` a second."""
        due = time.monotonic() + self._chance.expovariate(rate)
        end = time.monotonic() + seconds
        while due < end:
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            self.send(part, load)
            due += self._chance.expovariate(rate)

    async def drain(self) -> list[Sample]:
        """Until all are answered; returns them."""
        for sink, sample in self._open:
            await sink.done.wait()
            if sink.first is not None:
                sample.actual = sink.first - sample.sent
                sample.hindsight = predicted_wait(self._with_costs_of(sample, sink), sample.prompt_tokens, sample.age_s)
        done = [sample for _, sample in self._open if sample.actual is not None]
        self._open = []
        return done

    def _with_costs_of(self, sample: Sample, sink: Sink) -> Load:
        later = sink.load or sample.known
        costs = {name: getattr(later, name) for name in ("step_s", "prompt_token_s", "answer_token_s")}
        return replace(sample.known, **costs)

    def capacity(self) -> float:
        """Requests a second that all ranks can carry, by their own measurement."""
        prompt, answer = sum(PROMPTS) / 2, sum(ANSWERS) / 2
        total = 0.0
        for load in map(self.load, self.ranks):
            writers = max(1, min(load.slots, 8))
            each = load.prompt_token_s * prompt + answer * (load.answer_token_s + load.step_s / writers)
            total += 1 / each
        return total


async def measure(part: str, engine: str, slots: int, loads: list[str], args: argparse.Namespace) -> list[Sample]:
    """One deployment, all its loads."""
    samples: list[Sample] = []
    with tempfile.TemporaryDirectory() as folder, Fleet(Path(folder), args.ranks, engine, slots) as fleet:
        async with connected(fleet) as (client, machine):
            loader = Loader(client, machine, 256 if engine == "timed" else 200_000)
            for _ in range(WARMING_UP):
                loader.send(part, "warming up")
                await asyncio.sleep(0.05)
            await loader.drain()
            for load in loads:
                rate = LOADS[load] * loader.capacity()
                print(f"{part}, {load}: {rate:.2f} requests/s for {args.seconds:g} s", file=sys.stderr, flush=True)
                await loader.poisson(part, load, rate, args.seconds)
                samples += await loader.drain()
    return samples


def parts(args: argparse.Namespace) -> list[tuple[str, str, int, list[str]]]:
    """(name, engine, slots, loads) of each part."""
    found = [(engine, engine, 16, list(LOADS)) for engine in args.engines]
    return found + [(f"{engine}, {FEW_SLOTS} slots", engine, FEW_SLOTS, ["heavy"]) for engine in args.engines]


def main() -> int:
    """Measure and show."""
    parser = argparse.ArgumentParser(prog="cost_model.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=20.0, help="how long each load lasts (default: 20)")
    parser.add_argument("--engines", type=lambda text: text.split(","), default=["llama", "timed"])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all samples there too")
    parser.add_argument("--write", action="store_true", help="write bench/results/cost_model.md and .png")
    args = parser.parse_args()
    samples: list[Sample] = []
    for part in parts(args):
        samples += asyncio.run(measure(*part, args))
        print(to_console([sample for sample in samples if sample.part == part[0]]), flush=True)
    if args.json:
        args.json.write_text(json.dumps([plain(sample) for sample in samples]) + "\n")
    if args.write:
        plot(samples, RESULTS / "cost_model.png")
        command = f"make bench-cost-model ARGS='--ranks {args.ranks} --seconds {args.seconds:g} --write'"
        (RESULTS / "cost_model.md").write_text(to_markdown(samples, command))
    return 0


def plain(sample: Sample) -> dict[str, Any]:
    """For JSON."""
    fields = dict(vars(sample))
    fields["known"] = {name: getattr(sample.known, name) for name in sample.known.__struct_fields__}
    return fields


if __name__ == "__main__":
    sys.exit(main())
