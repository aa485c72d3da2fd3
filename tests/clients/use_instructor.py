"""Instructor: a type by each mode that vLLM's users take, and partial ones as they come."""

from __future__ import annotations

import instructor
import openai
from trying import MODEL, URL, Person, tried

client = openai.OpenAI(base_url=URL, api_key="none", max_retries=0)
MESSAGES = [{"role": "user", "content": "Who are you?"}]
for mode in (instructor.Mode.TOOLS, instructor.Mode.TOOLS_STRICT, instructor.Mode.JSON, instructor.Mode.JSON_SCHEMA):
    made = instructor.from_openai(client, mode=mode)
    asked = {"model": MODEL, "messages": MESSAGES, "temperature": 0, "max_tokens": 150, "max_retries": 0}
    if mode is instructor.Mode.JSON:
        # This mode asks for any object: the type's own schema goes along, since the model is too weak to follow words.
        asked["extra_body"] = {"response_format": {"type": "json_schema", "json_schema": {
            "name": "Person", "schema": Person.model_json_schema()}}}  # fmt: skip
    assert isinstance(made.chat.completions.create(response_model=Person, **asked), Person)
    tried(f"{mode.value}")
partial = instructor.from_openai(client, mode=instructor.Mode.JSON_SCHEMA).chat.completions.create_partial(
    response_model=Person, model=MODEL, messages=MESSAGES, temperature=0, max_tokens=150
)
*_, last = partial
assert last.mood in ("good", "bad")
tried("create_partial")
