"""LiteLLM as a library: chat, streams, tools, a type, completions, embeddings, its own names for vLLM."""

from __future__ import annotations

import json

import litellm
from trying import EMBED_URL, MODEL, URL, Person, close, tried

litellm.suppress_debug_info = True
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather", "description": "The weather now.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}  # fmt: skip
CHAT = {"messages": [{"role": "user", "content": "Name a colour."}], "api_key": "none", "max_tokens": 40,
        "temperature": 0, "num_retries": 0, "api_base": URL}  # fmt: skip
for provider in ("openai", "hosted_vllm"):
    asked = CHAT | {"model": f"{provider}/{MODEL}"}
    whole = litellm.completion(**asked)
    assert whole.choices[0].message.content
    assert whole.usage.completion_tokens > 0
    tried(f"{provider}: chat")
    chunks = list(litellm.completion(stream=True, stream_options={"include_usage": True}, **asked))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    tried(f"{provider}: stream")
    choice = {"type": "function", "function": {"name": "get_weather"}}
    message = litellm.completion(tools=[TOOL], tool_choice=choice, **asked).choices[0].message
    (call,) = message.tool_calls
    assert "city" in json.loads(call.function.arguments)
    back = [*asked["messages"], message, {"role": "tool", "tool_call_id": call.id, "content": "21 degrees"}]
    assert litellm.completion(tools=[TOOL], **asked | {"messages": back}).choices[0].message
    tried(f"{provider}: a tool, its call, its result")
    formed = litellm.completion(response_format=Person, **asked).choices[0].message.content
    assert Person.model_validate_json(formed)
    tried(f"{provider}: response_format")
assert litellm.text_completion(model=f"text-completion-openai/{MODEL}", prompt="The capital of France is",
                               api_base=URL, api_key="none", max_tokens=8).choices[0].text  # fmt: skip
tried("text_completion")
response = litellm.responses(model=f"openai/{MODEL}", input="Name a colour.", api_base=URL, api_key="none",
                             max_output_tokens=20)  # fmt: skip
assert response.output[0].content[0].text
tried("responses")
said = litellm.completion(
    model=f"anthropic/{MODEL}", messages=CHAT["messages"], api_base=URL.removesuffix("/v1"), api_key="none",
    max_tokens=20, num_retries=0,
)  # fmt: skip
assert said.choices[0].message.content
tried("anthropic: chat")
texts = ["The cat sits on the mat.", "A kitten rests on a rug.", "Stock markets fell sharply today."]
made = litellm.embedding(model=f"openai/{MODEL}", input=texts, api_base=EMBED_URL, api_key="none")
cat, kitten, markets = (one["embedding"] for one in made.data)
assert close(cat, kitten) > close(cat, markets)
tried("embedding")
try:
    litellm.completion(**CHAT | {"model": f"openai/{MODEL}", "messages": [{"role": "user", "content": "word " * 9000}]})
except litellm.ContextWindowExceededError:
    tried("a prompt that is too long is known as one")
else:
    raise AssertionError("a prompt that is too long was answered")
