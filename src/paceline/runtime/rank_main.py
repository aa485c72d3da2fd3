"""The target of a rank's process: make the engine, join, serve, and tell the supervisor how it goes."""

from __future__ import annotations

import os
import signal
import sys
from multiprocessing.connection import Connection

from msgspec import Struct

from paceline.engines.base import EngineError, EngineSettings
from paceline.engines.registry import find_engine
from paceline.errors import StartupError
from paceline.protocol.quota import AUTO, OFF
from paceline.protocol.rank import Rank
from paceline.runtime.carrier import Carrier
from paceline.runtime.identity import new_identity
from paceline.runtime.rank_process import SWITCH_INTERVAL_S, EngineRank
from paceline.runtime.status import Failed, Progressed, Ready


class RankSettings(Struct, frozen=True):
    """What one rank's process needs to know.

    `bind`: where front-ends reach it. `coordinator_input`, `coordinator_output`: as
    `DPCoordinator.get_engine_socket_addresses()` returns them. `report_loads`: False in external mode.
    `group_bind`: where the other ranks reach it, for lockstep engines. `sync_interval`: steps between agreements.
    `stall_timeout_s`: how long it waits for its peers in a collective before it says so.
    `prefill_quota`: how it is set (`protocol/quota.py`), for lockstep engines.
    """

    engine: str
    settings: EngineSettings
    bind: str
    coordinator_input: str
    coordinator_output: str
    report_loads: bool = True
    group_bind: str = ""
    sync_interval: int = 16
    stall_timeout_s: float = 30.0
    prefill_quota: int = AUTO


def run_rank(settings: RankSettings, status: Connection) -> None:
    """Serve until SIGTERM. Raises StartupError after telling `status` why the rank cannot be."""
    stopping: list[EngineRank | None] = [None]

    def on_terminate(*_: object) -> None:
        if stopping[0] is None:
            # It has joined nothing, and owes nobody anything. An exception need not end it: raised in a callback of the
            # import machinery it is printed and forgotten.
            os._exit(0)
        stopping[0].stop()

    signal.signal(signal.SIGTERM, on_terminate)
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    try:
        stopping[0] = rank = _make(settings, status)
        rank.run()
    except (EngineError, StartupError) as error:
        status.send(Failed(str(error)))
        sys.exit(1)
    except Exception as error:
        status.send(Failed(f"internal error: {type(error).__name__}: {error}"))
        raise


def _make(settings: RankSettings, status: Connection) -> EngineRank:
    engine_class = find_engine(settings.engine)
    number = settings.settings.rank
    engine = engine_class.create(settings.settings, lambda what, share: status.send(Progressed(what, share)))
    incarnation = new_identity()
    carrier = Carrier(number, incarnation, settings.bind, settings.coordinator_input, settings.coordinator_output)
    seat = None
    if engine_class.lockstep:
        from paceline.runtime.group_seat import GroupSeat

        seat = GroupSeat(number, settings.group_bind)
    machine = Rank(
        number, incarnation, carrier.address, lockstep=engine_class.lockstep, report_loads=settings.report_loads,
        sync_interval=settings.sync_interval, group_address=seat.address if seat is not None else "",
        prefill_quota=settings.prefill_quota if engine_class.lockstep else OFF,
    )  # fmt: skip
    return EngineRank(engine, machine, carrier, seat, settings.stall_timeout_s, on_ready=lambda: status.send(Ready()))
