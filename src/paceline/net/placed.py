"""What a rank finds out where it runs, since nobody could know it before: in a cluster that chooses nodes by itself.

Its addresses are those of the node. What its engine learns beforehand (where the model's files are, which devices it
sees) it learns there, too. All else is decided where the deployment is served. What must be the same at both is
compared, as with a node that joins.
"""

from __future__ import annotations

from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

from msgspec.structs import replace

from paceline.engines.base import EngineError
from paceline.engines.registry import find_engine
from paceline.errors import ConfigError, StartupError
from paceline.net.node import difference, facts_of, own_host
from paceline.net.sockets import tcp_address
from paceline.process.supervisor import Progressed

if TYPE_CHECKING:
    from paceline.net.rank import RankSettings


def placed(settings: RankSettings, facts: dict[str, str], status: Connection) -> RankSettings:
    """The settings with what is found here. `facts`: of the node that serves. Raises EngineError and StartupError."""
    config, parallel = settings.config, settings.config.parallel
    engine_class = find_engine(config.engine.engine)
    host = own_host(parallel.data_parallel_master_ip, parallel.data_parallel_rpc_port)
    # What is set aside for it is all that it sees.
    asked = replace(config.engine_settings(settings.rank), place=0, places=1, host=host)
    try:
        engine = engine_class.prepare(asked, lambda what, share: status.send(Progressed(what, share)))
    except ConfigError as error:
        raise EngineError(str(error)) from None
    if differs := difference(facts, facts_of(config, engine)):
        raise StartupError(f"its node differs from the one that serves (there, and here): {differs}")
    lockstep = engine_class.steps_together(engine)
    return replace(
        settings, engine=engine, facts=None,
        bind=tcp_address(host, parallel.rank_port(settings.rank, False)),
        group_bind=tcp_address(host, parallel.rank_port(settings.rank, True)) if lockstep else "",
    )  # fmt: skip
