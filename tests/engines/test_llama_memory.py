"""How KV memory is laid out, and which settings cannot be."""

from __future__ import annotations

from typing import Any

import pytest

from paceline.engines.base import EngineError, EngineSettings
from paceline.engines.gguf import GGUFHeader
from paceline.engines.llama_text import MemoryPlan, plan_memory

HEADER = GGUFHeader({"general.architecture": "gemma3", "gemma3.context_length": 32768}, {})


def plan(**settings: Any) -> MemoryPlan:
    """The plan for a model made for 32,768 tokens."""
    return plan_memory(EngineSettings(**settings), HEADER)


def test_by_default_each_slot_has_a_stream_of_moderate_length() -> None:
    assert plan() == MemoryPlan(4096, 16, 65536, shared=False)
    assert plan(max_model_len=32768, max_num_seqs=2) == MemoryPlan(32768, 2, 65536, shared=False)


def test_memory_for_a_stream_a_slot_makes_streams() -> None:
    assert plan(kv_cache_tokens=20000, max_model_len=1000) == MemoryPlan(1000, 16, 16000, shared=False)
    assert plan(kv_cache_tokens=999, max_num_seqs=1) == MemoryPlan(999, 1, 999, shared=False)


def test_less_memory_is_one_pool_for_all() -> None:
    assert plan(kv_cache_tokens=8192) == MemoryPlan(8192, 16, 8192, shared=True)
    assert plan(kv_cache_tokens=8192, max_model_len=1024) == MemoryPlan(1024, 16, 8192, shared=True)
    assert plan(kv_cache_tokens=100000) == MemoryPlan(32768, 16, 100000, shared=True)


def test_a_file_that_does_not_name_its_context_gets_a_moderate_one() -> None:
    assert plan_memory(EngineSettings(), GGUFHeader({}, {})).max_model_len == 4096


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"max_model_len": 32769}, "--max-model-len 32769"),
        ({"max_model_len": 0}, "--max-model-len 0"),
        ({"kv_cache_tokens": 0}, "--kv-cache-tokens 0"),
        ({"kv_cache_tokens": 100, "max_model_len": 101}, "--kv-cache-tokens 100"),
        ({"max_num_seqs": 0}, "--max-num-seqs 0"),
        ({"max_num_seqs": 257, "max_num_batched_tokens": 512}, "--max-num-seqs 257"),
        ({"max_num_batched_tokens": 15}, "--max-num-batched-tokens 15"),
    ],
)
def test_what_cannot_be_is_named(settings: dict[str, int], reason: str) -> None:
    with pytest.raises(EngineError, match=reason):
        plan(**settings)
