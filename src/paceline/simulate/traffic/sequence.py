"""One request on its way through a simulated deployment."""

from __future__ import annotations

from paceline.simulate.traffic.trace import Arrival


class Sequence:
    """What a request is, what an engine has done of it, and when.

    `number`: its place in the trace. `at`: when its client sent it; `first`, `last`: when the client had the first and
    the last token, below 0 before. `to_prefill`: prompt tokens to compute before the next token. `private`: tokens of
    KV that are its own; `shared`: blocks of KV that others may use too. `hits`: prompt tokens found in a prefix cache.
    `made`: answer tokens, as of when it last began to decode. `begins`, `ends`: by its engine's count of steps.
    `turn`: another number once it has been pushed out of its engine's memory.
    """

    __slots__ = (
        "answer", "at", "begins", "blocks", "ends", "first", "frontend", "hits", "last", "made", "number", "private",
        "prompt", "rank", "send", "shared", "to_prefill", "turn",
    )  # fmt: skip

    def __init__(self, number: int, arrival: Arrival, frontend: int) -> None:
        self.number = number
        self.frontend = frontend
        self.at = arrival.at
        self.prompt = arrival.prompt_tokens
        self.answer = arrival.answer_tokens
        self.blocks = arrival.blocks
        self.to_prefill = arrival.prompt_tokens
        self.rank = -1
        self.send = 0
        self.made = self.begins = self.ends = self.turn = 0
        self.private = self.hits = 0
        self.shared: list[int] = []
        self.first = self.last = -1.0
