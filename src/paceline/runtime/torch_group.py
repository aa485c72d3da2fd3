"""A `RankGroup` of torch.distributed: gloo on the CPU, NCCL between GPUs. Needs the extra `torch`.

A torch process group takes a dead peer for a slow one until its time-out, unless the call happens to wait for that
very peer, and gloo's blocked calls cannot be aborted. So the members also hold the connections of `group_link`, one a
pair, which a member's end closes: whoever waits for torch looks at them 20 times a second. Where one is closed, the
call raises GenerationEnded and the torch operation is left behind; it fails by itself as the members, one after the
other, drop their process groups. Every generation has a process group and a store of its own, and nothing global.

Each collective begins with an all-gather of one row a member: which collective it is, and its integers. A reduction
needs no more; an all-to-all gathers the sizes that way, then sends bytes. So members that disagree on the collective
see it, where torch would wait or mix up their data.

The NCCL part has not been run on GPUs.
"""

from __future__ import annotations

import contextlib
import ctypes
import select
import socket
import struct
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from itertools import accumulate
from typing import Any

import numpy as np
import torch

from paceline.engines.group import (
    MAX_REDUCED,
    REDUCTIONS,
    Array,
    GenerationEnded,
    RankGroup,
    Reduction,
    Waiting,
    reduced,
)
from paceline.runtime.array_bytes import ALIGNMENT_BYTES, MAX_PAYLOAD_BYTES, array_parts, read_array
from paceline.runtime.collective import HANG_UP

LOOK = timedelta(seconds=0.05)
"""How long a call waits for torch before it looks at the peers."""
NCCL_LOOK_S = 0.001
SLOWEST_MEMBER = timedelta(days=7)
"""torch's time-out. A slow member is waited for; a dead one shows on its connection."""

KINDS = ["barrier", *REDUCTIONS, "mixed", "all_to_all"]
HEAD = 3  # of a row: index in KINDS, number of the collective, how many integers follow
STEP = struct.Struct("<Q")


class TorchGroup(RankGroup):
    """A group over a torch process group. `torch_link.form_torch_group` makes one."""

    def __init__(
        self, generation: int, rank: int, links: Mapping[int, socket.socket], backend: Any, device: str
    ) -> None:
        super().__init__(generation, rank, [rank, *links])
        self._links = dict(links)
        self._backend = backend
        self._device = device
        self._own = self.members.index(rank)
        self._ended = False
        width = HEAD + max(MAX_REDUCED, len(self.members))
        self._row = np.zeros(width, np.int64)
        self._rows = np.zeros((len(self.members), width), np.int64)
        # Every torch operation is a step. A blocked member tells its step on the links, so that all know who is late.
        self._number = 0
        self._step = 0
        self._name = ""
        self._begun_s = 0.0
        self._blocked = False
        self._told = 0
        self._reached = dict.fromkeys(self._links, 0)
        self._unread = dict.fromkeys(self._links, b"")
        for link in self._links.values():
            link.setblocking(False)

    def barrier(self) -> None:
        self._gather("barrier", "barrier", [])

    def all_reduce(self, values: Sequence[int], reduction: Reduction | Sequence[Reduction]) -> list[int]:
        if not 1 <= len(values) <= MAX_REDUCED:
            raise ValueError(f"all_reduce takes 1 to {MAX_REDUCED} integers, not {len(values)}")
        kind = reduction if isinstance(reduction, str) else "mixed"
        rows = self._gather("all_reduce", kind, values)
        return reduced(rows, reduction) if self._links else list(values)

    def all_to_all(self, arrays: Sequence[Array]) -> list[Array]:
        if len(arrays) != len(self.members):
            raise ValueError(f"all_to_all takes an array for each of {len(self.members)} members, not {len(arrays)}")
        payloads = [b"" if i == self._own else b"".join(array_parts(array)) for i, array in enumerate(arrays)]
        sizes = [len(payload) for payload in payloads]
        if max(sizes) > MAX_PAYLOAD_BYTES:
            raise ValueError(f"{max(sizes)} bytes for one member, at most {MAX_PAYLOAD_BYTES} go in one message")
        rows = self._gather("all_to_all", "all_to_all", sizes)
        if not self._links:
            return list(arrays)
        received = self._exchange(payloads, [row[self._own] for row in rows])
        try:
            return [arrays[i] if i == self._own else read_array(part) for i, part in enumerate(received)]
        except (ValueError, TypeError, struct.error) as error:
            raise self._end(f"a peer sent what is no array: {error}") from None

    def waiting(self) -> Waiting | None:
        # A member that is blocked too has said so within LOOK.
        step = self._step
        if not self._blocked or self._ended:
            return None
        ranks = tuple(peer for peer in self.members if peer != self.rank and self._reached[peer] < step)
        answer = Waiting(self._number, self._name, ranks, time.monotonic() - self._begun_s)
        return answer if self._blocked and self._step == step else None

    def leave(self) -> None:
        self._ended = True
        for link in self._links.values():
            with contextlib.suppress(OSError):
                link.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.leave()
        self._backend = None
        for link in self._links.values():
            link.close()

    # Steps --------------------------------------------------------------------------------------

    def _gather(self, name: str, kind: str, values: Sequence[int]) -> list[list[int]]:
        """The integers of every member, in the order of members, all for the same collective."""
        self._number += 1
        self._name = name
        self._begun_s = time.monotonic()
        row = self._row
        row[:HEAD] = KINDS.index(kind), self._number, len(values)
        row[HEAD : HEAD + len(values)] = values
        if not self._links:
            return [list(values)]
        own = torch.from_numpy(row).to(self._device)
        gathered = torch.from_numpy(self._rows).to(self._device)
        self._finish(self._start("allgather", [list(gathered.unbind())], [own]))
        rows = gathered.tolist() if self._device == "cpu" else gathered.cpu().tolist()
        head = row[:HEAD].tolist()
        for member, theirs in zip(self.members, rows, strict=True):
            if theirs[:HEAD] != head:
                raise self._end(f"rank {member} is at collective {_named(theirs)}, this rank at {_named(head)}")
        return [theirs[HEAD : HEAD + len(values)] for theirs in rows]

    def _exchange(self, payloads: Sequence[bytes], sizes: Sequence[int]) -> list[memoryview]:
        """Send each member its bytes, and receive `sizes` bytes from each."""
        # Each part begins aligned in the whole.
        outgoing = b"".join(payload + bytes(-len(payload) % ALIGNMENT_BYTES) for payload in payloads)
        splits = [_aligned(len(payload)) for payload in payloads]
        incoming = [_aligned(size) for size in sizes]
        sent = torch.frombuffer(bytearray(outgoing), dtype=torch.uint8).to(self._device)
        received = torch.empty(sum(incoming), dtype=torch.uint8, device=self._device)
        self._finish(self._start("alltoall_base", received, sent, incoming, splits))
        memory = memoryview(received.cpu().numpy()).toreadonly()
        starts = accumulate(incoming, initial=0)
        return [memory[start : start + size] for start, size in zip(starts, sizes, strict=False)]

    def _start(self, operation: str, *arguments: Any) -> Any:
        """Begin a torch operation and return it."""
        if self._ended:
            self._backend = None  # nothing is under way here; elsewhere something may wait for this to close
            raise GenerationEnded(f"generation {self.generation} has ended")
        self._step += 1
        try:
            return getattr(self._backend, operation)(*arguments)
        except RuntimeError as error:
            raise self._end(first_line(error)) from None

    def _finish(self, work: Any) -> None:
        """Wait for a torch operation, with an eye on the peers."""
        self._blocked = True
        try:
            while not self._completes(work):
                gone = self._look()
                if gone is not None or self._ended:
                    raise self._end(f"rank {gone} has left")
        finally:
            self._blocked = False
            if not work.is_completed():
                _leave_behind(self._backend, work, self._device)
                self._backend = None

    def _completes(self, work: Any) -> bool:
        """Wait a little; whether the operation is done."""
        # NCCL's own wait with a time-out aborts the group; it is asked instead.
        if self._device != "cpu" and not work.is_completed():
            time.sleep(NCCL_LOOK_S)
            return False
        with contextlib.suppress(RuntimeError):
            work.wait(LOOK)
            return True
        if not work.is_completed():
            return False
        try:
            # It has failed, or ended well right after the time was up.
            work.wait()
        except RuntimeError as error:
            raise self._end(first_line(error)) from None
        return True

    def _look(self) -> int | None:
        """Tell the peers this rank's step and read theirs. Returns one that is gone."""
        poller = select.poll()
        peers = {link.fileno(): peer for peer, link in self._links.items()}
        for descriptor, peer in peers.items():
            if self._told < self._step:
                # A link is full only where the peer has not read for thousands of steps: it learns the next.
                with contextlib.suppress(OSError):
                    self._links[peer].send(STEP.pack(self._step))
            poller.register(descriptor, select.POLLIN | HANG_UP)
        self._told = self._step
        for descriptor, events in poller.poll(0):
            peer = peers.get(descriptor, -1)
            if events & HANG_UP or not self._read(peer):
                return peer
        return None

    def _read(self, peer: int) -> bool:
        """Read the steps a peer has told; whether it is still there."""
        try:
            data = self._links[peer].recv(1 << 16)
        except BlockingIOError:
            return True
        except OSError:
            return False
        unread = self._unread[peer] + data
        whole = len(unread) - len(unread) % STEP.size
        if whole:
            self._reached[peer] = STEP.unpack_from(unread, whole - STEP.size)[0]
        self._unread[peer] = unread[whole:]
        return bool(data)

    def _end(self, why: str) -> GenerationEnded:
        if self._ended:
            why = "this rank was told to leave"
        self.leave()
        return GenerationEnded(f"generation {self.generation} has ended: {why}")


# Operations left behind -------------------------------------------------------------------------

_left_behind: list[tuple[Any, Any]] = []


def _leave_behind(made: Any, work: Any, device: str) -> None:
    """Keep a process group whose operation is under way: to free it would wait for the operation.

    The operation fails when the last member that takes part drops its own; the next generation's forming then frees
    both. At the end of the process they must not be freed, hence a reference that nobody holds.
    """
    if device != "cpu":
        made.abort()
        return
    pair = (made, work)
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(pair))
    _left_behind.append(pair)


def sweep() -> None:
    """Free what was left behind and has ended since."""
    for pair in list(_left_behind):
        if pair[1].is_completed():
            try:
                _left_behind.remove(pair)
            except ValueError:  # another thread was faster
                continue
            ctypes.pythonapi.Py_DecRef(ctypes.py_object(pair))


def _aligned(size: int) -> int:
    return size + -size % ALIGNMENT_BYTES


def _named(head: Sequence[int]) -> str:
    kind = KINDS[head[0]] if 0 <= head[0] < len(KINDS) else "?"
    return f"{head[1]} ({kind} of {head[2]})"


def first_line(error: BaseException) -> str:
    """What torch says, without the stack that follows."""
    return (str(error).splitlines() or [""])[0]
