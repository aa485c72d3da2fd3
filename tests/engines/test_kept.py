"""What has been computed once is not computed again, and no text changes by that: on the real models."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given, settings, strategies as st

from paceline.core.blocks import block_hashes
from paceline.engines.base import EngineRequest
from paceline.engines.gguf import read_header
from paceline.engines.kept import KeptSchedule, common
from paceline.engines.llama import LlamaEngine
from paceline.engines.llama_text import Vocabulary, load_model
from paceline.engines.models import NAMES, named_model
from paceline.engines.scheduler import TextSequence
from paceline.engines.timed import NoMemory
from tests.engines.llama_runs import Answer, Makes, advance, answer_all, greedy
from tests.pace import examples

SYSTEM = "You are a careful clerk of a small library. You know every book by its place. " * 6
TURNS = ["Where do the atlases stand?", "And the poems?", "Who wrote the first of them?", "Thank you.", "One more?"]
ASKED = greedy(6)
EVERY = greedy(6, prompt_logprobs=0)
"""Who asks for its prompt's log-probabilities has all of it computed."""


@pytest.fixture(scope="module", params=NAMES)
def made(request: pytest.FixtureRequest) -> Iterator[Makes]:
    """With a sliding window (Gemma 3) and without."""
    path = named_model(request.param, lambda what, share: None)
    model = load_model(path, lambda what, share: None, repack=False)
    yield Makes(model, read_header(path))
    model.close()


class Serving:
    """An engine, what it says, and how many tokens of prompts it computes."""

    def __init__(self, engine: LlamaEngine) -> None:
        self.engine = engine
        self.vocabulary = Vocabulary(engine._model)
        self.computed = self.cached = 0

    def tokens(self, text: str) -> list[int]:
        return self.vocabulary.encode(text, add_special=False, parse_special=False)

    def all(self, *prompts: list[int]) -> dict[int, Answer]:
        """At once, from 1 on."""
        for key, prompt in enumerate(prompts, 1):
            self.engine.add(EngineRequest(key, prompt, ASKED))
        answers: dict[int, Answer] = {}
        self.computed = self.cached = 0
        while self.engine.has_work():
            made = self.engine.step()
            self.computed += made.prefilled_tokens
            for output in made.outputs:
                answer = answers.setdefault(output.key, Answer())
                answer.tokens += output.token_ids
                self.cached += output.cached_tokens
        assert all(len(answer.tokens) == ASKED.max_tokens for answer in answers.values())
        return answers

    def one(self, prompt: list[int]) -> list[int]:
        return self.all(prompt)[1].tokens

    def anew(self, *prompts: list[int]) -> list[list[int]]:
        """The same, all of it computed."""
        answers = answer_all(self.engine, dict(enumerate(prompts)), EVERY)
        return [answers[place].tokens for place in range(len(prompts))]


@pytest.mark.slow
@pytest.mark.parametrize("pool", [None, 700])
def test_a_chat_goes_on_from_where_it_was(made: Makes, pool: int | None) -> None:
    serving = Serving(made.engine(max_num_seqs=4, kv_cache_tokens=pool))
    chat = serving.tokens(SYSTEM)
    turns: list[tuple[list[int], list[int]]] = []
    for turn, text in enumerate(TURNS):
        chat += serving.tokens(text)
        answer = serving.one(chat)
        turns.append((list(chat), answer))
        assert serving.cached + serving.computed == len(chat)
        if turn:
            assert serving.computed <= len(serving.tokens(text)) + 2, "but for what is new"
        chat += answer
    assert serving.anew(*[prompt for prompt, _ in turns]) == [answer for _, answer in turns]


@pytest.mark.slow
def test_what_many_share_is_computed_once(made: Makes) -> None:
    serving = Serving(made.engine(max_num_seqs=4))
    shared = serving.tokens(SYSTEM)
    prompts = [shared + serving.tokens(text) for text in TURNS[:4]]
    serving.one(prompts[0])
    answers = serving.all(*prompts)
    window = serving.computed > len(shared)
    assert serving.cached >= (len(shared) if window else 4 * len(shared))
    assert serving.anew(*prompts) == [answers[key].tokens for key in range(1, 5)]


@pytest.mark.slow
def test_a_prompt_that_parts_from_the_one_before_is_right(made: Makes) -> None:
    serving = Serving(made.engine(max_num_seqs=2))
    long = serving.tokens(SYSTEM)
    prompts = [long, long[:-20] + serving.tokens("but of another one"), long[:40], long + serving.tokens("indeed")]
    said = [serving.one(prompt) for prompt in prompts]
    assert said == [tokens for prompt in prompts for tokens in serving.anew(prompt)]


@pytest.mark.slow
def test_what_is_kept_makes_room_for_what_runs(made: Makes) -> None:
    serving = Serving(made.engine(max_num_seqs=4, max_model_len=200, kv_cache_tokens=420))
    texts = ["apples and ", "pears and ", "plums and ", "figs and ", "nuts and "]
    prompts = [serving.tokens(text * 60)[:150] for text in texts]
    said = [serving.one(prompt) for prompt in prompts]
    together = serving.all(*prompts)
    assert [together[key].tokens for key in range(1, 6)] == said
    load = serving.engine.load()
    assert (load.kv_used, load.kv_reserved) == (0, 0)


@pytest.mark.slow
def test_one_that_was_aborted_has_left_what_it_computed(made: Makes) -> None:
    serving = Serving(made.engine(max_num_seqs=2, max_num_batched_tokens=32))
    prompt = serving.tokens(SYSTEM)
    serving.engine.add(EngineRequest(7, prompt, ASKED))
    answers: dict[int, Answer] = {}
    for _ in range(2):
        advance(serving.engine, answers)
    serving.engine.abort(7)
    said = serving.one(prompt)
    assert 0 < serving.cached < len(prompt)
    assert serving.anew(prompt) == [said]


@pytest.mark.slow
def test_more_chats_than_slots_go_on_from_where_they_were(made: Makes) -> None:
    serving = Serving(made.engine(max_num_seqs=2))
    chats = [serving.tokens(f"{word} " * 90)[:90] for word in ("apples", "pears", "plums", "figs")]
    turns: list[tuple[list[int], list[int]]] = []
    for turn in range(2):
        for chat in chats:
            prompt = list(chat)
            answer = serving.one(prompt)
            turns.append((prompt, answer))
            assert not turn or serving.computed <= 12, "but for what is new"
            chat += answer + serving.tokens("And then?")
    assert serving.anew(*[prompt for prompt, _ in turns]) == [answer for _, answer in turns]


def test_what_others_share_stays_where_one_goes_on_from_it() -> None:
    schedule = KeptSchedule(1, 1000, 512, NoMemory(), pooled=False, aside=1000)
    chat, other = list(range(200)), [*range(100), *range(500, 600)]
    assert [run(schedule, prompt) for prompt in (chat, other, [*chat, 7], [*other, 8])] == [0, 100, 200, 200]


@pytest.mark.parametrize(("pooled", "aside"), [(False, 350), (True, 1000)])
def test_what_is_laid_aside_is_bounded_and_the_least_lately_used_goes_first(pooled: bool, aside: int) -> None:
    schedule = KeptSchedule(1, 400, 512, NoMemory(), pooled=pooled, aside=aside)
    chats = [list(range(begin, begin + 100)) for begin in (0, 1000, 2000, 3000)]
    assert [run(schedule, chat) for chat in chats] == [0, 0, 0, 0]
    # The last has the slot, and beside it there is room for two or three.
    assert run(schedule, [*chats[1], 9]) == 100
    assert run(schedule, list(range(5000, 5100))) == 0
    assert [run(schedule, [*chat, 8]) for chat in (chats[1], chats[3])] == [100, 100]
    assert run(schedule, chats[0]) == 0


def run(schedule: KeptSchedule, prompt: list[int]) -> int:
    """Serve it to its end; returns how many tokens were there."""
    sequence = TextSequence(EngineRequest(1, prompt, greedy(1)), 1)
    schedule.queue(sequence)
    schedule.done(schedule.chunks())
    schedule.remove(1)
    return sequence.cached


@given(st.lists(st.integers(0, 2)), st.lists(st.integers(0, 2)))
def test_how_much_two_begin_with(one: list[int], other: list[int]) -> None:
    count = common(one, other)
    assert one[:count] == other[:count]
    assert one[: count + 1] != other[: count + 1] or count == min(len(one), len(other))


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 4), st.booleans()), max_size=40), st.booleans())
@settings(max_examples=examples(100))
def test_the_blocks_that_are_said_are_those_that_are_there(asked: list[tuple[int, int, bool]], pooled: bool) -> None:
    schedule = KeptSchedule(2, 2000, 300, NoMemory(), pooled=pooled, aside=700)
    said: set[int] = set()
    for key, (chat, length, ends) in enumerate(asked):
        prompt = [*range(200), *([chat] * (130 * length))]
        schedule.queue(TextSequence(EngineRequest(key, prompt, greedy(2)), 2))
        for _ in range(1 + 3 * ends):
            schedule.done(schedule.chunks())
        for one in list(schedule.running) if ends else []:
            schedule.remove(one.key)
        change = schedule.kv_events()
        if change is not None:
            assert not said & set(change.stored)
            assert set(change.removed) <= said
            said = (said | set(change.stored)) - set(change.removed)
        there = [one.tokens[: one.computed] for one in schedule.running]
        there += [one.tokens for one in (*schedule._kept.values(), *schedule._aside.values())]
        assert said == {name for tokens in there for name in block_hashes(tokens)}
    schedule.preempt_all()
    schedule.forget_all()
    change = schedule.kv_events()
    assert said == set(change.removed if change is not None else ())
