"""Chats of several turns on real ranks, with prefixes kept in mind and without: `make bench-chat`.

So many chats at once, each of which sends its whole history with every turn, as clients do. The same chats are held
with `--routing sticky` and with `least-load`, in turn, on deployments of their own; then with `sticky` once more,
and a rank killed in the middle. Printed are the share of all prompt tokens that a rank had (`cached_tokens` of
`usage`), and the time to the first token by turn. `--engine vllm` needs an environment with vLLM (`make test-vllm`
makes one).
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import statistics
import time
from collections.abc import Iterator

import openai
from msgspec import Struct
from openai.types.chat import ChatCompletionMessageParam
from tests.serving import Deployment, deployment

ENGINES = {
    "llama": ["--max-model-len", "4096"],
    "vllm": ["--engine", "vllm", "--max-model-len", "2048", "--enable-prefix-caching"],
}
SYSTEM = "You answer in one short sentence. " * 12
WORDS = [
    "river",
    "mountain",
    "city",
    "bread",
    "letter",
    "engine",
    "garden",
    "window",
    "winter",
    "music",
    "paper",
    "stone",
    "coffee",
    "ship",
    "forest",
]
ANSWER_TOKENS = 24
THINK_S = 2.0
"""The longest pause between an answer and the next turn."""


class Turn(Struct):
    """One answer. `first_s`: the time to its first token, in seconds; `cached`: of its `prompt` tokens; `known`: tokens
    of the prompt and the answer before it.
    """

    turn: int
    first_s: float
    prompt: int
    cached: int
    known: int


class Figures(Struct):
    """Of one run. `lost`: chats that ended with an error."""

    turns: list[Turn]
    lost: list[str]

    @property
    def hit_rate(self) -> float:
        return sum(one.cached for one in self.turns) / max(1, sum(one.prompt for one in self.turns))

    @property
    def possible(self) -> float:
        """The hit rate where each turn finds all of those before it, and the first ones nothing."""
        return sum(min(one.known, one.prompt) for one in self.turns) / max(1, sum(one.prompt for one in self.turns))

    def first_s(self, turn: int) -> tuple[float, float]:
        """The median, and what 99 of 100 stay under, of one turn."""
        times = sorted(one.first_s for one in self.turns if one.turn == turn)
        return statistics.median(times), times[len(times) * 99 // 100]


async def chat(client: openai.AsyncOpenAI, index: int, turns: int, figures: Figures, begun: list[int]) -> None:
    chance = random.Random(index)
    messages: list[ChatCompletionMessageParam] = [{"role": "system", "content": SYSTEM}]
    model = (await client.models.list()).data[0].id
    known = 0
    try:
        for turn in range(turns):
            messages.append({"role": "user", "content": f"{index}: " + " ".join(chance.choices(WORDS, k=24))})
            begin, first, text = time.monotonic(), 0.0, ""
            stream = await client.chat.completions.create(
                model=model, messages=messages, max_tokens=ANSWER_TOKENS, temperature=0, stream=True,
                stream_options={"include_usage": True}, extra_body={"ignore_eos": True},
            )  # fmt: skip
            begun[0] += 1
            async for chunk in stream:
                first = first or time.monotonic()
                text += "".join(choice.delta.content or "" for choice in chunk.choices)
                if chunk.usage is not None:
                    details = chunk.usage.prompt_tokens_details
                    cached = (details.cached_tokens or 0) if details is not None else 0
                    figures.turns.append(Turn(turn + 1, first - begin, chunk.usage.prompt_tokens, cached, known))
                    known = chunk.usage.prompt_tokens + chunk.usage.completion_tokens
            messages.append({"role": "assistant", "content": text})
            await asyncio.sleep(chance.uniform(0, THINK_S))
    except openai.OpenAIError as error:
        figures.lost.append(f"chat {index}: {error}")


async def hold(running: Deployment, chats: int, turns: int, *, kill: bool) -> Figures:
    figures, begun = Figures([], []), [0]
    async with openai.AsyncOpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0, timeout=600.0) as client:
        held = [asyncio.create_task(chat(client, index, turns, figures, begun)) for index in range(chats)]
        while kill and begun[0] < chats * turns // 2:
            await asyncio.sleep(0.05)
        if kill:
            os.kill(running.pid_of("rank 0"), signal.SIGKILL)
        await asyncio.gather(*held)
    return figures


def runs(engine: list[str], chats: int, turns: int) -> Iterator[tuple[str, Figures]]:
    for name, routing, kill in (("least-load", "least-load", False), ("sticky", "sticky", False),
                                ("sticky, a rank killed", "sticky", True)):  # fmt: skip
        with deployment(*engine, "-dp", "2", "-asc", "2", "--routing", routing) as running:
            yield name, asyncio.run(hold(running, chats, turns, kill=kill))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=sorted(ENGINES), default="llama")
    parser.add_argument("--model", help="a folder or name of a model, for vllm")
    parser.add_argument("--chats", type=int, default=40)
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--slots", type=int, default=16, help="requests that a rank runs at once")
    given = parser.parse_args()
    flags = [*(["--model", given.model] if given.model else []), *ENGINES[given.engine]]
    flags += ["--max-num-seqs", str(given.slots)]
    shown = [1, 2, given.turns]
    print(
        f"{'':24}{'hit rate':>9}{'possible':>9}{'lost':>6}"
        + "".join(f"{f'p50, p99 of turn {turn}':>22}" for turn in shown)
    )
    for name, figures in runs(flags, given.chats, given.turns):
        times = [figures.first_s(turn) for turn in shown]
        cells = "".join(f"{f'{1000 * p50:.0f}, {1000 * p99:.0f} ms':>22}" for p50, p99 in times)
        print(f"{name:24}{figures.hit_rate:9.2f}{figures.possible:9.2f}{len(figures.lost):6}{cells}", flush=True)
        for line in figures.lost:
            print(line)


if __name__ == "__main__":
    main()
