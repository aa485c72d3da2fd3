"""Answers of a given form on the real model: they have it, with the chances that are left, also where a rank dies."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import pytest

from paceline.core.requests import SamplingParams, StructuredOutput
from paceline.engines.base import EngineRequest
from paceline.engines.grammars import check_form
from paceline.engines.llama import LlamaEngine
from paceline.engines.llama_text import LlamaTokenizer
from tests.engines.llama_runs import Answer, answer_one, finish

DRAWS = 150
PERSON = json.dumps({
    "type": "object", "required": ["name", "age"], "additionalProperties": False,
    "properties": {
        "name": {"type": "string", "maxLength": 20}, "age": {"type": "integer", "minimum": 0, "maximum": 130},
    },
})  # fmt: skip
FORMS = {
    "json": StructuredOutput("json", PERSON),
    "regex": StructuredOutput("regex", r"[0-9]{3}-[0-9]{2}"),
    "choice": StructuredOutput("choice", json.dumps(['so "so"', "ü\n", "a b"])),
    "lark": StructuredOutput("grammar", 'start: ("yes" | "no") " " /[a-z]{4}/'),
    "gbnf": StructuredOutput("grammar", 'root ::= ("yes" | "no") " " [a-z] [a-z]'),
}
WRONG = {
    "json": ('{"type": "objec"}', "objec"),
    "regex": ("a(b", "regex"),
    "choice": ("no JSON", "Expecting"),
    "grammar": ("start: nothing", "nothing"),
}


def of_form(form: StructuredOutput, **changes: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 200, "structured_outputs": form, "seed": 5, **changes})


def fits(name: str, text: str) -> bool:
    match name:
        case "json":
            said = json.loads(text)
            return set(said) == {"name", "age"} and isinstance(said["age"], int)
        case "choice":
            return text in json.loads(FORMS["choice"].text)
        case "regex":
            return re.fullmatch(r"[0-9]{3}-[0-9]{2}", text) is not None
        case "lark":
            return re.fullmatch("(yes|no) [a-z]{4}", text) is not None
    return re.fullmatch("(yes|no) [a-z]{2}", text) is not None


@pytest.fixture(scope="session")
def prompt(tokenizer: LlamaTokenizer) -> list[int]:
    return tokenizer.encode("Somebody whom I know well:")


@pytest.mark.parametrize("name", FORMS)
def test_a_form_is_checked_without_a_vocabulary(name: str) -> None:
    check_form(FORMS[name])


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_form_is_told_what_is_wrong(kind: Any) -> None:
    text, said = WRONG[kind]
    with pytest.raises(ValueError, match=said):
        check_form(StructuredOutput(kind, text))


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("name", FORMS)
def test_the_answer_has_the_form_and_ends_with_it(
    engine: LlamaEngine, prompt: list[int], name: str, temperature: float
) -> None:
    answer = answer_one(engine, prompt, of_form(FORMS[name], temperature=temperature))
    assert answer.reason == "stop"
    assert fits(name, answer.text), answer.text


@pytest.mark.slow
def test_a_form_comes_before_all_that_forbids_it(engine: LlamaEngine, prompt: list[int]) -> None:
    wishes = {"ignore_eos": True, "min_tokens": 50, "allowed_token_ids": [300], "repetition_penalty": 1.2}
    answer = answer_one(engine, prompt, of_form(FORMS["regex"], **wishes))
    assert fits("regex", answer.text)


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_form_goes_along_to_another_rank(engine: LlamaEngine, prompt: list[int], temperature: float) -> None:
    params = of_form(FORMS["json"], temperature=temperature, max_tokens=40)
    whole = answer_one(engine, prompt, params)
    half = whole.tokens[: len(whole.tokens) // 2]
    engine.add(EngineRequest(2, prompt, params, made_token_ids=half))
    rest: Answer = finish(engine)[2]
    assert half + rest.tokens == whole.tokens


@pytest.mark.slow
def test_a_form_that_is_none_ends_its_request_alone(engine: LlamaEngine, prompt: list[int]) -> None:
    engine.add(EngineRequest(1, prompt, of_form(StructuredOutput("regex", "a(b"))))
    engine.add(EngineRequest(2, prompt, of_form(FORMS["regex"])))
    answers = finish(engine)
    assert answers[1].reason == "error"
    assert "regex" in str(answers[1].error)
    assert fits("regex", answers[2].text)


@pytest.mark.slow
def test_what_is_left_has_the_chances_of_masking(engine: LlamaEngine, tokenizer: LlamaTokenizer) -> None:
    """Of two letters, which are one token each, each comes as often as the model finds it likelier than the other."""
    prompt = tokenizer.encode("Grades from A to F. Ann: A. Bob: C. Carl: B. Dora: A. Eric:\n")
    free = answer_one(engine, prompt, SamplingParams(max_tokens=1, logprobs=64, temperature=0.0)).logprobs[0]
    first, second = [one for one in free.top if len(one.piece) == 1 and one.piece.isalnum()][:2]
    choice = StructuredOutput("choice", json.dumps([first.piece.decode(), second.piece.decode()]))
    share = 1 / (1 + math.exp(second.logprob - first.logprob))
    found = [answer_one(engine, prompt, of_form(choice, seed=seed, max_tokens=1)).text for seed in range(DRAWS)]
    times = found.count(first.piece.decode())
    assert abs(times - DRAWS * share) < 4 * math.sqrt(DRAWS * share * (1 - share))
