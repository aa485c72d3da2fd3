"""Under vLLM's own servers: its choice of a rank beside ours (`PACELINE_VLLM_ROUTING=1`): `make bench-vllm-routing`.

Two ranks, two API servers, the model of 100 million random weights, prefix caching on; each system is started in turn.
*Bursts*: 16 requests at once, with prompts of 16 to 400 tokens. *Chats*: sessions of several turns, each of which has
all before it in its prompt. Waits are for the first token; hits are vLLM's own count of prompt tokens in its cache.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import subprocess
import tempfile
import time
from pathlib import Path

from bench.vllm_engine import LARGER
from tests.vllm import environment
from tests.vllm.serving import VERSION, Server, vllm

RESULTS = Path(__file__).resolve().parent / "results" / "vllm_routing.md"
FLAGS = ["--max-model-len", "512", "--max-num-seqs", "32", "--enable-prefix-caching", "--max-num-batched-tokens", "512"]
SYSTEMS = {"vLLM's": {}, "ours": {"PACELINE_VLLM_ROUTING": "1"}}
BURST, SESSIONS, TURNS, TURN_TOKENS, ANSWER_TOKENS = 16, 12, 8, 44, 8


async def ask(port: int, prompt: list[int], waits: list[float]) -> None:
    body = json.dumps({
        "model": "tiny", "prompt": prompt, "max_tokens": ANSWER_TOKENS, "temperature": 0, "ignore_eos": True,
        "stream": True,
    }).encode()  # fmt: skip
    begin, first = time.monotonic(), 0.0
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    while line := await reader.readline():
        if line.startswith(b"data: {"):
            first = first or time.monotonic()
    writer.close()
    waits.append(first - begin if first else float("inf"))


async def bursts(port: int, draw: random.Random, count: int, every_s: float) -> list[float]:
    waits: list[float] = []
    tasks = []
    for _ in range(count):
        for _ in range(BURST):
            length = draw.choice((16, 16, 32, 64, 200, 400))
            tasks.append(asyncio.create_task(ask(port, [draw.randrange(300, 500) for _ in range(length)], waits)))
        await asyncio.sleep(every_s)
    await asyncio.gather(*tasks)
    return waits


async def chats(port: int, draw: random.Random, rounds: int) -> list[float]:
    waits: list[float] = []

    async def session() -> None:
        for _ in range(rounds):
            prompt: list[int] = []
            for _ in range(TURNS):
                prompt = prompt + [draw.randrange(300, 500) for _ in range(TURN_TOKENS)]
                await ask(port, prompt, waits)
                await asyncio.sleep(draw.random() * 0.3)

    await asyncio.gather(*(session() for _ in range(SESSIONS)))
    return waits


def counted(server: Server) -> tuple[float, float]:
    """Prompt tokens asked for, and found in the cache, at all ranks."""
    text = server.get("/metrics")
    lines = {
        name: re.findall(rf"^vllm:prefix_cache_{name}_total{{.*}} ([\d.e+]+)$", text, re.MULTILINE)
        for name in ("queries", "hits")
    }
    return sum(map(float, lines["queries"])), sum(map(float, lines["hits"]))


def row(load: str, system: str, waits: list[float], hits: float) -> str:
    ordered = sorted(waits)
    p50, p99 = ordered[len(ordered) // 2], ordered[int(0.99 * (len(ordered) - 1))]
    return f"| {load} | {system} | {len(waits)} | {p50 * 1000:.0f} ms | {p99 * 1000:.0f} ms | {hits:.0%} |"


def measure(system: str, model: str, count: int, rounds: int) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        variables = {"VLLM_LOGGING_LEVEL": "WARNING"} | SYSTEMS[system]
        with vllm(model, Path(folder), paceline=True, flags=FLAGS, **variables) as server:
            draw, lines = random.Random(0), []
            asyncio.run(bursts(server.port, random.Random(1), 2, 0.5))  # warm
            for load in ("bursts", "chats"):
                before = counted(server)
                made = bursts(server.port, draw, count, 1.5) if load == "bursts" else chats(server.port, draw, rounds)
                waits = asyncio.run(made)
                asked, hits = (after - earlier for after, earlier in zip(counted(server), before, strict=True))
                lines.append(row(load, system, waits, hits / asked if asked else 0.0))
            return lines


def main() -> None:
    parser = argparse.ArgumentParser(description="vLLM's choice of a rank, and ours.")
    parser.add_argument("--bursts", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--times", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        python = str(environment.environment_of(VERSION) / "bin" / "python")
        subprocess.run([python, "-c", LARGER, folder], check=True)
        lines = []
        for _ in range(options.times):
            for system in SYSTEMS:
                lines += measure(system, folder, options.bursts, options.rounds)
                print(lines, flush=True)
    head = f"""# The choice of a rank under vLLM's own servers

    make bench-vllm-routing

vLLM {VERSION} on 2 cores, two ranks, two API servers, Paceline's coordinator in both; started in turn.

| load | choice | requests | p50 to the first token | p99 | prompt tokens found in the cache |
|---|---|---|---|---|---|
"""
    options.output.write_text(head + "\n".join(sorted(lines)) + "\n")


if __name__ == "__main__":
    main()
