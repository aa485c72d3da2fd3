"""vLLM's engine in Paceline's ranks beside `vllm serve`: `make bench-vllm-engine`.

The same flags, the same model, two ranks and two API servers each, started in turn: so what else the machine does meets
both. Closed loops (each client asks again as soon as it has its answer) at 8, 32 and 128 streams; then bursts of
requests at 90% of the lower one's best rate, as the round before has measured it. Two models: the tiny dense one, where
the servers are the limit, and a larger one with random weights, whose steps are.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from msgspec import Struct
from tests.serving import deployment
from tests.vllm import environment
from tests.vllm.serving import PROMPTS, VERSION, vllm

RESULTS = Path(__file__).resolve().parent / "results" / "vllm_engine.md"
FLAGS = ["--enforce-eager", "--max-model-len", "256", "--max-num-seqs", "128", "--dtype", "bfloat16"]
SYSTEMS = ["paceline", "vllm serve"]
STREAMS = [8, 32, 128]
ANSWER_TOKENS = 32
BURST = 16
SHARE = 0.9
WARM_S = 4.0
LARGER = """
import sys, torch
from transformers import Qwen2Config, Qwen2ForCausalLM
sys.path.insert(0, "tests/vllm")
from make_models import SHAPE, tokenizer
torch.manual_seed(0)
shape = SHAPE | dict(hidden_size=1024, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=4)
Qwen2ForCausalLM(Qwen2Config(intermediate_size=2816, **shape)).to(torch.bfloat16).save_pretrained(sys.argv[1])
tokenizer().save_pretrained(sys.argv[1])
"""


class Figures(Struct):
    """Of one part: output tokens and requests a second, waits for the first token in seconds, requests that failed."""

    tokens: float
    requests: float
    waits: list[float]
    failed: int

    def wait(self, share: float) -> float:
        return (
            sorted(self.waits)[min(len(self.waits) - 1, int(share * len(self.waits)))] if self.waits else float("nan")
        )


class Clients:
    """Streaming clients of one port."""

    def __init__(self, port: int, model: str) -> None:
        self._port = port
        self._model = model
        self._asked = 0
        self.done: list[tuple[float, float, int]] = []
        """When it ended, how long its first token took, how many tokens it had."""
        self.failed = 0

    async def ask(self) -> None:
        prompt = PROMPTS[self._asked % len(PROMPTS)] + f" {self._asked}"
        self._asked += 1
        body = json.dumps({
            "model": self._model, "prompt": prompt, "max_tokens": ANSWER_TOKENS, "temperature": 0, "ignore_eos": True,
            "stream": True, "stream_options": {"include_usage": True},
        }).encode()  # fmt: skip
        begin, first, tokens = time.monotonic(), 0.0, 0
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
            head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n"
            writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            while line := await reader.readline():
                if line.startswith(b"data: {"):
                    first = first or time.monotonic()
                    if b'"completion_tokens":' in line and (usage := json.loads(line[6:])["usage"]):
                        tokens = usage["completion_tokens"]
            writer.close()
        except OSError:
            pass
        if tokens == ANSWER_TOKENS:
            self.done.append((time.monotonic(), first - begin, tokens))
        else:
            self.failed += 1

    def figures(self, begin: float, end: float) -> Figures:
        done = [one for one in self.done if begin <= one[0] < end]
        seconds = end - begin
        return Figures(
            sum(one[2] for one in done) / seconds, len(done) / seconds, [one[1] for one in done], self.failed
        )


async def closed_loop(port: int, model: str, streams: int, seconds: float) -> Figures:
    clients, begin = Clients(port, model), time.monotonic() + WARM_S

    async def client() -> None:
        while time.monotonic() < begin + seconds:
            await clients.ask()

    await asyncio.gather(*(client() for _ in range(streams)))
    return clients.figures(begin, begin + seconds)


async def bursts(port: int, model: str, a_second: float, seconds: float) -> Figures:
    """So many requests a second in the mean, `BURST` at once."""
    clients, begin, tasks = Clients(port, model), time.monotonic(), []
    while time.monotonic() < begin + seconds:
        tasks += [asyncio.create_task(clients.ask()) for _ in range(BURST)]
        await asyncio.sleep(max(0.0, begin + len(tasks) / a_second - time.monotonic()))
    await asyncio.gather(*tasks)
    return clients.figures(begin, time.monotonic())


@contextlib.contextmanager
def running(system: str, model: str, folder: Path) -> Iterator[tuple[int, str]]:
    """A deployment's port, and what it calls the model."""
    if system == "vllm serve":
        with vllm(model, folder, paceline=False, flags=FLAGS, VLLM_LOGGING_LEVEL="WARNING") as server:
            yield server.port, "tiny"
        return
    python = str(environment.environment_of(VERSION) / "bin" / "python")
    variables = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    named = [str(environment.models_of(VERSION) / model), "--served-model-name", "tiny"]
    with deployment(*named, "--engine", "vllm", "-dp", "2", "--api-server-count", "2", *FLAGS,
                    python=python, variables=variables) as ours:  # fmt: skip
        yield int(ours.url.rsplit(":", 1)[1]), "tiny"


Part = tuple[str, str, str]
"""Model, what was asked, system."""


def measure(models: list[str], rounds: int, seconds: float) -> dict[Part, list[Figures]]:
    found: dict[Part, list[Figures]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(rounds):
            for model in models:
                for system in SYSTEMS if turn % 2 == 0 else reversed(SYSTEMS):
                    with running(system, model, Path(folder)) as (port, name):
                        for streams in STREAMS:
                            figures = asyncio.run(closed_loop(port, name, streams, seconds))
                            found[model, f"{streams} streams", system].append(figures)
                            print(turn, model, streams, system, f"{figures.tokens:.0f} tokens/s", flush=True)
                        best = [best_rate(found, model, one) for one in SYSTEMS]
                        if min(best):
                            figures = asyncio.run(bursts(port, name, SHARE * min(best), seconds))
                            found[model, "bursts at 90%", system].append(figures)
    return found


def best_rate(found: dict[Part, list[Figures]], model: str, system: str) -> float:
    return max(
        (each.requests for streams in STREAMS for each in found[model, f"{streams} streams", system]), default=0.0
    )


def report(found: dict[Part, list[Figures]], rounds: int, seconds: float) -> str:
    of = ["tokens/s", "p50", "p99"]
    titles = ["model", "asked", *(f"{one}, ours | theirs | ratio" for one in of), "failed"]
    lines = [
        "# vLLM's engine in Paceline's ranks, beside `vllm serve`", "", "    make bench-vllm-engine", "",
        f"vLLM {VERSION} on {os.cpu_count()} cores, two ranks and two API servers each; {rounds} rounds in turn, "
        f"{seconds:g} s a part, {ANSWER_TOKENS} tokens an answer.", "Medians over the rounds; waits are for the first "
        "token.", "", f"| {' | '.join(titles)} |", "|---" * 12 + "|",
    ]  # fmt: skip
    for model, asked in dict.fromkeys(key[:2] for key in found):
        ours, theirs = (found[model, asked, system] for system in SYSTEMS)
        if not ours or not theirs:
            continue
        cells = [middle(ours, theirs, lambda one: one.tokens, "{:.0f}")]
        for share in (0.5, 0.99):
            cells.append(middle(ours, theirs, lambda one, share=share: 1000 * one.wait(share), "{:.0f} ms"))
        failed = "/".join(str(sum(one.failed for one in each)) for each in (ours, theirs))
        lines.append(f"| {model} | {asked} | {' | '.join(cells)} | {failed} |")
    return "\n".join(lines) + "\n"


def middle(ours, theirs, of, form: str) -> str:
    mine, other = (statistics.median(of(one) for one in each) for each in (ours, theirs))
    return f"{form.format(mine)} | {form.format(other)} | {mine / other:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--models", nargs="+", default=["dense", "larger"])
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.name}")
    given = parser.parse_args()
    larger = environment.models_of(VERSION) / "larger"
    if "larger" in given.models and not (larger / "config.json").exists():
        subprocess.run([environment.environment_of(VERSION) / "bin" / "python", "-c", LARGER, larger], check=True)
    text = report(measure(given.models, given.rounds, given.seconds), given.rounds, given.seconds)
    print(text)
    if given.write:
        RESULTS.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
