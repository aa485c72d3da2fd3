"""Settings: frozen, checked once, one place each; every refusal names its flag."""

from __future__ import annotations

from typing import Any

import pytest
import typer
from msgspec import Struct
from typer.testing import CliRunner

from paceline.cli import _config, _signature
from paceline.errors import ConfigError
from paceline.settings import DeploymentConfig, EngineConfig, ParallelConfig, ServerConfig, settings_of


@pytest.mark.parametrize(
    ("settings", "flag"),
    [
        ({"data_parallel_size": 0}, "--data-parallel-size"),
        ({"data_parallel_size": 2, "data_parallel_size_local": 3}, "--data-parallel-size-local"),
        ({"data_parallel_rank": 1}, "--data-parallel-start-rank"),
        ({"data_parallel_rank": 2, "data_parallel_size_local": 1, "data_parallel_external_lb": True},
         "--data-parallel-rank"),
        ({"data_parallel_external_lb": True, "data_parallel_size_local": 2}, "--data-parallel-size-local"),
        ({"data_parallel_external_lb": True, "data_parallel_hybrid_lb": True}, "--data-parallel-external-lb"),
        ({"data_parallel_rpc_port": 0}, "--data-parallel-rpc-port"),
        ({"api_server_count": 0}, "--api-server-count"),
        ({"headless": True, "data_parallel_size_local": 0}, "--headless"),
        ({"min_stats_update_interval_ms": 4}, "--min-stats-update-interval-ms"),
        ({"prefill_quota": "some"}, "--prefill-quota"),
        ({"prefill_quota": "0"}, "--prefill-quota"),
        ({"data_parallel_backend": "slurm"}, "--data-parallel-backend"),
        ({"data_parallel_backend": "ray", "headless": True}, "--headless"),
        ({"data_parallel_backend": "ray", "data_parallel_hybrid_lb": True}, "--data-parallel-hybrid-lb"),
        ({"data_parallel_backend": "ray", "ray_gpus_per_rank": -1.0}, "--ray-gpus-per-rank"),
        ({"ray_address": "10.0.0.1:6379"}, "--ray-address"),
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
    assert one.threads_per_rank >= many.threads_per_rank == 1
    assert DeploymentConfig(engine=EngineConfig(threads=7)).threads_per_rank == 7


def test_a_flag_left_out_is_taken_from_its_environment_variable() -> None:
    app = typer.Typer()
    seen: dict[str, Any] = {}

    def serve(**given: Any) -> None:
        seen.update(given)

    serve.__signature__ = _signature()  # type: ignore[attr-defined]
    serve.__annotations__ = {name: one.annotation for name, one in _signature().parameters.items()}
    app.command()(serve)
    environment = {"PACELINE_MAX_NUM_SEQS": "7", "PACELINE_DRAIN_TIMEOUT": "1.5", "PACELINE_HEADLESS": "true"}
    done = CliRunner().invoke(app, ["--max-num-batched-tokens", "64"], env=environment)
    assert done.exit_code == 0, done.output
    config = _config(seen)
    assert (config.engine.max_num_seqs, config.engine.max_num_batched_tokens) == (7, 64)
    assert (config.server.drain_timeout_s, config.parallel.headless) == (1.5, True)
    assert CliRunner().invoke(app, ["--max-num-seqs", "9"], env=environment).exit_code == 0
    assert _config(seen).engine.max_num_seqs == 9


@pytest.mark.parametrize("kind", [ParallelConfig, EngineConfig, ServerConfig])
def test_every_setting_says_what_it_is_once(kind: type[Struct]) -> None:
    flags = settings_of(kind)
    assert all(one.text.endswith(".") and one.names[0].startswith("--") for one in flags)
    assert len({one.names[0] for one in flags}) == len(flags)


@pytest.mark.parametrize("bind", ["late", "broker"])
def test_late_binding_has_two_names(bind: str) -> None:
    assert DeploymentConfig(server=ServerConfig(bind=bind)).late_binding
    assert not DeploymentConfig(server=ServerConfig(bind="arrival")).late_binding
    assert not DeploymentConfig(server=ServerConfig(bind=bind, routing="round-robin")).late_binding
