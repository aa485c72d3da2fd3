"""Late binding on the wire: descriptors of requests one way, grants and credits the other (`dispatch/queue.py`); what
has been sent.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from paceline.core.requests import Count, Identity, Message, RankNumber, Receipt

Blocks = Annotated[bytes, Meta(max_length=8 * 2048)]
Weight = Annotated[float, Meta(gt=0, le=1_000_000)]


class Descriptor(Message, frozen=True):
    """A request that waits at its front-end for a rank.

    `request`: the front-end's own id for it. `tokens`: of its prompt; `answer_tokens`: that its answer may come to
    have. `priority`: lower goes first. `waited_ms`: how long it has waited already. `blocks`, `session`: names of its
    prompt's beginnings, eight bytes each, and of its client's key (`core/blocks.py`); empty and 0 where unused.
    `tenant`, `weight`: whose it is, 0 for nobody's, and the part of the queue that is theirs.
    """

    request: Identity
    tokens: Count
    answer_tokens: Count
    priority: int = 0
    waited_ms: Count = 0
    blocks: Blocks = b""
    session: Identity = 0
    tenant: Identity = 0
    weight: Weight = 1.0


class Ask(Message, frozen=True, tag="ask"):
    """Queue these requests. Who asks has given back all shares up to `edition`, and uses none while requests wait.

    `told`: how many messages of this kind and Withdraw the front-end has sent in its life, this one included.
    `whole`: these are all that wait; what else the coordinator has of this front-end does not.
    """

    frontend: Identity
    told: Count
    edition: Count
    descriptors: list[Descriptor]
    whole: bool = False


class Withdraw(Message, frozen=True, tag="withdraw"):
    """These requests do not wait any more: their clients have gone, or they have a rank. `told`: as in Ask."""

    frontend: Identity
    told: Count
    requests: list[Identity]


class ReturnShares(Message, frozen=True, tag="return-shares"):
    """The front-end sends nothing more by shares of this `edition` or an earlier one."""

    frontend: Identity
    edition: Count


class Grant(Message, frozen=True):
    """The request goes to this life of this rank. Repeated until the front-end's SendNotice or Withdraw names it.

    `held`: tokens of its prompt believed to be there: the notice counts the others alone. `waited_ms`: as in
    Descriptor, when it was granted. `receipt`: where it belongs, if anybody holds its beginning.
    """

    frontend: Identity
    request: Identity
    rank: RankNumber
    incarnation: Identity
    held: Count = 0
    waited_ms: Count = 0
    receipt: Receipt | None = None


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

    frontend: Identity
    edition: Count
    shares: list[Share] = []


# Front-end -> coordinator: what is on its way ------------------------------------------------


class Send(Message, frozen=True):
    """One request sent: to which rank and life of it, its number there, its prompt tokens that are to be computed.

    `answer_tokens`: that its answer may come to have. `request`: as in Descriptor, of a request that waited; else 0.
    `held`: tokens of its prompt believed to be there. `blocks`, `session`: as in Descriptor, where it has not waited.
    """

    rank: RankNumber
    incarnation: Identity
    number: Count
    tokens: Count
    answer_tokens: Count = 0
    request: Identity = 0
    held: Count = 0
    blocks: Blocks = b""
    session: Identity = 0


class SendNotice(Message, frozen=True, tag="send-notice"):
    """What this front-end has just sent, so that the others see it before the rank reports it.

    `told`: how many sends, to whichever rank, this front-end has told of in its life, these included.
    """

    frontend: Identity
    sends: list[Send]
    told: Count = 0
