"""The llama engine on the real model: the same text in any company, nobody lost, nothing left in memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from paceline.engines.base import EngineError, EngineRequest, EngineSettings
from paceline.engines.llama import LlamaEngine
from paceline.engines.llama_text import LlamaTokenizer
from tests.engines.llama_runs import Answer, Makes, advance, answer_all, answer_one, finish, greedy

pytestmark = pytest.mark.slow

TIE = 1e-3
"""Two log-probabilities that differ by less may change places by float error alone."""
OPENINGS = [
    "The history of the Roman Empire begins",
    "def fibonacci(n):\n    ",
    "Once upon a time, in a village far away,",
    "The capital of France is",
    "日本の首都は",
    "To make a good bread you need",
    "In quantum mechanics, the wave function",
    "My favourite film is",
]


@pytest.fixture(scope="session")
def prompts(tokenizer: LlamaTokenizer) -> dict[int, list[int]]:
    """Sixteen prompts of 5 to 80 tokens."""
    texts = {key: " ".join(OPENINGS[: key // 3]) + OPENINGS[key % 8] for key in range(16)}
    return {key: tokenizer.encode(text) for key, text in texts.items()}


@pytest.fixture(scope="session")
def alone(engine: LlamaEngine, prompts: dict[int, list[int]]) -> dict[int, Answer]:
    """What each prompt gets when nobody else is there."""
    return {key: answer_one(engine, prompt, greedy(8)) for key, prompt in prompts.items()}


def assert_same(engine: LlamaEngine, prompt: list[int], alone: Answer, together: Answer) -> None:
    """The same text; where it parts, the two best tokens must have been equal within float error."""
    if together.tokens == alone.tokens:
        assert together.text == alone.text
        return
    pairs = zip(alone.tokens, together.tokens, strict=True)
    place = next(place for place, (one, other) in enumerate(pairs) if one != other)
    position = answer_one(engine, prompt, greedy(place + 1, logprobs=2)).logprobs[place]
    assert position.top[0].logprob - position.top[1].logprob < TIE, f"the text parts at token {place}"


def test_sixteen_together_get_the_text_that_each_gets_alone(
    engine: LlamaEngine, prompts: dict[int, list[int]], alone: dict[int, Answer]
) -> None:
    together = answer_all(engine, prompts, greedy(8))
    assert together.keys() == prompts.keys()
    for key, prompt in prompts.items():
        assert_same(engine, prompt, alone[key], together[key])


def test_small_chunks_of_prompts_give_the_same_text(
    makes: Makes, engine: LlamaEngine, prompts: dict[int, list[int]], alone: dict[int, Answer]
) -> None:
    chunked = answer_all(makes.engine(max_num_batched_tokens=32), prompts, greedy(8))
    for key, prompt in prompts.items():
        assert_same(engine, prompt, alone[key], chunked[key])


def test_one_shared_pool_gives_whole_answers(
    makes: Makes, prompts: dict[int, list[int]], alone: dict[int, Answer]
) -> None:
    """There the order of cells differs and with it the last bits, so only the first token is held to be equal."""
    shared = answer_all(makes.engine(kv_cache_tokens=1024), prompts, greedy(8))
    assert all(len(answer.tokens) == 8 for answer in shared.values())
    same = sum(shared[key].tokens[0] == alone[key].tokens[0] for key in prompts)
    assert same >= 14


def test_a_step_stays_within_its_token_budget_and_counts_what_it_computed(
    makes: Makes, prompts: dict[int, list[int]]
) -> None:
    engine = makes.engine(max_num_batched_tokens=32)
    prompts = {key: prompts[key] for key in range(6, 12)}
    for key, prompt in prompts.items():
        engine.add(EngineRequest(key, prompt, greedy(3)))
    total = sum(len(prompt) for prompt in prompts.values())
    assert engine.load().prefill_tokens == total
    prefilled = decoded = 0
    while engine.has_work():
        before = engine.load()
        result = engine.step()
        rows = sum(len(output.token_ids) for output in result.outputs)
        assert result.decoded_tokens == rows
        assert 0 < result.prefilled_tokens + rows <= 32 + len(prompts)
        assert result.prefilled_tokens <= 32
        assert engine.load().prefill_tokens == before.prefill_tokens - result.prefilled_tokens
        prefilled += result.prefilled_tokens
        decoded += result.decoded_tokens
    assert (prefilled, decoded) == (total, 3 * len(prompts))


def test_more_requests_than_slots_all_finish(makes: Makes, prompts: dict[int, list[int]]) -> None:
    engine = makes.engine(max_num_seqs=3)
    for key in range(10):
        engine.add(EngineRequest(key, prompts[key % 4], greedy(4)))
    answers: dict[int, Answer] = {}
    advance(engine, answers)
    load = engine.load()
    assert (load.waiting, load.running, load.slots) == (7, 3, 3)
    finish(engine, answers)
    assert [len(answers[key].tokens) for key in range(10)] == [4] * 10
    assert {answer.reason for answer in answers.values()} == {"length"}
    for key in range(4, 8):
        assert answers[key].tokens == answers[key - 4].tokens


def test_a_large_request_gets_its_turn_in_scarce_memory(makes: Makes, prompts: dict[int, list[int]]) -> None:
    engine = makes.engine(max_num_seqs=4, max_model_len=128, kv_cache_tokens=128)
    started: list[int] = []
    answers: dict[int, Answer] = {}
    for key in range(3):
        engine.add(EngineRequest(key, prompts[key][:5], greedy(8)))
    engine.add(EngineRequest(100, [*prompts[15], *prompts[14]][:110], greedy(8)))
    small = iter(range(200, 300))
    while 100 not in started:
        # Small ones keep coming, and must not pass the large one for ever.
        engine.add(EngineRequest(next(small), prompts[0][:5], greedy(8)))
        advance(engine, answers)
        started += [key for key in answers if key not in started]
        load = engine.load()
        assert load.kv_used <= load.kv_total == 128
    assert started == [0, 1, 2, 100]
    last = next(small)
    finish(engine, answers)
    assert sorted(answers) == [0, 1, 2, 100, *range(200, last)]
    assert {answer.reason for answer in answers.values()} == {"length"}


def test_the_more_urgent_goes_first(makes: Makes, prompts: dict[int, list[int]]) -> None:
    engine = makes.engine(max_num_seqs=1)
    for key, priority in enumerate([0, 5, -1, 5]):
        engine.add(EngineRequest(key, prompts[0], greedy(1), priority))
    order = []
    while engine.has_work():
        order += [output.key for output in engine.step().outputs]
    assert order == [2, 0, 1, 3]


def test_abort_frees_memory_at_once(makes: Makes, prompts: dict[int, list[int]]) -> None:
    engine = makes.engine(max_num_seqs=2)
    for key in range(4):
        engine.add(EngineRequest(key, prompts[key], greedy(8)))
    answers: dict[int, Answer] = {}
    advance(engine, answers)
    used = engine.load().kv_used
    assert used == len(prompts[0]) + len(prompts[1])
    engine.abort(0)
    engine.abort(3)
    engine.abort(99)
    load = engine.load()
    assert (load.waiting, load.running, load.kv_used) == (1, 1, len(prompts[1]))
    finish(engine, answers)
    assert len(answers[0].tokens) == 1
    assert 3 not in answers
    assert len(answers[1].tokens) == len(answers[2].tokens) == 8


@pytest.fixture
def overrated(makes: Makes) -> LlamaEngine:
    """Room for 256 cells where the schedule believes in 1024: what our own reckoning never lets happen."""
    engine = makes.engine(max_num_seqs=4, max_num_batched_tokens=128, max_model_len=256, kv_cache_tokens=256)
    believing = makes.engine(max_num_seqs=4, max_num_batched_tokens=128, max_model_len=512, kv_cache_tokens=1024)
    engine._schedule, engine._plan = believing._schedule, believing._plan
    engine._schedule._memory = engine
    return engine


def test_when_llama_cpp_finds_no_room_the_last_one_is_computed_anew(
    engine: LlamaEngine, overrated: LlamaEngine, tokenizer: LlamaTokenizer
) -> None:
    # Counting is what the model is sure of, so the text does not hang on the last bits.
    prompt = tokenizer.encode(" ".join(map(str, range(1, 35))))
    assert 80 < len(prompt) < 120
    alone = answer_one(engine, prompt, greedy(15))
    answers: dict[int, Answer] = {}
    for key in range(3):
        # Who asks for its prompt's log-probabilities has it computed, whatever there is of others.
        overrated.add(EngineRequest(key, prompt, greedy(15, prompt_logprobs=0)))
    prefilled = 0
    while overrated.has_work():
        before = overrated.load().prefill_tokens
        advance(overrated, answers)
        prefilled += max(0, before - overrated.load().prefill_tokens)
    assert {answer.text for answer in answers.values()} == {alone.text}
    assert {(len(answer.tokens), answer.reason) for answer in answers.values()} == {(15, "length")}
    assert prefilled > 3 * len(prompt), "somebody must have been computed anew, or this tests nothing"
    assert overrated.load().kv_used == 0


def test_one_for_which_llama_cpp_never_finds_room_ends_with_an_error(
    overrated: LlamaEngine, prompts: dict[int, list[int]]
) -> None:
    answers = answer_all(overrated, {1: (prompts[15] * 20)[:300], 2: prompts[0]}, greedy(3))
    assert answers[1].reason == "error"
    assert "no KV memory" in str(answers[1].error)
    assert answers[2].reason == "length"


@pytest.mark.parametrize(
    ("length", "error"), [(0, "the prompt is empty"), (512, "the prompt has 512 tokens"), (5000, "512 fit")]
)
def test_what_can_never_fit_ends_with_an_error_and_disturbs_nobody(
    engine: LlamaEngine, prompts: dict[int, list[int]], alone: dict[int, Answer], length: int, error: str
) -> None:
    engine.add(EngineRequest(1, [5] * length, greedy(5)))
    engine.add(EngineRequest(3, prompts[3], greedy(8)))
    assert engine.has_work()
    answers = finish(engine)
    assert answers[1].reason == "error"
    assert error in str(answers[1].error)
    assert answers[3].tokens == alone[3].tokens


def test_a_token_outside_the_vocabulary_is_an_error_for_its_request_alone(
    engine: LlamaEngine, prompts: dict[int, list[int]]
) -> None:
    engine.add(EngineRequest(1, [5, 10**6], greedy(5)))
    engine.add(EngineRequest(2, prompts[0], greedy(5, logit_bias={10**6: 1.0})))
    engine.add(EngineRequest(3, prompts[0], greedy(1)))
    answers = finish(engine)
    assert [answers[key].reason for key in (1, 2, 3)] == ["error", "error", "length"]
    assert answers[1].error == "token 1000000 is not in the vocabulary of 262144 tokens"


def test_max_model_len_ends_an_answer(makes: Makes, prompts: dict[int, list[int]]) -> None:
    engine = makes.engine(max_num_seqs=1, max_model_len=12)
    prompt = prompts[0][:8]
    answer = answer_one(engine, prompt, greedy(100))
    assert (len(answer.tokens), answer.reason) == (4, "length")


def test_the_end_of_generation_stops_and_ignore_eos_goes_on(engine: LlamaEngine, prompts: dict[int, list[int]]) -> None:
    eos = {1: 100.0}
    stopped = answer_one(engine, prompts[0], greedy(5, ignore_eos=False, logit_bias=eos))
    assert (stopped.tokens, stopped.text, stopped.reason, stopped.stop) == ([1], "", "stop", None)
    on = answer_one(engine, prompts[0], greedy(5, logit_bias=eos))
    assert (on.tokens, on.text, on.reason) == ([1] * 5, "", "length")
    shown = answer_one(engine, prompts[0], greedy(2, logit_bias=eos, skip_special_tokens=False))
    assert shown.text == "<eos><eos>"


def test_a_stop_string_that_spans_tokens_is_cut(engine: LlamaEngine, prompts: dict[int, list[int]]) -> None:
    whole = answer_one(engine, prompts[2], greedy(12))
    # From the middle of one token into the middle of the next.
    middle = len(whole.text) // 2
    stop = whole.text[middle - 4 : middle + 4]
    cut = answer_one(engine, prompts[2], greedy(12, stop=["no such text", stop]))
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert (cut.reason, cut.stop) == ("stop", stop)
    assert len(cut.tokens) < 12
    kept = answer_one(engine, prompts[2], greedy(12, stop=[stop], include_stop_str_in_output=True))
    assert kept.text == cut.text + stop


def test_a_stop_token_ends_an_answer(engine: LlamaEngine, prompts: dict[int, list[int]]) -> None:
    whole = answer_one(engine, prompts[2], greedy(6))
    stop = whole.tokens[3]
    cut = answer_one(engine, prompts[2], greedy(6, stop_token_ids=[stop]))
    place = whole.tokens.index(stop)
    assert (cut.tokens, cut.reason, cut.stop) == (whole.tokens[: place + 1], "stop", stop)
    assert whole.text.startswith(cut.text)
    kept = answer_one(engine, prompts[2], greedy(6, stop_token_ids=[stop], include_stop_str_in_output=True))
    assert len(kept.text) > len(cut.text)


def test_a_character_of_several_tokens_comes_whole(
    engine: LlamaEngine, tokenizer: LlamaTokenizer, prompts: dict[int, list[int]]
) -> None:
    character = "\U00010025"
    parts = tokenizer.encode(character, add_special=False)
    assert len(parts) == 4, "a character without a token of its own is expected to be four bytes"
    # Each token is the likeliest until it was used: so they come one after the other.
    bias = {token: 200.0 - 10 * place for place, token in enumerate(parts)}
    params = greedy(5, logit_bias=bias, presence_penalty=100.0, logprobs=0)
    engine.add(EngineRequest(1, prompts[0], params))
    outputs = [engine.step().outputs[0] for _ in range(4)]
    assert [output.token_ids for output in outputs] == [[token] for token in parts]
    assert [output.text for output in outputs] == ["", "", "", character]
    pieces = [position.chosen.piece for output in outputs for position in output.logprobs or []]
    assert b"".join(pieces) == character.encode()
    engine.abort(1)
    cut = answer_one(engine, prompts[0], greedy(2, logit_bias=bias, presence_penalty=100.0))
    assert (cut.text, cut.reason) == ("\ufffd", "length")


def test_what_cannot_be_set_is_refused_in_one_line(model_file: Path, tmp_path: Path) -> None:
    def refused(**settings: object) -> str:
        with pytest.raises(EngineError) as caught:
            LlamaEngine.check(EngineSettings(**settings), lambda what, share: None)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "--max-model-len 99999: this model takes 1 to 8192" in refused(max_model_len=99999)
    assert "--kv-cache-tokens 100" in refused(kv_cache_tokens=100, max_model_len=200)
    assert "--max-num-batched-tokens 8" in refused(max_num_batched_tokens=8)
    assert "--max-num-seqs 1000" in refused(max_num_seqs=1000)
    assert "--engine-option color: unknown" in refused(options={"color": "red"})
    assert "'yes' is neither 0 nor 1" in refused(options={"repack": "yes"})
    assert "'-1' is no number of tokens" in refused(options={"kept_tokens": "-1"})
    assert "there is no such model file" in refused(model=str(tmp_path / "absent.gguf"))
    cut = tmp_path / "cut.gguf"
    with model_file.open("rb") as whole:
        cut.write_bytes(whole.read(50 << 20))
    assert "cut short" in refused(model=str(cut))


def test_a_file_that_llama_cpp_refuses_is_one_line(model_file: Path, tmp_path: Path) -> None:
    data = bytearray(model_file.read_bytes())
    place = data.index(b"gemma3", data.index(b"general.architecture"))
    data[place : place + 6] = b"nomodl"
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(data)
    with pytest.raises(EngineError, match=r"broken.gguf: llama.cpp cannot load this model"):
        LlamaEngine.create(EngineSettings(model=str(broken)), lambda what, share: None)


def test_create_reports_its_progress_and_is_silent(capfd: pytest.CaptureFixture[str]) -> None:
    seen: list[tuple[str, float]] = []
    engine = LlamaEngine.create(
        EngineSettings(max_model_len=64, max_num_seqs=2), lambda what, share: seen.append((what, share))
    )
    assert seen[-1] == ("loading model", 1.0)
    answer = answer_one(engine, [2, 4521], greedy(2))
    assert len(answer.tokens) == 2
    engine.close()
    assert capfd.readouterr() == ("", "")


def test_the_numbers_themselves_do_not_depend_on_the_company(
    makes: Makes, engine: LlamaEngine, prompts: dict[int, list[int]]
) -> None:
    """Stricter than equal text. With F16 values in place of BF16 ones, this fails."""
    params, long = greedy(2, logprobs=3), (prompts[15] * 4)[:150]
    alone = answer_one(engine, long, params)
    together = answer_all(makes.engine(max_num_batched_tokens=32), {3: prompts[3], 9: prompts[9], 15: long}, params)
    for one, other in zip(alone.logprobs, together[15].logprobs, strict=True):
        assert [best.token_id for best in one.top] == [best.token_id for best in other.top]
        assert [best.logprob for best in one.top] == pytest.approx([best.logprob for best in other.top], abs=TIE)
