"""What happens where the deployment's size changes, in words."""

from __future__ import annotations

from paceline.core.messages import FromRank, NodeHello, RankFailed, Scaling, ToRank
from paceline.simulate.explore_scaling import ScaledWorld
from paceline.simulate.explore_state import Action, State


def of_scaling(world: ScaledWorld, before: State, action: Action, rank: str) -> str:
    """A move that `explore_scaling` has added; `rank`: what the story calls whom it is about."""
    match action.kind:
        case "scale":
            more = action.detail > world.known(world.common(before)).size
            who = f"; {rank} is to leave" * (action.rank >= 0)
            return f"The operator asks for {_ranks(action.detail)}, one {'more' if more else 'fewer'}{who}"
        case "scale-request":
            return f"A front-end's request for {_ranks(action.detail)} reaches the coordinator"
        case "scaling-late":
            return "The time that the change of the size may take is up"
        case "told":
            return f"The front-ends hear of {_scaling(world.coordinators.scalings[action.detail])}"
        case "tell":
            return f"The front-ends tell the coordinator of {_scaling(world.coordinators.scalings[action.detail])}"
        case "idle":
            return f"The coordinator hears that {rank} has nothing left"
        case "node-connects":
            return "The node is connected to the coordinator's broadcasts"
        case "node-says":
            return f"The coordinator reads the node's {_meaning(world.nodes.messages[action.detail])}"
        case "node-hears":
            return f"The node reads {_meaning(world.nodes.messages[action.detail])}, and sees to it"
    raise AssertionError(f"{action.kind} is no move of scaling")


def situation(world: ScaledWorld, state: State) -> str:
    """What everyone knows of scaling."""
    common = world.common(state)
    node = world.nodes.machine(world.scale(common).node)
    held = world.coordinators.scaling(state[0])
    known = f"the coordinator holds {_scaling(held)}, the front-ends {_scaling(world.known(common))}"
    return f"{known}, the node {_scaling(node.scaling)}"


def _scaling(scaling: Scaling) -> str:
    if scaling.under_way:
        return f"scaling {scaling.number}, from {scaling.size} to {_ranks(scaling.target)}"
    return f"scaling {scaling.number}, {_ranks(scaling.size)}" + f" ({scaling.outcome})" * (scaling.outcome != "done")


def _meaning(message: FromRank | ToRank) -> str:
    match message:
        case Scaling():
            return f"Scaling: {_scaling(message)}"
        case NodeHello():
            ranks = ", ".join(map(str, message.ranks))
            return f"NodeHello: here runs rank {ranks}; I know {_scaling(message.scaling)}"
        case RankFailed():
            return f"RankFailed: rank {message.rank} ended before it had joined"
    return type(message).__name__


def _ranks(count: int) -> str:
    return f"{count} rank{'s' * (count != 1)}"
