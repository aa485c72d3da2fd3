"""What a supervisor does to a child that a signal has stopped, which cannot see that itself."""

from __future__ import annotations

import gc
import os
import signal
import threading
from multiprocessing.connection import Connection
from typing import Any

import pytest

from paceline.process.ray_link import RayLife
from paceline.process.supervisor import Ready, Supervisor, is_stopped
from tests.serving import is_alive, wait_until


class Silent:
    def progress(self, name: str, what: str, share: float) -> None: ...

    def ready(self, name: str) -> None: ...


def child(settings: Any, status: Connection) -> None:
    status.send(Ready())
    threading.Event().wait()


@pytest.mark.slow
@pytest.mark.parametrize(("limit_s", "ended"), [(0.5, True), (None, False)])
def test_one_that_is_stopped_is_ended_where_others_wait_for_it(limit_s: float | None, ended: bool) -> None:
    supervisor = Supervisor(
        Silent(), startup_timeout_s=60.0, drain_timeout_s=1.0, log_level="warning", revive_s=10.0
    )  # fmt: skip
    lives: list[int] = []
    failures: list[BaseException] = []

    def settings(life: int) -> int:
        lives.append(life)
        return life

    def disturb() -> None:
        try:
            pid = supervisor._children["x"].process.pid
            assert pid is not None
            os.kill(pid, signal.SIGSTOP)
            wait_until(lambda: is_stopped(pid), "it is stopped")
            if ended:
                wait_until(lambda: len(lives) == 2 and supervisor._children["x"].ready, "it is started again")
            else:
                threading.Event().wait(2.5)
                assert is_alive(pid)
                os.kill(pid, signal.SIGCONT)
        except BaseException as error:
            failures.append(error)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=disturb)
    supervisor.run(lambda made: made.add("x", "rank", child, settings, stopped_s=limit_s), thread.start)
    thread.join()
    supervisor._wakeup.close()
    assert failures == []
    assert len(lives) == (2 if ended else 1)


def test_one_that_runs_is_not_stopped() -> None:
    assert not is_stopped(os.getpid())
    assert not is_stopped(None)


def test_what_is_waited_on_outlives_the_child_that_is_started_again() -> None:
    """Or its descriptor's number is the next one's, and the supervisor waits on that twice, or for another's end."""
    lives: list[RayLife] = []

    def start(name: str, *_: object) -> tuple[RayLife, Connection]:
        life = RayLife(name, lambda: None, lambda: None)
        lives.append(life)
        return life, life.status

    supervisor = Supervisor(Silent(), startup_timeout_s=60.0, drain_timeout_s=1.0)
    supervisor.add("rank 0", "rank", child, lambda life: life, start=start)
    alive = supervisor._alive()
    lives.pop().ended(None, "its node died")
    supervisor._restarts = True
    supervisor._restart_children()
    gc.collect()
    assert lives[0].is_alive()
    pipe = os.pipe()
    assert not {process.sentinel for process in alive} & set(pipe), "their numbers are free for others"
    for end in pipe:
        os.close(end)
    # The end that came meanwhile is seen at once.
    supervisor._wait(60.0, alive)
    assert supervisor._children["rank 0"].process is lives[0]
    supervisor._wakeup.close()
