"""Under vLLM's own API servers: which rank gets a request, where the environment says `PACELINE_VLLM_ROUTING=1`.

vLLM's servers each choose by counts of requests that are up to 100 ms old, and multiply their own by the number of
servers. Here all servers of a machine share what they have in flight, exactly and at once, in a file in memory: each
writes its own row and reads all. A rank's cost for a request is, in tokens: prompts that were sent to it and have no
token yet, what of this prompt it has not computed before, and a little for each answer that it is writing. So whoever
holds the beginning of the prompt gets it, until others would have it computed sooner anyway.

The choice goes into `DPLBAsyncMPClient.get_core_engine_for_request` as if the client had named the rank; the rest of
that stays vLLM's. Without the variable nothing here is imported.
"""

from __future__ import annotations

import fcntl
import hashlib
import mmap
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from msgspec import Struct

from paceline.core.blocks import block_hashes

DECODING_TOKENS = 8
"""What an answer that is being written costs a rank, beside prompts."""
FULL = 0.95
"""Above this share of its KV a rank would make a prompt wait."""
BLOCK_TOKENS = 32
SLOTS = 1 << 16
SHARED_MEMORY = "/dev/shm"
WORD = 8


class Sent(Struct):
    """A request in flight: to which rank, and its prompt's tokens while no token of its answer has come."""

    rank: int
    pending: int


class Board:
    """What all API servers have in flight, in memory that they share; and which rank had a block of a prompt last.

    `name`: the same at all servers of one deployment, and at no others.
    """

    def __init__(self, name: str, servers: int, server: int, ranks: int) -> None:
        self._ranks, self._servers = ranks, servers
        self._row = server * ranks * 2
        counts = servers * ranks * 2
        folder = SHARED_MEMORY if os.path.isdir(SHARED_MEMORY) else tempfile.gettempdir()
        digest = hashlib.blake2b(f"{os.getuid()} {name}".encode(), digest_size=8).hexdigest()
        self.path = Path(folder, f"paceline-vllm-{digest}")
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            size = WORD * (1 + counts + 2 * SLOTS)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            os.ftruncate(descriptor, size)
            words = memoryview(mmap.mmap(descriptor, size)).cast("q")
            words[0] += 1
            if words[0] >= servers:
                # All have it: the name is of no use any more, and nothing is left when they end.
                self.path.unlink(missing_ok=True)
        finally:
            # The map has a descriptor of its own, with which the lock would live on.
            fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)
        keys = 1 + counts
        self._counts, self._keys, self._holders = words[1:keys], words[keys : keys + SLOTS], words[keys + SLOTS :]
        # One that was here before has ended with all that it had.
        for place in range(self._row, self._row + ranks * 2):
            self._counts[place] = 0

    def add(self, rank: int, requests: int, tokens: int) -> None:
        """This server has so many more in flight."""
        place = self._row + 2 * rank
        self._counts[place] += requests
        self._counts[place + 1] += tokens

    def totals(self, rank: int) -> tuple[int, int]:
        """Requests in flight at a rank, of all servers, and tokens of prompts that have no token yet."""
        places = [2 * (server * self._ranks + rank) for server in range(self._servers)]
        return sum(self._counts[place] for place in places), sum(self._counts[place + 1] for place in places)

    def held(self, blocks: Sequence[int]) -> dict[int, int]:
        """Of the beginning of a prompt, by rank, how many blocks in a row it had last."""
        found: dict[int, int] = {}
        for index, block in enumerate(blocks):
            slot = block % SLOTS
            if self._keys[slot] != block:
                break
            rank = self._holders[slot]
            if found.get(rank, 0) == index:
                found[rank] = index + 1
        return found

    def hold(self, blocks: Sequence[int], rank: int) -> None:
        for block in blocks:
            self._keys[block % SLOTS] = block
            self._holders[block % SLOTS] = rank


class ServerRouter:
    """One API server's choices. `first`: where to begin among equals."""

    def __init__(self, board: Board, ranks: int, first: int) -> None:
        self.board = board
        self._ranks, self._first = ranks, first
        self._sent: dict[str, Sent] = {}

    def choose(self, request: str, tokens: Sequence[int], used: Sequence[float]) -> int:
        """The rank for a request, which counts as sent there. `used`: the share of each rank's KV that is taken."""
        blocks = block_hashes(tokens, BLOCK_TOKENS)
        held = self.board.held(blocks)
        order = [(self._first + step) % self._ranks for step in range(self._ranks)]
        self._first = (self._first + 1) % self._ranks

        def cost(rank: int) -> tuple[bool, int]:
            requests, pending = self.board.totals(rank)
            lacking = len(tokens) - BLOCK_TOKENS * held.get(rank, 0)
            return used[rank] > FULL, pending + lacking + DECODING_TOKENS * requests

        rank = min(order, key=cost)
        self._sent[request] = Sent(rank, max(1, len(tokens) - BLOCK_TOKENS * held.get(rank, 0)))
        self.board.add(rank, 1, self._sent[request].pending)
        self.board.hold(blocks, rank)
        return rank

    def begun(self, request: str) -> None:
        """It has a token of its answer."""
        sent = self._sent.get(request)
        if sent is not None and sent.pending:
            self.board.add(sent.rank, 0, -sent.pending)
            sent.pending = 0

    def ended(self, request: str) -> None:
        sent = self._sent.pop(request, None)
        if sent is not None:
            self.board.add(sent.rank, -1, -sent.pending)


# vLLM's client ------------------------------------------------------------------------------------


def install(client: Any) -> None:
    """Let vLLM's class of clients (`DPLBAsyncMPClient`) choose so."""
    choose, read = client.get_core_engine_for_request, client.process_engine_outputs

    def router_of(self: Any) -> ServerRouter:
        made: ServerRouter | None = getattr(self, "paceline_router", None)
        ranks = len(self.core_engines)
        if made is None or self.paceline_ranks != ranks:
            board = Board(f"{self.stats_update_address} {ranks}", self.client_count, self.client_index, ranks)
            made = self.paceline_router = ServerRouter(board, ranks, self.eng_start_index)
            self.paceline_ranks = ranks
        return made

    def chosen(self: Any, request: Any) -> Any:
        known = request.request_id in self.reqs_in_flight or request.data_parallel_rank is not None
        if known or not request.prompt_token_ids or request.pooling_params is not None:
            return choose(self, request)
        used = [counts[2] if len(counts) > 2 else 0.0 for counts in self.lb_engines]
        request.data_parallel_rank = router_of(self).choose(request.request_id, request.prompt_token_ids, used)
        try:
            return choose(self, request)
        finally:
            request.data_parallel_rank = None

    async def outputs(self: Any, made: Any) -> None:
        router = router_of(self)
        for one in made.outputs:
            router.begun(one.request_id)
        for request in made.finished_requests or ():
            router.ended(request)
        await read(self, made)

    client.get_core_engine_for_request = chosen
    client.process_engine_outputs = staticmethod(outputs)
