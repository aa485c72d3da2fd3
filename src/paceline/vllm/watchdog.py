"""The watchdog: what vLLM watches as its coordinator, and what starts the coordinator again when that dies.

vLLM ends a deployment when its coordinator's process ends. This process is small enough not to: it imports the standard
library alone, holds no socket of the protocol, and remembers for the coordinator the few values that ranks cannot be
asked for again. A coordinator that dies is started anew at the same addresses at once, and when that fails, again and
again. The coordinator ends when the watchdog does, and the watchdog with its parent.

It also serves `/health` and `/loads`, which it asks the coordinator for: so they answer while there is none.
"""

from __future__ import annotations

import contextlib
import json
import logging
import select
import selectors
import signal
import socket
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from typing import Any

from paceline.process.spawn import END, Restarts, Wakeup

logger = logging.getLogger("paceline.vllm")

FIRST_WAIT_S, LONGEST_WAIT_S = 0.02, 1.0
LIVED_S = 1.0
"""A coordinator that lived so long did not fail at its start."""
ANSWER_S = 1.0
"""How long `/health` waits for the coordinator, and for its client."""
MOST_BYTES = 1 << 20


class Watchdog:
    """Keeps one coordinator running.

    `settings`: its Settings as a dict, without the channel, changed by what it says; the module that it is
    (`program`); and where to answer questions (`status_address`), if anywhere.

    `report`: gets the addresses once bound, or a string that says why they cannot be.
    """

    def __init__(self, settings: dict[str, Any], report: Connection | None) -> None:
        self._settings = settings
        self._program = settings.pop("program")
        self._report = report
        self._child: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None
        self._started_at = 0.0
        self._policy = Restarts(first_s=FIRST_WAIT_S, longest_s=LONGEST_WAIT_S, steady_s=LIVED_S)
        self._due: float | None = None
        self._restarts = 0
        self._stopping = False
        self._wakeup = Wakeup()
        self._selector = selectors.DefaultSelector()
        self._listener: socket.socket | None = None

    def run(self) -> None:
        """Keep it until stopped. Raises SystemExit where the first one does not come up."""
        if address := self._settings.pop("status_address", ""):
            self._listen(address)
        self._selector.register(self._wakeup, selectors.EVENT_READ, None)
        self._start()
        while not self._stopping:
            wait_s = None if self._due is None else max(0.0, self._due - time.monotonic())
            for key, _ in self._selector.select(wait_s):
                if key.fileobj is self._channel:
                    self._read()
                elif key.fileobj is self._listener:
                    self._serve()
            if self._due is not None and time.monotonic() >= self._due:
                self._due = None
                self._start()
        self._end()

    def stop(self) -> None:
        """Make `run` return. Safe in a signal handler."""
        self._stopping = True
        self._wakeup.set()

    def _start(self) -> None:
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._selector.register(self._channel, selectors.EVENT_READ, None)
        self._started_at = time.monotonic()
        with theirs:
            settings = json.dumps(self._settings | {"channel": theirs.fileno()})
            command = [sys.executable, "-m", self._program, settings]
            self._child = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()])

    def _read(self) -> None:
        """A word of the coordinator, or its end."""
        assert self._channel is not None
        try:
            packet = self._channel.recv(MOST_BYTES, socket.MSG_DONTWAIT)
        except BlockingIOError:
            # An answer of `/health` came in between and read it.
            return
        except OSError:
            packet = b""
        if not packet:
            self._on_end()
            return
        self._take(json.loads(packet))

    def _take(self, said: dict[str, Any]) -> None:
        if "memory" in said:
            self._settings["memory"] = said["memory"]
        if "addresses" in said:
            names = ("front_publish_address", "back_output_address", "back_publish_address")
            self._settings |= dict(zip(names, said["addresses"], strict=True))
            self._settings["restarted"] = True
            if self._report is not None:
                self._report.send(tuple(said["addresses"]))
                self._report = None
                logger.info("Paceline's coordinator is up, for %s ranks", self._settings["memory"]["size"])
        if "failed" in said:
            if self._report is not None:
                self._report.send(said["failed"])
                self._end()
                sys.exit(1)
            logger.error("the coordinator cannot start again: %s", said["failed"])

    def _on_end(self) -> None:
        status = self._close()
        if self._report is not None:
            self._report.send(f"it ended at its start (exit status {status})")
            sys.exit(1)
        self._restarts += 1
        now = time.monotonic()
        self._due = self._policy.ended(now - self._started_at, now)
        logger.warning("the coordinator has ended (%s) and is started again", status)

    def _close(self) -> int:
        """The channel has ended, so the process has or is about to."""
        assert self._channel is not None
        assert self._child is not None
        self._selector.unregister(self._channel)
        self._channel.close()
        self._channel = None
        try:
            return self._child.wait(1.0)
        except subprocess.TimeoutExpired:
            self._child.kill()
            return self._child.wait()

    def _end(self) -> None:
        if self._channel is not None:
            assert self._child is not None
            self._child.terminate()
            self._close()
        if self._listener is not None:
            self._listener.close()

    # Status -----------------------------------------------------------------------------------

    def _listen(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        try:
            self._listener = socket.create_server((host.strip("[]"), int(port)), backlog=16)
        except (OSError, ValueError, OverflowError) as error:
            # Not worth a deployment.
            logger.error("PACELINE_VLLM_STATUS: cannot listen at %s: %s", address, error)
            return
        self._selector.register(self._listener, selectors.EVENT_READ, None)

    def _serve(self) -> None:
        """One short answer a connection: the smallest HTTP that curl, a probe and `paceline loads` need."""
        assert self._listener is not None
        with contextlib.suppress(OSError):
            client, _ = self._listener.accept()
            with client:
                client.settimeout(ANSWER_S)
                client.sendall(self._answer(client.recv(8192)))

    def _answer(self, request: bytes) -> bytes:
        words = request.split(b" ", 2)
        path = words[1].partition(b"?")[0] if len(words) == 3 and words[0] == b"GET" else b""
        if path not in (b"/health", b"/loads"):
            return _response("404 Not Found", _error("GET /health or /loads"))
        known = self._ask()
        if known is None:
            return _response("503 Service Unavailable", _error("the coordinator is being started again"))
        if path == b"/loads":
            return _response("200 OK", {"ranks": known["loads"]})
        health = known["health"] | {"restarts": self._restarts}
        return _response("503 Service Unavailable" if health["stalls"] else "200 OK", health)

    def _ask(self) -> dict[str, Any] | None:
        """What the coordinator knows now; None where it does not answer in time."""
        if self._channel is None:
            return None
        end = time.monotonic() + ANSWER_S
        try:
            self._channel.send(b"?")
            while (left_s := end - time.monotonic()) > 0:
                if not select.select([self._channel], (), (), left_s)[0]:
                    return None
                packet = self._channel.recv(MOST_BYTES)
                if not packet:
                    return None
                said: dict[str, Any] = json.loads(packet)
                if "status" in said:
                    status: dict[str, Any] = said["status"]
                    return status
                self._take(said)
        except OSError:
            pass
        return None


def _response(status: str, content: dict[str, Any]) -> bytes:
    body = json.dumps(content).encode()
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\nConnection: close"
    return head.encode() + b"\r\n\r\n" + body


def _error(message: str) -> dict[str, Any]:
    return {"error": {"message": message}}


def run_watchdog(settings: dict[str, Any], report: Connection) -> None:
    watchdog = Watchdog(settings, report)
    for number in (signal.SIGTERM, END):
        signal.signal(number, lambda *_: watchdog.stop())
    watchdog.run()
