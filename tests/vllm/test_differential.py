"""vLLM's own coordinator against ours, told the same at random: where they agree, and where they differ on purpose.

What must agree: the wave of every wake, every wave and running state published, READY, and the last counts. Where ours
differs, the difference has a name here and in `docs/VLLM.md`; the random scripts leave it out, and a test of its own
shows it on both.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.vllm import environment
from tests.vllm.pairs import SETTLE_S, Neighbours, StockCoordinators, pair
from tests.vllm.serving import VERSION

pytestmark = pytest.mark.slow

EVENTS = 30
QUICK_S, SLOW_S, SLOWEST_S = 0.02, 0.2, 1.0
"""Between two events, so that both coordinators hear them in one order. A busy machine needs longer."""
DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "VLLM.md"
Word = tuple[str, tuple[Any, ...]]


@pytest.fixture(scope="module")
def stock() -> Iterator[StockCoordinators]:
    made = StockCoordinators()
    try:
        yield made
    finally:
        made.close()


def stats(waiting: int, running: int, wave: int, step: int) -> dict[str, Any]:
    return {"num_waiting_reqs": waiting, "num_running_reqs": running, "step_counter": step, "current_wave": wave,
            "kv_cache_usage": round(running / 64, 4)}  # fmt: skip


class Script:
    """What real ranks and front-ends could say, drawn at random; the named differences are left out. `notices`: whether
    front-ends give notice of requests, as they do up to 0.32.
    """

    def __init__(self, seed: int, *, notices: bool = True) -> None:
        self._notices = notices
        self._draw = random.Random(seed)
        self.size = self.least = self._draw.choice((2, 3, 5))
        self._wave = 0
        self._running = False
        self._step = 0
        self.words = [self._word() for _ in range(EVENTS)]

    def _word(self) -> Word:
        kinds = [*(["notice", "stale notice"] if self._notices else []), "quiet report", "late", "scale", "old end"]
        kinds += ["end", "report", "report", "report", "stale start", "start"] if self._running else ["start"] * 3
        draw, size = self._draw, self.size
        match draw.choice(kinds):
            case "notice":
                return "frontend_says", (draw.randrange(size).to_bytes(2, "little"), self._wave)
            case "stale notice":
                wave = draw.choice((max(0, self._wave - 1), 0, self._wave + 1))
                return "frontend_says", (draw.randrange(size).to_bytes(2, "little"), wave)
            case "scale":
                self.size = draw.randint(self.least, self.least + 2)
                return "frontend_says", ("SCALE_ELASTIC_EP", self.size)
            case "late":
                return draw.choice(("rank_subscribes", "frontend_subscribes")), ()
            case "start":
                if not self._running:
                    self._wave += draw.choice((0, 0, 0, 1))
                    self._running, self._step = True, 0
                # Who may be scaled away does not start: see "who-has-left".
                return "rank_says", (draw.randrange(self.least), None, None, self._wave)
            case "stale start":
                return "rank_says", (draw.randrange(size), None, None, max(0, self._wave - 1))
            case "end":
                said, self._running = self._wave + draw.choice((0, 0, 0, 1)), False
                self._wave = said + 1
                return "rank_says", (0, None, said)
            case "old end":
                return "rank_says", (0, None, max(0, self._wave - 1 - draw.randrange(2))) if self._wave else (0,)
            case "quiet report":
                step = self._step if self._running else 0
                return "rank_says", (draw.randrange(size), stats(0, 0, self._wave, step))
            case _:
                self._step += draw.randrange(3)
                counts = draw.randrange(4), draw.randrange(17)
                return "rank_says", (draw.randrange(size), stats(*counts, self._wave, self._step))


def tell(both: tuple[Neighbours, ...], words: list[Word], pause_s: float) -> None:
    for word, arguments in words:
        for neighbours in both:
            getattr(neighbours, word)(*arguments)
        listen(both, pause_s)
    listen(both, SETTLE_S + pause_s)


def listen(both: tuple[Neighbours, ...], seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for neighbours in both:
            neighbours.read()
        both[0].inputs[0].poll(2)


def outcome(neighbours: Neighbours) -> dict[str, Any]:
    return {
        "waves woken": neighbours.waves_woken(),
        "states": neighbours.states(),
        "counts": neighbours.counts(),
        "greetings": neighbours.greetings,
    }


def kept(said: dict[str, Any]) -> dict[str, Any]:
    """What must agree with this version's own coordinator. Older ones call the ranks running once a front-end has
    noticed a request, and say the counts of ranks that have been scaled away."""
    return said if VERSION == environment.DEFAULT_VERSION else {key: said[key] for key in ("waves woken", "greetings")}


def both_say(stock: StockCoordinators, script: Script, pause_s: float) -> list[dict[str, Any]]:
    with pair(stock, script.least) as both:
        listen(both, SETTLE_S)
        tell(both, script.words, pause_s)
        return [kept(outcome(neighbours)) for neighbours in both]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "seed" in metafunc.fixturenames:
        metafunc.parametrize("seed", range(100 if metafunc.config.getoption("--vllm-full") else 12))


def test_they_agree(stock: StockCoordinators, seed: int) -> None:
    agree(stock, Script(seed))


@pytest.fixture(scope="module")
def newest() -> Iterator[StockCoordinators]:
    """The newest version's, of which there is no build for CPUs: its coordinator is plain Python."""
    if VERSION != environment.DEFAULT_VERSION:
        pytest.skip("it runs in the environment of the default version")
    made = StockCoordinators(environment.sources_of_newest())
    try:
        yield made
    finally:
        made.close()


def test_they_agree_with_the_newest(newest: StockCoordinators, seed: int, request: pytest.FixtureRequest) -> None:
    """Its front-ends give no notice; its ranks say what they start."""
    if seed >= 2 and not request.config.getoption("--vllm-full"):
        pytest.skip("two of them do: --vllm-full")
    agree(newest, Script(seed, notices=False))


def test_what_the_newest_has_no_case_for() -> None:
    """Its front-ends give no notice any more, so none is lost, and none is one of many."""
    sources = environment.sources_of_newest()
    client = (sources / "v1" / "engine" / "core_client.py").read_text(encoding="utf-8")
    sent = re.findall(r"first_req_send_socket\.send\((.*?)\)", client)
    assert all("SCALE_ELASTIC_EP" in what or what == "scale_msg" for what in sent), sent
    assert "received unexpected message from front-end" in (sources / "v1" / "engine" / "coordinator.py").read_text()


def agree(stock: StockCoordinators, script: Script) -> None:
    for pause_s in (QUICK_S, SLOW_S, SLOWEST_S):
        theirs, ours = both_say(stock, script, pause_s)
        if theirs == ours:
            break
    assert ours == theirs, script.words


# Differences on purpose ---------------------------------------------------------------------------


def wakes_of(both: tuple[Neighbours, ...]) -> tuple[int, int]:
    return len(both[0].wakes), len(both[1].wakes)


def report_wakes(both: tuple[Neighbours, ...]) -> None:
    tell(both, [("rank_says", (1, stats(1, 0, 0, 0)))], SLOW_S)
    assert both[0].wakes == []
    assert both[1].waves_woken() == [0]
    assert both[1].states()[-1] == (0, True)


def stale_start(both: tuple[Neighbours, ...]) -> None:
    tell(both, [("rank_says", (0, None, 0)), ("rank_says", (1, None, None, 0))], SLOW_S)
    assert both[0].wakes == []
    assert both[1].waves_woken() == [1]


def repeated_wake(both: tuple[Neighbours, ...]) -> None:
    tell(both, [("frontend_says", (b"\0\0", 0))], SLOW_S)
    assert wakes_of(both)[0] == 1
    assert wakes_of(both)[1] >= 3
    assert both[1].waves_woken() == [0]


def one_wake(both: tuple[Neighbours, ...]) -> None:
    for neighbours in both:
        for _ in range(20):
            neighbours.frontend_says(b"\0\0", 0)
    listen(both, 2 * SETTLE_S)
    assert wakes_of(both)[0] == (20 if VERSION == environment.DEFAULT_VERSION else 1)
    assert wakes_of(both)[1] < 10


def counts_with_waves(both: tuple[Neighbours, ...]) -> None:
    listen(both, SETTLE_S)
    for neighbours in both:
        neighbours.views.clear()
    tell(both, [("rank_says", (0, None, None, 0))], 0.0)
    assert both[0].views[0] == (None, 0, True)
    counts, *state = both[1].views[0]
    assert (state, [set(rank) for rank in counts]) == ([0, True], [{0}, {0}])


def backward_step(both: tuple[Neighbours, ...]) -> None:
    words = [
        ("rank_says", (0, None, None, 1)),
        ("rank_says", (1, stats(0, 5, 1, 9))),
        ("rank_says", (1, stats(0, 7, 1, 8))),
    ]
    tell(both, words, SLOW_S)
    assert both[0].counts()[1][1] == 7
    assert both[1].counts()[1][1] == 5


def who_has_left(both: tuple[Neighbours, ...]) -> None:
    scaled = ("frontend_says", ("SCALE_ELASTIC_EP", 1))
    tell(both, [("rank_says", (1, None, None, 0)), scaled, ("frontend_subscribes", ())], SLOW_S)
    assert both[1].states()[-1] == (0, False)
    # The other one says so with its next publication only.
    tell(both, [("rank_says", (0, stats(0, 0, 0, 0)))], SLOW_S)
    assert both[0].states()[-1] == (0, True)


def bad_frames(both: tuple[Neighbours, ...]) -> None:
    for neighbours in both:
        neighbours.outputs[0].send(b"nonsense")
    listen(both, SETTLE_S)
    tell(both, [("rank_says", (0, None, None, 0))], SLOW_S)
    assert both[0].states() == [(0, False)], "it has ended"
    assert both[1].states()[-1] == (0, True)


DIFFERENCES: dict[str, Callable[[tuple[Neighbours, ...]], None]] = {
    "report-wakes": report_wakes,
    "stale-start-wakes": stale_start,
    "wake-repeated": repeated_wake,
    "one-wake-for-many-notices": one_wake,
    "counts-with-every-wave": counts_with_waves,
    "backward-step-dropped": backward_step,
    "who-has-left-runs-no-more": who_has_left,
    "garbage-counted": bad_frames,
}


GONE = ("report-wakes", "one-wake-for-many-notices", "wake-repeated")
"""What is shown by a front-end's notice, which the newest version's do not give."""


@pytest.mark.parametrize("name", [name for name in DIFFERENCES if name not in GONE])
def test_difference_to_the_newest(newest: StockCoordinators, name: str) -> None:
    with pair(newest, 2) as both:
        listen(both, SETTLE_S)
        DIFFERENCES[name](both)


@pytest.mark.parametrize("name", DIFFERENCES)
def test_difference(stock: StockCoordinators, name: str) -> None:
    with pair(stock, 2) as both:
        listen(both, SETTLE_S)
        DIFFERENCES[name](both)


@pytest.mark.parametrize("name", DIFFERENCES)
def test_difference_is_documented(name: str) -> None:
    assert f"`{name}`" in DOCUMENT.read_text(encoding="utf-8")
