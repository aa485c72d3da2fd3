"""The parent of all of a node's processes: starts them, watches them, ends them.

    starting --all ready--> serving --SIGTERM--> draining --done--> ended

A child that ends before all are ready, or a second signal, leads to the end of all of them. While serving, whatever
ends is started again (`spawn.Restarts` says when): a rank up to a number of times in a row, after which the
deployment goes on without it, since the others serve, and it is tried again now and then, or when somebody asks for
it; the node ends when none of its ranks is left. A front-end and
the coordinator are started again for ever. Nothing is left behind: children end with this process even when it is
killed, because each watches for that itself. SIGTERM and SIGHUP may come to all of them: the children leave those to
the parent. A child that cannot be started at all, for want of a process or a descriptor, is tried again, for ever.

A child tells its supervisor how it goes on a pipe of its own.
"""

from __future__ import annotations

import logging
import multiprocessing.connection
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NoReturn, Protocol

from msgspec import Struct

from paceline.errors import PacelineError, StartupError
from paceline.log import OomKills
from paceline.process.ends import Ends
from paceline.process.spawn import AGAIN, FIRST_WAIT_S, Restarts, Running, Start, Wakeup, start_child, stop


class Progressed(Struct, frozen=True):
    """What the child is doing, and the share done, 0.0 to 1.0."""

    what: str
    share: float


class Waiting(Struct, frozen=True):
    """The child is up and waits for these ranks."""

    ranks: list[int]


class Ready(Struct, frozen=True):
    """The child does its work."""


class Failed(Struct, frozen=True):
    """The child cannot go on; why, in one line. `trace`: where that is a defect, its traceback."""

    why: str
    trace: str = ""


Status = Progressed | Waiting | Ready | Failed


Settings = Callable[[int], object]
"""What a life is started with, by its number: 0 for the first."""


class Child:
    """One process of a node over all its lives; it says on a pipe when it is ready.

    `name`: shown to people. `kind`: what it is one of ("rank"). `target`: run as `target(settings=…, status=pipe)`.
    `drains`: it finishes its work on SIGTERM, and is told first. `start`: starts a life of it, here or elsewhere.
    """

    def __init__(
        self, name: str, kind: str, target: Callable[..., None], settings: Settings, restarts: Restarts, *,
        drains: bool, log_level: str, revive_s: float, start: Start,
    ) -> None:  # fmt: skip
        self.name, self.kind, self.drains = name, kind, drains
        self.life = 0
        self.state: Status = Progressed("starting", 0.0)
        self.process: Running
        self.status: Connection
        self.unstarted = True
        """Whether it is still to be started for the first time, or could not be."""
        self.due: float | None = None
        """When it is started again, on the monotonic clock; None while it runs, and where it is given up."""
        self.given_up = False
        self.stopped = StoppedFor(None)
        self.provisional: Callable[[str], None] | None = None
        """Told why it has ended, in place of starting it again."""
        self._start = start
        self._target = target
        self._settings = settings
        self._restarts = restarts
        self._log_level = log_level
        self._revive_s = revive_s
        self._ready_at: float | None = None
        self._starts = Restarts()

    @property
    def about(self) -> dict[str, object]:
        """What a log line about it has beside its text: its rank, if it is one, and the defect that has ended it."""
        number = self.name.removeprefix("rank ")
        trace = {"trace": self.state.trace} if isinstance(self.state, Failed) else {}
        return trace | ({"rank": int(number)} if number.isdecimal() else {})

    @property
    def alive(self) -> bool:
        return not self.unstarted and self.process.is_alive()

    @property
    def ready(self) -> bool:
        return isinstance(self.state, Ready)

    def read(self) -> Status | None:
        """What it says; None where it says nothing more."""
        try:
            self.state = self.status.recv()
        except (EOFError, OSError):
            self.status.close()
            return None
        if self.ready and self._ready_at is None:
            self._ready_at = time.monotonic()
        return self.state

    def why(self) -> str:
        """How it ended: the reason it gave, or the signal or exit status."""
        while not self.status.closed and self.status.poll():
            self.read()
        return self.state.why if isinstance(self.state, Failed) else how(self.process.exitcode)

    def ended(self) -> float | None:
        """It has ended: decides when it is started again. Returns in how many seconds; None: never."""
        now = time.monotonic()
        served_s = 0.0 if self._ready_at is None else now - self._ready_at
        # Who asks for it is no reason to wait, nor to be given up.
        self.due = now if self.process.exitcode == AGAIN else self._restarts.ended(served_s, now)
        self.given_up = self.due is None
        if self.due is None:
            self.due = now + self._revive_s
            return None
        return self.due - now

    def begin(self) -> None:
        """Start it, the first time or again. Raises OSError or PacelineError where that cannot be: due later."""
        first, self.unstarted = not hasattr(self, "process"), True
        try:
            settings = self._settings(self.life + (not first))
            process, status = self._start(self.name, self._target, settings, self._log_level)
        except (OSError, PacelineError):
            now = time.monotonic()
            self.due = max(self._starts.ended(0.0, now) or now, now + FIRST_WAIT_S)
            raise
        if not first:
            self.status.close()
            self.life += 1
        self.unstarted, self._starts = False, Restarts()
        self.process, self.status = process, status
        self.state = Progressed("starting", 0.0)
        self.due = None
        self._ready_at = None


class StoppedFor:
    """For how long a child is stopped (SIGSTOP), which it cannot see itself. `limit_s`: so long it may be before it is
    ended; None for ever.
    """

    def __init__(self, limit_s: float | None) -> None:
        self.limit_s = limit_s
        self._since: float | None = None

    def too_long(self, pid: int | None, now: float) -> bool:
        if self.limit_s is None or not is_stopped(pid):
            self._since = None
        elif self._since is None:
            self._since = now
        elif now >= self._since + self.limit_s:
            self._since = None
            return True
        return False


_oom_kills = OomKills()


def is_stopped(pid: int | None) -> bool:
    """Whether a signal has stopped the process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    # Behind the name, in which anything may stand.
    return stat.rpartition(")")[2].split()[0] == "T"


BY_SOMEBODY = (-signal.SIGKILL, -signal.SIGTERM)
"""Ends that say nothing of what was started: it is started again even where it has not been ready yet."""


def how(exit_code: int | None) -> str:
    if exit_code is None or exit_code >= 0:
        return f"exit status {exit_code}"
    text = f"killed by {signal.Signals(-exit_code).name}"
    if exit_code == -signal.SIGKILL and _oom_kills.rose():
        text += ", it may be by the kernel for want of memory: its count of such kills has risen"
    return text


logger = logging.getLogger("paceline.supervisor")

STOP_TIMEOUT_S = 5.0
DRAIN_GRACE_S = 2.0
WATCHED_AGAIN_S = 0.5
"""Between two restarts of what others cannot do without, however often it ends."""
LOOKS_S = 1.0
"""How often it is looked whether children are stopped."""
SAID_AGAIN_S = 60.0


class Reporter(Protocol):
    """Shows a person how the start goes."""

    def progress(self, name: str, what: str, share: float) -> None:
        """`name` is doing `what`, `share` of it done."""

    def ready(self, name: str) -> None:
        """`name` is ready."""


class Watched(Struct):
    """A process that somebody else starts and stops, and how it is started again."""

    process: Running
    restart: Callable[[], Running]
    restarts: Restarts
    started: float
    due: float | None = None


class Supervisor:
    """Runs one node's processes.

    `startup_timeout_s`: how long all may take to be ready. `drain_timeout_s`: how long those that drain may
    take after the first signal. `log_level`: of the children. `revive_s`: between two tries of one that was given up.
    """

    def __init__(
        self, reporter: Reporter, *, startup_timeout_s: float, drain_timeout_s: float, log_level: str = "info",
        revive_s: float = 300.0,
    ) -> None:  # fmt: skip
        self._revive_s = revive_s
        self._reporter = reporter
        self._startup_timeout_s = startup_timeout_s
        self._drain_timeout_s = drain_timeout_s
        self._log_level = log_level
        self._children: dict[str, Child] = {}
        self._watched: list[Watched] = []
        # Those that were told to end, and until when they may take.
        self._leaving: list[tuple[Child, float]] = []
        self._attendants: list[Callable[[], None]] = []
        self._closers: list[Callable[[], None]] = []
        self._starting = True
        self._restarts = False
        self._signals = 0
        self._wakeup = Wakeup()
        self._ends = Ends()

    def run(self, start: Callable[[Supervisor], None], on_ready: Callable[[], None]) -> int:
        """Serve until a signal; returns the exit status.

        `start` adds what is to run; `on_ready` is called when all of it is ready. Raises StartupError where it
        does not come up.
        """
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            # `nohup` ignores SIGHUP, and shall.
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._on_signal)
        try:
            start(self)
            self._starting = False
            if not self._wait_ready():
                return 1
            on_ready()
            return self._serve()
        except KeyboardInterrupt:
            return 1
        finally:
            self._starting = False
            self._end()

    def add(
        self, name: str, kind: str, target: Callable[..., None], settings: Settings, *, drains: bool = False,
        max_restarts: int | None = None, provisional: Callable[[str], None] | None = None,
        stopped_s: float | None = None, start: Start = start_child,
    ) -> None:  # fmt: skip
        """Start a child that runs `target(settings=…, status=pipe)` and says on the pipe when it is ready.

        `kind`: the node ends when all children of one kind are given up. `drains`: it finishes its work on SIGTERM,
        and is told first. `max_restarts`: in a row, None for any number. `provisional`: until `keep` is called it is
        not started again at all; this is told why it has ended. `stopped_s`: as in StoppedFor; `start`: as in Child.
        """
        restarts = Restarts(max_restarts)
        child = Child(
            name, kind, target, settings, restarts, drains=drains, log_level=self._log_level, revive_s=self._revive_s,
            start=start,
        )  # fmt: skip
        child.provisional, child.stopped = provisional, StoppedFor(stopped_s)
        if self._restarts:
            self._begin(child)
        else:
            try:
                child.begin()
            except OSError as error:
                raise StartupError(f"{name} cannot be started: {error}") from None
        self._children[name] = child

    def keep(self, name: str) -> None:
        """From here on this child is started again like the others."""
        child = self._children.get(name)
        if child is not None:
            child.provisional, child.given_up = None, False

    def revive(self, name: str) -> None:
        """Start a child now that does not run, also one that was given up."""
        child = self._children.get(name)
        if child is not None and not child.alive:
            child.due = time.monotonic()

    def remove(self, name: str) -> None:
        child = self._children.pop(name, None)
        if child is None or not hasattr(child, "process"):
            return
        alive = child.alive
        child.process.end()
        if alive:
            self._leaving.append((child, time.monotonic() + STOP_TIMEOUT_S))

    def attend(self, attendant: Callable[[], None]) -> Callable[[], None]:
        """Have this called, while all is serving, after each call of what is returned; any thread may call that."""
        self._attendants.append(attendant)
        return self._wakeup.set

    def watch(self, process: Running, restart: Callable[[], Running]) -> None:
        """Have `restart` called when this process ends while all is serving; whatever started it also stops it."""
        policy = Restarts(first_s=WATCHED_AGAIN_S, longest_s=WATCHED_AGAIN_S, steady_s=WATCHED_AGAIN_S)
        self._watched.append(Watched(process, restart, policy, time.monotonic()))

    def at_end(self, close: Callable[[], None]) -> None:
        """Call when the children have ended; the last one given is called first."""
        self._closers.append(close)

    # Start --------------------------------------------------------------------------------------

    def _wait_ready(self) -> bool:
        """Until all children are ready; False where a signal came first.

        What other nodes are to bring is waited for without end: they find this one, whenever they come.
        """
        deadline = time.monotonic() + self._startup_timeout_s
        while not all(child.ready for child in self._children.values()):
            alive = self._alive()
            waits = (self._restart_ended(), self._restart_children(), deadline - time.monotonic())
            if waits[-1] <= 0:
                if any(self._elsewhere(child) is None for child in self._children.values() if not child.ready):
                    raise StartupError(self._missing_text())
                for child in self._children.values():
                    if not child.ready:
                        text = "%s still waits for rank %s of another node"
                        logger.warning(text, child.name, self._elsewhere(child), extra=child.about)
                deadline = time.monotonic() + SAID_AGAIN_S
                continue
            self._wait(min(wait_s for wait_s in waits if wait_s is not None), alive)
            if self._signals:
                return False
        return True

    def _elsewhere(self, child: Child) -> str | None:
        """The ranks of other nodes that it waits for, where it waits for nothing else."""
        ranks = child.state.ranks if isinstance(child.state, Waiting) else []
        if not ranks or any(f"rank {rank}" in self._children for rank in ranks):
            return None
        return ", ".join(map(str, ranks))

    def _missing_text(self) -> str:
        parts: list[str] = []
        for child in self._children.values():
            match child.state:
                case Progressed(what, share):
                    parts.append(f"{child.name} ({what}, {share:.0%})")
                case Waiting(ranks) if ranks:
                    text = f"{child.name} (waits for rank {', '.join(map(str, ranks))})"
                    parts.append(text)
                case Waiting():
                    parts.append(f"{child.name} (waits for the coordinator)")
        return f"not ready within --startup-timeout of {self._startup_timeout_s:g} s: {'; '.join(parts)}"

    def _cannot_start(self, child: Child, why: str) -> NoReturn:
        if not isinstance(child.state, Failed):
            raise StartupError(f"{child.name} ended before it was ready ({why})")
        if child.state.trace:
            logger.error("%s: %s", child.name, why, extra=child.about)
        raise StartupError(f"{child.name}: {why}")

    # Serve and end ------------------------------------------------------------------------------

    def _serve(self) -> int:
        self._restarts = True
        while not self._signals:
            for attendant in self._attendants:
                attendant()
            alive = self._alive()
            due = (self._restart_ended(), self._restart_children(), self._see_off(), self._end_stopped())
            waits = [wait_s for wait_s in due if wait_s is not None]
            lost = self._lost_kind()
            if lost is not None:
                logger.error("no %s of this node is left; ending it", lost)
                return 1
            self._wait(min(waits, default=None), alive)
        return self._drain()

    def _restart_children(self) -> float | None:
        """Start the children that are due. Returns after how many seconds to look again."""
        waits: list[float] = []
        for child in list(self._children.values()):
            if child.alive or (child.given_up and child.due is None):
                continue
            if child.provisional is not None and not child.unstarted:
                child.given_up = True
                why = child.why()
                logger.warning("%s ended (%s) before it was part of the deployment", child.name, why, extra=child.about)
                child.provisional(why)
                continue
            if child.due is None:
                self._note_end(child)
            if child.due is not None:
                wait_s = child.due - time.monotonic()
                if wait_s <= 0:
                    self._begin(child)
                # The wait for the ends of children does not know of one that has just begun.
                waits.append(max(0.0, wait_s))
        return min(waits, default=None)

    def _begin(self, child: Child) -> None:
        try:
            child.begin()
        except (OSError, PacelineError) as error:
            wait_s = 0.0 if child.due is None else child.due - time.monotonic()
            text = "%s cannot be started: %s; trying again in %.1f s"
            logger.error(text, child.name, error, wait_s, extra=child.about)

    def _see_off(self) -> float | None:
        """End those for good that were told to, and have not. Returns after how many seconds to look again."""
        now = time.monotonic()
        for child, until in self._leaving:
            if child.process.is_alive() and now >= until:
                child.process.kill()
            elif not child.process.is_alive():
                logger.info("%s has left", child.name, extra=child.about)
                child.status.close()
        self._leaving = [(child, until) for child, until in self._leaving if child.process.is_alive()]
        return min((max(0.1, until - now) for _, until in self._leaving), default=None)

    def _end_stopped(self) -> float | None:
        """End those that have been stopped for too long. Returns after how many seconds to look again."""
        looked = [child for child in self._children.values() if child.stopped.limit_s is not None and child.alive]
        for child in looked:
            if child.stopped.too_long(child.process.pid, time.monotonic()):
                logger.warning("%s has been stopped for %.0f s; ending it", child.name, child.stopped.limit_s)
                child.process.kill()
        return LOOKS_S if looked else None

    def _note_end(self, child: Child) -> None:
        why = child.why()
        if not self._restarts and child.process.exitcode not in BY_SOMEBODY:
            self._cannot_start(child, why)
        self._ends.add(child.kind, child.process.exitcode)
        wait_s = child.ended()
        if wait_s is None and not self._restarts:
            raise StartupError(f"{child.name} ended before it was ready ({why}), once too often (--max-rank-restarts)")
        if wait_s is None:
            text = "%s ended (%s) once too often (--max-rank-restarts); the deployment goes on without it, and tries it"
            text += " again every %g s, or on `paceline revive`"
            logger.error(text, child.name, why, self._revive_s, extra=child.about)
        else:
            later = f" in {wait_s:g} s" * (wait_s > 0)
            logger.warning("%s ended (%s); starting it again%s", child.name, why, later, extra=child.about)

    def _lost_kind(self) -> str | None:
        """Of which kind no child is left that lives or will, if there is one."""
        left = {child.kind for child in self._children.values() if not child.given_up or child.provisional is not None}
        return next((child.kind for child in self._children.values() if child.kind not in left), None)

    def _restart_ended(self) -> float | None:
        """Start what has ended and can be started again. Returns after how many seconds to look again."""
        for watched in self._watched:
            if watched.process.is_alive():
                continue
            now = time.monotonic()
            if watched.due is None:
                watched.due = watched.restarts.ended(now - watched.started, now)
            if watched.due is not None and watched.due > now:
                return watched.due - now
            watched.started, watched.due = now, None
            why = how(watched.process.exitcode)
            if not self._restarts and watched.process.exitcode not in BY_SOMEBODY:
                raise StartupError(f"{watched.process.name} ended before it was ready ({why})")
            self._ends.add(watched.process.name, watched.process.exitcode)
            logger.warning("%s ended (%s); starting it again", watched.process.name, why)
            try:
                watched.process = watched.restart()
                logger.info("%s is back", watched.process.name)
            except (OSError, StartupError) as error:
                logger.error("%s cannot be started: %s; trying again", watched.process.name, error)
            return 0.0
        return None

    def _drain(self) -> int:
        """Let those finish that drain. Returns the exit status."""
        draining = [child.process for child in self._children.values() if child.drains and child.alive]
        if draining:
            logger.info("draining for up to %g s; a second signal ends at once", self._drain_timeout_s)
        for process in draining:
            process.terminate()
        deadline = time.monotonic() + self._drain_timeout_s + DRAIN_GRACE_S
        while alive := [process for process in draining if process.is_alive()]:
            left_s = deadline - time.monotonic()
            if left_s <= 0 or self._signals > 1:
                logger.warning("not drained: %s", "told to end at once" if self._signals > 1 else "not in time")
                return 1
            self._wait(left_s, alive)
        if draining:
            logger.info("drained")
        return 0

    def _end(self) -> None:
        every = [*self._children.values(), *(child for child, _ in self._leaving)]
        children = [child for child in every if hasattr(child, "process")]
        for child in children:
            # What drains has done so, or has nothing to drain for: asked now, it would begin.
            if child.drains or self._signals > 1:
                child.process.kill()
        stop([child.process for child in children], STOP_TIMEOUT_S)
        for close in reversed(self._closers):
            close()

    # Waiting ------------------------------------------------------------------------------------

    def _on_signal(self, *_: object) -> None:
        self._signals += 1
        self._wakeup.set()
        if self._starting:
            raise KeyboardInterrupt

    def _alive(self) -> list[Running]:
        """What to wait on for the end of what runs now.

        Taken before anything is asked about what has ended: what ends between the two is then seen by one of them.
        """
        children = (*self._children.values(), *(child for child, _ in self._leaving))
        processes = [child.process for child in children if child.alive]
        processes += [watched.process for watched in self._watched]
        return [process for process in processes if process.is_alive()]

    def _wait(self, timeout_s: float | None, alive: list[Running]) -> None:
        """Until a child says something, one of `alive` ends, a signal comes, or the time passes."""
        # Processes, not their descriptors: of one that is replaced meanwhile the number would soon be another's.
        sentinels = [process.sentinel for process in alive]
        begun = [child for child in self._children.values() if hasattr(child, "status")]
        pipes = {child.status: child for child in begun if not child.status.closed}
        ready = multiprocessing.connection.wait([*pipes, *sentinels, self._wakeup.fileno()], timeout_s)
        if self._wakeup.fileno() in ready:
            self._wakeup.clear()
        for pipe, child in pipes.items():
            if pipe in ready:
                self._read(child)

    def _read(self, child: Child) -> None:
        state = child.read()
        if self._restarts:
            # The display of the start is gone.
            if isinstance(state, Ready):
                child.given_up = False
                logger.info("%s is %s", child.name, "back" if child.life else "ready", extra=child.about)
            return
        match state:
            case Progressed(what, share):
                self._reporter.progress(child.name, what, share)
            case Waiting(ranks) if ranks:
                self._reporter.progress(child.name, f"waiting for rank {', '.join(map(str, ranks))}", 0.0)
            case Ready():
                self._reporter.ready(child.name)
