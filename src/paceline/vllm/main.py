"""The coordinator's process under vLLM from its first instruction: its sockets are bound before the rest is imported.

vLLM's launcher waits for the addresses, and then starts ranks, which takes seconds. Sockets that are bound keep what
comes. So what they need is imported first, pyzmq and little else, and the rest while others go on.
"""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import sys

import zmq

from paceline.errors import StartupError
from paceline.net.sockets import CoordinatorSockets

REPORTS_KEPT = 1000
"""Messages of a rank that wait here; the rank keeps what is beyond. Each costs up to a kilobyte."""
ADDRESSES = ("front_publish_address", "back_output_address", "back_publish_address")


def main(arguments: list[str]) -> None:
    """Run one coordinator: `arguments` holds its Settings as JSON."""
    settings = json.loads(arguments[0])
    channel = socket.socket(fileno=settings["channel"])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        sockets = CoordinatorSockets(
            *[settings[name] for name in ADDRESSES], kept=REPORTS_KEPT,
            # Each subscription is reported, not the first alone.
            front_options={zmq.XPUB_VERBOSE: 1},
            # A subscription holds once it is taken up here: a rank must hear nothing before it is greeted.
            back_options={zmq.XPUB_MANUAL: 1},
        )  # fmt: skip
    except StartupError as error:
        _say(channel, {"failed": str(error)})
        sys.exit(1)
    _say(channel, {"addresses": sockets.addresses()})

    from paceline.vllm import process as vllm_process

    vllm_process.run(arguments[0], channel, sockets)


def _say(channel: socket.socket, said: dict[str, object]) -> None:
    # Where the watchdog is gone, the loop will see that.
    with contextlib.suppress(OSError):
        channel.send(json.dumps(said).encode())


if __name__ == "__main__":
    main(sys.argv[1:])
