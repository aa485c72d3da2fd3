"""What an actor in a Ray cluster does with a rank's process, without Ray: the process is a real one."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from paceline import __version__
from paceline.net.sockets import SECRET
from paceline.process.ray_actor import Logged, News, RankActor
from paceline.process.ray_link import Ended, Life, Said, variables
from paceline.process.spawn import END
from paceline.process.supervisor import Failed, Progressed, Ready
from tests.serving import is_alive, process_name, wait_until

pytestmark = pytest.mark.slow


def child(settings: Any, status: Connection) -> None:
    """Says its process id and the secret, and serves until END, or fails where it is told to."""
    signal.signal(END, lambda *_: os._exit(0))
    secret = Path(os.environ[SECRET]).read_text() if SECRET in os.environ else ""
    print("a line\nand half", end="", file=sys.stderr, flush=True)
    status.send(Progressed(f"{os.getpid()} {os.environ.get('VLLM_X')} {secret}", 0.5))
    status.send(Ready())
    if settings == "fail":
        status.send(Failed("no memory", "a traceback"))
        sys.exit(1)
    threading.Event().wait()


class Asking:
    """Asks for news as the shell does, and keeps what there was."""

    def __init__(self, actor: RankActor) -> None:
        self.actor, self._seen = actor, 0
        self.news: list[News] = []

    def more(self) -> list[News]:
        self._seen, news = self.actor.news(self._seen)
        self.news += news
        return self.news

    def until_ready(self) -> int:
        """Returns the process id of the life that is ready now."""
        self.news.clear()
        wait_until(lambda: any(isinstance(getattr(one, "status", None), Ready) for one in self.more()), "it is ready")
        said = next(one.status for one in self.news if isinstance(one, Said))
        assert isinstance(said, Progressed)
        self.said = said.what
        return int(said.what.split()[0])

    def until_ended(self) -> Ended:
        wait_until(lambda: any(isinstance(one, Ended) for one in self.more()), "its end")
        return next(one for one in self.news if isinstance(one, Ended))

    @property
    def log(self) -> bytes:
        return b"".join(one.lines for one in self.news if isinstance(one, Logged))


@pytest.fixture
def asking(monkeypatch: pytest.MonkeyPatch) -> Iterator[Asking]:
    for name in (SECRET, "VLLM_X"):
        # So that what the actor sets is gone again.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    asking = Asking(RankActor(__version__))
    yield asking
    asking.actor.end(kill=True)


def life(number: int, settings: object = None, **further: Any) -> Life:
    return Life(number, 3, {}, "rank 3", child, settings, "info", **further)


def test_lives_follow_one_another_and_all_they_say_and_log_is_told(asking: Asking) -> None:
    asking.actor.start(life(0, variables={"VLLM_X": "x"}, secret=b"the secret"))
    first = asking.until_ready()
    assert process_name(first) == "pl:rank 3"
    assert asking.said == f"{first} x the secret"
    os.kill(first, signal.SIGKILL)
    ended = asking.until_ended()
    assert (ended.life, ended.exit_code) == (0, -signal.SIGKILL)
    # More follows where the kernel has killed somebody for want of memory meanwhile.
    assert ended.why.startswith("killed by SIGKILL")
    assert asking.log == b"a line\nand half\n"
    asking.actor.start(life(1))
    assert asking.until_ready() != first
    asking.actor.end(kill=False)
    assert asking.until_ended() == Ended(1, 0, "exit status 0")


def test_one_that_fails_has_said_why(asking: Asking) -> None:
    asking.actor.start(life(0, "fail"))
    assert asking.until_ended() == Ended(0, 1, "no memory")
    assert Said(0, Failed("no memory", "a traceback")) in asking.news


def test_one_that_is_stopped_for_too_long_is_ended(asking: Asking) -> None:
    asking.actor.start(life(0, stopped_s=0.5))
    pid = asking.until_ready()
    os.kill(pid, signal.SIGSTOP)
    assert asking.until_ended().exit_code == -signal.SIGKILL
    assert not is_alive(pid)
    assert b"rank 3 has been stopped for too long" in asking.log


def test_another_version_is_refused() -> None:
    with pytest.raises(RuntimeError, match=f"its node has Paceline {__version__}, and the one that serves 0.0.0"):
        RankActor("0.0.0")


def test_a_rank_has_the_engines_variables_and_none_of_our_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("VLLM_X", "VLLM_HOST_IP", "HF_TOKEN", "PACELINE_API_KEY", "PACELINE_LOG_FORMAT", SECRET):
        monkeypatch.setenv(name, "json")
    assert variables().keys() >= {"VLLM_X", "HF_TOKEN", "PACELINE_LOG_FORMAT"}
    assert not variables().keys() & {"VLLM_HOST_IP", "PACELINE_API_KEY", SECRET}
