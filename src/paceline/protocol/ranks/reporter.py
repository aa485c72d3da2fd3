"""What a rank reports of its load, and how fast it works: only what the last report did not say."""

from __future__ import annotations

import msgspec

from paceline.protocol.load import SpeedMeter
from paceline.protocol.messages import Load, RankReport
from paceline.protocol.rank_events import Stepped
from paceline.protocol.ranks.requests import RankRequests
from paceline.protocol.ranks.step_meter import StepMeter


class LoadReporter:
    """The reports of one life of a rank."""

    def __init__(self, requests: RankRequests) -> None:
        self._requests = requests
        self._prefill = SpeedMeter()
        self._decode = SpeedMeter()
        self._steps = StepMeter()
        self._last: RankReport | None = None

    def measure(self, done: Stepped, now: float) -> None:
        """Take in how long a step took that has just ended."""
        # A step that does both is split by tokens: a decoding request costs about what a prompt token does.
        tokens = done.prefilled_tokens + done.decoded_tokens
        if not tokens:
            return
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
        requests = self._requests
        cost = self._steps.cost
        load = msgspec.structs.replace(
            requests.load(engine),
            prefill_rate=self._prefill.rate,
            decode_rate=self._decode.rate,
            step_s=cost.step_s,
            prompt_token_s=cost.prompt_token_s,
            answer_token_s=cost.answer_token_s,
        )
        taken = dict(requests.taken)
        last = self._last
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
