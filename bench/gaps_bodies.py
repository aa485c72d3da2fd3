"""The bodies that `gaps.py` sends, and the engine that it sends them to.

Each kind is what somebody could send by mistake or on purpose: much of one thing, up to `--max-body-bytes`, or as much
of it as fits. What a field may hold and what of it is refused is told elsewhere; here it only must freeze nobody.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from paceline.engines.base import EngineSettings
from paceline.engines.llama import LlamaEngine
from paceline.engines.llama_text import LlamaTokenizer
from paceline.engines.timed import TimedEngine

FULL = 16 * 1024 * 1024 - 4096
"""Bytes of the largest bodies."""

Body = tuple[str, bytes, bytes]
"""Path, further head, body."""


class Engine(TimedEngine):
    """A model's tokenizer and template, and all that its engine says it can; steps that only take time. So the ranks
    leave the cores to the front-end that is measured.
    """

    supports = LlamaEngine.supports - {"embeddings"}

    @classmethod
    def tokenizer(cls, settings: EngineSettings) -> LlamaTokenizer:  # type: ignore[override]
        return LlamaEngine.tokenizer(settings)


def repeated(before: str, part: str, after: str, size: int = FULL, between: str = ",") -> bytes:
    """A body of about this size that has the part as often as it may."""
    times = max(1, (size - len(before) - len(after)) // len((part + between).encode()))
    return (before + between.join([part] * times) + after).encode()


def numbered(before: str, part: str, after: str, count: int) -> bytes:
    """The same with a number of its own in each part, where that has a %d."""
    return (before + ",".join([part % number for number in range(count)]) + after).encode()


def deep(before: str, levels: int, after: str, way: tuple[str, str] = ("[", "]")) -> bytes:
    return (before + way[0] * levels + way[1] * levels + after).encode()


TEXT = "The quick brown fox jumps over the lazy dog, and some more. "
ARGUMENTS = json.dumps({f"k{n}": [n, "some text", {"a": None}] for n in range(100)})
DEEP_ARGUMENTS = '{"a":' * 400 + "1" + "}" * 400
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {f"p{n}": {"type": "array", "items": {"type": "string"}} for n in range(20)},
}
TOOL = json.dumps({"type": "function", "function": {"name": "f", "description": TEXT, "parameters": SCHEMA}})
OBJECTS = '{"a":[1,2,{"b":null}],"c":"d"}'


def completions() -> dict[str, Callable[[], bytes]]:
    end, few = '","max_tokens":2}', ',"max_tokens":2}'
    return {
        "prompt: text": lambda: repeated('{"prompt":"', TEXT, end, between=""),
        "prompt: text of 5 MB": lambda: repeated('{"prompt":"', TEXT, end, 5_000_000, ""),
        "prompt: text that nearly fits": lambda: repeated('{"prompt":"', TEXT, end, 200_000, ""),
        "prompt: text that fits": lambda: repeated('{"prompt":"', TEXT, end, 100_000, ""),
        "prompt: one letter": lambda: repeated('{"prompt":"', "a", end, between=""),
        "prompt: escapes": lambda: repeated('{"prompt":"', "\\u00e9\\n", end, between=""),
        "prompt: emoji": lambda: repeated('{"prompt":"', "🙂", end, between=""),
        "prompt: markers that fit": lambda: repeated('{"prompt":"', "<end_of_turn>", end, 250_000, ""),
        "prompt: text, truncated": lambda: repeated('{"truncate_prompt_tokens":-1,"prompt":"', TEXT, end, between=""),
        "prompt: ids": lambda: repeated('{"prompt":[', "1", "]" + few),
        "prompt: ids that fit": lambda: repeated('{"prompt":[', "1234", "]" + few, 5 * 32_000),
        "prompt: ids, truncated": lambda: repeated('{"truncate_prompt_tokens":-1,"prompt":[', "1", "]" + few),
        "prompt: ids with a text": lambda: repeated('{"prompt":["a",', "1", "]" + few),
        "prompt: floats": lambda: repeated('{"prompt":[', "2.0", "]" + few),
        "prompt: lists": lambda: repeated('{"prompt":[', "[1]", "]" + few),
        "prompt: 4096 lists": lambda: repeated(
            '{"prompt":[', "[" + ",".join("1" * 2000) + "]", "]" + few, 4096 * 4002
        ),
        "prompt: 400 lists of 20,000": lambda: repeated(
            '{"prompt":[', "[" + ",".join("1" * 20_000) + "]", "]" + few
        ),
        "prompt: texts": lambda: repeated('{"prompt":[', '"a"', "]" + few),
        "prompt: 4096 texts": lambda: repeated('{"prompt":[', json.dumps(TEXT * 65), "]" + few),
        "prompt: texts of all lengths": lambda: repeated('{"prompt":[', json.dumps(TEXT * 1600), "]" + few),
        "prompt: empty texts": lambda: repeated('{"prompt":[', '""', "]" + few),
        "prompt: deep": lambda: deep('{"prompt":', FULL // 2 - 100, few),
        "prompt: 500 deep": lambda: deep('{"prompt":', 500, few),
        "prompt: objects": lambda: repeated('{"prompt":[', OBJECTS, "]" + few),
        "echo, n = 128": lambda: repeated('{"echo":true,"n":128,"prompt":"', TEXT, end, 100_000, ""),
        "return_token_ids, n = 128": lambda: repeated(
            '{"return_token_ids":true,"n":128,"prompt":[', "1234", "]" + few, 5 * 32_000
        ),
        "n = 1024 of what fits": lambda: repeated('{"n":1024,"prompt":"', TEXT, end, 100_000, ""),
    }  # fmt: skip


def sampling() -> dict[str, Callable[[], bytes]]:
    """Fields that all requests for text have, here of completions."""
    ask = '{"prompt":"a","max_tokens":2,'
    texts = json.dumps(TEXT * 60)
    return {
        "logit_bias": lambda: numbered(ask + '"logit_bias":{', '"%d":1', "}}", 1_000_000),
        "logit_bias, 16,384": lambda: numbered(ask + '"logit_bias":{', '"%d":1', "}}", 16_384),
        "logit_bias, 16,384, n = 256": lambda: numbered(ask + '"n":256,"logit_bias":{', '"%d":1', "}}", 16_384),
        "stop": lambda: repeated(ask + '"stop":[', '"a"', "]}"),
        "stop of 16": lambda: repeated(ask + '"stop":[', texts, "]}", 16 * len(texts)),
        "stop_token_ids": lambda: repeated(ask + '"stop_token_ids":[', "1", "]}"),
        "stop_token_ids below 1 MiB": lambda: repeated(ask + '"stop_token_ids":[', "1", "]}", 1_000_000),
        "allowed_token_ids below 1 MiB": lambda: repeated(ask + '"allowed_token_ids":[', "1", "]}", 1_000_000),
        "allowed_token_ids, n = 256": lambda: repeated(ask + '"n":256,"allowed_token_ids":[', "1", "]}", 250_000),
        "bad_words": lambda: repeated(ask + '"bad_words":[', '"a"', "]}"),
        "bad_words of 1024": lambda: repeated(ask + '"bad_words":[', json.dumps(TEXT * 15), "]}", 1024 * 900),
        "metadata": lambda: repeated(ask + '"metadata":{"a":[', OBJECTS, "]}}"),
        "metadata below 1 MiB": lambda: repeated(ask + '"metadata":{"a":[', OBJECTS, "]}}", 1_000_000),
        "unknown field": lambda: repeated(ask + '"other":[', OBJECTS, "]}"),
        "unknown fields": lambda: numbered(ask, '"other%d":1', "}", 900_000),
        "one field again and again": lambda: repeated(ask, '"n":1', "}"),
        "user": lambda: repeated(ask + '"user":"', TEXT, '"}', between=""),
        "prompt_cache_key": lambda: repeated(ask + '"prompt_cache_key":"', TEXT, '"}', 1_000_000, ""),
        "model": lambda: repeated(ask + '"model":"', TEXT, '"}', between=""),
        "digits": lambda: repeated(ask + '"seed":', "9", "}", between=""),
        "digits below 1 MiB": lambda: repeated(ask + '"seed":', "9", "}", 1_000_000, ""),
        "blanks": lambda: repeated(ask, " ", '"n":1}', between=""),
        "no JSON": lambda: b"[" + repeated("", OBJECTS, ""),
        "no UTF-8": lambda: repeated(ask + '"user":"', TEXT, "", between="") + b'\xff"}',
        "objects": lambda: deep("", FULL // 12, "", ('{"aaaaa":[', "]}")),
    }


def forms() -> dict[str, Callable[[], bytes]]:
    ask = '{"prompt":"a","max_tokens":2,'
    schema = json.dumps(SCHEMA)
    below = 60_000
    return {
        "structured_outputs.json": lambda: repeated(ask + '"structured_outputs":{"json":{"anyOf":[', schema, "]}}}"),
        "structured_outputs.json, 1 MB": lambda: repeated(
            ask + '"structured_outputs":{"json":{"anyOf":[', schema, "]}}}", 1_000_000
        ),
        "structured_outputs.json, 60 KB": lambda: repeated(
            ask + '"structured_outputs":{"json":{"anyOf":[', schema, "]}}}", below
        ),
        "json of 10,000 names": lambda: numbered(
            ask + '"guided_json":{"type":"object","properties":{', '"p%d":{}', "}}}", 5_000
        ),
        "json of 10,000 required": lambda: numbered(
            ask + '"guided_json":{"type":"object","required":[', '"p%d"', "]}}", 7_000
        ),
        "json as enum": lambda: numbered(ask + '"guided_json":{"enum":[', '"%d"', "]}}", 7_000),
        "json with lengths": lambda: (
            ask + '"guided_json":{"type":"array","minItems":90000,"items":{"type":"string","minLength":90000}}}'
        ).encode(),
        "json with patterns": lambda: numbered(
            ask + '"guided_json":{"anyOf":[', '{"type":"string","pattern":"^(a|b%d){1,50}$"}', "]}}", 900
        ),
        "json, 300 deep": lambda: (ask + '"guided_json":' + '{"items":' * 300 + "{}" + "}" * 301).encode(),
        "regex": lambda: repeated(ask + '"guided_regex":"', "(a|b)*c", '"}', between=""),
        "regex, 60 KB": lambda: repeated(ask + '"guided_regex":"', "(a|b)*c", '"}', below, ""),
        "regex, repeats": lambda: (ask + '"guided_regex":"((a{1,300}b){1,300}c){1,300}"}').encode(),
        "regex, alternatives": lambda: numbered(ask + '"guided_regex":"(', "a.*%d|", 'x)"}', 6_000),
        "choice": lambda: repeated(ask + '"guided_choice":[', json.dumps(TEXT * 60), "]}"),
        "choice, 4096": lambda: numbered(ask + '"guided_choice":[', '"some %d"', "]}", 4096),
        "grammar": lambda: repeated(ask + '"guided_grammar":"start: ', "a ", '\\na: /b+/"}', between=""),
        "grammar, 60 KB": lambda: repeated(ask + '"guided_grammar":"start: ', "a ", '\\na: /b+/"}', below, ""),
        "grammar of rules": lambda: (
            ask + '"guided_grammar":"start: r0\\n'
            + "".join(f'r{n}: \\"a\\" | r{n + 1} r{n + 1}\\n' for n in range(1900)) + 'r1900: \\"a\\"\\n"}'
        ).encode(),
    }  # fmt: skip


def chats() -> dict[str, Callable[[], bytes]]:
    begin, end = '{"max_tokens":2,"messages":[', "]}"
    said = '{"role":"user","content":"a"}'
    return {
        "messages": lambda: repeated(begin, said, end),
        "messages that fit": lambda: repeated(begin, said, end, 4000 * 30),
        "messages, two roles": lambda: repeated(begin, said + ',{"role":"assistant","content":"b"}', end, 198_000),
        "message: text": lambda: repeated(begin + '{"role":"user","content":"', TEXT, '"}' + end, between=""),
        "message: text that fits": lambda: repeated(
            begin + '{"role":"user","content":"', TEXT, '"}' + end, 100_000, ""
        ),
        "message: markers": lambda: repeated(
            begin + '{"role":"user","content":"', "<|im_end|><end_of_turn>", '"}' + end, 250_000, ""
        ),
        "message: blanks": lambda: repeated(begin + '{"role":"user","content":"', " ", '"}' + end, 120_000, ""),
        "message: parts": lambda: repeated(
            begin + '{"role":"user","content":[', '{"type":"text","text":"a"}', "]}" + end
        ),
        "message: 100,000 parts": lambda: repeated(
            begin + '{"role":"user","content":[', '{"type":"text","text":"a"}', "]}" + end, 2_700_000
        ),
        "message: parts without text": lambda: repeated(
            begin + '{"role":"user","content":[', '{"type":"text","text":""}', "]}" + end
        ),
        "message: parts that are none": lambda: repeated(begin + '{"role":"user","content":[', "{}", "]}" + end),
        "message: role": lambda: repeated(begin + '{"content":"a","role":"', TEXT, '"}' + end, between=""),
        "message: name": lambda: repeated(
            begin + '{"role":"user","content":"a","name":"', TEXT, '"}' + end, between=""
        ),
        "message: other fields": lambda: repeated(
            begin + '{"role":"user","content":"a","other":[', OBJECTS, "]}" + end
        ),
        "message: reasoning": lambda: repeated(
            begin + '{"role":"assistant","content":"a","reasoning_content":"', TEXT, '"}' + end, between=""
        ),
    }  # fmt: skip


def calls() -> dict[str, Callable[[], bytes]]:
    """Calls, tools, documents and forms of chats."""
    begin = '{"max_tokens":2,"messages":['
    user = begin + '{"role":"user","content":"a"}'
    called = user + ',{"role":"assistant","tool_calls":['
    call = '{"function":{"name":"f","arguments":%s}}'
    more = '{"role":"user","content":"a"}],"max_tokens":2'
    return {
        "calls: arguments as text": lambda: (
            called + call % json.dumps('{"a":[' + ",".join([ARGUMENTS] * 1000) + "]}") + "]}]}"
        ).encode(),
        "calls: arguments as text, 4 MB of blanks": lambda: (
            called + call % json.dumps("{" + " " * 4_000_000 + "}") + "]}]}"
        ).encode(),
        "calls: arguments that fit": lambda: (
            called + call % json.dumps('{"a":[' + ",".join([ARGUMENTS] * 10) + "]}") + "]}]}"
        ).encode(),
        "calls: arguments as object": lambda: repeated(
            called + '{"function":{"name":"f","arguments":{"a":[', ARGUMENTS, "]}}}]}]}"
        ),
        "calls: deep arguments": lambda: (called + call % json.dumps(DEEP_ARGUMENTS) + "]}]}").encode(),
        "calls": lambda: repeated(called, call % '"{}"', "]}]}"),
        "calls that fit": lambda: repeated(called, call % '"{}"', "]}]}", 100_000),
        "tools": lambda: repeated('{"tools":[', TOOL, '],"messages":[' + more + "}", 1000 * len(TOOL)),
        "tools that fit": lambda: repeated('{"tools":[', TOOL, '],"messages":[' + more + "}", 100_000),
        "tools, none": lambda: repeated(
            '{"tool_choice":"none","tools":[', TOOL, '],"messages":[' + more + "}", 1000 * len(TOOL)
        ),
        "tools: a huge schema": lambda: repeated(
            '{"tools":[{"function":{"name":"f","parameters":{"anyOf":[', json.dumps(SCHEMA),
            ']}}}],"messages":[' + more + "}",
        ),
        "tools, required": lambda: repeated(
            '{"tool_choice":"required","tools":[', TOOL, '],"messages":[' + more + "}", 60_000
        ),
        "tools, required, 1 MB": lambda: repeated(
            '{"tool_choice":"required","tools":[', TOOL, '],"messages":[' + more + "}", 1_000_000
        ),
        "documents": lambda: repeated('{"documents":[', OBJECTS, '],"messages":[' + more + "}"),
        "chat_template_kwargs": lambda: repeated(
            '{"chat_template_kwargs":{"a":[', OBJECTS, ']},"messages":[' + more + "}"
        ),
        "chat_template": lambda: repeated(
            '{"chat_template":"', "{% if 1 %}a{% endif %}", '","messages":[' + more + "}", between=""
        ),
        "response_format": lambda: repeated(
            '{"response_format":{"type":"json_schema","json_schema":{"schema":{"anyOf":[', json.dumps(SCHEMA),
            ']}}},"messages":[' + more + "}",
        ),
        "response_format, 60 KB": lambda: repeated(
            '{"response_format":{"type":"json_schema","json_schema":{"schema":{"anyOf":[', json.dumps(SCHEMA),
            ']}}},"messages":[' + more + "}", 60_000,
        ),
        "unknown field": lambda: repeated(user + '],"other":[', OBJECTS, "]}"),
    }  # fmt: skip


def tokenizing() -> dict[str, dict[str, Callable[[], bytes]]]:
    said = '{"role":"user","content":"a"}'
    part = '{"type":"text","text":"a"}'
    tokenize: dict[str, Callable[[], bytes]] = {
        "prompt": lambda: repeated('{"prompt":"', TEXT, '"}', between=""),
        "prompt of 5 MB": lambda: repeated('{"prompt":"', TEXT, '"}', 5_000_000, ""),
        "prompt of 200 KB": lambda: repeated('{"prompt":"', TEXT, '"}', 200_000, ""),
        "prompt of emoji, 200 KB": lambda: repeated('{"prompt":"', "🙂", '"}', 200_000, ""),
        "one letter, 5 MB": lambda: repeated('{"prompt":"', "a", '"}', 5_000_000, ""),
        "strings, 5 MB": lambda: repeated('{"return_token_strs":true,"prompt":"', TEXT, '"}', 5_000_000, ""),
        "messages": lambda: repeated('{"messages":[', said, "]}"),
        "parts": lambda: repeated('{"messages":[{"role":"user","content":[', part, "]}]}"),
        "tools": lambda: repeated('{"tools":[', TOOL, '],"messages":[' + said + "]}"),
        "other": lambda: repeated('{"prompt":"a","other":[', OBJECTS, "]}"),
    }
    detokenize: dict[str, Callable[[], bytes]] = {
        "tokens": lambda: repeated('{"tokens":[', "1", "]}"),
        "tokens, 250 KB": lambda: repeated('{"tokens":[', "1234", "]}", 250_000),
        "tokens that are none": lambda: repeated('{"tokens":[', "99999999", "]}"),
        "texts": lambda: repeated('{"tokens":[', '"a"', "]}"),
    }
    return {"/tokenize": tokenize, "/detokenize": detokenize}


def embeddings() -> dict[str, Callable[[], bytes]]:
    return {
        "input: text": lambda: repeated('{"input":"', TEXT, '"}', between=""),
        "input: texts": lambda: repeated('{"input":[', '"a"', "]}"),
        "input: ids": lambda: repeated('{"input":[', "1", "]}"),
        "input: lists": lambda: repeated('{"input":[', "[1]", "]}"),
        "input: 4000 lists": lambda: repeated('{"input":[', "[" + ",".join("1" * 2000) + "]", "]}"),
        "input: mixed": lambda: repeated('{"input":[', '"a",1', "]}"),
        "input: deep": lambda: deep('{"input":', FULL // 2 - 100, "}"),
        "user": lambda: repeated('{"input":"a","user":"', TEXT, '"}', between=""),
        "messages": lambda: repeated('{"input":"a","messages":[', OBJECTS, "]}"),
    }


def responses() -> dict[str, Callable[[], bytes]]:
    begin, end = '{"max_output_tokens":2,"input":', "}"
    said, user = '{"role":"user","content":"a"}', begin + '"a",'
    call = '{"type":"function_call","call_id":"a","name":"f","arguments":%s}'
    tool = json.dumps({"type": "function", "name": "f", "description": TEXT, "parameters": SCHEMA})
    return {
        "input: text": lambda: repeated(begin + '"', TEXT, '"' + end, between=""),
        "input: text that fits": lambda: repeated(begin + '"', TEXT, '"' + end, 100_000, ""),
        "input: items": lambda: repeated(begin + "[", said, "]" + end),
        "input: items that fit": lambda: repeated(begin + "[", said, "]" + end, 100_000),
        "input: parts": lambda: repeated(
            begin + '[{"role":"user","content":[', '{"type":"input_text","text":"a"}', "]}]" + end
        ),
        "input: references": lambda: repeated(begin + "[", '{"type":"item_reference","id":"msg_1"}', "]" + end),
        "input: a call": lambda: (
            begin + "[" + said + "," + call % json.dumps('{"a":[' + ",".join([ARGUMENTS] * 1000) + "]}") + "]" + end
        ).encode(),
        "input: reasoning": lambda: repeated(
            begin + "[" + said + ',{"type":"reasoning","summary":[', OBJECTS, "]}]" + end
        ),
        "input: reasoning, 1 MB": lambda: repeated(
            begin + "[" + said + ',{"type":"reasoning","summary":[', OBJECTS, "]}]" + end, 1_000_000
        ),
        "instructions": lambda: repeated(user + '"instructions":"', TEXT, '"' + end, between=""),
        "instructions that fit": lambda: repeated(user + '"instructions":"', TEXT, '"' + end, 100_000, ""),
        "metadata": lambda: repeated(user + '"metadata":{"a":[', OBJECTS, "]}" + end),
        "metadata below 1 MiB": lambda: repeated(user + '"metadata":{"a":[', OBJECTS, "]}" + end, 1_000_000),
        "tools": lambda: repeated(user + '"tools":[', tool, "]" + end),
        "tools, none": lambda: repeated(user + '"tool_choice":"none","tools":[', tool, "]" + end, 900 * len(tool)),
        "tools, none, streamed": lambda: repeated(
            user + '"stream":true,"tool_choice":"none","tools":[', tool, "]" + end, 900 * len(tool)
        ),
        "tools: a huge schema, none": lambda: repeated(
            user + '"tool_choice":"none","tools":[{"type":"function","name":"f","parameters":{"anyOf":[',
            json.dumps(SCHEMA), "]}}]" + end,
        ),
        "text": lambda: repeated(
            user + '"text":{"format":{"type":"json_schema","name":"a","schema":{"anyOf":[', json.dumps(SCHEMA),
            "]}}}" + end,
        ),
        "include": lambda: repeated(user + '"include":[', '"a"', "]" + end),
        "other": lambda: repeated(user + '"other":[', OBJECTS, "]" + end),
    }  # fmt: skip


def messages() -> dict[str, Callable[[], bytes]]:
    begin, end = '{"max_tokens":2,"messages":[', "]}"
    said = '{"role":"user","content":"a"}'
    tool = json.dumps({"name": "f", "description": TEXT, "input_schema": SCHEMA})
    use = '{"role":"assistant","content":[{"type":"tool_use","id":"a","name":"f","input":{"a":['
    result = '{"role":"user","content":[{"type":"tool_result","tool_use_id":"a","content":['
    text = '{"type":"text","text":"a"}'
    return {
        "messages": lambda: repeated(begin, said, end),
        "text": lambda: repeated(begin + '{"role":"user","content":"', TEXT, '"}' + end, between=""),
        "text that fits": lambda: repeated(begin + '{"role":"user","content":"', TEXT, '"}' + end, 100_000, ""),
        "blocks": lambda: repeated(begin + '{"role":"user","content":[', text, "]}" + end),
        "blocks, 1 MB": lambda: repeated(begin + '{"role":"user","content":[', text, "]}" + end, 1_000_000),
        "tool_use": lambda: repeated(begin + said + "," + use, ARGUMENTS, "]}}]}" + end),
        "tool_use, 5 MB": lambda: repeated(begin + said + "," + use, ARGUMENTS, "]}}]}" + end, 5_000_000),
        "tool_use, 250 KB": lambda: repeated(begin + said + "," + use, ARGUMENTS, "]}}]}" + end, 250_000),
        "tool_result": lambda: repeated(begin + said + "," + result, text, "]}]}" + end),
        "system": lambda: repeated('{"system":[', text, '],"max_tokens":2,"messages":[' + said + end),
        "tools": lambda: repeated('{"tools":[', tool, '],"max_tokens":2,"messages":[' + said + end),
        "tools, none": lambda: repeated(
            '{"tool_choice":{"type":"none"},"tools":[', tool, '],"max_tokens":2,"messages":[' + said + end,
            900 * len(tool),
        ),
        "metadata": lambda: repeated('{"metadata":{"a":[', OBJECTS, ']},"max_tokens":2,"messages":[' + said + end),
        "stop_sequences": lambda: repeated('{"stop_sequences":[', '"a"', '],"max_tokens":2,"messages":[' + said + end),
        "other": lambda: repeated('{"other":[', OBJECTS, '],"max_tokens":2,"messages":[' + said + end),
    }  # fmt: skip


def heads() -> dict[str, Body]:
    """What is large or many around a body."""
    ask = b'{"prompt":"a","max_tokens":2}'
    pieces = b"".join(b"1\r\n%c\r\n" % byte for byte in ask.ljust(300_000)) + b"0\r\n\r\n"
    many = b"".join(b"X-Other-%d: a\r\n" % number for number in range(3000))
    path = "/v1/completions"
    return {
        "a header of 60 KB": (path, b"X-Other: " + b"a" * 60_000 + b"\r\n", ask),
        "a header of 1 MB": (path, b"X-Other: " + b"a" * 1_000_000 + b"\r\n", ask),
        "3000 headers": (path, many, ask),
        "a query of 60 KB": (path + "?" + "a=b&" * 15_000, b"", ask),
        "a session of 60 KB": (path, b"X-Session-Id: " + b"a" * 60_000 + b"\r\n", ask),
        "300,000 chunks of a byte": (path, b"Transfer-Encoding: chunked\r\n", pieces),
        "control: deep": ("/collective_rpc", b"", deep('{"method":"a","args":', 30_000, "}")),
        "control: many": ("/collective_rpc", b"", repeated('{"method":"a","args":[', "1", "]}", 65_000)),
        "control: 16 MB": ("/collective_rpc", b"", repeated('{"method":"a","args":[', "1", "]}")),
    }


def all_bodies(embed: bool) -> dict[str, Callable[[], Body]]:
    """Every kind by its name: of a deployment that generates, or of one that embeds."""
    paths: dict[str, dict[str, Callable[[], bytes]]] = {"/v1/embeddings": embeddings()} if embed else {
        "/v1/completions": completions() | sampling() | forms(), "/v1/chat/completions": chats() | calls(),
        "/v1/responses": responses(), "/v1/messages": messages(), "/v1/messages/count_tokens": messages(),
        "/v1/embeddings": {"input: texts": embeddings()["input: texts"]}, **tokenizing(),
    }  # fmt: skip
    found: dict[str, Callable[[], Body]] = {}
    for path, kinds in paths.items():
        for name, make in kinds.items():
            found[f"{path} {name}"] = lambda path=path, make=make: (path, b"", make())  # type: ignore[misc]
    for name, body in ({} if embed else heads()).items():
        found[f"HTTP {name}"] = lambda body=body: body  # type: ignore[misc]
    return found
