"""Whether a connecting socket's one connection is up, as ZeroMQ's own thread sees it.

That thread answers and sends heartbeats whatever the program does, so a peer in a long step is up, and one that is
dead, stopped or cut off is not.
"""

from __future__ import annotations

from collections.abc import Callable

import zmq
from zmq.utils.monitor import parse_monitor_message

UP = zmq.EVENT_HANDSHAKE_SUCCEEDED
DOWN = zmq.EVENT_DISCONNECTED | zmq.EVENT_CONNECT_RETRIED


class LinkMonitor:
    """Watches one socket. `on_change` is called with True and False as the connection comes up and ends.

    What has not been up yet is taken to come up: only a try that failed is an end. The socket's owner calls `read`
    whenever `socket` can be read, and `close` before it closes its own.
    """

    def __init__(self, watched: zmq.Socket[bytes], on_change: Callable[[bool], None]) -> None:
        self._watched = watched
        self._on_change = on_change
        self._up = True
        self.socket: zmq.Socket[bytes] = watched.get_monitor_socket(UP | DOWN)

    def read(self) -> None:
        """Take in all that has happened."""
        while not self.socket.closed:
            try:
                frames = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            up = bool(parse_monitor_message(frames)["event"] & UP)
            if up != self._up:
                self._up = up
                self._on_change(up)

    def close(self) -> None:
        """Watch no more."""
        self._watched.disable_monitor()
        self.socket.close()
