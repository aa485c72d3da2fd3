"""Sixteen streams that ask for all that an answer can depend on, and what becomes of them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import httpx2
from msgspec import Struct

from tests.pace import stretched
from tests.vllm.serving import PROMPTS

TOKENS = 150
SEED = 100

KINDS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0.8, "seed": SEED},
    {"temperature": 0, "frequency_penalty": 0.5, "presence_penalty": 0.3},
    {"temperature": 0.8, "seed": SEED + 1, "frequency_penalty": 0.5, "top_p": 0.9},
    {"temperature": 0, "repetition_penalty": 1.2},
    {"temperature": 0, "logprobs": 2},
    {"temperature": 0, "logit_bias": {"65": 5}},
    {"temperature": 1.0, "seed": SEED + 2, "top_k": 20, "min_p": 0.02},
]
ASKED = [
    kind | {"prompt": prompt, "max_tokens": TOKENS, "ignore_eos": True}
    for kind, prompt in zip(KINDS * 2, [*PROMPTS, *reversed(PROMPTS)], strict=True)
]


class Said(Struct, frozen=True):
    """An answer. `logprobs`: the tokens' texts and rounded values, since a batch's size changes the last digits."""

    text: str
    finish: str | None
    logprobs: list[tuple[str, float]]
    error: str | None = None


async def stream(client: httpx2.AsyncClient, asked: dict[str, Any], begun: asyncio.Semaphore | None = None) -> Said:
    text, finish, logprobs, events = "", None, [], 0
    try:
        async with client.stream("POST", "/v1/completions", json=asked | {"stream": True}) as answer:
            if answer.status_code != 200:
                return Said("", None, [], (await answer.aread()).decode())
            async for line in answer.aiter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    return Said(text, finish, logprobs, str(event["error"]))
                (choice,) = event["choices"]
                text, finish, events = text + choice["text"], choice["finish_reason"] or finish, events + 1
                if choice.get("logprobs"):
                    values = choice["logprobs"]
                    pairs = zip(values["tokens"], values["token_logprobs"], strict=True)
                    logprobs += [(token, round(value, 1)) for token, value in pairs]
                if events == 10 and begun is not None:
                    begun.release()
    except httpx2.HTTPError as error:
        return Said(text, finish, logprobs, repr(error))
    return Said(text, finish, logprobs)


async def streams(url: str, asked: Sequence[dict[str, Any]] = ASKED, midway: Any = None) -> list[Said]:
    """All at once; `midway` is called when the first few tokens of half of them have come."""
    begun = asyncio.Semaphore(0)
    async with httpx2.AsyncClient(base_url=url, timeout=stretched(120)) as client:
        tasks = [asyncio.create_task(stream(client, one, begun)) for one in asked]
        if midway is not None:
            for _ in range(len(asked) // 2):
                await asyncio.wait_for(begun.acquire(), stretched(60))
            midway()
        return list(await asyncio.gather(*tasks))


def run(url: str, asked: Sequence[dict[str, Any]] = ASKED, midway: Any = None) -> list[Said]:
    return asyncio.run(streams(url, asked, midway))
