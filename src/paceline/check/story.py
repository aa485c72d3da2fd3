"""What happens to lockstep ranks, in words: a line a move, and what came of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from msgspec import Struct

from paceline.check.parties import Node, State, Word
from paceline.check.search import Part
from paceline.core.invariants import join

SENDS = "A front-end that believes the ranks paused before wave {what} sends {rank} a request, which"
TEXTS = {
    "send": "A front-end that believes wave {what} to run sends {rank} a request, which arrives",
    "send-alone": "A front-end sends {rank} a request, stamped {what}, which arrives",
    "send-late": "A front-end sends {rank} a request, stamped {what}, which is on its way",
    "send-first": f"{SENDS} arrives, and the coordinator a notice, which is on its way",
    "notice-first": f"{SENDS} is on its way, and the coordinator a notice, which it reads",
    "notice": "The coordinator reads the front-end's notice (a request stamped {what} to {rank})",
    "arrive": "The request stamped {what} arrives at {rank}",
    "hear": "{rank} reads {what}",
    "say": "The coordinator reads {rank}'s {what}",
    "connect": "{rank} is connected to the coordinator's broadcasts",
    "tick": "The coordinator's timer is due ({what})",
    "round": "All ranks take part in a step",
    "agree": "All ranks agree whether any has work left",
    "die": "{rank} dies",
    "hello": "{rank} waits to be admitted and says hello again",
    "ask": "The operator asks for: {what}",
    "call": "The call ({what}) reaches the coordinator",
    "crash": "The coordinator dies, with all that was on its way to and from it, and another starts that knows nothing",
    "load": "The next life of {rank} has loaded its engine",
    "form": "{rank} leaves its group and waits for the others to form the next",
    "formed": "{rank} is told that epoch {what} is formed",
    "ended": "{rank} enters a collective and finds that its group is over",
    "gives-up": "{rank} waits no longer for its group to be formed",
    "torn": "A member leaves just as a collective completes, and not all get the outcome",
    "late": "The coordinator reads what {rank}'s life before had said: {what}",
    "gone": "The coordinator hears that the connection of {rank}'s life before has ended",
    "scale": "The operator asks for {what} ranks",
    "scale-request": "A front-end's request for {what} ranks reaches the coordinator",
    "scaling-late": "The time that the change of the size may take is up",
    "told": "The front-ends hear of {what}",
    "tell": "The front-ends tell the coordinator of {what}",
    "idle": "The coordinator hears that {rank} has nothing left",
    "node-connects": "The node is connected to the coordinator's broadcasts",
    "node-says": "The coordinator reads the node's {what}",
    "node-hears": "The node reads {what}, and sees to it",
}
MADE_UP = {"address", "group_address", "members", "protocol", "rank"}
"""Fields of messages that say nothing here."""


def told(before: State, what: tuple[Any, ...], after: State) -> str:
    """A move, and what came of it."""
    lost = what[-1] if what[-2:-1] == ("lost",) else -1
    kind, place, *details = what[:-2] if lost >= 0 else what
    rank = f"rank {before.names[place]}" if place >= 0 else "nobody"
    detail = details[0] if details else ""
    text = TEXTS[kind].format(rank=rank, what=meaning(detail.thing) if isinstance(detail, Part) else detail)
    nodes = zip(before.names, before.nodes, after.nodes, strict=True)
    results = [line for name, was, now in nodes for line in _results(f"rank {name}", was, now)]
    if lost >= 0:
        who = f"rank {before.names[lost]}" if lost < len(before.names) else "the node"
        results.append(f"the broadcast does not reach {who}")
    return text[0].upper() + text[1:] + (f": {'; '.join(results)}" if results else "")


def situation(state: State) -> str:
    """Where everyone is."""
    parts = []
    for name, node in sorted(zip(state.names, state.nodes, strict=True), key=lambda one: one[0]):
        machine, held = node.process.machine, node.process.unfinished
        where = "runs in" if machine.running else "is paused before"
        if not node.ended:
            parts.append(f"rank {name} {where} wave {machine.wave} with {held or 'no'} request{'s' * (held != 1)}")
    known = state.coordinator.thing.statistics()
    running = "knows ranks that run" if known["running"] else "knows of no rank that runs"
    parts.append(f"the coordinator holds wave {known['wave']}, {running}")
    if state.scale is not None:
        held_, heard, node_ = state.coordinator.thing.scaling, state.scale.heard, state.scale.node.scaling
        parts.append(f"it holds {meaning(held_)}, the front-ends {meaning(heard)}, the node {meaning(node_)}")
    return join(parts)


def meaning(message: Struct) -> str:
    """A message's name, and what it says beside the defaults."""
    names = zip(reversed(message.__struct_fields__), reversed(message.__struct_defaults__), strict=False)
    defaults, said = dict(names), []
    for name in message.__struct_fields__:
        value = getattr(message, name)
        if name not in MADE_UP and (name not in defaults or value != defaults[name]):
            said.append(f"{name} {meaning(value) if isinstance(value, Struct) else value}")
    return f"{type(message).__name__}{f' ({join(said)})' if said else ''}"


def _results(name: str, before: Node, after: Node) -> Iterator[str]:
    was, now = before.process.machine, after.process.machine
    if now.incarnation != was.incarnation:
        if before.requests and before.process.bound.grouped:
            yield f"{before.requests} request{'s' * (before.requests > 1)} must go on elsewhere"
    elif after.ended > before.ended:
        yield f"{name} is no more"
    elif now.running and (not was.running or now.wave != was.wave):
        yield f"{name} runs in wave {now.wave}"
    elif was.running and not now.running:
        yield f"{name} pauses, wave {now.wave} is next"
    finished = len(before.process.left) - len(after.process.left)
    if finished > 0 and now.incarnation == was.incarnation:
        yield f"{name} answers {finished} request{'s' * (finished > 1)}"
    yield from (f"{name} says {meaning(word.thing)}" for word in _new(before.up, after.up))
    yield from (f"the coordinator sends {name} {meaning(word.thing)}" for word in _new(before.down, after.down))


def _new(before: tuple[Word, ...], after: tuple[Word, ...]) -> tuple[Word, ...]:
    """What has been put at the end of a link, from which something may have been taken at the front."""
    taken = next(taken for taken in range(len(before) + 1) if after[: len(before) - taken] == before[taken:])
    return after[len(before) - taken :]
