"""A node's machine: which ranks it starts, keeps and ends as the coordinator speaks, and what it answers."""

from __future__ import annotations

from typing import Any

from paceline.core.messages import PROTOCOL_VERSION, Identify, NodeHello, RankFailed, Scaling, StartDPWave
from paceline.core.node import CoordinatorSaid, Effect, KeepRank, Node, RankEnded, StartRank, StopRank
from tests.core.harness import find, one, said

NODE = 7
UP = Scaling(1, 2, 4, hosts=[(2, NODE), (3, 8)])
JOINED = Scaling(2, 4, 4, hosts=[(2, NODE), (3, 8)])


def node(*ranks: int, **settings: Any) -> Node:
    return Node(NODE, ranks or (0, 1), 2, **settings)


def hear(machine: Node, *messages: Any) -> list[Effect]:
    effects: list[Effect] = []
    for message in messages:
        effects = machine.handle(CoordinatorSaid(message), 0.0)
    return effects


def test_it_says_who_it_is_when_it_is_asked() -> None:
    hello = one(said(hear(node(own_frontends=True), Identify(PROTOCOL_VERSION, 1)), NodeHello))
    assert (hello.node, hello.ranks, hello.own_frontends, hello.scaling) == (NODE, [0, 1], True, Scaling(0, 2, 2))


def test_it_starts_the_ranks_that_are_to_run_there_and_no_others_and_says_so() -> None:
    machine = node()
    effects = hear(machine, UP)
    assert find(effects, StartRank) == [StartRank(2)]
    assert one(said(effects, NodeHello)).ranks == [0, 1, 2]
    assert machine.provisional(2)
    assert not find(hear(machine, UP), StartRank)


def test_what_joins_is_kept() -> None:
    machine = node()
    assert find(hear(machine, UP, JOINED), KeepRank) == [KeepRank(2)]
    assert not machine.provisional(2)


def test_who_missed_the_beginning_starts_them_all_the_same() -> None:
    effects = hear(node(), JOINED)
    assert find(effects, StartRank) + find(effects, KeepRank) == [StartRank(2), KeepRank(2)]


def test_a_rank_that_ends_before_it_has_joined_is_told_of_until_something_is_done_about_it() -> None:
    machine = node()
    hear(machine, UP)
    failure = RankFailed(NODE, 1, 2, "no memory")
    assert said(machine.handle(RankEnded(2, "no memory"), 0.0), RankFailed) == [failure]
    assert said(hear(machine, UP), RankFailed) == [failure]
    undone = Scaling(2, 2, 4, outcome="failed")
    effects = hear(machine, undone)
    assert find(effects, StopRank) == [StopRank(2)]
    assert not said(effects, RankFailed)
    assert machine.ranks == {0, 1}


def test_the_end_of_another_rank_is_nobodys_business() -> None:
    assert node().handle(RankEnded(0, "killed"), 0.0) == []


def test_ranks_that_leave_run_until_the_change_is_over() -> None:
    machine = Node(NODE, range(4), 4)
    assert not find(hear(machine, Scaling(1, 4, 2)), StopRank)
    assert find(hear(machine, Scaling(2, 2, 2)), StopRank) == [StopRank(2), StopRank(3)]


def test_what_is_older_changes_nothing_and_is_answered_with_what_is_newer() -> None:
    machine = node()
    effects = hear(machine, UP, JOINED, UP)
    assert one(said(effects, NodeHello)).scaling == JOINED
    assert machine.ranks == {0, 1, 2}


def test_what_is_for_ranks_is_not_for_it() -> None:
    assert hear(node(), StartDPWave(3)) == []


def test_a_failure_is_told_of_under_the_number_that_a_new_coordinator_gives_the_change() -> None:
    machine = node()
    hear(machine, UP)
    machine.handle(RankEnded(2, "no memory"), 0.0)
    taken_over = Scaling(3, 2, 4, hosts=[(2, NODE), (3, 8)])
    assert said(hear(machine, taken_over), RankFailed) == [RankFailed(NODE, 3, 2, "no memory")]


def test_one_that_has_been_put_elsewhere_while_the_node_was_away_is_ended() -> None:
    machine = node(0, 1)
    effects = hear(machine, Scaling(4, 3, 3, hosts=[(1, 8), (2, 8)]))
    assert find(effects, StopRank) == [StopRank(1)]
    assert one(said(effects, NodeHello)).ranks == [0]
