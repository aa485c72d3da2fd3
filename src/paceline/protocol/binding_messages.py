"""Brokered binding: descriptors one way, grants and shares the other (`broker.py` has the rules)."""

from __future__ import annotations

from paceline.protocol.sampling import Count, Identity, Message, RankNumber

# Front-end -> coordinator ---------------------------------------------------------------------


class Descriptor(Message, frozen=True):
    """A request that waits at its front-end for a rank.

    `request`: the front-end's own id for it. `tokens`: of its prompt; `answer_tokens`: that its answer may come to
    have. `priority`: lower goes first. `waited_ms`: how long it has waited already.
    """

    request: Identity
    tokens: Count
    answer_tokens: Count
    priority: int = 0
    waited_ms: Count = 0


class Ask(Message, frozen=True, tag="ask"):
    """Queue these requests. Who asks has given back all shares up to `edition`, and uses none while requests wait.

    `told`: how many messages of this kind and Withdraw the front-end has sent in its life, this one included.
    `whole`: these are all that wait; what else the coordinator has of this front-end does not.
    """

    front_end: Identity
    told: Count
    edition: Count
    descriptors: list[Descriptor]
    whole: bool = False


class Withdraw(Message, frozen=True, tag="withdraw"):
    """These requests do not wait any more: their clients have gone, or they have a rank. `told`: as in Ask."""

    front_end: Identity
    told: Count
    requests: list[Identity]


class ReturnShares(Message, frozen=True, tag="return-shares"):
    """The front-end sends nothing more by shares of this `edition` or an earlier one."""

    front_end: Identity
    edition: Count


# Coordinator -> front-ends --------------------------------------------------------------------


class Grant(Message, frozen=True):
    """The request goes to this life of this rank. Repeated until the front-end's SendNotice or Withdraw names it."""

    front_end: Identity
    request: Identity
    rank: RankNumber
    incarnation: Identity


class Grants(Message, frozen=True, tag="grants"):
    """New and unconfirmed grants. Sent again and again while any descriptor is there, also without any grant.

    `asked`: per front-end of which there are descriptors, the `told` up to which every message of it came.
    `queued`: descriptors that wait. `recall`: whoever holds shares gives them back (ReturnShares). `queues`: where not
    all front-ends balance over the same ranks, how many wait in each one's queue.
    """

    coordinator: Identity
    grants: list[Grant]
    asked: dict[Identity, Count]
    queued: Count
    recall: bool = False
    queues: dict[Identity, Count] = {}


class Share(Message, frozen=True):
    """What a front-end may send to a rank by itself, beyond its sends that the view has heard of.

    `requests`: how many; `tokens`: of their prompts together; `kv_tokens`: of prompts and answers together.
    """

    rank: RankNumber
    incarnation: Identity
    requests: Count
    tokens: Count
    kv_tokens: Count


class Shares(Message, frozen=True):
    """One front-end's shares, in place of those before. `edition`: grows by one after they were given back."""

    front_end: Identity
    edition: Count
    shares: list[Share] = []
