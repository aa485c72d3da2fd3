"""What the coordinator tells the ranks: who joins, which group they form, when they run (rules: `messages.py`)."""

from __future__ import annotations

from paceline.protocol.control_messages import Suspension
from paceline.protocol.sampling import Address, Count, Identity, Message, RankNumber, Wave
from paceline.protocol.scaling_messages import Scaling

# Coordinator -> ranks (XPUB -> XSUB) -----------------------------------------------------------


class Identify(Message, frozen=True, tag="identify"):
    """The coordinator asks every rank to say who it is; each answers with a RankHello."""

    version: Count
    coordinator: Identity


class Admit(Message, frozen=True, tag="admit"):
    """Tells one rank the wave and the suspension. From here on it may call itself ready."""

    rank: RankNumber
    incarnation: Identity
    wave: Wave
    suspension: Suspension | None = None


class GroupMember(Message, frozen=True):
    """One rank of a generation, and where the others reach it."""

    rank: RankNumber
    incarnation: Identity
    address: Address


class Form(Message, frozen=True, tag="form"):
    """The ranks form this generation, in place of any before; a joining rank takes up the wave and may call itself
    ready when it has. Each member answers with a RankHello that names the generation.
    """

    generation: Count
    wave: Wave
    members: list[GroupMember]
    suspension: Suspension | None = None


class StartDPWave(Message, frozen=True, tag="start-dp-wave"):
    """Every paused rank starts running in `wave`, but for `exclude`, which runs already."""

    wave: Wave
    exclude: RankNumber | None = None


ToRank = Identify | Admit | Form | Suspension | StartDPWave | Scaling
