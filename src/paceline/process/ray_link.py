"""Children whose processes run in a Ray cluster, as the supervisor sees them: the same as those of its own.

What speaks with Ray is a process of its own, the Ray shell (`ray_shell.py`): Ray ends whatever is connected to a
cluster whose head is away for a minute, and neither the supervisor nor the front-ends may end with that. The supervisor
asks it for lives on a pipe, and hears there what they say and how they end. A shell that ends takes all ranks with it,
since Ray ends what belongs to a connection that is gone, which also leaves no orphans. It is started again, asks for
the cluster for ever, and the ranks begin anew when that is back; requests wait meanwhile.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection, wait

from msgspec import Struct
from msgspec.structs import replace

from paceline.core.places import End, Kill, Resources
from paceline.errors import ConfigError, StartupError
from paceline.log import FORMAT_VARIABLE
from paceline.net.sockets import SECRET
from paceline.process.spawn import AGAIN, END, ChildProcess, Running, spawn, stop
from paceline.process.supervisor import Failed, Status

logger = logging.getLogger("paceline.supervisor")

CARRIED = ("VLLM_", "NCCL_", "GLOO_", "UCX_", "HF_", "HUGGING_FACE_", FORMAT_VARIABLE)
"""How variables begin that a rank has from here, as its engine would; vLLM's own Ray backend carries these too."""
NOT_CARRIED = ("VLLM_HOST_IP", "VLLM_HOST_PORT")

# To the shell ---------------------------------------------------------------------------------


class Life(Struct, frozen=True):
    """A life to begin: `target(settings=…, status=pipe)` in a process called `name`. `life`: its number; `needs`: what
    is set aside for its rank; `stopped_s`: as in `supervisor.StoppedFor`. `variables`, `secret`: of this node's
    environment, and what its `--secret-file` holds.
    """

    life: int
    rank: int
    needs: Resources
    name: str
    target: Callable[..., None]
    settings: object
    log_level: str
    stopped_s: float | None = None
    variables: Mapping[str, str] = {}
    secret: bytes | None = None


# From the shell -------------------------------------------------------------------------------


class Connected(Struct, frozen=True):
    """The shell is connected. `host`: the address of this node in the cluster."""

    host: str


class Said(Struct, frozen=True):
    life: int
    status: Status


class Ended(Struct, frozen=True):
    """`exit_code`: None where nobody knows; `why`: in one line."""

    life: int
    exit_code: int | None
    why: str


class ShellSettings(Struct, frozen=True):
    """`address`: of the cluster, as Ray takes it. `ranks_a_node`: as in `core.places.Places`. `fresh`: False where it
    takes the place of one that has ended.
    """

    address: str
    ranks_a_node: int | None = None
    fresh: bool = True


class RayLife:
    """One life of a child in the cluster. `said`: our end of the pipe on which it says how it goes."""

    pid = None

    def __init__(self, name: str, end: Callable[[], None], kill: Callable[[], None]) -> None:
        self.name = name
        self.exitcode: int | None = None
        self._failed = False
        self.status, self._said = multiprocessing.Pipe(duplex=False)
        # Its reading end shows the end of the life, as a process's sentinel does.
        self._sentinel, self._lives = multiprocessing.Pipe(duplex=False)
        self.end, self.kill = end, kill
        self.terminate = end

    @property
    def sentinel(self) -> int:
        return self._sentinel.fileno()

    def is_alive(self) -> bool:
        return not self._lives.closed

    def join(self, timeout: float | None = None) -> None:
        wait([self._sentinel], timeout)

    def say(self, status: Status) -> None:
        """It has said this."""
        self._failed = isinstance(status, Failed)
        # Nobody may be there to read it any more.
        with contextlib.suppress(OSError):
            self._said.send(status)

    def ended(self, exit_code: int | None, why: str) -> None:
        if not self._failed:
            self.say(Failed(why))
        self.exitcode = exit_code
        self._said.close()
        self._lives.close()


class RayLink:
    """The supervisor's end of the pipe to the Ray shell, which it starts; `close` ends that."""

    def __init__(self, settings: ShellSettings, log_level: str) -> None:
        self._settings, self._log_level = settings, log_level
        self._lock = threading.Lock()
        self._lives: dict[int, tuple[Life, RayLife]] = {}
        self._count = 0
        self._connected: Connected | Failed | None = None
        self._changed = threading.Condition()
        self._pipe: Connection | None = None
        self.process = self._start()

    def start(
        self, rank: int, needs: Resources, stopped_s: float | None, name: str, target: Callable[..., None],
        settings: object, log_level: str,
    ) -> tuple[Running, Connection]:  # fmt: skip
        """Start a life of a rank; the last four as `spawn.start_child` takes them. It waits for the cluster."""
        with self._lock:
            number, self._count = self._count, self._count + 1
            about = Life(
                number, rank, needs, name, target, settings, log_level, stopped_s, variables(), own_secret()
            )  # fmt: skip
            life = RayLife(name, lambda: self._tell(End(rank)), lambda: self._tell(Kill(number)))
            self._lives[number] = about, life
            self._send(about)
        return life, life.status

    def wait_connected(self, timeout_s: float) -> str:
        """The address of this node in the cluster. Raises StartupError where there is no connection."""
        with self._changed:
            self._changed.wait_for(lambda: self._connected is not None, timeout_s)
        if not isinstance(self._connected, Connected):
            why = "no answer" if self._connected is None else self._connected.why
            raise StartupError(f"--data-parallel-backend ray: {why}")
        return self._connected.host

    def restart(self) -> ChildProcess:
        """Start another shell in place of one that has ended, which begins what has been asked for since."""
        self._reader.join()
        self._settings = replace(self._settings, fresh=False)
        self.process = self._start()
        return self.process

    def close(self) -> None:
        stop([self.process])

    def _start(self) -> ChildProcess:
        ours, theirs = multiprocessing.Pipe()
        try:
            process = spawn(
                "ray", run_ray_shell, {"settings": self._settings, "pipe": theirs}, self._log_level
            )  # fmt: skip
        finally:
            theirs.close()
        with self._lock:
            self._pipe = ours
            for about, _ in self._lives.values():
                self._send(about)
        self._reader = threading.Thread(target=self._read, args=(ours,), name="ray-link", daemon=True)
        self._reader.start()
        return process

    def _send(self, order: Life | End | Kill) -> None:
        """Where there is a shell. Of one that has just ended `_read` hears, and says so of all lives."""
        if self._pipe is not None:
            with contextlib.suppress(OSError):
                self._pipe.send(order)

    def _tell(self, order: End | Kill) -> None:
        with self._lock:
            self._send(order)
            unbegun = self._pipe is None
            meant = [number for number, (about, _) in self._lives.items() if unbegun and _meant(order, about)]
        for number in meant:
            self._on_said(Ended(number, None, "it was ended"))

    def _read(self, pipe: Connection) -> None:
        """In a thread, one for each shell."""
        while True:
            try:
                self._on_said(pipe.recv())
            except (EOFError, OSError):
                break
        with self._lock:
            self._pipe = None
            lives, self._lives = self._lives, {}
        pipe.close()
        with self._changed:
            self._connected = self._connected or Failed("the process that speaks with Ray has ended")
            self._changed.notify_all()
        for _, life in lives.values():
            life.ended(AGAIN, "the connection to Ray has ended")

    def _on_said(self, said: Connected | Failed | Said | Ended) -> None:
        match said:
            case Connected() | Failed():
                with self._changed:
                    self._connected = said
                    self._changed.notify_all()
            case Said(number, status):
                if number in self._lives:
                    self._lives[number][1].say(status)
            case Ended(number, exit_code, why):
                with self._lock:
                    _, life = self._lives.pop(number, (None, None))
                if life is not None:
                    life.ended(exit_code, why)


def _meant(order: End | Kill, about: Life) -> bool:
    return about.rank == order.rank if isinstance(order, End) else about.life == order.life


def ray_address(given: str | None) -> str:
    """Which cluster to connect to. Raises ConfigError where the address is none of a cluster that runs."""
    address = given or os.environ.get("RAY_ADDRESS") or "auto"
    if address == "local" or "://" in address:
        text = f"must be HOST:PORT of a cluster that this node is in, or auto, not {address!r}"
        raise ConfigError(f"--ray-address: {text}")
    return address


def variables() -> dict[str, str]:
    """Those of this process that a rank has too, wherever it runs."""
    return {
        name: value for name, value in os.environ.items() if name.startswith(CARRIED) and name not in NOT_CARRIED
    }  # fmt: skip


def own_secret() -> bytes | None:
    """What this node's secret file holds. Raises StartupError."""
    path = os.environ.get(SECRET)
    if path is None:
        return None
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise StartupError(f"--secret-file: {path}: {error.strerror or error}") from None


def run_ray_shell(settings: ShellSettings, pipe: Connection) -> None:
    """The shell's process. Ray is imported there and nowhere else."""
    signal.signal(END, lambda *_: os._exit(0))
    try:
        from paceline.process.ray_shell import run_shell
    except ImportError as error:
        pipe.send(Failed(f"it needs Ray: pip install 'paceline[ray]' ({error})"))
        sys.exit(1)
    run_shell(settings, pipe)
