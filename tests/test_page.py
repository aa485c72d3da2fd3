"""The page at /dashboard in a real browser: a killed rank, its requests' move, pausing by key, a map of very many.

Needs Debian's chromium and chromium-driver, and selenium: `make test-page` installs them. PACELINE_PICTURES=FOLDER has
the pictures of docs/ taken anew.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.pace import stretched
from tests.serving import Deployment, deployment, wait_until

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not there (make test-page)")
DRIVER, BROWSER = shutil.which("chromedriver"), shutil.which("chromium")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(DRIVER is None or BROWSER is None, reason="Chromium is not there (make test-page)"),
]

FLAGS = ("--engine", "timed-lockstep", "-dp", "8", "-asc", "2", "--engine-option", "step_ms=40")
ARGUMENTS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1400,900",
    "--hide-scrollbars",
)  # fmt: skip
NAME = "a-long-one"
PICTURES = os.environ.get("PACELINE_PICTURES")
PICTURES_AFTER_S = 200.0


@pytest.fixture(scope="module")
def server() -> Iterator[Deployment]:
    with deployment(*FLAGS) as running:
        if PICTURES:
            _live_through(running, PICTURES_AFTER_S)
        yield running


def _live_through(server: Deployment, seconds: float) -> None:
    """Some minutes of load, so that the pictures show a history."""
    end = time.monotonic() + seconds
    with ThreadPoolExecutor(96) as pool:
        for burst in itertools.cycle((8, 40, 96, 60, 0, 20)):
            if time.monotonic() >= end:
                break
            list(pool.map(lambda number: complete(server, f"warm-{number}", 100 + number), range(burst)))
            wait_until(lambda: time.monotonic() >= end or not server.health()["running"], "the wave is over")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = str(BROWSER)
    for argument in ARGUMENTS:
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    made = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield made
    made.quit()


@pytest.fixture
def page(browser: Any, server: Deployment) -> Any:
    wait_until(lambda: len(server.health()["ready"]) == 8, "all ranks are there")
    browser.get("about:blank")
    browser.get(f"{server.url}/dashboard")
    wait_until(lambda: said(browser, "status") == "all ranks serve", "the page shows them")
    return browser


def said(browser: Any, identity: str) -> str:
    return str(browser.execute_script("return document.getElementById(arguments[0]).innerText", identity))


def doing(browser: Any, rank: int) -> str:
    return str(browser.execute_script("return document.getElementById(arguments[0]).dataset.doing", f"rank-{rank}"))


def type_keys(browser: Any, keys: str) -> None:
    browser.switch_to.active_element.send_keys(keys)


def picture(browser: Any, name: str) -> None:
    if PICTURES:
        browser.save_screenshot(str(Path(PICTURES, name)))


def places(browser: Any) -> Any:
    """Where what can be pressed stands."""
    return browser.execute_script(
        "return [...document.querySelectorAll('header button, .lane[tabindex], #name, aside section')]"
        ".map(one => { const box = one.getBoundingClientRect(); return [one.id, box.x, box.y, box.width]; })"
    )


def complete(server: Deployment, name: str, tokens: int) -> Any:
    body = {"prompt": f"{name} says hello", "max_tokens": tokens}
    return server.http.post("/v1/completions", json=body, headers={"x-request-id": name})


def rank_of(server: Deployment) -> int:
    answer = server.http.get(f"/requests/{NAME}")
    if answer.status_code != 200:
        return -1
    choice = answer.json()["requests"][0]["choices"][0]
    return int(choice["ranks"][-1]["rank"]) if choice["tokens"] > 20 else -1


def test_a_killed_rank_is_shown_and_the_move_of_its_request(page: Any, server: Deployment) -> None:
    before = places(page)
    with ThreadPoolExecutor(12) as pool:
        answers = [
            pool.submit(complete, server, NAME, 250),
            *(pool.submit(complete, server, f"r{n}", 150) for n in range(9)),
        ]
        wait_until(lambda: rank_of(server) >= 0, "it has a rank and tokens")
        rank = rank_of(server)
        wait_until(lambda: doing(page, rank) == "decode", "its rank decodes")
        assert "runs" in said(page, "wavenow")
        picture(page, "dashboard.png")
        os.kill(server.pid_of(f"rank {rank}"), signal.SIGKILL)
        killed = time.monotonic()
        wait_until(lambda: doing(page, rank) in ("gone", "loading"), "the page shows it")
        # Within a second on a machine that is not busy; printed where somebody asks for it (-s).
        print(f"shown after {time.monotonic() - killed:.2f} s")
        assert f"rank {rank} is gone" in said(page, "words")
        page.execute_script("document.getElementById('name').value = arguments[0]", NAME)
        page.find_element("css selector", "#ask button").click()
        wait_until(lambda: "moved to rank" in said(page, "found"), "its move is shown")
        assert NAME in said(page, "words")
        picture(page, "dashboard-dead-rank.png")
        assert places(page) == before, "nothing has moved under a finger"
        assert all(answer.result().status_code == 200 for answer in answers)
    wait_until(lambda: doing(page, rank) == "idle", "it is back")
    assert f"rank {rank} is back" in said(page, "words")


def test_a_full_queue_is_shown_and_a_rank_that_hangs(browser: Any, tmp_path: Path) -> None:
    """The pictures of docs/runbook.md."""
    hanging = ("--engine", "tests.hanging_engines:Hanging", "--engine-option", f"folder={tmp_path}")
    slow = ("--engine-option", "step_ms=40", "--max-num-seqs", "4", "--max-waiting", "30", "-asc", "2")
    with deployment(*hanging, *slow, "-dp", "4", "--stall-timeout", "2") as running, ThreadPoolExecutor(96) as pool:
        browser.get(f"{running.url}/dashboard")
        wait_until(lambda: said(browser, "status") == "all ranks serve", "the page shows them")
        answers = [pool.submit(complete, running, f"r{number}", 60 + number) for number in range(90)]
        wait_until(lambda: "overload" in said(browser, "words"), "it says that requests are refused")
        wait_until(lambda: "in the queue" in said(browser, "tiles") and said(browser, "tiles")[0] != "0", "some wait")
        picture(browser, "dashboard-saturated.png")
        (tmp_path / "hang-1").touch()
        wait_until(lambda: doing(browser, 1) == "hung", "the page shows it")
        assert said(browser, "status") == "rank 1 hung"
        assert "rank 1 hangs in a step: its requests go on elsewhere" in said(browser, "words")
        picture(browser, "dashboard-hung.png")
        (tmp_path / "go").touch()
        wait_until(lambda: "rank 1 goes on" in said(browser, "words"), "it goes on")
        assert {answer.result().status_code for answer in answers} == {200, 429}
        # Its server ends now, which the browser would log as an error.
        browser.get("about:blank")


def test_pausing_by_key_says_first_what_will_happen(page: Any, server: Deployment) -> None:
    type_keys(page, "p")
    assert "All ranks stop after the step they are in. 0 requests that run stay" in said(page, "then")
    page.find_element("css selector", "#say button[value=no]").click()
    assert server.http.get("/is_paused").json()["is_paused"] is False
    type_keys(page, "p")
    page.find_element("id", "do").click()
    wait_until(lambda: said(page, "status") == "paused", "it is paused")
    wait_until(lambda: doing(page, 3) == "paused", "and so is each rank")
    type_keys(page, "r")
    assert "go on at once" in said(page, "then")
    page.find_element("id", "do").click()
    wait_until(lambda: said(page, "status") == "all ranks serve", "it goes on")
    type_keys(page, "s")
    page.execute_script(
        "const one = document.querySelector('#choice input'); one.value = 6; one.dispatchEvent(new Event('input'))"
    )
    assert "From 8 to 6: ranks 6 to 7 get nothing new" in said(page, "then")
    page.find_element("css selector", "#say button[value=no]").click()


def test_nothing_comes_from_outside_and_nothing_fails(page: Any, server: Deployment) -> None:
    loaded = page.execute_script("return performance.getEntriesByType('resource').map(one => one.name)")
    assert loaded
    assert all(name.startswith((server.url, "data:")) for name in loaded)
    assert [entry for entry in page.get_log("browser") if entry["level"] == "SEVERE"] == []
    policy = server.http.get("/dashboard").headers["content-security-policy"]
    assert "default-src 'none'" in policy


def test_with_a_key_it_asks_for_it_and_shows_nothing_without(browser: Any) -> None:
    from selenium.webdriver.support.expected_conditions import alert_is_present
    from selenium.webdriver.support.ui import WebDriverWait

    def asked() -> Any:
        return WebDriverWait(browser, stretched(30.0)).until(alert_is_present())

    with deployment("--engine", "timed", "-dp", "2", "--admin-key", "the-admins-key") as running:
        browser.get(f"{running.url}/dashboard")
        asked().dismiss()
        wait_until(lambda: said(browser, "status") == "needs the admin's key", "it says so")
        assert said(browser, "lanes") == ""
        browser.refresh()
        asked().send_keys("the-admins-key")
        asked().accept()
        wait_until(lambda: said(browser, "status") == "all ranks serve", "it shows the deployment")


def test_light_and_dark(page: Any) -> None:
    found = {}
    for scheme in ("light", "dark"):
        feature = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", feature)
        found[scheme] = page.execute_script("return getComputedStyle(document.body).backgroundColor")
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert found["light"] != found["dark"]


@pytest.mark.parametrize(("ranks", "mapped"), [(64, False), (1024, True)])
def test_many_ranks_are_lanes_and_very_many_a_map(page: Any, ranks: int, mapped: bool) -> None:
    """What is shown here is made up: so many ranks do not run on a test's machine."""
    page.execute_script(
        """const more = JSON.parse(JSON.stringify(state));
        more.ranks = Array.from({length: arguments[0]}, (_, at) =>
            [at, "pdyix"[at % 5], at % 16, 0, 16, 0, at / 2000, 0.5, 10, 40, 0]);
        show = () => {}; asMap = null; state = more; lay(more);
        for (let at = 0; at < more.ranks.length; at++) mapped() ? cell(at) : lane(at);""",
        ranks,
    )
    shown = page.execute_script("return document.getElementById('map').hidden ? 'lanes' : 'map'")
    assert shown == ("map" if mapped else "lanes")
    assert doing(page, ranks - 1) in ("prefill", "decode", "dummy step", "idle", "paused")
    size = page.execute_script("const box = document.getElementById(arguments[0]).getBoundingClientRect();"
                               "return [box.width, box.height]", f"rank-{ranks - 1}")  # fmt: skip
    assert min(size) >= 18
    page.execute_script("document.getElementById('rank-0').focus()")
    from selenium.webdriver.common.keys import Keys

    type_keys(page, Keys.ARROW_RIGHT)
    assert said(page, "detail").startswith("Rank 1: decode")
