"""One run: a trace, a deployment, a way to choose ranks."""

from __future__ import annotations

import time
from collections.abc import Callable
from random import Random

from msgspec import Struct

from paceline.core.routing import POLICIES
from paceline.core.routing.least import LeastLoad
from paceline.core.routing.policy import Policy
from paceline.errors import ConfigError
from paceline.simulate.traffic.clock import Clock
from paceline.simulate.traffic.engine import EngineShape
from paceline.simulate.traffic.independent import IndependentFleet
from paceline.simulate.traffic.lockstep import LockstepFleet
from paceline.simulate.traffic.oracle import Oracle
from paceline.simulate.traffic.ours import Links, Paceline
from paceline.simulate.traffic.outcome import Outcome, Who, outcome
from paceline.simulate.traffic.peers import PEERS, PeerPlane
from paceline.simulate.traffic.peers_lockstep import LOCKSTEP_PEERS, ContextGate
from paceline.simulate.traffic.plane import ControlPlane
from paceline.simulate.traffic.prefill_quota import CommonQuota, PrefillQuota
from paceline.simulate.traffic.recorder import Recorder
from paceline.simulate.traffic.sequence import Sequence
from paceline.simulate.traffic.trace import Arrival

ORACLE = "oracle"
SAMPLES = 2000
"""How often a run is looked at for how level its ranks are, and for the progress bar."""

LEAST_SAMPLE_S = 0.1


class Deployment(Struct, frozen=True):
    """What serves. `routing`: a name; `policy`: the class where it is one of the control plane's policies.

    `quota`: whether lockstep ranks of ours, and the oracle's, have the common prefill quota; peers have theirs.
    `bind`: whether requests of ours wait in the coordinator's queue ("broker"; least-load alone) or are bound when they
    arrive ("arrival").
    `seed`: which front-end a request comes to. `warm_up`: the share of the arrivals' time that counts for no figure
    of time and no sustained throughput.
    """

    ranks: int = 8
    frontends: int = 1
    lockstep: bool = False
    routing: str = "least-load"
    policy: type[Policy] | None = None
    engine: EngineShape = EngineShape()
    links: Links = Links()
    seed: int = 0
    warm_up: float = 0.0
    quota: bool = True
    bind: str = "broker"


def routing_names() -> list[str]:
    """What `--routing` takes beside a policy of somebody else's."""
    return [*POLICIES, *PEERS, *LOCKSTEP_PEERS, ORACLE]


def run(deployment: Deployment, arrivals: list[Arrival], progress: Callable[[int, int], None] | None = None) -> Outcome:
    """Serve all arrivals (in order of time); returns the figures. `progress`: told of requests ended, and of how many.

    Raises ConfigError where the deployment cannot serve any of it.
    """
    return Run(deployment, arrivals).run(progress)


class Run:
    """One run."""

    def __init__(self, deployment: Deployment, arrivals: list[Arrival]) -> None:
        self.deployment = deployment
        front = Random(deployment.seed)
        kv_tokens = deployment.engine.kv_tokens
        fitting = [one for one in arrivals if one.prompt_tokens + one.answer_tokens <= kv_tokens]
        if not fitting:
            raise ConfigError(f"--kv-tokens: no request of the trace fits into {kv_tokens}")
        self.refused = len(arrivals) - len(fitting)
        self.sequences = [
            Sequence(number, one, front.randrange(deployment.frontends)) for number, one in enumerate(fitting)
        ]
        self.clock = Clock()
        begin, end = fitting[0].at, fitting[-1].at
        window = (begin + deployment.warm_up * (end - begin), end)
        self.recorder = Recorder(window, 0.0 if deployment.routing == ORACLE else deployment.links.delay_s)
        self._next = 0
        self._sample_s = max(LEAST_SAMPLE_S, (end - begin) / SAMPLES)

    def run(self, progress: Callable[[int, int], None] | None = None) -> Outcome:
        """All of it."""
        begin, deployment = time.perf_counter(), self.deployment
        plane = self._plane()
        fleet = self._fleet(plane)
        plane.start(fleet)
        self._plane_used, self._ranks, self._progress = plane, fleet.ranks, progress
        self.clock.at(self.sequences[0].at, self._arrive)
        self.clock.at(self.sequences[0].at + self._sample_s, self._sample)
        clock, recorder, count = self.clock, self.recorder, len(self.sequences)
        while recorder.ended < count and clock.step():
            pass
        assert recorder.ended == count, f"{count - recorder.ended} requests have not ended"
        who = Who(deployment.routing, deployment.ranks, deployment.frontends, deployment.lockstep)
        return outcome(who, self.sequences, self.refused, fleet.ranks, recorder, time.perf_counter() - begin)

    def _arrive(self, _: None) -> None:
        sequence = self.sequences[self._next]
        self._next += 1
        if self._next < len(self.sequences):
            self.clock.at(self.sequences[self._next].at, self._arrive)
        self._plane_used.arrive(sequence)

    def _sample(self, _: None) -> None:
        if self._next < len(self.sequences):
            self.recorder.balance(self._ranks, self.clock.now)
        if self._progress is not None:
            self._progress(self.recorder.ended, len(self.sequences))
        self.clock.at(self.clock.now + self._sample_s, self._sample)

    def _plane(self) -> ControlPlane:
        deployment, clock = self.deployment, self.clock
        routing, links = deployment.routing, deployment.links
        if routing == ORACLE:
            return Oracle(clock)
        if routing in LOCKSTEP_PEERS:
            if not deployment.lockstep:
                raise ConfigError(f"--routing: {routing}: only with --lockstep")
            return LOCKSTEP_PEERS[routing](clock, links.delay_s)
        if routing in PEERS:
            return PeerPlane(clock, PEERS[routing], deployment.frontends, deployment.ranks, links.delay_s)
        kind = deployment.policy or POLICIES[routing]
        policies = [kind(index, deployment.frontends) for index in range(deployment.frontends)]
        contents = routing == "prefix" or deployment.policy is not None
        # Clients allow as much as the longest answer has; how long theirs will be they do not know.
        max_tokens = 1 << (max(sequence.answer for sequence in self.sequences) - 1).bit_length()
        late_binding = deployment.bind == "broker" and issubclass(kind, LeastLoad)
        return Paceline(clock, policies, deployment.lockstep, links, max_tokens, late_binding, contents)

    def _quota(self) -> PrefillQuota:
        routing = self.deployment.routing
        if routing == "trtllm-adp":
            return ContextGate()
        common = self.deployment.quota and routing not in PEERS and routing not in LOCKSTEP_PEERS
        return CommonQuota() if common else PrefillQuota()

    def _fleet(self, plane: ControlPlane) -> IndependentFleet | LockstepFleet:
        deployment = self.deployment
        common = (self.clock, deployment.ranks, deployment.engine, plane, self.recorder)
        if deployment.lockstep:
            wake_s = 0.0 if deployment.routing == ORACLE else deployment.links.delay_s
            return LockstepFleet(*common, wake_s, self._quota())
        return IndependentFleet(*common)
