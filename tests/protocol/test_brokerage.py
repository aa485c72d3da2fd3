"""What a queue holds of a rank's room is what the board says, however it came to know of it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from paceline.protocol.binding_messages import Ask, Descriptor, Grant
from paceline.protocol.board import Board
from paceline.protocol.brokerage import Brokerage
from paceline.protocol.membership import Membership
from paceline.protocol.messages import PROTOCOL_VERSION, FrontEndHello, Load, RankReport, Send
from paceline.protocol.rooms import Amount

FRONT_ENDS = (11, 12)
RANKS, LIFE, SLOTS = 2, 7, 3

steps = st.lists(
    st.one_of(
        st.tuples(st.just("ask"), st.sampled_from(FRONT_ENDS), st.integers(1, 50)),
        st.tuples(st.just("send"), st.integers(0, 9), st.booleans()),
        st.tuples(st.just("report"), st.integers(0, RANKS - 1), st.integers(0, SLOTS)),
    ),
    max_size=40,
)  # fmt: skip


class Queue:
    """A brokerage with its board, and what its front-ends would do."""

    def __init__(self) -> None:
        self.board, self.membership, self.brokerage = Board(), Membership(RANKS), Brokerage(1)
        self.asked = dict.fromkeys(FRONT_ENDS, 0)
        self.numbers = {(front_end, rank): 0 for front_end in FRONT_ENDS for rank in range(RANKS)}
        self.granted: dict[tuple[int, int], Grant] = {}
        self.tokens: dict[tuple[int, int], int] = {}
        for rank in range(RANKS):
            self.membership.hello(rank, LIFE, "ipc://x", True)
            self.report(rank, 0)
        for front_end in FRONT_ENDS:
            self.brokerage.hello(FrontEndHello(PROTOCOL_VERSION, front_end, brokered=True), range(RANKS))

    def ask(self, front_end: int, tokens: int) -> None:
        self.asked[front_end] = number = self.asked[front_end] + 1
        self.tokens[front_end, number] = tokens
        self.brokerage.said(Ask(front_end, number, 1000, [Descriptor(number, tokens, 5)]), 0.0)

    def send(self, which: int, elsewhere: bool) -> None:
        """A front-end does as it was granted, or sends to another rank (it had bound it before the grant came)."""
        if not self.granted:
            return
        key = sorted(self.granted)[which % len(self.granted)]
        grant = self.granted.pop(key)
        rank = (grant.rank + elsewhere) % RANKS
        self.numbers[key[0], rank] = number = self.numbers[key[0], rank] + 1
        send = Send(rank, LIFE, number, self.tokens[key], 5, key[1])
        self.brokerage.sent(key[0], send, self.board.sent(key[0], send))

    def report(self, rank: int, running: int) -> None:
        # It has taken all that was sent, also what nobody has told of yet.
        taken = {front_end: self.numbers[front_end, rank] + 1 for front_end in FRONT_ENDS}
        load = Load(0, running, SLOTS, 10 * running, kv_reserved=running, kv_total=10_000, step_tokens=512)
        self.board.report(RankReport(rank, LIFE, 0, 0, False, load, taken))
        self.brokerage.mark(rank)

    def settle(self) -> None:
        grants = self.brokerage.grants(self.board, self.membership, True, 0.0)
        for grant in grants.grants if grants is not None else ():
            self.granted[grant.front_end, grant.request] = grant


@given(steps)
def test_a_room_is_what_the_board_says(said: list[tuple[str, int, int]]) -> None:
    queue = Queue()
    for name, first, second in said:
        getattr(queue, name)(first, second)
        queue.settle()
        (pool,) = queue.brokerage._pools.values()
        for room in pool.broker.rooms:
            if room.rank in pool.marked:
                continue
            load, wire = queue.board.known(room.rank, LIFE) or (Load(), Amount())
            assert room.has == Amount(
                load.running + wire.requests, load.prefill_tokens + wire.tokens, load.kv_reserved + wire.kv
            )
            promised = [entry for entry in pool.broker.granted.values() if entry.room is room]
            assert room.granted.requests == len(promised)
            assert room.granted.tokens == sum(entry.tokens for entry in promised)
