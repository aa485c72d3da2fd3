"""Every answer cut at every place and gone on with: `python tests/vllm/cut_answers.py MODEL`, in vLLM's environment.

One engine in this process makes each answer whole, and then from each number of its tokens on, as a rank does that
takes over another's request. What comes must be the rest: tokens, text, reason, log-probabilities. Prints a line for
each kind and exits with 1 where one differs.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from msgspec.structs import replace

from paceline.core.requests import SamplingParams, StructuredOutput
from paceline.engines.base import EngineRequest, EngineSettings
from paceline.engines.vllm import VllmEngine

TOKENS = 24
EVERY = 3
PROMPT = [70, 300, 17, 400, 33, 5, 90, 210, 310, 44]
SCHEMA = {
    "type": "object", "properties": {"a": {"type": "integer"}, "b": {"enum": ["red", "green"]}}, "required": ["a", "b"],
    "additionalProperties": False,
}  # fmt: skip
LONG = PROMPT * 12
"""More than a step computes: a sample made before its end is thrown away, with its random number."""


class Answer:
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.text = ""
        self.shown: list[int] = [0]
        """How much text was shown after so many tokens."""
        self.end: tuple[str | None, Any] = (None, None)
        self.logprobs: list[tuple[int, int]] = []


def answer(engine: VllmEngine, key: int, prompt: list[int], params: SamplingParams, made: list[int]) -> Answer:
    said = Answer()
    engine.add(EngineRequest(key, prompt, params, 0, made))
    while engine.has_work():
        for output in engine.step().outputs:
            if output.key != key:
                continue
            assert output.finish_reason != "error", output.error
            said.tokens += output.token_ids
            said.text += output.text
            said.shown += [len(said.text)] * len(output.token_ids)
            said.end = (output.finish_reason, output.stop_reason) if output.finish_reason else said.end
            for position in output.logprobs or ():
                said.logprobs.append((position.chosen.token_id, round(10 * position.chosen.logprob)))
    return said


def kinds(engine: VllmEngine) -> dict[str, tuple[list[int], SamplingParams]]:
    greedy = SamplingParams(TOKENS, temperature=0.0, ignore_eos=True)
    seeded = replace(greedy, temperature=0.9, seed=7)
    plain = answer(engine, 0, PROMPT, greedy, [])
    whole, first = plain.text, plain.tokens
    schema = StructuredOutput("json", json.dumps(SCHEMA))
    choice = StructuredOutput("choice", '["perhaps not","perhaps so"]')
    return {
        "greedy": (PROMPT, greedy),
        "seeded": (PROMPT, seeded),
        "seeded, top_k and top_p": (PROMPT, replace(seeded, top_k=20, top_p=0.9, min_p=0.01)),
        "seeded, a prompt of several steps": (LONG, seeded),
        "penalties": (PROMPT, replace(greedy, frequency_penalty=0.7, presence_penalty=0.4, repetition_penalty=1.3)),
        "seeded, penalties": (PROMPT, replace(seeded, frequency_penalty=0.7, repetition_penalty=1.3)),
        "logprobs": (PROMPT, replace(greedy, logprobs=3)),
        "bias": (PROMPT, replace(greedy, logit_bias={65: 4.0, 66: 4.0})),
        # Of several tokens, so that cuts go through it.
        "a stop string": (PROMPT, replace(greedy, stop=[whole[20:32]])),
        "a stop string that is shown": (PROMPT, replace(greedy, stop=[whole[20:32]], include_stop_str_in_output=True)),
        "a stop string that never comes": (PROMPT, replace(greedy, stop=["\x00" * 9])),
        "min_tokens": (PROMPT, replace(greedy, ignore_eos=False, min_tokens=9, logit_bias={0: 50.0})),
        "bad words": (PROMPT, replace(greedy, bad_words=[[first[5]], first[8:10]])),
        "allowed tokens": (PROMPT, replace(greedy, allowed_token_ids=list(range(70, 130)))),
        "a schema": (
            PROMPT,
            replace(seeded, ignore_eos=False, structured_outputs=schema),
        ),
        "a regular expression": (
            PROMPT,
            replace(seeded, ignore_eos=False, structured_outputs=StructuredOutput("regex", "(ab|cde){3,9}!")),
        ),
        "a choice": (
            PROMPT,
            replace(greedy, ignore_eos=False, structured_outputs=choice),
        ),
        "a stop token": (PROMPT, replace(greedy, stop_token_ids=[first[18]])),
    }


def differences(engine: VllmEngine) -> int:
    key, wrong = 100, 0
    for name, (prompt, params) in kinds(engine).items():
        whole = answer(engine, key, prompt, params, [])
        bad = []
        for cut in range(1, len(whole.tokens), EVERY):
            key += 1
            rest = answer(engine, key, prompt, params, whole.tokens[:cut])
            expected = (whole.tokens[cut:], whole.text[whole.shown[cut] :], whole.end, whole.logprobs[cut:])
            if (rest.tokens, rest.text, rest.end, rest.logprobs) != expected:
                bad.append(cut)
        print(f"{name}: {len(whole.tokens)} tokens, {whole.end}, differs at {bad}", flush=True)
        wrong += len(bad)
        key += 1
    return wrong


def main(model: str) -> int:
    flags = ("--enforce-eager", "--dtype=float32", "--max-model-len=256", "--max-num-batched-tokens=48",
             "--max-num-seqs=4", "--no-enable-prefix-caching")  # fmt: skip
    asked = EngineSettings(model=model, arguments=flags)
    settings = VllmEngine.prepare(asked, lambda what, share: None)
    engine = VllmEngine.create(settings, lambda what, share: None)
    wrong = differences(engine)
    engine.close()
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
