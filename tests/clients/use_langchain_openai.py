"""LangChain's chat model and completions: text, streams, tools, a type, embeddings (a second deployment)."""

from __future__ import annotations

import asyncio

from langchain_core.messages import HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from trying import EMBED_URL, MODEL, URL, Person, close, tried

chat = ChatOpenAI(model=MODEL, base_url=URL, api_key="none", temperature=0, max_tokens=60, max_retries=0)
QUESTION = [SystemMessage("Be short."), HumanMessage("Name a colour.")]


@tool
def get_weather(city: str) -> str:
    """The weather in a city now."""
    return f"21 degrees in {city}"


whole = chat.invoke(QUESTION)
assert whole.content
assert whole.usage_metadata["output_tokens"] > 0
tried("invoke")
assert "".join(chunk.content for chunk in chat.stream(QUESTION)) == whole.content
tried("stream")
assert asyncio.run(chat.ainvoke(QUESTION)).content == whole.content
tried("ainvoke")
assert [one.content for one in chat.batch([QUESTION, QUESTION])] == [whole.content] * 2
tried("batch")
asked = [HumanMessage("What is the weather in Paris?")]
called = chat.bind_tools([get_weather], tool_choice="get_weather").invoke(asked)
(call,) = called.tool_calls
assert call["name"] == "get_weather"
result = ToolMessage(get_weather.invoke(call["args"]), tool_call_id=call["id"])
assert chat.bind_tools([get_weather]).invoke([*asked, called, result]).content
tried("a tool, its call, its result")
pieces = chat.bind_tools([get_weather], tool_choice="required", parallel_tool_calls=False).stream(asked)
total = None
for piece in pieces:
    total = piece if total is None else total + piece
assert total.tool_calls[0]["name"] == "get_weather"
tried("a streamed call")
for method in ("json_schema", "function_calling"):
    person = chat.with_structured_output(Person, method=method).invoke("Who are you?")
    assert isinstance(person, Person)
    tried(f"with_structured_output, {method}")
responses = ChatOpenAI(model=MODEL, base_url=URL, api_key="none", use_responses_api=True, max_retries=0, max_tokens=30)
first = responses.invoke("Name a colour.")
assert first.text
follow_up = responses.invoke("Another.", previous_response_id=first.response_metadata["id"])
assert follow_up.text
tried("Responses, and on from a response")
assert OpenAI(model=MODEL, base_url=URL, api_key="none", max_tokens=8).invoke("The capital of France is")
tried("completions")
vectors = OpenAIEmbeddings(model=MODEL, base_url=EMBED_URL, api_key="none", check_embedding_ctx_length=False)
cat, kitten, markets = vectors.embed_documents(
    ["The cat sits on the mat.", "A kitten rests on a rug.", "Stock markets fell sharply today."]
)
assert close(cat, kitten) > close(cat, markets)
tried("embeddings")
