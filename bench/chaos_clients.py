"""Chaos, as clients see it: streams, each compared with the text of the same request undisturbed."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import openai
from tests.serving import Deployment

TOKENS = {"timed": 200, "moe": 120, "llama": 40}


@dataclass
class Tally:
    """What has come of the requests."""

    requests: int = 0
    lost: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    cut: int = 0
    refused: int = 0
    longest_stall_s: float = 0.0
    longest_stall: str = "none"
    """When it was, and where in the stream."""
    longest_suspension_s: float = 0.0
    longest_suspension: str = "none"
    begin: float = field(default_factory=time.monotonic)
    faults: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)


class Client(threading.Thread):
    """Asks one request after the other, and reads each answer as it comes."""

    def __init__(
        self, index: int, running: Deployment, asks: list[dict[str, Any]], texts: list[str], tally: Tally
    ) -> None:
        super().__init__(daemon=True)
        self._random = random.Random(index)
        self._running, self._asks, self._texts, self._tally = running, asks, texts, tally
        self.over = threading.Event()

    def run(self) -> None:
        while not self.over.is_set():
            which = self._random.randrange(len(self._asks))
            self._ask(self._asks[which], self._texts[which])

    def _ask(self, ask: dict[str, Any], expected: str) -> None:
        text, finish = "", None
        before = time.monotonic()
        try:
            # A connection of its own: a front-end that is killed takes only what is under way with it.
            with self._running.openai as client:
                for chunk in client.completions.create(**ask, stream=True):
                    now = time.monotonic()
                    self._stalled(now - before, before, len(text))
                    before = now
                    for choice in chunk.choices:
                        text += choice.text
                        finish = choice.finish_reason or finish
        except openai.APITimeoutError as error:
            self._count(lost=f"{error} after {len(text)} characters of {expected[:20]!r}")
            return
        except openai.APIConnectionError:
            self._count(cut=True)
            return
        except openai.InternalServerError as error:
            # No rank was ready when it came: it is to be asked again. What had begun is not refused but lost.
            refused = error.status_code == 503 and error.code == "no_rank"
            self._count(refused=refused, lost=None if refused else str(error))
            return
        except openai.APIError as error:
            self._count(lost=f"{error} after {len(text)} characters of {expected[:20]!r}")
            return
        except Exception as error:
            # The HTTP client's own errors for a connection that broke in the middle.
            cut = type(error).__module__.startswith("http")
            self._count(cut=cut, lost=None if cut else repr(error))
            return
        wrong = None if text == expected and finish else f"{text[-60:]!r} ({finish}) in place of {expected[-60:]!r}"
        self._count(wrong=wrong)

    def _count(
        self, *, cut: bool = False, refused: bool = False, lost: str | None = None, wrong: str | None = None
    ) -> None:
        tally = self._tally
        with tally.lock:
            tally.requests += 1
            tally.cut += cut
            tally.refused += refused
            tally.lost += [lost] if lost else []
            tally.wrong += [wrong] if wrong else []

    def _stalled(self, seconds: float, since: float, characters: int) -> None:
        tally = self._tally
        with tally.lock:
            if seconds > tally.longest_stall_s:
                tally.longest_stall_s = seconds
                tally.longest_stall = f"after {characters} characters, {since - tally.begin:.0f} s after the beginning"


def asks_of(engine: str, model: str) -> list[dict[str, Any]]:
    """Requests of some variety; each has one right answer."""
    ways: list[dict[str, Any]] = [{"temperature": 0}, {"temperature": 1.0, "seed": 5, "presence_penalty": 0.2}]
    prompts = ["The capital of France is", "Once upon a time there was a", "東京は日本の", "1, 2, 3, 4,"]
    common = {"model": model, "extra_body": {"ignore_eos": True}}
    return [
        {**common, **way, "prompt": prompt, "max_tokens": TOKENS[engine] // divisor}
        for prompt in prompts for way in ways for divisor in (1, 3)
    ]  # fmt: skip
