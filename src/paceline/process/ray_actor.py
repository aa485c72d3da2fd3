"""The actor that has a rank's place in a Ray cluster: the rank's process is its child, and it tells how that goes.

The process is the same as on a node of ours, and is started, named and ended in the same way: it ends with the actor,
and so with the connection to Ray of whoever serves. A life that ends leaves the actor, and what is set aside for it, to
the next. What the process logs comes with the rest, so that it stands in the log of the deployment.

Nothing here imports Ray, which makes a `RankActor` in a process of its own and calls several of its methods at once.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from multiprocessing.connection import Connection, wait

from msgspec import Struct

from paceline import __version__
from paceline.net.sockets import SECRET
from paceline.process.ray_link import Ended, Life, Said
from paceline.process.spawn import ChildProcess, spawn
from paceline.process.supervisor import Failed, Status, StoppedFor, how

NEWS_KEPT = 1_000
NEWS_S = 20.0
"""As long a question for news waits for some: then it is asked again."""
LOOKS_S = 1.0
READ_BYTES = 65536


class Logged(Struct, frozen=True):
    """What a rank's process has written to its log: whole lines, as they are."""

    lines: bytes


News = Said | Ended | Logged


class RankActor:
    """`version`: Paceline's, where the deployment is served. Raises RuntimeError where it is another here."""

    def __init__(self, version: str) -> None:
        if version != __version__:
            raise RuntimeError(f"its node has Paceline {__version__}, and the one that serves {version}")
        self._news: deque[News] = deque()
        self._first = 0
        """The number of the first of `_news`."""
        self._changed = threading.Condition()
        self._process: ChildProcess | None = None
        self._secret: int | None = None

    def start(self, life: Life) -> None:
        """Begin a life; the one before has ended."""
        os.environ.update(life.variables)
        if life.secret is not None:
            os.environ[SECRET] = self._held(life.secret)
        reader, writer = multiprocessing.get_context("spawn").Pipe(duplex=False)
        log, logs = multiprocessing.get_context("spawn").Pipe(duplex=False)
        arguments = {"target": life.target, "settings": life.settings, "status": writer, "log": logs}
        try:
            self._process = spawn(life.name, run_logged, arguments, life.log_level)
        except OSError as error:
            reader.close()
            log.close()
            why = f"it cannot be started: {error}"
            self._tell(Ended(life.life, None, why))
            return
        finally:
            writer.close()
            logs.close()
        watched = (life, self._process, reader, log)
        threading.Thread(target=self._watch, args=watched, name="watch", daemon=True).start()

    def end(self, kill: bool) -> None:
        if self._process is not None:
            if kill:
                self._process.kill()
            else:
                self._process.end()

    def news(self, after: int) -> tuple[int, list[News]]:
        """What there is from number `after` on, as soon as there is something; and the number that comes next.

        Whoever asks has all before `after`: it is forgotten.
        """
        with self._changed:
            while self._news and self._first < after:
                self._news.popleft()
                self._first += 1
            self._changed.wait_for(lambda: self._news, NEWS_S)
            return self._first + len(self._news), list(self._news)

    def _tell(self, *news: News) -> None:
        with self._changed:
            self._news.extend(news)
            if len(self._news) > NEWS_KEPT:
                # Nobody has asked for long. Lines of the log can be done without.
                kept = [one for one in self._news if not isinstance(one, Logged)]
                self._first += len(self._news) - len(kept)
                self._news = deque(kept)
            self._changed.notify_all()

    def _held(self, secret: bytes) -> str:
        """A path under which this process's user finds the secret for as long as this process lives."""
        if self._secret is None:
            self._secret = os.memfd_create("paceline-secret")
            os.fchmod(self._secret, 0o600)
        os.ftruncate(self._secret, 0)
        os.pwrite(self._secret, secret, 0)
        return f"/proc/{os.getpid()}/fd/{self._secret}"

    def _watch(self, life: Life, process: ChildProcess, reader: Connection, log: Connection) -> None:
        """In a thread: until the process has ended, tell what it says."""
        stopped = StoppedFor(life.stopped_s)
        status: Status | None = None
        lines = Lines()
        timeout_s = None if life.stopped_s is None else LOOKS_S
        while process.is_alive():
            pipes = [pipe for pipe in (reader, log) if not pipe.closed]
            ready = wait([*pipes, process.sentinel], timeout_s)
            if reader in ready:
                status = self._read(life, reader) or status
            if log in ready:
                self._log(lines, log)
            if stopped.too_long(process.pid, time.monotonic()):
                self._tell(Logged(b"%s has been stopped for too long; ending it\n" % life.name.encode()))
                process.kill()
        while not reader.closed and reader.poll():
            status = self._read(life, reader) or status
        # A process that it has left behind may have the log open: what is there is read, and no end is waited for.
        while not log.closed and log.poll():
            self._log(lines, log)
        why = status.why if isinstance(status, Failed) else how(process.exitcode)
        self._tell(*lines.rest(), Ended(life.life, process.exitcode, why))
        reader.close()
        log.close()

    def _read(self, life: Life, reader: Connection) -> Status | None:
        try:
            status: Status = reader.recv()
        except (EOFError, OSError):
            reader.close()
            return None
        self._tell(Said(life.life, status))
        return status

    def _log(self, lines: Lines, log: Connection) -> None:
        found = os.read(log.fileno(), READ_BYTES)
        if found:
            self._tell(*lines.take(found))
        else:
            log.close()


class Lines:
    """Whole lines of what comes in pieces."""

    def __init__(self) -> None:
        self._begun = b""

    def take(self, piece: bytes) -> list[News]:
        whole, newline, self._begun = (self._begun + piece).rpartition(b"\n")
        if len(self._begun) > READ_BYTES:
            # It will not end soon.
            newline, self._begun, whole = b"\n", b"", whole + newline + self._begun
        return [Logged(whole + newline)] if newline else []

    def rest(self) -> list[News]:
        return [Logged(self._begun + b"\n")] if self._begun else []


def run_logged(target: Callable[..., None], settings: object, status: Connection, log: Connection) -> None:
    """What a rank's process runs: its log, and whatever a library writes there, goes into the pipe."""
    os.dup2(log.fileno(), 2)
    log.close()
    target(settings=settings, status=status)
