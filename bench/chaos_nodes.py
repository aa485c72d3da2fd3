"""Chaos over two nodes, each in a network namespace of its own: to the faults of one machine come links that are cut,
a worker node that dies, and a head that dies. What has died is started again, as a service manager would.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import openai
from bench.chaos_mischief import FAULTS, RANKS, Mischief, Tally
from tests.namespaces import Host, hosts
from tests.serving import Command

PORT = 8000
LOCAL = RANKS // 2
HEAD, WORKER = "head", "worker"
NODE_FAULTS = ("cut a link", "cut a link", "kill a node", "kill the head")
CUTS_S = (0.3, 1.5, 5.0)
AWAY_S = (0.0, 1.0, 4.0)
"""How long what was killed is away."""
SERVES_S = 120.0


class Nodes:
    """A head and a worker, over all their lives. `arguments`: of both."""

    def __init__(self, arguments: list[str], head: Host, worker: Host, folder: Path) -> None:
        self._hosts = {HEAD: head, WORKER: worker}
        self._lives: dict[str, Command] = {}
        self._before: list[str] = []
        self.url = f"http://{head.address}:{PORT}"
        self.admin_key = folder.name
        common = ["serve", *arguments, "-dp", str(RANKS), "-dpl", str(LOCAL), "-dpa", head.address]
        common += ["--secret-file", str(folder / "secret"), "--admin-key", self.admin_key]
        self._commands = {
            HEAD: [*common, "--host", "0.0.0.0", "--port", str(PORT)],
            WORKER: [*common, "--headless", "--data-parallel-start-rank", str(LOCAL)],
        }

    def start(self, node: str) -> None:
        self._lives[node] = Command(*self._commands[node], prefix=self._hosts[node].prefix)

    def wait_serves(self) -> None:
        self._lives[HEAD].wait_line("serves on http", SERVES_S)

    def kill(self, node: str) -> None:
        """Its main process; the others end with it."""
        life = self._lives[node]
        life.signal(signal.SIGKILL)
        life.wait_end()
        self._before += life.lines
        life.close()

    def cut(self, node: str, cut: bool) -> None:
        self._hosts[node].cut(cut)

    @property
    def lines(self) -> list[str]:
        return [*self._before, *(line for life in self._lives.values() for line in life.lines)]

    @property
    def output(self) -> str:
        return "".join(self.lines)

    def children(self) -> list[int]:
        return [pid for life in list(self._lives.values()) for pid in life.children()]

    @property
    def openai(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60.0)

    def close(self) -> None:
        for life in self._lives.values():
            life.close()


@contextlib.contextmanager
def two_nodes(arguments: list[str]) -> Iterator[Nodes]:
    """Both, serving; gone at the block's end."""
    from paceline.net.secret import make

    with tempfile.TemporaryDirectory() as folder, hosts(2) as (head, worker):
        make(Path(folder) / "secret")
        running = Nodes(arguments, head, worker, Path(folder))
        try:
            for node in (HEAD, WORKER):
                running.start(node)
            running.wait_serves()
            yield running
        except BaseException:
            print(running.output, file=sys.stderr)
            raise
        finally:
            running.close()


class NodesMischief(Mischief):
    """One rank is not left alone here: a node with all of its own may go."""

    faults = (*FAULTS, *NODE_FAULTS)

    def __init__(self, running: Nodes, seed: int, tally: Tally) -> None:
        super().__init__(running, seed, tally)
        self._nodes = running
        self._mend_at: float | None = None

    def _strike(self, kind: str) -> bool:
        nodes, away_s = self._nodes, self._random.choice(AWAY_S)
        if kind.startswith("cut"):
            if self._mend_at is not None:
                return False
            nodes.cut(WORKER, True)
            self._mend_at = time.monotonic() + self._random.choice(CUTS_S)
            return True
        if kind not in NODE_FAULTS:
            return super()._strike(kind)
        node = HEAD if kind.endswith("head") else WORKER
        # What was stopped dies with its parent once it goes on.
        self._wake(everybody=True)
        nodes.kill(node)
        time.sleep(away_s)
        nodes.start(node)
        if node == HEAD:
            self._mend()
            nodes.wait_serves()
        return True

    def _left(self, what: str) -> int:
        """Of ranks and front-ends at the head: the least that there may be, so that not all of them are struck."""
        return len([name for name in self._names() if name.startswith(f"pl:{what}")]) - len(self._stopped)

    def _names(self) -> list[str]:
        names = []
        for pid in self._nodes.children():
            with contextlib.suppress(OSError):
                names.append(Path(f"/proc/{pid}/comm").read_text().strip())
        return names

    def _wake(self, *, everybody: bool = False) -> None:
        super()._wake(everybody=everybody)
        if self._mend_at is not None and (everybody or time.monotonic() >= self._mend_at):
            self._mend()

    def _mend(self) -> None:
        self._nodes.cut(WORKER, False)
        self._mend_at = None
