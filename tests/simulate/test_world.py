"""Virtual time: order, waiting, the journal and the seeds' streams."""

from __future__ import annotations

import pytest

from paceline.simulate.world import Journal, Seeds, Violation, World


def test_actions_happen_in_order_of_time_and_then_of_asking() -> None:
    world, seen = World(), []
    for name, when in (("c", 2.0), ("a", 1.0), ("b", 1.0)):
        world.at(when, lambda name=name: seen.append((name, world.now)))  # type: ignore[misc]
    world.run_for(5.0)
    assert seen == [("a", 1.0), ("b", 1.0), ("c", 2.0)]
    assert world.now == 5.0


def test_what_is_past_happens_now() -> None:
    world, seen = World(), []
    world.run_for(3.0)
    world.at(1.0, lambda: seen.append(world.now))
    world.run_for(0.0)
    assert seen == [3.0]


def test_waiting_ends_with_the_condition_or_says_what_was_awaited() -> None:
    world, seen = World(), []
    world.after(2.0, lambda: seen.append(1))
    assert world.run_until(lambda: bool(seen)) == 2.0
    with pytest.raises(Violation, match="a second one does not hold"):
        world.run_until(lambda: len(seen) > 1, wanted="a second one")
    world.after(50.0, lambda: seen.append(2))
    with pytest.raises(Violation, match="after 30 s"):
        world.run_until(lambda: len(seen) > 1)


def test_after_each_is_called_once_an_action() -> None:
    world, calls = World(), []
    world.after_each = lambda: calls.append(world.now)
    world.at(1.0, lambda: None)
    world.at(2.0, lambda: None)
    world.run_for(5.0)
    assert calls == [1.0, 2.0]


def test_the_journal_shows_the_last_events_of_those_concerned() -> None:
    journal = Journal()
    for number in range(100):
        journal.record(float(number), f"rank {number % 3}", f"event {number}", ["an effect"])
    shown = journal.last(["rank 1", "rank 2"], count=4)
    assert [entry.what for entry in shown] == ["event 94", "event 95", "event 97", "event 98"]
    assert "an effect" in shown[0].text()
    assert [entry.number for entry in journal.last([], count=2)] == [99, 100]


def test_the_digest_depends_on_every_event_and_its_time() -> None:
    digests = set()
    for when, party, what in ((1.0, "rank 0", "a"), (1.5, "rank 0", "a"), (1.0, "rank 1", "a"), (1.0, "rank 0", "b")):
        journal = Journal()
        journal.record(when, party, what)
        digests.add(journal.digest())
    assert len(digests) == 4


def test_streams_depend_on_seed_and_purpose_only() -> None:
    seeds = Seeds(5)
    faults = [seeds.stream("faults").random() for _ in range(2)]
    assert faults[0] == faults[1] == Seeds(5).stream("faults").random()
    assert len({faults[0], seeds.stream("workload").random(), Seeds(6).stream("faults").random()}) == 3
