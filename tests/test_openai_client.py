"""The official OpenAI client against the real thing: Gemma 3 270M over two ranks."""

from __future__ import annotations

import asyncio
import signal
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from tests.pace import stretched
from tests.serving import Deployment, deployment, is_alive, wait_until

pytestmark = pytest.mark.slow

PROMPT = "The capital of France is"
SETTINGS: dict[str, Any] = {"model": "gemma-3-270m", "temperature": 0, "max_tokens": 16}


def test_completion_is_real_text(llama_server: Deployment) -> None:
    answer = llama_server.openai.completions.create(prompt=PROMPT, **SETTINGS)
    assert len(answer.choices[0].text.split()) > 5
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 16
    assert answer.choices[0].finish_reason == "length"


def test_stream_has_the_same_text(llama_server: Deployment) -> None:
    client = llama_server.openai
    whole = client.completions.create(prompt=PROMPT, **SETTINGS).choices[0].text
    chunks = list(
        client.completions.create(prompt=PROMPT, stream=True, stream_options={"include_usage": True}, **SETTINGS)
    )
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == whole
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 16


def test_chat_whole_and_stream(llama_server: Deployment) -> None:
    client = llama_server.openai
    messages: list[Any] = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Name a colour."}]
    whole = client.chat.completions.create(messages=messages, **SETTINGS)
    stream = client.chat.completions.create(messages=messages, stream=True, **SETTINGS)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert text == whole.choices[0].message.content
    assert whole.choices[0].message.role == "assistant"


def test_every_rank_says_the_same(llama_server: Deployment) -> None:
    texts = set()
    for rank in ("0", "1"):
        raw = llama_server.openai.completions.with_raw_response.create(
            prompt=PROMPT, extra_headers={"X-data-parallel-rank": rank}, **SETTINGS
        )
        assert raw.headers["x-data-parallel-rank"] == rank
        texts.add(raw.parse().choices[0].text)
    assert len(texts) == 1


def test_sampling_fields_reach_the_engine(llama_server: Deployment) -> None:
    client = llama_server.openai
    hot: dict[str, Any] = SETTINGS | {"temperature": 1.0}
    first, second = (client.completions.create(prompt=PROMPT, seed=7, **hot).choices[0].text for _ in range(2))
    other = client.completions.create(prompt=PROMPT, seed=8, **hot).choices[0].text
    assert first == second != other
    many = client.completions.create(prompt=PROMPT, seed=7, n=3, **hot)
    assert len({choice.text for choice in many.choices}) == 3
    whole = client.completions.create(prompt=PROMPT, **SETTINGS).choices[0].text
    word = whole.split()[2]
    stopped = client.completions.create(prompt=PROMPT, stop=[word], **SETTINGS).choices[0]
    assert stopped.finish_reason == "stop"
    assert stopped.text == whole[: whole.index(word)]
    forced = client.completions.create(prompt=PROMPT, logit_bias={"9259": 100}, **SETTINGS)
    assert forced.choices[0].text.startswith("Hello")


def test_logprobs(llama_server: Deployment) -> None:
    client = llama_server.openai
    logprobs = client.completions.create(prompt=PROMPT, logprobs=2, **SETTINGS).choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert logprobs.token_logprobs is not None
    assert len(logprobs.tokens) == 16
    assert all(value is not None and value <= 0 for value in logprobs.token_logprobs)
    chat = client.chat.completions.create(
        messages=[{"role": "user", "content": "Hi"}], logprobs=True, top_logprobs=3, **SETTINGS
    )
    content = chat.choices[0].logprobs
    assert content is not None
    assert content.content is not None
    for token in content.content:
        assert len(token.top_logprobs) == 3
        best = [top.logprob for top in token.top_logprobs]
        assert best == sorted(best, reverse=True)
        assert token.logprob == pytest.approx(best[0], abs=1e-6), "greedy takes the best"


def test_errors_are_the_clients_own(llama_server: Deployment) -> None:
    client = llama_server.openai
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="gemma-3-270m", prompt="a", max_tokens=-1)
    assert caught.value.param == "max_tokens"
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="gpt-9", prompt="a")
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="gemma-3-270m", prompt="word " * 5000)
    assert caught.value.code == "context_length_exceeded"
    assert [model.id for model in client.models.list()] == ["gemma-3-270m"]


async def _streams(url_client: openai.AsyncOpenAI, count: int) -> list[tuple[str, str]]:
    """Texts of many streams at a time, with the rank of each."""

    async def one(number: int) -> tuple[str, str]:
        raw = await url_client.completions.with_raw_response.create(
            prompt=f"Number {number} is", stream=True, model="gemma-3-270m", temperature=0, max_tokens=12
        )
        text = "".join([chunk.choices[0].text async for chunk in raw.parse()])
        return text, raw.headers["x-data-parallel-rank"]

    return list(await asyncio.gather(*(one(number) for number in range(count))))


def test_32_concurrent_streams_use_both_ranks(llama_server: Deployment) -> None:
    async def run() -> list[tuple[str, str]]:
        async with llama_server.async_openai() as client:
            return await _streams(client, 32)

    results = asyncio.run(run())
    assert all(text for text, _ in results)
    ranks = [rank for _, rank in results]
    assert 12 <= ranks.count("0") <= 20
    assert ranks.count("0") + ranks.count("1") == 32


def test_stream_that_is_dropped_frees_its_rank(llama_server: Deployment) -> None:
    client = llama_server.openai
    stream = client.completions.create(
        model="gemma-3-270m", prompt=PROMPT, max_tokens=1500, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()

    def idle() -> bool:
        loads = llama_server.http.get("/loads").json()["ranks"]
        return all(load["kv_used"] == 0 and load["running"] == 0 for load in loads)

    wait_until(idle, "no KV is used", 20.0)


def test_sigterm_under_load_loses_nothing() -> None:
    own = ("--model", "gemma-3-270m", "--max-model-len", "512", "--drain-timeout", "90")
    with deployment(*own) as running, ThreadPoolExecutor(8) as pool:
        client = running.openai
        streams = [
            client.completions.create(prompt=f"{PROMPT} {number}", stream=True, **SETTINGS | {"max_tokens": 40})
            for number in range(8)
        ]
        children = running.children()
        texts = [pool.submit(lambda stream: [chunk.choices[0] for chunk in stream], stream) for stream in streams]
        running.signal(signal.SIGTERM)
        for text in texts:
            choices = text.result(stretched(90))
            assert choices[-1].finish_reason in ("length", "stop")
        assert running.wait_end() == 0
        assert "Traceback" not in running.output
        wait_until(lambda: not any(is_alive(pid) for pid in children), "children ended")
