"""The coordinator's process under vLLM from its first instruction: its sockets are bound before the rest is imported.

vLLM's launcher waits for the addresses, and then starts ranks, which takes seconds. Sockets that are bound keep what
comes. So what they need is imported first, pyzmq and little else, and the rest while others go on.

The three sockets of a coordinator under vLLM.
"""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import sys

import zmq

from paceline.core.limits import MAX_CONTROL_BYTES
from paceline.errors import StartupError
from paceline.net.sockets import bound_address, open_socket

REPORTS_KEPT = 1000
"""Messages of a rank that wait here; the rank keeps what is beyond. Each costs up to a kilobyte."""


class VllmSockets:
    """`front`: what front-ends hear, and say; `back_in`: what ranks say; `back_out`: what they hear. All are bound.

    Raises StartupError where an address cannot be.
    """

    def __init__(self, front_publish: str, back_output: str, back_publish: str) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        context, limit = self._context, MAX_CONTROL_BYTES
        # Each subscription is reported, not the first alone.
        each = {zmq.XPUB_VERBOSE: 1}
        # A subscription holds once it is taken up here: a rank must hear nothing before it is greeted.
        taken_up = {zmq.XPUB_MANUAL: 1}
        self.front = open_socket(context, zmq.XPUB, bind=front_publish, max_bytes=limit, options=each)
        self.back_in = open_socket(context, zmq.PULL, bind=back_output, max_bytes=limit, kept=REPORTS_KEPT)
        self.back_out = open_socket(context, zmq.XPUB, bind=back_publish, max_bytes=limit, options=taken_up)

    def addresses(self) -> tuple[str, str, str]:
        """Where each of the three can be reached: `front`, `back_in`, `back_out`."""
        return bound_address(self.front), bound_address(self.back_in), bound_address(self.back_out)

    def close(self) -> None:
        """Close all of them."""
        self._context.destroy(linger=0)


ADDRESSES = ("front_publish_address", "back_output_address", "back_publish_address")


def main(arguments: list[str]) -> None:
    """Run one coordinator: `arguments` holds its Settings as JSON."""
    settings = json.loads(arguments[0])
    channel = socket.socket(fileno=settings["channel"])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        sockets = VllmSockets(*[settings[name] for name in ADDRESSES])
    except StartupError as error:
        _say(channel, {"failed": str(error)})
        sys.exit(1)
    _say(channel, {"addresses": sockets.addresses()})

    from paceline.vllm import process as vllm_process

    vllm_process.run(arguments[0], channel, sockets)


def _say(channel: socket.socket, said: dict[str, object]) -> None:
    # Where the keeper is gone, the loop will see that.
    with contextlib.suppress(OSError):
        channel.send(json.dumps(said).encode())


if __name__ == "__main__":
    main(sys.argv[1:])
