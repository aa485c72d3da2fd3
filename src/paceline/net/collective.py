"""Collectives among the ranks of one epoch, which end at once when the epoch does.

A forward pass with collectives blocks until every rank takes part. When one dies, the others must not wait for
it: libraries made for training wait for a time-out of minutes, since to them a dead peer and a slow one look
the same. Here every pair of ranks holds a connection, and a rank that waits watches all of them. A peer's end closes
its connections, so each blocked call raises `EpochEnded` within milliseconds, whichever rank it was waiting for; a rank
that raises closes its own, which tells the rest. A slow peer keeps its connections and is waited for.

Small values are reduced through the first member (two short messages a member: on few cores that beats every
rank talking to every other). Arrays go straight to the rank they are for, all at the same time, because two ranks
that both send first, more than the sockets hold, would wait for each other.
"""

from __future__ import annotations

import re
import select
import socket
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from hmac import compare_digest

import numpy as np

from paceline.engines.group import MAX_REDUCED, Array, EpochEnded, RankGroup, Reduction, Waiting, reduced
from paceline.net.secret import TAG_BYTES, Seal, tag

MAX_PAYLOAD_BYTES = 1 << 30
"""For one member in one collective."""
ALIGNMENT_BYTES = 16
"""Elements begin at a multiple of this after the payload's first byte: NumPy copies what is not aligned."""

# The type's name, the number of dimensions; the shape follows.
ARRAY = struct.Struct("<8sB")


PLAIN_TYPE = re.compile(r"[<>|=][a-zA-Z]\d{1,6}(\[\w+\])?")


def array_parts(array: Array) -> list[bytes | memoryview]:
    """An array as bytes: its type and shape, then its elements. Raises ValueError for an array of objects."""
    if array.dtype.hasobject:
        raise ValueError("arrays of Python objects cannot be sent")
    flat = np.ascontiguousarray(array)
    head = ARRAY.pack(flat.dtype.str.encode(), flat.ndim) + struct.pack(f"<{flat.ndim}Q", *flat.shape)
    head += bytes(-len(head) % ALIGNMENT_BYTES)
    return [head, flat.reshape(-1).view(np.uint8).data if flat.size else b""]


def read_array(payload: bytes | memoryview) -> Array:
    """The array that `array_parts` wrote, over the same memory.

    Raises ValueError, TypeError or struct.error on anything else.
    """
    name, dimensions = ARRAY.unpack_from(payload)
    shape = struct.unpack_from(f"<{dimensions}Q", payload, ARRAY.size)
    named = name.rstrip(b"\0").decode("ascii")
    # NumPy would evaluate more than names.
    if not PLAIN_TYPE.fullmatch(named):
        raise ValueError(f"{named!r} is no type of an array")
    kind = np.dtype(named)
    if kind.hasobject:
        raise ValueError("an array of Python objects")
    head = ARRAY.size + 8 * dimensions
    return np.frombuffer(payload, kind, offset=head + -head % ALIGNMENT_BYTES).reshape(shape)


# kind, number of the collective in its epoch, bytes that follow
HEADER = struct.Struct("<BQI")
GATHER, RESULT, BLOCK = 1, 2, 3
URGENT = 0x80
"""Set in the kind: the sender wants the members to agree."""
HANG_UP = select.POLLRDHUP | select.POLLHUP | select.POLLERR


class SocketGroup(RankGroup):
    """A group over one stream socket for each pair of members. `net.group.form_group` makes one.

    `seals`: with whom messages are authenticated, all or none.
    """

    def __init__(
        self, epoch: int, rank: int, links: Mapping[int, socket.socket], seals: Mapping[int, Seal] | None = None
    ) -> None:
        super().__init__(epoch, rank, [rank, *links])
        self._links = dict(links)
        self._seals = seals or {}
        self._peers = [member for member in self.members if member != rank]
        self._number = 0
        self._name = ""
        self._begun_s = 0.0
        self._blocked: _Transfer | None = None
        self._ended = False
        self._urging = False
        self._urged = False
        for link in self._links.values():
            link.setblocking(False)

    def barrier(self) -> None:
        self._reduce("barrier", [0], "max")

    def all_reduce(self, values: Sequence[int], reduction: Reduction | Sequence[Reduction]) -> list[int]:
        return self._reduce("all_reduce", values, reduction)

    def _reduce(self, name: str, values: Sequence[int], reduction: Reduction | Sequence[Reduction]) -> list[int]:
        if not 1 <= len(values) <= MAX_REDUCED:
            raise ValueError(f"all_reduce takes 1 to {MAX_REDUCED} integers, not {len(values)}")
        if not self._peers:
            return list(values)
        layout = f"<{len(values)}q"
        own = struct.pack(layout, *values)
        self._begin(name)
        root = self.members[0]
        if self.rank != root:
            self._exchange(GATHER, {root: [own]}, [])
            return list(struct.unpack(layout, self._receive(RESULT, root, len(own))))
        gathered = self._exchange(GATHER, {}, self._peers)
        rows = [values, *(struct.unpack(layout, self._sized(gathered[peer], len(own))) for peer in self._peers)]
        result = reduced(rows, reduction)
        try:
            packed = struct.pack(layout, *result)
        except struct.error:
            raise self._end("the peers' integers are too large to be summed") from None
        self._exchange(RESULT, {peer: [packed] for peer in self._peers}, [])
        return result

    def all_to_all(self, arrays: Sequence[Array]) -> list[Array]:
        if len(arrays) != len(self.members):
            raise ValueError(f"all_to_all takes an array for each of {len(self.members)} members, not {len(arrays)}")
        self._begin("all_to_all")
        outgoing = {
            member: array_parts(array)
            for member, array in zip(self.members, arrays, strict=True)
            if member != self.rank
        }
        urging, self._urging = self._urging, False
        received = self._exchange(BLOCK, outgoing, self._peers, urging)
        own = self.members.index(self.rank)
        try:
            blocks = {peer: read_array(payload) for peer, payload in received.items()}
        except (ValueError, TypeError, struct.error) as error:
            raise self._end(f"a peer sent what is no array: {error}") from None
        return [arrays[own] if member == self.rank else blocks[member] for member in self.members]

    def urge(self) -> None:
        self._urging = True

    def urged(self) -> bool:
        urged, self._urged = self._urged, False
        return urged

    def waiting(self) -> Waiting | None:
        transfer = self._blocked
        if transfer is None or self._ended:
            return None
        answer = Waiting(self._number, self._name, transfer.missing(), time.monotonic() - self._begun_s)
        # The thread of the collectives goes on meanwhile: an answer pieced together of two of them is none.
        return answer if answer.ranks and self._blocked is transfer else None

    def leave(self) -> None:
        self._ended = True
        for link in self._links.values():
            # A shut-down wakes a thread that polls it, here and at the peer; a close alone would not.
            try:
                link.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue

    def close(self) -> None:
        self.leave()
        for link in self._links.values():
            link.close()

    def _begin(self, name: str) -> None:
        self._number += 1
        self._name = name
        self._begun_s = time.monotonic()

    # Bytes --------------------------------------------------------------------------------------

    def _receive(self, kind: int, peer: int, size: int) -> bytes:
        return self._sized(self._exchange(kind, {}, [peer])[peer], size)

    def _sized(self, payload: bytes, size: int) -> bytes:
        if len(payload) != size:
            raise self._end(f"a peer reduces {len(payload) // 8} integers, this rank {size // 8}")
        return payload

    def _exchange(
        self, kind: int, outgoing: Mapping[int, Sequence[bytes | memoryview]], incoming: Sequence[int],
        urging: bool = False,
    ) -> dict[int, bytes]:  # fmt: skip
        """Send a payload to each of `outgoing` and get one from each of `incoming`, all at a time."""
        if self._ended:
            raise EpochEnded(f"epoch {self.epoch} has ended")
        transfer = _Transfer(kind, self._number, outgoing, incoming, urging, self._seals)
        for peer in list(transfer.sending):
            self._guard(transfer.send, peer)
        for peer in list(transfer.receiving):
            self._guard(transfer.receive, peer)
        if transfer.sending or transfer.receiving:
            self._blocked = transfer
            while transfer.sending or transfer.receiving:
                self._wait(transfer)
            self._blocked = None
        self._urged = self._urged or transfer.urgent
        return transfer.received

    def _wait(self, transfer: _Transfer) -> None:
        poller = select.poll()
        by_descriptor: dict[int, int] = {}
        for peer, link in self._links.items():
            events = HANG_UP
            events |= select.POLLOUT if peer in transfer.sending else 0
            # A peer that is not awaited may be ahead and have sent already: that is no reason to wake up.
            events |= select.POLLIN if peer in transfer.receiving else 0
            poller.register(link, events)
            by_descriptor[link.fileno()] = peer
        gone: int | None = None
        for descriptor, events in poller.poll():
            peer = by_descriptor.get(descriptor, -1)
            if peer in transfer.receiving and events & (select.POLLIN | HANG_UP):
                # What it sent before it ended counts.
                self._guard(transfer.receive, peer)
            elif events & HANG_UP:
                gone = peer
            if peer in transfer.sending and events & select.POLLOUT:
                self._guard(transfer.send, peer)
        if gone is not None and (transfer.sending or transfer.receiving):
            raise self._end(f"rank {gone} has left")

    def _guard(self, move: Callable[[int, socket.socket], None], peer: int) -> None:
        try:
            move(peer, self._links[peer])
        except (ConnectionError, EOFError, OSError):
            raise self._end(f"rank {peer} has left") from None
        except _Confused as error:
            raise self._end(f"rank {peer}: {error}") from None

    def _end(self, why: str) -> EpochEnded:
        if self._ended:
            why = "this rank was told to leave"
        self.leave()
        return EpochEnded(f"epoch {self.epoch} has ended: {why}")


class _Confused(Exception):
    """A peer sent what does not belong here: another collective, too much, or what somebody else has written."""


class _Transfer:
    """One exchange under way: what is still to be sent to whom, and to be received from whom."""

    def __init__(
        self, kind: int, number: int, outgoing: Mapping[int, Sequence[bytes | memoryview]], incoming: Sequence[int],
        urging: bool, seals: Mapping[int, Seal],
    ) -> None:  # fmt: skip
        self._kind = kind
        self._seals, self._tag_bytes = seals, TAG_BYTES if seals else 0
        self.urgent = urging
        self._number = number
        self.sending: dict[int, list[memoryview]] = {}
        for peer, parts in outgoing.items():
            size = sum(len(part) for part in parts)
            if size > MAX_PAYLOAD_BYTES:
                raise ValueError(f"{size} bytes for rank {peer}, at most {MAX_PAYLOAD_BYTES} go in one message")
            header = HEADER.pack(kind | URGENT if urging else kind, number, size)
            whole = [header, *parts, *([tag(seals[peer].outgoing, [header, *parts])] if seals else [])]
            if size < 4096:
                self.sending[peer] = [memoryview(b"".join(whole))]
            else:
                self.sending[peer] = [memoryview(part) for part in whole if len(part)]
        self.receiving: dict[int, bytearray] = {peer: bytearray() for peer in incoming}
        self._sizes: dict[int, int] = {}
        self.received: dict[int, bytes] = {}

    def missing(self) -> tuple[int, ...]:
        """Ranks whose part has not come, or that do not take ours. For any thread."""
        while True:
            try:
                return tuple(sorted({*self.receiving, *self.sending}))
            except RuntimeError:
                # A part came meanwhile, and the dictionary shrank: at most once for each.
                continue

    def send(self, peer: int, link: socket.socket) -> None:
        """Send as much as goes. Raises ConnectionError."""
        parts = self.sending[peer]
        while parts:
            try:
                sent = link.send(parts[0])
            except BlockingIOError:
                return
            if sent < len(parts[0]):
                parts[0] = parts[0][sent:]
            else:
                parts.pop(0)
        del self.sending[peer]

    def receive(self, peer: int, link: socket.socket) -> None:
        """Read as much as there is of this message and no more. Raises EOFError, ConnectionError, _Confused."""
        buffer = self.receiving[peer]
        while True:
            size = self._sizes.get(peer)
            wanted = HEADER.size if size is None else HEADER.size + size + self._tag_bytes
            if len(buffer) == wanted:
                if size is not None:
                    whole = memoryview(buffer)
                    end = wanted - self._tag_bytes
                    if self._seals and not compare_digest(tag(self._seals[peer].incoming, [whole[:end]]), whole[end:]):
                        raise _Confused("what it sent is not what came")
                    self.received[peer] = bytes(whole[HEADER.size : end])
                    del self.receiving[peer]
                    return
                self._sizes[peer] = self._size_of(buffer)
                continue
            try:
                data = link.recv(min(wanted - len(buffer), 1 << 20))
            except BlockingIOError:
                return
            if not data:
                raise EOFError
            buffer += data

    def _size_of(self, header: bytearray) -> int:
        kind, number, size = HEADER.unpack(header)
        self.urgent = self.urgent or bool(kind & URGENT)
        kind &= ~URGENT
        if (kind, number) != (self._kind, self._number):
            raise _Confused(f"is at collective {number} ({kind}), this rank at {self._number} ({self._kind})")
        if size > MAX_PAYLOAD_BYTES:
            raise _Confused(f"sends {size} bytes")
        return int(size)
