"""What must hold when the faults are over, every request has ended and time has gone on."""

from __future__ import annotations

from paceline.simulate.coordinator_party import NAME as COORDINATOR
from paceline.simulate.deployment import Deployment
from paceline.simulate.frontend_party import FrontendParty
from paceline.simulate.world import Violation

PAUSE_LIMIT_S = 60.0
SETTLE_S = 9.0
"""Two heartbeats of the coordinator: what was lost has been said again."""
IDLE_S = 8.0
IDLE_EVENTS_A_PARTY = 8


def check_rest(deployment: Deployment) -> None:
    """All ranks pause and agree on the wave, all loads are known exactly, nothing keeps happening. Raises Violation."""
    world, ranks = deployment.world, deployment.present()
    paused = lambda: not any(party.machine.running for party in ranks.values())  # noqa: E731
    world.run_until(paused, PAUSE_LIMIT_S, "that all ranks pause")
    world.run_for(SETTLE_S)
    waves = {party.name: party.machine.wave for party in ranks.values()}
    if deployment.shape.lockstep and len(set(waves.values())) > 1:
        raise Violation(f"at rest the ranks' waves differ: {waves}", *waves, COORDINATOR)
    for frontend in deployment.frontends.values():
        _check_frontend(deployment, frontend)
    coordinator = deployment.coordinator
    if coordinator is not None and (left := list(coordinator.machine.dispatcher.descriptors())):
        raise Violation(f"at rest there are still descriptors in the queue: {left}", COORDINATOR)
    begin = world.journal.events
    world.run_for(IDLE_S)
    events = world.journal.events - begin
    allowed = IDLE_EVENTS_A_PARTY * (len(deployment.frontends) + 1)
    if events > allowed:
        raise Violation(f"at rest {events} events happen in {IDLE_S:g} s, {allowed} may")


def _check_frontend(deployment: Deployment, party: FrontendParty) -> None:
    machine = party.machine
    if deployment.shape.lockstep:
        wave = max(rank.machine.wave for rank in deployment.present().values())
        # It may know a later one, where all who knew it too have died.
        if machine.wave < wave or machine.running:
            said = f"wave {machine.wave}, {'running' if machine.running else 'paused'}"
            raise Violation(
                f"{party.name} believes {said}; all ranks are paused before {wave}", party.name, COORDINATOR
            )
    if deployment.shape.external:
        return
    for number, rank in deployment.present().items():
        known, load = machine.believed(number), rank.engine.load()
        finished = rank.machine.statistics()["finished"]
        if (known.waiting, known.running, known.prefill_tokens, known.finished) != (
            load.waiting, load.running, load.prefill_tokens, finished
        ):  # fmt: skip
            text = f"{party.name} believes of rank {number} {known}, which has {load} and has finished {finished}"
            raise Violation(text, party.name, rank.name, COORDINATOR)
    for rank in deployment.present().values():
        if rank.engine.has_work():
            raise Violation(f"{rank.name} still works for nobody", rank.name)
