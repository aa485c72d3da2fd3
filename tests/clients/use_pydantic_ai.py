"""Pydantic AI: agents with text, a type by each of its ways, a tool that is run, and streams; chat and Responses."""

from __future__ import annotations

import asyncio

from pydantic_ai import Agent, NativeOutput, ToolOutput
from pydantic_ai.messages import ModelRequest, ToolReturnPart
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider
from trying import MODEL, URL, Person, tried

provider = OpenAIProvider(base_url=URL, api_key="none")
settings = {"temperature": 0.0, "max_tokens": 100}
for kind in (OpenAIChatModel, OpenAIResponsesModel):
    name, model = kind.__name__, kind(MODEL, provider=provider)
    answer = Agent(model, instructions="Be short.", model_settings=settings).run_sync("Name a colour.")
    assert answer.output
    assert answer.usage.output_tokens > 0
    tried(f"{name}: text")

    async def streamed(model: object = model) -> str:
        async with Agent(model, model_settings=settings).run_stream("Name a colour.") as result:
            return "".join([text async for text in result.stream_text(delta=True)])

    assert asyncio.run(streamed())
    tried(f"{name}: stream")
    for way in (NativeOutput, ToolOutput):
        person = Agent(model, output_type=way(Person), model_settings=settings, retries=3).run_sync("Who are you?")
        assert isinstance(person.output, Person)
        tried(f"{name}: {way.__name__}")
    agent = Agent(model, output_type=ToolOutput(Person), model_settings=settings, retries=3)
    agent_again = agent.run_sync("And who else?", message_history=agent.run_sync("Who are you?").all_messages())
    returned = [part for message in agent_again.all_messages() if isinstance(message, ModelRequest)
                for part in message.parts if isinstance(part, ToolReturnPart)]  # fmt: skip
    assert returned
    tried(f"{name}: calls and their results in the history")
