"""The node that starts and ends the ranks, with its links, as a number: what there is to know of it in a state.

Its supervisor does at once what its machine says, and starts again who dies and is not on trial. A question is answered
when it is sent, if nothing is before it in the link; a life of the coordinator asks once, as it does of ranks
(`explore_rank`), and a Scaling that the node knows is not put into the link: it would repeat its last word.
"""

from __future__ import annotations

from typing import NamedTuple

from paceline.core.messages import Identify, NodeHello, RankFailed, Scaling, ToRank
from paceline.core.node import CoordinatorSaid, Effect, Event, Node, RankEnded, ToCoordinator
from paceline.simulate.explore_block import Broken
from paceline.simulate.explore_parts import NOW, Register, renumber

NODE = 50


class NodeBlock(NamedTuple):
    """Numbers of the machine and of the messages in its links, oldest first. `connected`, `asked`: as in `Block`."""

    machine: int
    up: tuple[int, ...] = ()
    down: tuple[int, ...] = ()
    connected: bool = True
    asked: bool = False


class Nodes:
    """All states of the node met, and what can become of them."""

    def __init__(self) -> None:
        self.messages: Register[NodeHello | RankFailed | ToRank] = Register()
        self._machines: Register[Node] = Register()
        self._blocks: Register[NodeBlock] = Register(lambda block: block)

    def __getitem__(self, number: int) -> NodeBlock:
        return self._blocks[number]

    def number(self, block: NodeBlock) -> int:
        """The number of a block."""
        return self._blocks.number(block)

    def machine(self, number: int) -> Node:
        """The machine in a block. Not to be changed."""
        return self._machines[self._blocks[number].machine]

    def fresh(self, size: int) -> int:
        """A node that runs all ranks there are."""
        return self.number(NodeBlock(self._machines.number(Node(NODE, range(size), size)), connected=False))

    def broadcast(self, number: int, message: ToRank) -> int:
        """The coordinator sent a message, and it is on its way to the node."""
        block, known = self[number], self.machine(number).scaling.number
        question = isinstance(message, Identify)
        new = (isinstance(message, Scaling) and message.number > known) or (question and not block.asked)
        name = self.messages.number(message)
        if not block.connected or not new or name in block.down:
            return number
        after = self.number(block._replace(down=(*block.down, name), asked=block.asked or question))
        return self.heard(after)[0] if question and not block.down else after

    def heard(self, number: int) -> tuple[int, list[Effect]]:
        """The node after it has read the oldest message, and what it does."""
        block = self[number]
        message = self.messages[block.down[0]]
        return self._handle(block._replace(down=block.down[1:]), CoordinatorSaid(message))  # type: ignore[arg-type]

    def ended(self, number: int, rank: int) -> int:
        """A rank has died."""
        return self._handle(self[number], RankEnded(rank, "it died"))[0]

    def said(self, number: int) -> tuple[int, NodeHello | RankFailed]:
        """The node after the coordinator has read the oldest message from it, and the message."""
        block = self[number]
        message = self.messages[block.up[0]]
        assert isinstance(message, NodeHello | RankFailed)
        return self.number(block._replace(up=block.up[1:])), message

    def cut_off(self, number: int) -> int:
        """The node after the coordinator has died: what was on its way to or from it is lost."""
        return self.number(NodeBlock(self[number].machine, connected=False))

    def quiet(self, number: int) -> bool:
        """Whether nothing is under way at the node."""
        block = self[number]
        return block.connected and not block.up and not block.down

    def _handle(self, block: NodeBlock, event: Event) -> tuple[int, list[Effect]]:
        machine = renumber(self._machines[block.machine])
        try:
            effects = machine.handle(event, NOW)
        except Exception as error:
            raise Broken(f"the node's machine failed: {type(error).__name__}: {error}") from error
        up = list(block.up)
        for effect in effects:
            if isinstance(effect, ToCoordinator):
                name = self.messages.number(effect.message)
                if up[-1:] != [name]:
                    up.append(name)
        others = [effect for effect in effects if not isinstance(effect, ToCoordinator)]
        return self.number(block._replace(machine=self._machines.number(machine), up=tuple(up))), others
