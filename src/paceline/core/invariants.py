"""What must hold in every state, whatever the order in which things happen.

Pure functions of what machines show; each returns None where its rule holds, else one sentence that says how it is
broken. The explorer asks them of every state there is, the simulator of every state it comes through.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from paceline.core.messages import Admit, Form, Scaling, StartDPWave
from paceline.core.rank.events import Agree, DummyStep, Effect, Phase, Step, ToFrontend
from paceline.core.rank.machine import Rank


def wave_never_falls(party: str, before: int, after: int) -> str | None:
    """A wave number never goes down, at any party."""
    if after >= before:
        return None
    return f"the wave of {party} went down from {before} to {after}"


def same_collective(entered: Mapping[str, Effect]) -> str | None:
    """All ranks of an epoch take part in the same sequence of collectives.

    `entered`: by party, the Step, DummyStep or Agree that it is in. A step and a dummy step are the same collective.
    """
    in_step = sorted(party for party, effect in entered.items() if isinstance(effect, Step | DummyStep))
    in_agreement = sorted(party for party, effect in entered.items() if isinstance(effect, Agree))
    if not in_step or not in_agreement:
        return None
    return f"ranks are in different collectives: {join(in_step)} in a step, {join(in_agreement)} in an agreement"


def same_quota(steps: Iterable[Effect]) -> str | None:
    """All ranks that compute in a lockstep step have the same prefill quota."""
    quotas = {effect.prefill_quota for effect in steps if isinstance(effect, Step)}
    if len(quotas) < 2:
        return None
    return f"ranks that step together have different prefill quotas: {join(sorted(map(str, quotas)))}"


def same_generation(group: int, known: Mapping[str, int]) -> str | None:
    """Ranks whose collective completes are members of the same epoch, and know it.

    `group`: whose connections they hold. `known`: by party, the epoch that its machine is in.
    """
    others = {party: generation for party, generation in sorted(known.items()) if generation != group}
    if not others:
        return None
    parts = join(f"{party} believes to be in {generation}" for party, generation in others.items())
    return f"a collective of generation {group} completes, and {parts}"


def answered_once(finished: Iterable[int], effects: Sequence[Effect]) -> str | None:
    """What the engine finished in a step, the rank answers, each once.

    `finished`: the requests, by their front-ends' numbers. `effects`: of the rank, on that step.
    """
    answered: list[int] = []
    for effect in effects:
        if isinstance(effect, ToFrontend):
            answered += [output.request for output in effect.message.outputs if output.finish_reason is not None]
    if sorted(answered) == sorted(finished):
        return None
    return f"the step finished the requests {sorted(finished)} and the rank answered {sorted(answered)}"


def runs_only_when_ready(rank: Rank) -> str | None:
    """Waves are a matter of ready ranks alone."""
    if not rank.running or rank.phase is Phase.READY:
        return None
    return f"rank {rank.rank} runs while it is {rank.phase.value}"


def left_out_has_it(wake: StartDPWave, wave: int, running: bool, on_its_way: Iterable[int]) -> str | None:
    """A wake leaves out only a rank that needs none.

    `wave`, `running`: of the rank left out. `on_its_way`: the waves stamped on requests that will reach it.
    It runs in that wave or a later one, has finished it, or a request of that wave will start it.
    """
    if wave > wake.wave or (running and wave >= wake.wave) or any(stamp >= wake.wave for stamp in on_its_way):
        return None
    return f"the wake for wave {wake.wave} leaves out a rank that is paused and that no request of this wave will reach"


def joiner_is_told(message: Admit | Form, wave: int) -> str | None:
    """A rank that joins is told the wave before it is ready. `wave`: the coordinator's."""
    if message.wave >= wave:
        return None
    return f"a rank that joins is told wave {message.wave}, and the coordinator knows of wave {wave}"


def nothing_steps_while_suspended(settled: int, ranks: Mapping[str, tuple[bool, int]]) -> str | None:
    """Once a pause is settled, no rank begins a step before every rank knows a higher number.

    `settled`: the pause's number. `ranks`: by party, whether it runs, and the highest number that it knows.
    """
    runs = sorted(party for party, (running, _) in ranks.items() if running)
    unaware = sorted(party for party, (_, number) in ranks.items() if number <= settled)
    if not runs or not unaware:
        return None
    return f"suspension {settled} is settled and {join(unaware)} knows of no later one, but {join(runs)} runs"


def leaver_has_nothing(requests: int, trial: bool, undisturbed: bool) -> str | None:
    """A rank that has not joined has no requests when it is ended, and one that is to leave ends what it has first.

    `requests`: that it has. `undisturbed`: whether nobody has died, nothing was lost and the change was in time.
    """
    if not requests or not (trial or undisturbed):
        return None
    what = "has not joined yet" if trial else "is to leave, before its time is up,"
    return f"a rank that {what} is ended while it has {requests} request{'s' * (requests > 1)}"


def one_size_a_number(known: Mapping[str, Scaling]) -> str | None:
    """Who knows the same number of a change knows the same sizes. `known`: by party, the newest that it has heard."""
    first: dict[int, tuple[str, Scaling]] = {}
    for party, scaling in known.items():
        other, theirs = first.setdefault(scaling.number, (party, scaling))
        # Before any change front-ends have heard of the size by a coordinator, which was told of it when it began.
        if scaling.number and (scaling.size, scaling.limit) != (theirs.size, theirs.limit):
            text = f"by scaling {scaling.number} there are {theirs.size} ranks to {other}"
            return f"{text}, and {scaling.size} to {party}"
    return None


def agree_at_rest(coordinator: int, ranks: Mapping[str, int]) -> str | None:
    """When all is at rest, all know the same wave."""
    if all(wave == coordinator for wave in ranks.values()):
        return None
    waves = join(f"{party}: {wave}" for party, wave in sorted(ranks.items()))
    return f"all is at rest, and the waves differ: the coordinator: {coordinator}, {waves}"


def join(parts: Iterable[object]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    words = [str(part) for part in parts]
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
