"""In what vLLM's versions differ, as far as a coordinator notices."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

Greeting = Literal["none", "once", "each"]


class VllmDialect(Struct, frozen=True):
    """One version's ways; the defaults are those of 0.32.

    `count_fields`: numbers a rank in what front-ends hear: waiting and running, since 0.28 the used share of KV too.
    `greeting`: whether a rank waits for READY when it has subscribed: not in 0.10.0; a rank that gets it a second time
    breaks (`once`) or, since about 0.17, ignores it (`each`).
    `proof_step`: a rank that reports this step of a wave, or a later one, has come through an all-reduce with all
    others, so all run. Ranks agree every `dp_sync_interval` steps, since 0.30 after the first step as well.
    `wake_is_safe`: a rank that is suspended, or sleeps, ignores a wake (since about 0.22).
    `says_started`: rank 0 says `start_wave` when its loop has come through the first all-reduce (since 0.30), so
    silence after a wake means something.
    """

    count_fields: int = 3
    greeting: Greeting = "each"
    proof_step: int = 1
    wake_is_safe: bool = True
    says_started: bool = True
