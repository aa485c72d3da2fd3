"""How much a request may hold, and how KV memory is laid out: one stream a slot, or one shared pool.

llama.cpp can give each sequence a stretch of KV of its own (a stream), or let all of them share one pool
of cells. We use streams wherever they fit, for two reasons.

*The same text, whoever else is served.* A quantised model rounds its activations to 8 bits before every
matrix product, so the least difference, in the last bit of one sum, grows within a few layers to a few
tenths in the logits: enough to turn a near tie and with it the rest of the text. Text that does not
depend on the batch therefore needs products that agree in every bit, and three things spoil that. We set
them so that they do not (`llama_context.py`): repacked weights compute four rows differently from one;
flash attention has one kernel for one row, one for 64 rows or more and one for a long cache; and
attention sums in the order of the cells. In a stream that order is the order of the text. In a shared
pool it depends on who left which cell free.

*Speed.* In a shared pool, each token's attention passes over everybody's cells to skip them.

The price is that a stream has the length of the longest request allowed. So the default for that is
moderate, and where `kv_cache_tokens` is too little for a stream a slot, all share one pool of that size.
There a request starts when the pool has room for its prompt and its whole answer (`schedule.py`).
"""

from __future__ import annotations

from msgspec import Struct

from paceline.engines.base import EngineError, EngineSettings
from paceline.engines.gguf import GGUFHeader

MODERATE_TOKENS = 4096
MOST_SEQUENCES = 256
"""LLAMA_MAX_SEQ of llama.cpp."""


class MemoryPlan(Struct, frozen=True):
    """What one request may have, what all may have, and whether all share one pool."""

    max_model_len: int
    slots: int
    kv_tokens: int
    shared: bool


def plan_memory(settings: EngineSettings, header: GGUFHeader) -> MemoryPlan:
    """The same answer in ranks and front-ends. Raises EngineError naming the setting that cannot be."""
    slots = settings.max_num_seqs
    if not 0 < slots <= MOST_SEQUENCES:
        raise EngineError(f"--max-num-seqs {slots}: llama.cpp takes 1 to {MOST_SEQUENCES}")
    if settings.max_num_batched_tokens < slots:
        raise EngineError(
            f"--max-num-batched-tokens {settings.max_num_batched_tokens}: must be at least --max-num-seqs ({slots})"
        )
    own = header.train_context_tokens or MODERATE_TOKENS
    asked, pool = settings.max_model_len, settings.kv_cache_tokens
    if asked is not None and not 0 < asked <= own:
        raise EngineError(f"--max-model-len {asked}: this model takes 1 to {own}")
    if pool is None:
        length = asked or min(own, MODERATE_TOKENS)
        return MemoryPlan(length, slots, slots * length, shared=False)
    if pool < 1 or (asked is not None and asked > pool):
        raise EngineError(f"--kv-cache-tokens {pool}: must be at least --max-model-len ({asked or 1})")
    length = asked or min(own, pool)
    if slots * length <= pool:
        return MemoryPlan(length, slots, slots * length, shared=False)
    return MemoryPlan(length, slots, pool, shared=True)
