"""What bounds the prompt tokens of a lockstep step: nothing, or the quota that all ranks agree on.

`CommonQuota` decides by the production code (`protocol/quota.py`), from the same integers, at the same moments: after
every step while any rank has a prompt to compute, after the step in which one has more than the quota allows, and at
each agreement. Summing is all that is done here in place of the ranks, and for all of them at once.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from paceline.core.rank import prefill_quota as quota
from paceline.simulate.traffic.rank import SimulatedRank

NS = 1e9


class PrefillQuota:
    """No quota: each rank computes what its own token budget allows."""

    def begin(self) -> None:
        """A wave begins, or all pause: what was agreed is void."""

    def agree(self, ranks: Sequence[SimulatedRank], busy: Collection[int], regular: bool) -> None:
        """Steps are over, and nothing has been taken in since. `busy`: the ranks that may have prompts to compute.

        `regular`: whether the ranks agree now in any case.
        """

    def tokens(self, ranks: Sequence[SimulatedRank], busy: Collection[int]) -> int | None:
        """Prompt tokens that each rank may compute in the step that begins now, None for its own budget."""
        return None


class CommonQuota(PrefillQuota):
    """The quota of `protocol/quota.py`."""

    def __init__(self) -> None:
        self._outcome = quota.Outcome()
        self._urged = False
        self._candidates = np.array(quota.CANDIDATES[1:])

    def begin(self) -> None:
        """The first step of a wave is without a limit."""
        self._outcome = quota.Outcome()
        self._urged = False

    def agree(self, ranks: Sequence[SimulatedRank], busy: Collection[int], regular: bool) -> None:
        """Decide anew where it is time to."""
        if regular or self._urged or self._outcome.pending:
            self._urged = False
            self._outcome = quota.decide(self._reduced(ranks, busy))

    def tokens(self, ranks: Sequence[SimulatedRank], busy: Collection[int]) -> int | None:
        """What was agreed on last. Whoever has more than that asks for another agreement after this step."""
        tokens = self._outcome.quota
        if tokens is not None and not self._outcome.pending:
            self._urged = any(ranks[number].engine.startable(tokens + 1) > tokens for number in busy)
        return tokens

    def _reduced(self, ranks: Sequence[SimulatedRank], busy: Collection[int]) -> tuple[int, ...]:
        shape = ranks[0].engine.shape
        costs = shape.costs
        pending = np.array([ranks[number].engine.startable(shape.budget) for number in busy], dtype=np.int64)
        together = np.minimum.outer(self._candidates, pending).sum(axis=1)
        decoding = sum(rank.engine.decoding for rank in ranks)
        places = sum(
            quota.places(shape.slots, rank.engine.decoding, rank.engine.kv_used, shape.kv_tokens) for rank in ranks
        )
        decode_ns = round(len(ranks) * costs.step_ms * 1e-3 * NS + decoding * costs.decode_ms * 1e-3 * NS)
        return (
            quota.AUTO, quota.LARGEST - min(shape.budget, quota.LARGEST), self._outcome.waited, 0, 0,
            int(pending.max(initial=0)),
            len(ranks), decoding, places, decode_ns, round(len(ranks) * costs.prefill_ms * 1e-3 * NS),
            *(int(tokens) for tokens in together),
        )  # fmt: skip
