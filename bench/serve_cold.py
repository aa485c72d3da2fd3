"""What waking up costs on this machine: the same bit of Python run back to back, and every 10 ms.

A process that has slept finds its caches and the core cold, and on a virtual machine the wake-up itself is
dear. No stack can avoid that share; without this figure beside them, the figures of few streams would seem to
say something about the stack alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable

TABLE = {number: str(number) for number in range(20_000)}


def work() -> None:
    """Some 30 us of look-ups, spread over memory."""
    for place in range(300):
        len(TABLE[place * 60])


def cost_us(rounds: int, pause_s: float, task: Callable[[], None] = work) -> float:
    """CPU microseconds of one `task`, with a pause before each."""
    begin = time.process_time()
    for _ in range(rounds):
        if pause_s:
            time.sleep(pause_s)
        task()
    return (time.process_time() - begin) / rounds * 1e6


def cold_and_hot_us() -> tuple[float, float]:
    """CPU microseconds of `work` when it wakes up for it every 10 ms, and back to back."""
    cost_us(100, 0.0)
    return cost_us(200, 0.01), cost_us(2000, 0.0)
