"""Settings: frozen, checked once, and every refusal names its flag."""

from __future__ import annotations

from typing import Any

import pytest

from paceline.config import DeploymentConfig, EngineConfig, ParallelConfig, ServerConfig, threads_per_rank
from paceline.errors import ConfigError


@pytest.mark.parametrize(
    ("settings", "flag"),
    [
        ({"data_parallel_size": 0}, "--data-parallel-size"),
        ({"data_parallel_size": 2, "data_parallel_size_local": 3}, "--data-parallel-size-local"),
        ({"data_parallel_rank": 1}, "--data-parallel-start-rank"),
        ({"data_parallel_rank": 2, "data_parallel_size_local": 1, "data_parallel_external_lb": True},
         "--data-parallel-rank"),
        ({"data_parallel_external_lb": True}, "--data-parallel-size-local"),
        ({"data_parallel_external_lb": True, "data_parallel_hybrid_lb": True}, "--data-parallel-external-lb"),
        ({"data_parallel_rpc_port": 0}, "--data-parallel-rpc-port"),
        ({"api_server_count": 0}, "--api-server-count"),
        ({"headless": True, "data_parallel_size_local": 0}, "--headless"),
        ({"min_stats_update_interval_ms": 4}, "--min-stats-update-interval-ms"),
        ({"prefill_quota": "some"}, "--prefill-quota"),
        ({"prefill_quota": "0"}, "--prefill-quota"),
    ],
)  # fmt: skip
def test_parallel_settings_that_cannot_be(settings: dict[str, Any], flag: str) -> None:
    with pytest.raises(ConfigError, match=f"^{flag}: "):
        ParallelConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "flag"),
    [({"max_num_seqs": 0}, "--max-num-seqs"), ({"max_model_len": -1}, "--max-model-len"),
     ({"threads": -1}, "--threads"), ({"seed": -1}, "--seed"), ({"kv_cache_tokens": -1}, "--kv-cache-tokens"),
     ({"max_num_batched_tokens": 0}, "--max-num-batched-tokens")],
)  # fmt: skip
def test_engine_settings_that_cannot_be(settings: dict[str, Any], flag: str) -> None:
    with pytest.raises(ConfigError, match=f"^{flag}: "):
        EngineConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "flag"),
    [({"port": -1}, "--port"), ({"routing": "x"}, "--routing"), ({"max_waiting": -1}, "--max-waiting"),
     ({"max_rank_losses": 0}, "--max-rank-losses"),
     ({"max_body_bytes": 1}, "--max-body-bytes"), ({"startup_timeout_s": 0}, "--startup-timeout"),
     ({"drain_timeout_s": -1}, "--drain-timeout"), ({"log_level": "loud"}, "--log-level")],
)  # fmt: skip
def test_server_settings_that_cannot_be(settings: dict[str, Any], flag: str) -> None:
    with pytest.raises(ConfigError, match=f"^{flag}: "):
        ServerConfig(**settings)


def test_settings_are_frozen() -> None:
    with pytest.raises(AttributeError):
        ParallelConfig().data_parallel_size = 3  # type: ignore[misc]


def test_who_leads_and_who_balances_over_what() -> None:
    internal = ParallelConfig(data_parallel_size=4, data_parallel_size_local=2)
    assert internal.leads
    assert internal.balanced_ranks is None
    assert not internal.one_node
    headless = ParallelConfig(data_parallel_size=4, data_parallel_size_local=2, data_parallel_rank=2, headless=True)
    assert not headless.leads
    assert list(headless.local_ranks) == [2, 3]
    hybrid = ParallelConfig(
        data_parallel_size=4, data_parallel_size_local=2, data_parallel_rank=2, data_parallel_hybrid_lb=True
    )
    assert hybrid.balanced_ranks == {2, 3}
    external = ParallelConfig(
        data_parallel_size=4, data_parallel_size_local=1, data_parallel_rank=3, data_parallel_external_lb=True
    )
    assert external.balanced_ranks == {3}


def test_threads_are_an_equal_share_of_the_cores() -> None:
    one = DeploymentConfig(parallel=ParallelConfig(data_parallel_size=1, data_parallel_size_local=1))
    many = DeploymentConfig(parallel=ParallelConfig(data_parallel_size=512, data_parallel_size_local=512))
    assert threads_per_rank(one) >= threads_per_rank(many) == 1
    assert threads_per_rank(DeploymentConfig(engine=EngineConfig(threads=7))) == 7
