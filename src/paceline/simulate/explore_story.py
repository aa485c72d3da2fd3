"""A path of states as a story that a person can read: one line a step, and why it ends badly."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from paceline.core.invariants import join
from paceline.core.messages import (
    Admit,
    Form,
    FromRank,
    Identify,
    RankHello,
    StartDPWave,
    StartWave,
    Suspension,
    ToRank,
    WaveComplete,
)
from paceline.simulate.explore_block import Broken
from paceline.simulate.explore_scaling import ScaledWorld
from paceline.simulate.explore_state import FIRST_BLOCK, Action, State
from paceline.simulate.explore_story_scaling import of_scaling, situation
from paceline.simulate.explore_world import World

LONGEST_ENDING = 40


def meaning(message: FromRank | ToRank) -> str:
    """A message in words."""
    match message:
        case StartWave(wave=wave):
            return f"StartWave: I took a request while paused and run in wave {wave}"
        case WaveComplete(wave=wave):
            return f"WaveComplete: I have paused, wave {wave} is finished"
        case RankHello():
            state = "run in" if message.running else "am paused, next is"
            return f"RankHello: I am {'ready' if message.ready else 'joining'} and {state} wave {message.wave}" + (
                f", know suspension {message.suspension}{' and keep it' * message.held}" * bool(message.suspension)
                + f", am in generation {message.generation} and was told {message.told}" * bool(message.group_address)
            )
        case Identify():
            return "Identify: who are you?"
        case StartDPWave(wave=wave):
            return f"StartDPWave: whoever is paused, run in wave {wave}"
        case Suspension():
            if message.number % 2:
                return f"Suspension {message.number} ({message.mode}): start nothing by yourself"
            return f"Suspension {message.number}: " + (
                "go on" if message.released else "this is to end, say that you know"
            )
        case Form():
            return (
                f"Form: leave what group you are in, form generation {message.generation}; the wave is {message.wave}"
            )
        case Admit():
            return f"Admit: you may be ready, the wave is {message.wave}"
    return repr(message)


def tell(world: World, path: Sequence[State], why: str) -> list[str]:
    """The story of a path. `why`: what is broken by a move from its last state; empty where it is stuck there."""
    teller = _Teller(world, path[0])
    for after in path[1:]:
        teller.step(after)
    if why:
        teller.lines.append(f"Then: {why}.")
        return teller.lines
    teller.end()
    teller.lines.append(f"Stuck: {teller.situation()}. Nothing that happens by itself brings this to an end.")
    return teller.lines


class _Teller:
    def __init__(self, world: World, first: State) -> None:
        self._world = world
        self._state = first
        # By place in the state, the rank that the story calls it.
        self._names = list(range(world.ranks))
        self.lines: list[str] = []

    def step(self, after: State) -> None:
        """One more step, to a state that follows."""
        for action, raw, target, order in self._world.story_successors(self._state):
            if target == after:
                self.lines.append(f"{len(self.lines) + 1}. {self._say(action, raw)}")
                self._names = [self._names[place] for place in order]
                self._state = after
                return
        raise AssertionError("a path whose states do not follow each other")

    def end(self) -> None:
        """Go on with what happens by itself until nothing does, or no longer than is readable."""
        seen = {self._state}
        while len(seen) < LONGEST_ENDING:
            fair = [target for action, _, target, _ in self._successors() if action.fair and target not in seen]
            if not fair:
                return
            seen.add(fair[0])
            self.step(fair[0])

    def situation(self) -> str:
        """Where everyone is."""
        parts = []
        for place in sorted(range(self._world.ranks), key=self._names.__getitem__):
            if self._world.blocks[self._state[FIRST_BLOCK + place]].ended:
                continue
            life = self._world.blocks.life(self._state[FIRST_BLOCK + place])
            machine, held = life.machine, life.unfinished
            state = "runs in" if machine.running else "is paused before"
            parts.append(
                f"rank {self._names[place]} {state} wave {machine.wave} with {held or 'no'} request{'s' * (held != 1)}"
            )
        coordinator = self._world.coordinators[self._state[0]].statistics()
        known = f"the coordinator holds wave {coordinator['wave']}, " + (
            "knows ranks that run" if coordinator["running"] else "knows of no rank that runs"
        )
        scaling = [situation(self._world, self._state)] if isinstance(self._world, ScaledWorld) else []
        return join([*parts, known, *scaling])

    def _successors(self) -> Iterator[tuple[Action, State, State, tuple[int, ...]]]:
        try:
            yield from self._world.story_successors(self._state)
        except Broken:
            return

    def _say(self, action: Action, raw: State) -> str:
        sentence = self._action(action)
        results = [result for place in range(self._world.ranks) for result in self._results(place, raw)]
        if action.lost >= 0:
            who = "the node" if action.lost == self._world.ranks else self._rank(action.lost)
            results.append(f"the broadcast does not reach {who}")
        return f"{sentence}." if not results else f"{sentence}: {'; '.join(results)}."

    def _action(self, action: Action) -> str:
        rank = self._rank(action.rank)
        messages = self._world.blocks.messages
        match action.kind:
            case "send":
                return f"A front-end that believes wave {action.detail} to run sends {rank} a request, which arrives"
            case "send-alone" | "send-late":
                where = "arrives" if action.kind == "send-alone" else "is on its way"
                whose = " whose rank has died" * action.fair
                return f"A front-end sends {rank} a request{whose}, stamped {action.detail}, which {where}"
            case "send-first":
                return (
                    f"A front-end that believes the ranks paused before wave {action.detail} sends {rank} a request, "
                    f"which arrives, and the coordinator a notice, which is on its way"
                )
            case "notice-first":
                return (
                    f"A front-end that believes the ranks paused before wave {action.detail} sends {rank} a request, "
                    f"which is on its way, and the coordinator a notice, which it reads"
                )
            case "notice":
                return f"The coordinator reads the front-end's notice (a request stamped {action.detail} to {rank})"
            case "arrive":
                return f"The request stamped {action.detail} arrives at {rank}"
            case "hear":
                return f"{rank.capitalize()} reads {meaning(messages[action.detail])}"
            case "say":
                return f"The coordinator reads {rank}'s {meaning(messages[action.detail])}"
            case "connect":
                return f"{rank.capitalize()} is connected to the coordinator's broadcasts"
            case "tick":
                return "The coordinator's timer is due"
            case "round":
                return "All ranks take part in a step" + (" and agree whether any has work left" * bool(action.detail))
            case "agree":
                return "All ranks agree whether any has work left"
            case "die":
                return f"{rank.capitalize()} dies" + (
                    "" if self._world.blocks.group_address else ", and its next life is loaded"
                )
            case "hello":
                return f"{rank.capitalize()} waits to be admitted and says hello again"
            case "ask":
                return f"The operator asks for: {self._world.calls[action.detail]}"
            case "call":
                return f"The call ({self._world.calls[action.detail]}) reaches the coordinator"
        return self._of_generations(action, rank)

    def _of_generations(self, action: Action, rank: str) -> str:
        messages = self._world.blocks.messages
        match action.kind:
            case "load":
                return f"The next life of {rank} has loaded its engine"
            case "lost":
                return "The coordinator waits no longer for who is gone"
            case "silent":
                return "The coordinator waits no longer for who says nothing"
            case "form":
                return f"{rank.capitalize()} leaves its group and waits for the others to form the next"
            case "formed":
                return f"{rank.capitalize()} is told that generation {action.detail} is formed"
            case "ended":
                return f"{rank.capitalize()} enters a collective and finds that its generation is over"
            case "gives-up":
                return f"{rank.capitalize()} waits no longer for its generation to be formed"
            case "torn":
                return "A member leaves just as a collective completes, and not all get the outcome"
            case "patience":
                return "The coordinator waits no longer for the generation to be formed"
            case "late":
                return f"The coordinator reads what {rank}'s life before had said: {meaning(messages[action.detail])}"
            case "gone":
                return f"The coordinator hears that the connection of {rank}'s life before has ended"
        if action.kind == "crash":
            return "The coordinator dies and another starts that knows nothing; " + self._lost(action.detail)
        assert isinstance(self._world, ScaledWorld)
        return of_scaling(self._world, self._state, action, rank)

    def _lost(self, bits: int) -> str:
        words = ("what it had said to the coordinator", "broadcasts to it", "the notices that name it")
        lost = [
            f"{join([word for bit, word in enumerate(words) if bits >> 3 * place & 1 << bit])} are lost with it"
            f" ({self._rank(place)})"
            for place in range(self._world.ranks)
            if bits >> 3 * place & 7
        ]
        return join(lost) or "what was on its way stays so"

    def _results(self, place: int, raw: State) -> Iterator[str]:
        blocks = self._world.blocks
        before, after = self._state[FIRST_BLOCK + place], raw[FIRST_BLOCK + place]
        name = self._rank(place)
        was, now = blocks.life(before).machine, blocks.life(after).machine
        if now.incarnation != was.incarnation:
            lost = blocks.life(before).unfinished + len(blocks[before].arriving)
            if lost and blocks.group_address:
                yield f"{lost} request{'s' * (lost > 1)} must go on elsewhere"
        elif blocks[after].ended > blocks[before].ended:
            yield f"{name} is no more"
        elif now.running and (not was.running or now.wave != was.wave):
            yield f"{name} runs in wave {now.wave}"
        elif was.running and not now.running:
            yield f"{name} pauses, wave {now.wave} is next"
        finished = len(blocks.life(before).left) - len(blocks.life(after).left)
        if finished > 0 and now.incarnation == was.incarnation:
            yield f"{name} answers {finished} request{'s' * (finished > 1)}"
        for message in _new(blocks[before].up, blocks[after].up):
            yield f'{name} says "{meaning(blocks.messages[message])}"'
        for message in _new(blocks[before].down, blocks[after].down):
            yield f'the coordinator sends {name} "{meaning(blocks.messages[message])}"'

    def _rank(self, place: int) -> str:
        return f"rank {self._names[place]}" if place >= 0 else "nobody"


def _new(before: tuple[int, ...], after: tuple[int, ...]) -> tuple[int, ...]:
    """What has been put at the end of a link, from which something may have been taken at the front."""
    for taken in range(len(before) + 1):
        kept = before[taken:]
        if after[: len(kept)] == kept:
            return after[len(kept) :]
    return ()
