"""What a simulated deployment is made of."""

from __future__ import annotations

from msgspec import Struct

from paceline.core.rank.prefill_quota import OFF
from paceline.engines.timed import CostModel
from paceline.simulate.network import STEADY, Delays


class Shape(Struct, frozen=True):
    """What a deployment is made of.

    `grouped`: whether lockstep ranks form generations; else their engines have collectives of their own, and a
    rank's death is theirs to deal with. `connecting`: how long a connection takes to come up. `encode`: whether
    messages travel as bytes. `loss`: the share of the coordinator's broadcasts, and of front-ends' notices, that get
    lost. `same_address`: whether a rank's next life is reached where the last one was. `scatter`: whether ranks leave
    a collective a little apart. `late_binding`: whether front-ends' requests wait in the coordinator's queue.
    """

    ranks: int = 2
    frontends: int = 1
    lockstep: bool = True
    grouped: bool = True
    external: bool = False
    sync_interval: int = 16
    prefill_quota: int = OFF
    interval_s: float = 0.1
    costs: CostModel = CostModel()
    slots: int = 16
    budget: int = 512
    links: Delays = STEADY
    connecting: Delays = STEADY
    encode: bool = True
    loss: float = 0.0
    same_address: bool = False
    scatter: bool = False
    late_binding: bool = False
