"""A trace on a simulated deployment, by our way to choose ranks or another system's; a picture of it.

    python -m bench.replay --trace azure_llm_2023_conv.csv --ranks 64 --front-ends 4 --routing vllm-0.32

The flags are those of `paceline simulate --trace`. Ranks and links are the same too: only who chooses is not.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from bench.peers import CLIENTS as OF_LOAD, QUEUES, AdpBalance, Client, ContextGate, Queue, Rank, Snapshot
from bench.session_peers import SESSION_CLIENTS
from msgspec.structs import replace

from paceline.core.frontend import events as frontend_events
from paceline.core.rank import events as rank_events
from paceline.core.requests import AddRequest, Outputs
from paceline.errors import ConfigError
from paceline.sim.answers import Answers
from paceline.sim.engine import EngineShape, MemoryEngine, Sequence
from paceline.sim.processes import Engine, FrontendProcess, Planned, RankProcess
from paceline.sim.replay import Recorder, Replay, Setup, prompt_of
from paceline.sim.trace import Arrival, Sessions
from paceline.sim.world import Link
from paceline.simulate_cli import FAULTS, TRACE, Flag, Given, command, run_trace

CLIENTS = OF_LOAD | SESSION_CLIENTS
NOBODY = 1
"""Who sends what a queue gives out."""


class ClientReplay(Replay):
    """Front-ends that name the rank of each request, as a peer's clients would choose it."""

    def __init__(self, setup: Setup, arrivals: list[Arrival] | Sessions) -> None:
        super().__init__(replace(setup, quota=False, bind="arrival"), arrivals, ClientRecorder(self._heard))
        self.kind = CLIENTS[setup.routing]
        count = 1 if self.kind.one else setup.frontends
        self.clients = [self.kind(index, setup.frontends, setup.ranks) for index in range(count)]
        self._ticking = False

    def start(self) -> ClientReplay:
        super().start()
        for client in self.clients:
            client.engines(self.engines)
        return self

    def client(self, frontend: FrontendProcess) -> Client:
        places = [place for place, one in self.frontends.items() if one is frontend]
        return self.clients[0 if self.kind.one else places[0]]

    def submit(self, frontend: FrontendProcess, sequence: Sequence) -> None:
        client = self.client(frontend)
        rank = client.choose(sequence)
        client.in_flight[rank] += 1
        frontend.ask(sequence.number, prompt_of(sequence, contents=False), self.params, rank)
        if not self._ticking:
            self._ticking = True
            self.world.after(self.kind.interval_s, self._tick)

    def _tick(self) -> None:
        # It takes one message to hear of the ranks, and one to tell the clients.
        self.world.after(2 * self.setup.delay_s, partial(self._hear, Snapshot(self.engines)))
        self._ticking = not self.finished()
        if self._ticking:
            self.world.after(self.kind.interval_s, self._tick)

    def _hear(self, snapshot: Snapshot) -> None:
        for client in self.clients:
            client.hear(snapshot)

    def _heard(self, frontend: FrontendProcess, said: Outputs) -> None:
        client = self.client(frontend)
        for output in said.outputs:
            ended = output.finish_reason is not None
            client.in_flight[said.rank] -= ended
            client.heard(output.request, ended)


class ClientRecorder(Recorder):
    """Tells of what front-ends hear from ranks."""

    def __init__(self, heard: Callable[[FrontendProcess, Outputs], None]) -> None:
        super().__init__()
        self._heard = heard

    def frontend(self, frontend: FrontendProcess, event: frontend_events.Event) -> None:
        if isinstance(event, frontend_events.RankSaid):
            self._heard(frontend, event.message)


class QueueReplay(Replay):
    """One queue before all ranks, which gives requests to them between two steps."""

    def __init__(self, setup: Setup, arrivals: list[Arrival] | Sessions) -> None:
        kind = QUEUES[setup.routing]
        if kind.lockstep and not setup.lockstep:
            raise ConfigError(f"--routing: {setup.routing}: only with --lockstep")
        delay_s = 0.0 if kind.at_once else setup.delay_s
        quota = setup.quota and kind.at_once
        self.queue: Queue = kind(self._give)
        self.gate = ContextGate() if kind is AdpBalance else None
        self._pulled_at = self._looked_at = -1.0
        self._open = True
        super().__init__(
            replace(setup, delay_s=delay_s, quota=quota, bind="arrival"), arrivals, QueueRecorder(self._turn)
        )
        self.asked = Answers(self.world, "the queue")
        self.known: list[Rank] = []
        links = self.shape.links
        self._to_clients = Link(self.world, "to clients", None, self._hear, links, self.seeds.stream("to clients"))

    def start(self) -> QueueReplay:
        """All processes, and what the queue knows of the ranks."""
        super().start()
        self.known = [Rank(number, one, partial(self._next_turn, number)) for number, one in enumerate(self.engines)]
        return self

    def engine(self) -> Engine:
        if self.gate is None:
            return super().engine()
        self.engines.append(GatedEngine(self.setup.engine, self.sequence, self._prefills))
        return self.engines[-1]

    def answers(self) -> list[Answers]:
        return [self.asked]

    def submit(self, frontend: FrontendProcess, sequence: Sequence) -> None:
        self.asked.asked(self.params.max_tokens, sequence.number)
        self.world.after(self.setup.delay_s, partial(self._queue_up, sequence))

    def back(self, rank: RankProcess, identity: int) -> Link | None:
        return self._to_clients if identity == NOBODY else super().back(rank, identity)

    def _queue_up(self, sequence: Sequence) -> None:
        self.queue.queue.append(sequence)
        if self.queue.at_once or not any(rank.machine.running for rank in self.ranks.values()):
            self.queue.pull(self.known)
        else:
            self.ranks[0].interrupt()

    def _turn(self, rank: RankProcess) -> None:
        if not self.queue.queue or not self.known:
            return
        if not rank.lockstep:
            self.queue.pull([self.known[rank.machine.rank]])
        elif self._pulled_at != self.world.now:
            self._pulled_at = self.world.now
            self.queue.pull(self.known)

    def _give(self, rank: Rank, sequence: Sequence) -> None:
        process = self.ranks[rank.number]
        rank.given.append(sequence)
        self.asked[sequence.number].rank = rank.number
        life, number = process.machine.incarnation, process.taken.get(NOBODY, 0) + len(rank.given)
        prompt = prompt_of(sequence, contents=False)
        add = AddRequest(sequence.number, number, life, process.machine.wave, prompt, self.params)
        process.arrive(rank_events.FrontendSaid(NOBODY, add))

    def _hear(self, said: Outputs) -> None:
        for output in said.outputs:
            self.asked.delivered(output)

    def _next_turn(self, number: int) -> float:
        process, now = self.ranks[number], self.world.now
        return max(now, process.span.step_end) if process.busy and process.span is not None else now

    def _prefills(self) -> bool:
        """Whether the step that begins now computes prompts: asked by one rank, for all."""
        if self.gate is not None and self._looked_at != self.world.now:
            self._looked_at = self.world.now
            self._open = self.gate.opens(self.known)
        return self._open


class QueueRecorder(Recorder):
    """Tells of ranks that are between two steps."""

    def __init__(self, turned: Callable[[RankProcess], None]) -> None:
        super().__init__()
        self._turned = turned

    def turn(self, rank: RankProcess) -> None:
        self._turned(rank)


class GatedEngine(MemoryEngine):
    """Computes prompts in some steps alone."""

    def __init__(
        self, shape: EngineShape, find: Callable[[AddRequest], Sequence], prefills: Callable[[], bool]
    ) -> None:
        super().__init__(shape, find)
        self._prefills = prefills

    def plan(self, prefill_quota: int | None = None) -> Planned:
        return super().plan(None if self._prefills() else 0)


# The command ------------------------------------------------------------------------------------


def replay_of(setup: Setup, arrivals: list[Arrival] | Sessions) -> Replay:
    """What serves a trace, by the name of the way to choose ranks."""
    kinds = dict.fromkeys(CLIENTS, ClientReplay) | dict.fromkeys(QUEUES, QueueReplay)
    kind: Callable[..., Replay] = kinds.get(setup.routing, Replay)
    return kind(setup, arrivals)


def check_plotting() -> None:
    """Raises ConfigError where nothing can be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError("--plot: needs matplotlib: pip install 'paceline[bench]'") from None


def plot(run: Replay, path: Path) -> None:
    """Draw a run that is over into a file (.png, .svg, ...): how long requests waited, and how level the ranks were.

    Raises ConfigError where it cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    waits, work = figure.subplots(1, 2)
    firsts = np.sort([one.first - one.asked for answers in run.answers() for one in answers.values()])
    waits.plot(firsts, np.arange(1, len(firsts) + 1) / len(firsts))
    waits.set(xscale="log", xlabel="time to first token, s", ylabel="share of requests", ylim=(0, 1))
    waits.grid(alpha=0.3)
    samples = np.array(run.recorder.samples).reshape(-1, 3)
    work.plot(samples[:, 0], samples[:, 1] / 1e3, label="the fullest rank", linewidth=0.8)
    work.plot(samples[:, 0], samples[:, 2] / 1e3, label="mean", linewidth=0.8)
    work.set(xlabel="time, s", ylabel="queued work of a rank, 1,000 tokens", ylim=(0, None))
    work.grid(alpha=0.3)
    work.legend()
    setup = run.setup
    kind = "lockstep" if setup.lockstep else "independent"
    figure.suptitle(f"{setup.routing}, {setup.ranks} {kind} ranks, {setup.frontends} front-ends")
    try:
        figure.savefig(path, dpi=80)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--plot: {path}: {getattr(error, 'strerror', None) or error}") from None


def replay_command(given: Given) -> None:
    if given["trace"] is None:
        raise ConfigError("--trace: which one?")
    if given["plot"] is not None:
        check_plotting()
    run = run_trace(given, replay_of, (*CLIENTS, *QUEUES))
    if given["plot"] is not None:
        plot(run, Path(given["plot"]))


SHARED = ("seed", "ranks", "frontends", "requests", "lockstep", "json", "bind")
FLAGS = {name: replace(FAULTS[name], drawn=False) for name in SHARED} | TRACE
FLAGS["routing"] = Flag(str, f"{TRACE['routing'].help[:-1]}; or of others: {', '.join((*CLIENTS, *QUEUES))}.")
FLAGS["plot"] = Flag(str, "Draw the run into this file (needs matplotlib).")
app = command(
    FLAGS, (), replay_command, "Serve a trace in virtual time, by our way to choose ranks or another system's."
)

if __name__ == "__main__":
    app(prog_name="python -m bench.replay")
