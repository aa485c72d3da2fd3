"""What a step costs a rank, learned from its own steps.

A step costs `base + prefill x prompt tokens + decode x requests that get a token`. The proportions of the three belong
to the model and the machine and are learned slowly; the pace at which the machine now works through such steps changes
with whatever else runs on it, and is followed quickly. Plain least squares in three unknowns: a few hundred
nanoseconds a number, and no library.

What a rank reports of its load, and how fast it works: only what the last report did not say.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from paceline.core.load import Load, SpeedMeter
from paceline.core.messages import RankReport
from paceline.core.rank.events import Stepped
from paceline.core.rank.requests import RankRequests

SHAPE_HALF_LIFE_S = 60.0
PACE_HALF_LIFE_S = 3.0
SCALES = (1.0, 64.0, 2.0)
"""What a step typically has of each: the unit in which a lack of knowledge is shared out."""

DOUBT = 0.001
"""How much of one second of steps the costs so far count for, where steps tell two costs apart poorly or not at all."""

DOUBTS = tuple(DOUBT * scale**2 for scale in SCALES)

Triple = tuple[float, float, float]


class StepCost(NamedTuple):
    """What a step costs in seconds: itself, each prompt token, each token of an answer."""

    step_s: float
    prompt_token_s: float
    answer_token_s: float


class StepMeter:
    """The costs of one rank's steps. The proportions age with its steps, the pace with the clock."""

    __slots__ = ("_cost", "_costs", "_expected_s", "_moments", "_projections", "_seen", "_spent_s")

    def __init__(self) -> None:
        self._costs: Triple = (0.0, 0.0, 0.0)
        self._cost: StepCost | None = StepCost(0.0, 0.0, 0.0)
        # Sums over the steps, each divided by its expected length: of features by features, and by seconds.
        self._moments = [[0.0] * 3 for _ in range(3)]
        self._projections = [0.0] * 3
        self._spent_s = 0.0
        self._expected_s = 0.0
        self._seen = float("-inf")

    def add(self, prefilled_tokens: int, decoded_tokens: int, seconds: float, now: float) -> None:
        """A step of so many tokens took `seconds` and has just ended. A step of nothing, or no time, says nothing."""
        if seconds <= 0.0 or not (prefilled_tokens or decoded_tokens):
            return
        self._cost = None
        features = (1.0, float(prefilled_tokens), float(decoded_tokens))
        self._learn(features, seconds)
        # Against the new costs: the first step of a kind is then no surprise.
        expected = _product(self._costs, features)
        keep = 0.5 ** (max(seconds, now - self._seen) / PACE_HALF_LIFE_S)
        self._seen = now
        self._spent_s = self._spent_s * keep + seconds
        self._expected_s = self._expected_s * keep + expected

    def _learn(self, features: Triple, seconds: float) -> None:
        # Divided by their expected length, steps are weighted such that the sum of all expectations is the time
        # that they took. What was expected bounds the weight of a step that the machine held up.
        expected = _product(self._costs, features)
        weight = 1.0 / min(max(expected, seconds / 3), seconds * 3)
        keep = 0.5 ** (seconds / SHAPE_HALF_LIFE_S)
        one, prompts, answers = features
        for row, value in enumerate(features):
            weighted, moments = weight * value, self._moments[row]
            self._projections[row] = self._projections[row] * keep + weighted * seconds
            moments[0] = moments[0] * keep + weighted * one
            moments[1] = moments[1] * keep + weighted * prompts
            moments[2] = moments[2] * keep + weighted * answers
        self._costs = _not_negative(self._moments, self._projections, self._costs)

    @property
    def cost(self) -> StepCost:
        """The costs now, all 0 until known; three digits, so that noise does not look like a change."""
        if self._cost is None:
            pace = self._spent_s / self._expected_s if self._expected_s > 0.0 else 1.0
            self._cost = StepCost(*[float(f"{cost * pace:.3g}") for cost in self._costs])
        return self._cost


def _product(costs: Triple, features: Triple) -> float:
    return costs[0] * features[0] + costs[1] * features[1] + costs[2] * features[2]


def _not_negative(moments: list[list[float]], projections: list[float], before: Triple) -> Triple:
    """The best costs of which none is negative: what would be is 0, and the others make up for it."""
    used = [0, 1, 2]
    while used:
        matrix = [[moments[row][column] for column in used] for row in used]
        right = [projections[row] for row in used]
        for place, row in enumerate(used):
            # Counts like a little time spent on this feature alone, at the cost that it had before.
            matrix[place][place] += DOUBTS[row]
            right[place] += DOUBTS[row] * before[row]
        solution = _solve(matrix, right)
        if min(solution) >= 0.0:
            costs = dict(zip(used, solution, strict=True))
            return (costs.get(0, 0.0), costs.get(1, 0.0), costs.get(2, 0.0))
        del used[min(range(len(used)), key=lambda place: solution[place] * SCALES[used[place]])]
    return before


def _solve(matrix: list[list[float]], right: list[float]) -> list[float]:
    """Solve a small positive definite system, in place."""
    size = len(right)
    if size == 3:
        # Written out: this is done at each step of each rank.
        (a, b, c), (d, e, f), (g, h, i) = matrix
        x, y, z = right
        lower, lowest = d / a, g / a
        y, e, f = y - lower * x, e - lower * b, f - lower * c
        z, h, i = z - lowest * x, h - lowest * b, i - lowest * c
        factor = h / e
        z = (z - factor * y) / (i - factor * f)
        y = (y - f * z) / e
        return [(x - (b * y + c * z)) / a, y, z]
    for pivot in range(size):
        for row in range(pivot + 1, size):
            factor = matrix[row][pivot] / matrix[pivot][pivot]
            right[row] -= factor * right[pivot]
            for column in range(pivot, size):
                matrix[row][column] -= factor * matrix[pivot][column]
    for pivot in reversed(range(size)):
        known = sum(matrix[pivot][column] * right[column] for column in range(pivot + 1, size))
        right[pivot] = (right[pivot] - known) / matrix[pivot][pivot]
    return right


class LoadReporter:
    """The reports of one life of a rank."""

    def __init__(self, requests: RankRequests) -> None:
        self._requests = requests
        self._prefill = SpeedMeter()
        self._decode = SpeedMeter()
        self._steps = StepMeter()
        self._last: RankReport | None = None
        self._asked: tuple[object, ...] = ()
        self._measured = 0

    def measure(self, done: Stepped, now: float) -> None:
        """Take in how long a step took that has just ended."""
        # A step that does both is split by tokens: a decoding request costs about what a prompt token does.
        tokens = done.prefilled_tokens + done.decoded_tokens
        if not tokens:
            return
        self._measured += 1
        self._steps.add(done.prefilled_tokens, done.decoded_tokens, done.seconds, now)
        share = done.prefilled_tokens / tokens
        if done.prefilled_tokens:
            self._prefill.add(done.prefilled_tokens, done.seconds * share)
        if done.decoded_tokens:
            self._decode.add(done.decoded_tokens, done.seconds * (1 - share))

    def report(
        self, engine: Load, step: int, wave: int, running: bool, prefill_quota: int | None = None
    ) -> RankReport | None:
        """A report, where it would say anything that the last one did not. `engine`: the engine's own load.

        A quota that has changed is told with the next report; with every step one would be too many.
        """
        requests, last = self._requests, self._last
        # Asked twice between two steps: the second time with the same load, to the same end.
        asked = (engine, self._measured, requests.finished, requests.kept_back, wave, running)
        if last is not None and asked == self._asked and requests.taken == last.taken:
            return None
        self._asked = asked
        cost = self._steps.cost
        load = msgspec.structs.replace(
            requests.load(engine), prefill_rate=self._prefill.rate, decode_rate=self._decode.rate, step_s=cost.step_s,
            prompt_token_s=cost.prompt_token_s, answer_token_s=cost.answer_token_s,
        )  # fmt: skip
        taken = dict(requests.taken)
        if last is not None:
            load = msgspec.structs.replace(load, prefill_quota=last.load.prefill_quota)
        if last is not None and (last.load, last.taken, last.wave, last.running) == (load, taken, wave, running):
            return None
        load = msgspec.structs.replace(load, prefill_quota=prefill_quota)
        self._last = RankReport(requests.rank, requests.incarnation, step, wave, running, load, taken)
        return self._last

    def forget(self) -> None:
        """Whoever listens may know nothing: the next report says all."""
        self._last = None
