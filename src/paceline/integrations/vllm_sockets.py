"""The three sockets of a coordinator under vLLM."""

from __future__ import annotations

import zmq

from paceline.protocol.limits import MAX_CONTROL_BYTES
from paceline.runtime.sockets import bound_address, open_socket

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
