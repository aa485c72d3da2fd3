"""What brokered binding adds to a request while ranks are idle: time to first token, against binding at arrival.

    python -m bench.broker_idle

Two deployments of the `timed` engine (no step time) side by side, one with each `--bind`, asked in turn, one request
at a time over one kept connection each; medians, and the difference of the medians.
"""

from __future__ import annotations

import http.client
import json
import re
import signal
import statistics
import subprocess
import sys
import time

REQUESTS = 1500
COSTS = ("step_ms", "prefill_ms", "decode_ms")
PROMPTS = ("hello", "a prompt of some length " * 8)


class Served:
    """`paceline serve` with one way of binding."""

    def __init__(self, bind: str, frontends: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "paceline", "serve", "--engine", "timed", "-dp", "4", "-asc", str(frontends),
             "--port", "0", "--bind", bind, *(f"--engine-option={name}=0" for name in COSTS)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        assert self._process.stdout is not None
        for line in self._process.stdout:
            found = re.search(r"serves on http://([^:/]+):(\d+)", line)
            if found:
                self._connection = http.client.HTTPConnection(found[1], int(found[2]))
                return
        raise SystemExit(f"--bind {bind} did not come up")

    def ask(self, prompt: str) -> float:
        body = json.dumps({"prompt": prompt, "max_tokens": 1, "stream": True})
        begin = time.perf_counter()
        self._connection.request("POST", "/v1/completions", body)
        answer = self._connection.getresponse()
        answer.readline()
        took = time.perf_counter() - begin
        answer.read()
        return took * 1000

    def end(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(30)


def main() -> None:
    print("| front-ends | prompt | arrival p50, ms | broker p50, ms | difference, ms |\n|---|---|---|---|---|")
    for frontends in (1, 2):
        both = [Served(bind, frontends) for bind in ("arrival", "broker")]
        try:
            for prompt in PROMPTS:
                took: list[list[float]] = [[], []]
                for number in range(REQUESTS):
                    for which in (0, 1) if number % 2 else (1, 0):
                        took[which].append(both[which].ask(prompt))
                arrival, late = (statistics.median(one[REQUESTS // 10 :]) for one in took)
                print(f"| {frontends} | {len(prompt)} tokens | {arrival:.2f} | {late:.2f} | {late - arrival:+.2f} |")
        finally:
            for served in both:
                served.end()


if __name__ == "__main__":
    main()
