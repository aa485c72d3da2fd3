"""All targets, by name."""

from __future__ import annotations

from tests.fuzz.coordinator_targets import FromFrontends, FromRanks, FromStrangeRanks, RankSubscriptions
from tests.fuzz.frontend_targets import Broadcasts, Tokens
from tests.fuzz.rank_targets import Agreements, FromCoordinator, Requests
from tests.fuzz.stream_targets import Collectives, HttpBodies, RendezvousAnswers, RendezvousQuestions, WatchdogStatus
from tests.fuzz.target import Target
from tests.fuzz.vllm_targets import VllmFrontends, VllmRanks

TARGETS: dict[str, type[Target]] = {
    target.name: target
    for target in (
        FromStrangeRanks, FromRanks, FromFrontends, RankSubscriptions, FromCoordinator, Requests, Agreements,
        Broadcasts, Tokens, VllmRanks, VllmFrontends, WatchdogStatus, Collectives, RendezvousQuestions,
        RendezvousAnswers, HttpBodies,
    )
}  # fmt: skip
