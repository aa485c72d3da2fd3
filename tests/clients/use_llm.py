"""Simon Willison's `llm` with models of its `extra-openai-models.yaml`, on the command line and from Python."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from trying import MODEL, URL, Person, tried

folder = Path(tempfile.mkdtemp())
os.environ["LLM_USER_PATH"] = str(folder)
(folder / "extra-openai-models.yaml").write_text(
    f"- model_id: here\n  model_name: {MODEL}\n  api_base: {URL}\n  supports_schema: true\n  supports_tools: true\n"
    f"- model_id: here-completions\n  model_name: {MODEL}\n  api_base: {URL}\n  completion: true\n"
)
command = [str(Path(sys.executable).with_name("llm")), "-m", "here"]


def run(*arguments: str) -> str:
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


assert run("Name a colour.", "-s", "Be short.", "-o", "max_tokens", "20").strip()
tried("llm: a prompt, streamed")
assert run("Name a colour.", "--no-stream", "-o", "max_tokens", "20").strip()
tried("llm --no-stream")
assert run("Another.", "-c", "-o", "max_tokens", "20").strip()
tried("llm -c, on with the conversation")
assert run("Who are you?", "--schema", "name str, age int", "--no-stream", "-o", "max_tokens", "100").strip()[0] == "{"
tried("llm --schema")

import llm  # noqa: E402

model = llm.get_model("here")
person = model.prompt("Who are you?", schema=Person, stream=False, max_tokens=100)
assert Person.model_validate_json(person.text())
tried("a schema from Python")


def get_weather(city: str) -> str:
    """The weather in a city now."""
    return f"21 degrees in {city}"


assert model.prompt("The weather in Paris?", tools=[get_weather], stream=False, max_tokens=30).text() is not None
tried("tools are told")
assert llm.get_model("here-completions").prompt("The capital of France is", max_tokens=8).text()
tried("completions")
