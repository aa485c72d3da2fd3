"""The prefill quota in a whole deployment: one for all, nobody waits for ever, and the others are not held up."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
from msgspec.structs import replace

from paceline.core.rank import events as rank_events, prefill_quota as quota
from paceline.core.rank.prefill_quota import RankQuota
from paceline.engines.timed import CostModel
from paceline.sim.checks import Checks
from paceline.sim.deployment import Deployment, Shape
from paceline.sim.processes import RankProcess
from paceline.sim.run import Options, Outcome, simulate
from paceline.sim.world import Violation
from tests.pace import examples

COSTS = CostModel(step_ms=6.0, prefill_ms=0.09, decode_ms=0.02)
SHAPE = Shape(ranks=4, costs=COSTS, slots=8, budget=512)


class Steps(Checks):
    """Keeps the quota of every step that computed something, and when it began, as rank 0 sees it."""

    def __init__(self) -> None:
        super().__init__()
        self.quotas: list[int | None] = []
        self.begun: list[float] = []
        self.agreements = 0

    def together(self, rank: RankProcess, effects: Sequence[rank_events.Effect]) -> None:
        super().together(rank, effects)
        steps = [effect for effect in effects if isinstance(effect, rank_events.Step)]
        if rank.machine.rank == 0 and steps:
            self.quotas.append(steps[0].prefill_quota)
            self.begun.append(rank.world.now)

    def rank(self, rank: RankProcess, event: rank_events.Event) -> None:
        super().rank(rank, event)
        self.agreements += rank.machine.rank == 0 and isinstance(event, rank_events.Agreed)

    def longest_step_s(self, since: int) -> float:
        times = self.begun[since:]
        return max(after - before for before, after in itertools.pairwise(times))


def deployment(setting: int, decoding: int = 6) -> tuple[Deployment, Steps]:
    """One whose ranks decode so many requests each, for long, and know what a step costs them."""
    checks = Steps()
    made = Deployment(replace(SHAPE, prefill_quota=setting), checks=checks).start().ready()
    for rank in range(SHAPE.ranks):
        for _ in range(decoding):
            made.frontends[0].submit(200, 800, rank)
    made.world.run_for(0.8)
    return made, checks


def first_token_s(made: Deployment, request: int) -> float:
    answer = made.frontends[0].answers[request]
    made.world.run_until(lambda: answer.first >= 0, 60.0, "a first token")
    return answer.first - answer.asked


@pytest.mark.slow
def test_a_long_prompt_does_not_hold_the_others_up() -> None:
    found = {}
    for setting in (quota.OFF, quota.AUTO):
        made, checks = deployment(setting)
        since = len(checks.quotas)
        request = made.frontends[0].submit(4000, 4, 0)
        wait_s = first_token_s(made, request)
        found[setting] = (checks.longest_step_s(since), wait_s)
        made.finish(60.0)
    assert found[quota.OFF][0] > 0.09 * 512 / 1000
    assert found[quota.AUTO][0] < 0.09 * 512 / 8 / 1000 + 0.01
    # It waits for its own first token meanwhile: in 9 steps an eighth of a budget.
    assert found[quota.AUTO][1] < 4000 / 64 * 9 * 0.0075


def test_at_rest_they_agree_at_the_interval_and_while_someone_has_a_prompt_after_every_step() -> None:
    made, checks = deployment(quota.AUTO)
    steps, agreements = len(checks.quotas), checks.agreements
    made.world.run_for(1.0)
    assert checks.agreements - agreements <= (len(checks.quotas) - steps) / SHAPE.sync_interval + 1
    request = made.frontends[0].submit(4000, 4, 2)
    steps, agreements = len(checks.quotas), checks.agreements
    first_token_s(made, request)
    assert checks.agreements - agreements >= len(checks.quotas) - steps - 4


def test_new_requests_do_not_wait_for_the_interval() -> None:
    made, checks = deployment(quota.AUTO, decoding=1)
    steps = len(checks.quotas)
    first_token_s(made, made.frontends[0].submit(300, 2, 3))
    assert len(checks.quotas) - steps <= 5


def test_idle_ranks_prefill_with_their_whole_budget() -> None:
    made = Deployment(replace(SHAPE, prefill_quota=quota.AUTO), checks=Steps()).start().ready()
    first_token_s(made, made.frontends[0].submit(100, 1, 0))
    made.world.run_for(1.0)
    wait_s = first_token_s(made, made.frontends[0].submit(3 * 512, 1, 0))
    assert wait_s < 3 * (0.006 + 0.09 * 0.512) + 0.02


@pytest.mark.parametrize("seed", range(100, 100 + examples(30)))
def test_seeds_with_it(seed: int) -> None:
    outcome = simulate(Options(seed, lockstep=True))
    assert outcome.ok, "\n".join([outcome.verdict, *outcome.history])


# Broken machines ------------------------------------------------------------------------------------


def first_broken(seeds: range) -> Outcome:
    outcomes = (simulate(Options(seed, lockstep=True)) for seed in seeds)
    broken = next((outcome for outcome in outcomes if not outcome.ok), None)
    assert broken is not None, f"seeds {seeds} pass"
    return broken


def test_a_rank_that_decides_by_itself_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    real = RankQuota.agreed

    def own(self: Any, reduced: Sequence[int], now: float) -> None:
        real(self, reduced, now)
        if self._outcome.pending:
            self._outcome = quota.Outcome(self._last[0] + 1, True)

    monkeypatch.setattr(RankQuota, "agreed", own)
    assert "have different prefill quotas" in first_broken(range(30)).verdict


def test_a_quota_that_stays_at_zero_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paceline.core.rank.prefill_quota.PATIENCE", 10**9)
    made, _ = deployment(quota.AUTO)
    request = made.frontends[0].submit(4000, 4, 0)
    with pytest.raises(Violation, match="has had no quota for 10 steps"):
        first_token_s(made, request)


def test_ranks_that_agree_without_having_been_urged_together_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    # Each by its own prompts, in place of what all have agreed on.
    monkeypatch.setattr(RankQuota, "follows", property(lambda self: self._last[0] > 0))
    assert "collective" in first_broken(range(30)).verdict
