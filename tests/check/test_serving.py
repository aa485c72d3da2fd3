"""The search of what clients are given: nothing is lost or comes twice, and what is broken on purpose is found."""

from __future__ import annotations

from typing import Any

import pytest

from paceline.check.search import Finding, search
from paceline.check.serving import Bounds, Serving
from paceline.core.coordinator.membership import Membership
from paceline.core.frontend.control import FrontendScaling
from paceline.core.frontend.failover import Failover
from paceline.core.frontend.inflight import InFlight, InFlightRequests, RankHandle
from paceline.core.frontend.machine import Frontend
from paceline.core.messages import Members
from paceline.core.node import Node
from paceline.core.requests import Outputs


def walked(**bounds: int) -> Finding:
    return search(Serving(Bounds(**{"crashes": 0} | bounds)))


@pytest.mark.parametrize("bounds", [{"crashes": 1}, {"cuts": 1}, {"scales": 1}])
def test_nothing_is_lost_and_nothing_comes_twice(bounds: dict[str, int]) -> None:
    found = walked(**bounds)
    assert (found.violation, found.story) == ("", [])
    assert found.states > 400


@pytest.mark.slow
@pytest.mark.parametrize(
    "bounds",
    [
        {"requests": 2, "tokens": 1, "crashes": 1},
        {"tokens": 1, "scales": 1, "cuts": 1},
        {"tokens": 1, "scales": 1, "crashes": 1},
    ],
)
def test_nor_where_more_goes_wrong(bounds: dict[str, int]) -> None:
    found = walked(**bounds)
    assert (found.violation, found.story) == ("", [])
    assert found.states > 1_000


def forgotten_with_its_rank(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Failover, "move", lambda *_: [])


def begun_anew(patch: pytest.MonkeyPatch) -> None:
    real = InFlightRequests.send_again

    def send_again(self: InFlightRequests, inflight: InFlight, rank: int) -> Any:
        inflight.made.clear()
        return real(self, inflight, rank)

    patch.setattr(InFlightRequests, "send_again", send_again)


def under_its_old_name_from_whichever_life(patch: pytest.MonkeyPatch) -> None:
    """A request keeps its number at the next rank, and what a life said that is over counts as the next one's."""
    again, outputs = InFlightRequests.send_again, InFlightRequests.outputs

    def send_again(self: InFlightRequests, inflight: InFlight, rank: int) -> Any:
        self._next_resend = inflight.submit.request
        return again(self, inflight, rank)

    def any_life(self: InFlightRequests, message: Outputs, *rest: Any) -> Any:
        handle = next(iter(self.handles.values()), None)
        if handle is not None:
            message = Outputs(handle.rank, handle.incarnation, message.outputs)
        return outputs(self, message, *rest)

    patch.setattr(InFlightRequests, "send_again", send_again)
    patch.setattr(InFlightRequests, "outputs", any_life)


def forgotten_where_it_left(patch: pytest.MonkeyPatch) -> None:
    real = InFlightRequests.lose

    def lose(self: InFlightRequests, handle: RankHandle) -> list[InFlight]:
        leaves = handle.rank in self.leaving
        lost = real(self, handle)
        return [] if leaves else lost

    patch.setattr(InFlightRequests, "lose", lose)


def moved_while_it_answers(patch: pytest.MonkeyPatch) -> None:
    real = Frontend._learn_scaling

    def learn_scaling(self: Frontend, message: Members, now: float) -> Any:
        effects, known = real(self, message, now), self._inflight
        left = [known._inflight[wire] for handle in known.leaving.values() for wire in sorted(handle.in_flight)]
        return [*effects, *self._failover.move(left, now, "")]

    patch.setattr(Frontend, "_learn_scaling", learn_scaling)


def sent_to_who_leaves(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(FrontendScaling, "takes_new", lambda *_: True)


@pytest.mark.parametrize(
    ("breakage", "bounds", "found"),
    [
        (forgotten_with_its_rank, {"crashes": 1}, "requests have not ended, and the front-end knows 0"),
        (begun_anew, {"crashes": 1}, "goes on behind 0 of 1 tokens"),
        (under_its_old_name_from_whichever_life, {"crashes": 1}, "got tokens"),
        (forgotten_where_it_left, {"scales": 1}, "1 requests have not ended, and the front-end knows 0"),
        (moved_while_it_answers, {"scales": 1}, "request 1 goes to rank 0 too; rank 1 has it"),
        (sent_to_who_leaves, {"scales": 1}, "request 1 goes to rank 1, which is to leave"),
    ],
)
def test_a_breakage_is_found(
    breakage: Any, bounds: dict[str, int], found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    breakage(monkeypatch)
    finding = walked(**bounds)
    assert found in finding.violation
    reason = "an operator asks for so many ranks: 1" if "scales" in bounds else "dies"
    assert any(reason in line for line in finding.story)


def test_a_rank_that_is_never_a_member_again_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Membership, "is_ready", lambda self, rank: False)
    assert walked(crashes=1).violation == "a request can never come to its end any more"


def test_a_rank_that_is_never_ended_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    on_scaling = Node._on_scaling

    def without_ends(node: Node, scaling: Any) -> Any:
        return [effect for effect in on_scaling(node, scaling) if type(effect).__name__ != "StopRank"]

    monkeypatch.setattr(Node, "_on_scaling", without_ends)
    assert walked(scales=1).violation == "a request can never come to its end any more"
