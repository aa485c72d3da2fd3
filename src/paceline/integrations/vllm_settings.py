"""What the keeper starts a coordinator under vLLM with, and what it hears from it.

Both cross a socket pair between the two processes as JSON: the keeper imports the standard library alone.
"""

from __future__ import annotations

from msgspec import Struct

from paceline.integrations.vllm_dialect import VllmDialect
from paceline.integrations.vllm_events import Memory


class Settings(Struct, frozen=True):
    """The three addresses to bind, how to speak, and what the coordinator before this one remembered.

    `channel`: the file descriptor of the socket pair. `interval_ms`: least time between two publications of loads.
    """

    channel: int
    front_publish_address: str
    back_output_address: str
    back_publish_address: str
    memory: Memory
    dialect: VllmDialect = VllmDialect()
    interval_ms: float = 10.0
    lockstep: bool = True
    publish_loads: bool = True
    restarted: bool = False
    stall_s: float = 30.0
    log_level: str = "info"


class Status(Struct, frozen=True):
    """What `/health` and `/loads` say."""

    health: dict[str, object]
    loads: list[dict[str, object]]


class Said(Struct, frozen=True, omit_defaults=True):
    """One word of the coordinator to its keeper: what to remember; how things stand. Before these it has said its
    `addresses`, or why there are none (`failed`): `vllm_main.py`.
    """

    memory: Memory | None = None
    status: Status | None = None
