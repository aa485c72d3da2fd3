"""One moe engine alone: its schedule and its limits, and what ends an answer."""

from __future__ import annotations

import subprocess
import sys
import time
from typing import Any

import pytest

from paceline.engines.base import EngineError, EngineSettings
from paceline.engines.moe import EOS, MoeEngine
from tests.engines.moe_runs import make_engine, request, run_alone, text_of
from tests.pace import stretched


def answer(tokens: int = 16, **params: Any) -> str:
    """What a new engine answers to the one prompt of most tests here."""
    engine = make_engine()
    engine.add(request(0, tokens=tokens, **params))
    return text_of(run_alone(engine), 0)


def test_answer_is_readable_text_of_its_full_length() -> None:
    text = answer(tokens=40)
    assert len(text) == 40
    assert text.isascii()
    assert text.isprintable()
    assert text == answer(tokens=40)


def test_prompts_are_computed_in_chunks_within_the_budget() -> None:
    engine = make_engine(max_num_seqs=4, max_num_batched_tokens=8)
    engine.add(request(1, [97] * 20, tokens=2))
    results = [engine.step() for _ in range(4)]
    assert [result.prefilled_tokens for result in results] == [8, 8, 4, 0]
    assert [result.decoded_tokens for result in results] == [0, 0, 1, 1]
    assert not engine.has_work()


def test_prompts_are_computed_within_the_quota_and_decoding_goes_on() -> None:
    engine = make_engine(max_num_seqs=4, max_num_batched_tokens=8)
    engine.add(request(1, [97] * 2, tokens=6))
    engine.step()
    engine.add(request(2, [97] * 9, tokens=1))
    found = []
    for quota in (0, 3, 0, 100, None):
        engine.limit_prefill(quota)
        result = engine.step()
        found.append((result.prefilled_tokens, result.decoded_tokens))
    assert found == [(0, 1), (3, 1), (0, 1), (6, 2), (0, 1)]
    engine.add(request(3, [97] * 9, tokens=1))
    engine.limit_prefill(0)
    assert engine.step().outputs == []
    assert engine.load().prefill_tokens == engine.load().startable_tokens == 9


def test_more_requests_than_slots_wait_and_all_finish() -> None:
    engine = make_engine(max_num_seqs=2)
    for key in range(7):
        engine.add(request(key))
    assert (engine.load().waiting, engine.load().prefill_tokens) == (7, 7 * 6)
    engine.step()
    assert (engine.load().waiting, engine.load().running, engine.load().slots) == (5, 2, 2)
    assert engine.load().kv_used == 12
    outputs = run_alone(engine)
    assert {output.key for output in outputs if output.finish_reason == "length"} == set(range(7))
    assert engine.load().kv_used == 0


def test_request_waits_for_kv_memory() -> None:
    engine = make_engine(max_num_seqs=4, kv_cache_tokens=20)
    engine.add(request(1, tokens=8))
    engine.add(request(2, tokens=8))
    engine.step()
    assert (engine.load().running, engine.load().waiting, engine.load().kv_total) == (1, 1, 20)
    outputs = run_alone(engine)
    assert [output.key for output in outputs if output.finish_reason] == [1, 2]


def test_abort_frees_at_once() -> None:
    engine = make_engine(kv_cache_tokens=20)
    for key in (1, 2, 3):
        engine.add(request(key, tokens=8))
    engine.step()
    engine.abort(1)
    assert (engine.load().running, engine.load().waiting, engine.load().kv_used) == (0, 2, 0)
    engine.abort(3)
    engine.abort(77)
    assert {output.key for output in run_alone(engine)} == {2}
    assert not engine._kv
    engine.add(request(4, []))
    engine.abort(4)
    assert not engine.has_work()


@pytest.mark.parametrize(
    ("prompt", "params", "error"),
    [
        ([], {}, "empty"),
        ([97] * 64, {}, "64 tokens"),
        ([258], {}, "token 258"),
        ([-1], {}, "token -1"),
        ([97], {"logit_bias": {300: 1.0}}, "token 300"),
    ],
)
def test_request_that_can_never_be_served(prompt: list[int], params: dict[str, Any], error: str) -> None:
    engine = make_engine(max_model_len=64)
    engine.add(request(1, prompt, **params))
    assert engine.has_work()
    (output,) = run_alone(engine)
    assert (output.key, output.token_ids, output.finish_reason) == (1, [], "error")
    assert error in (output.error or "")


def test_request_larger_than_all_kv_memory() -> None:
    # The limit for one request is then the memory's size, so the answer is cut to what fits.
    engine = make_engine(kv_cache_tokens=20)
    engine.add(request(1, tokens=1000))
    outputs = run_alone(engine)
    assert (len(outputs), outputs[-1].finish_reason) == (14, "length")


def test_answer_ends_at_a_stop_string() -> None:
    text = answer()
    stop = text[5:8]
    engine = make_engine()
    engine.add(request(0, tokens=16, stop=[stop]))
    outputs = run_alone(engine)
    assert text_of(outputs, 0) == text[: text.index(stop)]
    assert (outputs[-1].finish_reason, outputs[-1].stop_reason) == ("stop", stop)
    assert answer(stop=[stop], include_stop_str_in_output=True) == text[: text.index(stop) + 3]


def test_answer_ends_at_a_stop_token() -> None:
    text = answer()
    stop = ord(text[4])
    engine = make_engine()
    engine.add(request(0, tokens=16, stop_token_ids=[stop]))
    outputs = run_alone(engine)
    assert text_of(outputs, 0) == text[: text.index(text[4])]
    assert (outputs[-1].finish_reason, outputs[-1].stop_reason) == ("stop", stop)


def test_end_of_text_ends_unless_it_is_ignored() -> None:
    engine = make_engine()
    wanted = {EOS: 100.0}
    engine.add(request(0, logit_bias=wanted, ignore_eos=False))
    engine.add(request(1, logit_bias=wanted, ignore_eos=True))
    engine.add(request(2, logit_bias=wanted, ignore_eos=True, skip_special_tokens=False, tokens=2))
    outputs = run_alone(engine)
    ends = {output.key: output.finish_reason for output in outputs if output.finish_reason}
    assert ends == {0: "stop", 1: "length", 2: "length"}
    assert [text_of(outputs, key) for key in range(3)] == ["", "", "<eos><eos>"]


def test_text_waits_for_whole_characters() -> None:
    engine = make_engine()
    # Only the first byte of a two-byte character may be chosen: every one is a broken character.
    engine.add(request(0, tokens=3, logit_bias={0xC3: 100.0}))
    outputs = run_alone(engine)
    assert [output.text for output in outputs] == ["", "\ufffd", "\ufffd\ufffd"]


def test_requests_without_a_seed_follow_the_seed_of_the_rank() -> None:
    texts = []
    for seed in (5, 5, 6):
        engine = make_engine(seed=seed)
        engine.add(request(0, tokens=30, temperature=1.0))
        texts.append(text_of(run_alone(engine), 0))
    assert texts[0] == texts[1] != texts[2]


def test_step_lasts_as_long_as_it_is_told() -> None:
    engine = make_engine(options={"step_ms": "20"})
    engine.add(request(0, tokens=2))
    begin = time.monotonic()
    run_alone(engine)
    assert time.monotonic() - begin >= 0.04


def test_lockstep_engine_checks_its_settings_before_anything_starts() -> None:
    assert MoeEngine.lockstep
    with pytest.raises(EngineError, match="--engine-option layer: unknown"):
        MoeEngine.check(EngineSettings(options={"layer": "3"}), lambda what, share: None)
    with pytest.raises(EngineError, match="--max-model-len"):
        MoeEngine.check(EngineSettings(max_model_len=0), lambda what, share: None)


@pytest.mark.slow
def test_frontend_does_without_numpy() -> None:
    program = (
        "import sys; from paceline.engines.base import EngineSettings; from paceline.engines.moe import MoeEngine; "
        "MoeEngine.tokenizer(EngineSettings()).encode('a'); sys.exit('numpy' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=stretched(60))
