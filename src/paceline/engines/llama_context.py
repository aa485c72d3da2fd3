"""llama.cpp's context, set so that a token's logits do not depend on who shares its batch.

What was measured, on an EPYC core with AVX-512 and Gemma 3 270M Q4_K_M: the logits of one position,
computed alone and in company, in chunks of 1 to 512 tokens, after 64 to 1,000 tokens
(the last line also with two threads).

| setting | greatest difference of a logit |
|---|---|
| llama.cpp's defaults (repacked weights, F16 K and V, one pool) | 0.8 to 1.3 |
| weights not repacked | 0.7 to 1.2 |
| … and no flash attention, streams | 0 for chunks of 2 rows or more, 0.6 to 1.2 for single rows |
| … and flash attention, streams, F16 K, BF16 V | 0, always |

The last is what we use. BF16 values keep flash attention in its one-row kernel, which treats every row alike
whatever stands beside it: the kernels for 64 rows and for long caches take F16 and F32 only. It also adds
BF16 values up in 32 bits, where it adds F16 ones up in 16. The cost is small:
prefill 173 against 190 tokens/s, decoding within the noise. Not repacking costs between nothing and a fifth in a
batch of 16 (the machine was shared); `--engine-option repack=1` takes that and gives up the equality.
"""

from __future__ import annotations

import os
from typing import Any

from paceline.engines.base import EngineError, EngineSettings
from paceline.engines.llama_library import has_gpu, library
from paceline.engines.llama_memory import MemoryPlan

F16 = 1
BF16 = 30
FLASH_ATTENTION = 1
CELLS_ALIGNMENT = 256
MICRO_BATCH_TOKENS = 128
"""Tokens llama.cpp computes at once. More is not faster on a CPU, and costs memory in sliding-window layers."""


def make_context(model: Any, settings: EngineSettings, plan: MemoryPlan) -> Any:
    """A context with room for the plan. Raises EngineError."""
    cpp = library()
    threads = compute_threads(settings)
    params = cpp.LlamaContextParams()
    streams = 1 if plan.shared else plan.slots
    params.n_ctx = streams * _aligned(plan.kv_tokens // streams)
    params.n_seq_max = plan.slots
    params.kv_unified = plan.shared
    params.n_batch = settings.max_num_batched_tokens
    params.n_ubatch = min(settings.max_num_batched_tokens, MICRO_BATCH_TOKENS)
    params.n_threads = threads
    params.n_threads_batch = threads
    params.no_perf = True
    # Sliding-window layers keep their window and no more; the default keeps everything, five times the memory here.
    params.swa_full = False
    # A GPU has kernels of its own, and none for mixed types: there llama.cpp's own choice is best.
    if not has_gpu():
        params.flash_attn_type = FLASH_ATTENTION
        params.type_k = F16
        params.type_v = BF16
    try:
        return cpp.LlamaContext(model, params)
    except (RuntimeError, ValueError, MemoryError, OverflowError):
        raise EngineError(
            f"no memory for {plan.kv_tokens} tokens of KV ({plan.slots} requests at once): "
            "lower --max-model-len, --max-num-seqs or --kv-cache-tokens"
        ) from None


def compute_threads(settings: EngineSettings) -> int:
    """This rank's share of the cores, unless the user said otherwise."""
    return settings.threads or max(1, len(os.sched_getaffinity(0)) // settings.dp_size)


def _aligned(tokens: int) -> int:
    return -(-tokens // CELLS_ALIGNMENT) * CELLS_ALIGNMENT
