"""LlamaIndex's OpenAI-like model: completions, chats, streams, a tool, a type."""

from __future__ import annotations

from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from trying import MODEL, URL, Person, tried

model = OpenAILike(model=MODEL, api_base=URL, api_key="none", is_chat_model=True, is_function_calling_model=True,
                   context_window=4096, temperature=0, max_tokens=100, max_retries=0)  # fmt: skip
QUESTION = [ChatMessage(role="system", content="Be short."), ChatMessage(role="user", content="Name a colour.")]
whole = model.chat(QUESTION)
assert whole.message.content
tried("chat")
*_, last = model.stream_chat(QUESTION)
assert last.message.content == whole.message.content
tried("stream_chat")
plain = OpenAILike(model=MODEL, api_base=URL, api_key="none", is_chat_model=False, max_tokens=8, temperature=0)
assert plain.complete("The capital of France is").text
tried("complete")


def get_weather(city: str) -> str:
    """The weather in a city now."""
    return f"21 degrees in {city}"


answer = model.predict_and_call([FunctionTool.from_defaults(get_weather)], "The weather in Paris?", tool_required=True)
assert "21 degrees" in str(answer)
tried("predict_and_call with a tool that is run")
person = model.as_structured_llm(Person).chat(QUESTION).raw
assert isinstance(person, Person)
tried("as_structured_llm")
