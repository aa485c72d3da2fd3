"""All targets, by name."""

from __future__ import annotations

from tests.fuzz.coordinator_targets import FromFrontEnds, FromRanks, FromStrangeRanks, RankSubscriptions
from tests.fuzz.front_end_targets import Broadcasts, Tokens
from tests.fuzz.rank_targets import Agreements, FromCoordinator, Requests
from tests.fuzz.stream_targets import Collectives, HttpBodies, KeeperStatus, RendezvousAnswers, RendezvousQuestions
from tests.fuzz.target import Target
from tests.fuzz.vllm_targets import VllmFrontEnds, VllmRanks

TARGETS: dict[str, type[Target]] = {
    target.name: target
    for target in (
        FromStrangeRanks, FromRanks, FromFrontEnds, RankSubscriptions, FromCoordinator, Requests, Agreements,
        Broadcasts, Tokens, VllmRanks, VllmFrontEnds, KeeperStatus, Collectives, RendezvousQuestions,
        RendezvousAnswers, HttpBodies,
    )
}  # fmt: skip
