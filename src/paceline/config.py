"""Settings: frozen, and checked once, at the edge. Field names of `ParallelConfig` are vLLM's."""

from __future__ import annotations

import os
from collections.abc import Mapping

from msgspec import Struct

from paceline.core.limits import most_ranks
from paceline.core.rank.prefill_quota import setting_of
from paceline.errors import ConfigError


def _require(condition: bool, setting: str, text: str) -> None:
    if not condition:
        raise ConfigError(f"{setting}: {text}")


class ParallelConfig(Struct, frozen=True):
    """How the ranks are spread. Names and meaning as in vLLM's class of this name.

    `data_parallel_rank` is set for external mode (this node's one rank) and is the first local rank
    otherwise (`--data-parallel-start-rank`). `max_data_parallel_size`: None for `most_ranks`.
    """

    data_parallel_size: int = 2
    data_parallel_size_local: int = 2
    data_parallel_rank: int = 0
    data_parallel_master_ip: str = "127.0.0.1"
    data_parallel_rpc_port: int = 29550
    data_parallel_external_lb: bool = False
    data_parallel_hybrid_lb: bool = False
    headless: bool = False
    api_server_count: int = 1
    dp_sync_interval: int = 16
    prefill_quota: str = "auto"
    min_stats_update_interval_ms: int = 100
    max_data_parallel_size: int | None = None

    def __post_init__(self) -> None:
        size, local = self.data_parallel_size, self.data_parallel_size_local
        _require(1 <= size <= 65536, "--data-parallel-size", f"must be 1 to 65536, not {size}")
        _require(0 <= local <= size, "--data-parallel-size-local", f"must be 0 to {size} (all ranks), not {local}")
        _require(
            0 <= self.data_parallel_rank <= size - max(1, local),
            "--data-parallel-rank" if self.data_parallel_external_lb else "--data-parallel-start-rank",
            f"{self.data_parallel_rank} with {local} local ranks does not fit {size} ranks",
        )
        both = self.data_parallel_external_lb and self.data_parallel_hybrid_lb
        _require(not both, "--data-parallel-external-lb", "cannot be combined with --data-parallel-hybrid-lb")
        if self.data_parallel_external_lb:
            _require(local == 1, "--data-parallel-size-local", "must be 1 with --data-parallel-external-lb")
        _require(0 < self.data_parallel_rpc_port < 65536, "--data-parallel-rpc-port", "must be 1 to 65535")
        _require(1 <= self.api_server_count <= 256, "--api-server-count", "must be 1 to 256")
        _require(self.dp_sync_interval >= 1, "--dp-sync-interval", "must be at least 1")
        try:
            setting_of(self.prefill_quota)
        except ValueError as error:
            raise ConfigError(f"--prefill-quota: {error}") from None
        _require(
            5 <= self.min_stats_update_interval_ms <= 3_600_000,
            "--min-stats-update-interval-ms",
            f"must be 5 to 3600000, not {self.min_stats_update_interval_ms}",
        )
        most = self.max_data_parallel_size or size
        _require(size <= most <= 65536, "--max-data-parallel-size", f"must be {size} to 65536, not {most}")
        _require(not self.headless or local > 0, "--headless", "a headless node needs at least one local rank")

    @property
    def local_ranks(self) -> range:
        """The ranks that run on this node."""
        return range(self.data_parallel_rank, self.data_parallel_rank + self.data_parallel_size_local)

    @property
    def most_ranks(self) -> int:
        """What the deployment may be scaled to."""
        return self.max_data_parallel_size or most_ranks(self.data_parallel_size)

    @property
    def leads(self) -> bool:
        """Whether this node runs the coordinator: the one with rank 0, unless it is headless."""
        return self.data_parallel_rank == 0 and not self.headless

    @property
    def one_node(self) -> bool:
        """Whether all ranks run here, so that no socket leaves the machine."""
        return self.data_parallel_size_local == self.data_parallel_size

    @property
    def balanced_ranks(self) -> frozenset[int] | None:
        """The ranks that this node's front-ends balance over; None for all."""
        if self.data_parallel_external_lb or self.data_parallel_hybrid_lb:
            return frozenset(self.local_ranks)
        return None


class EngineConfig(Struct, frozen=True):
    """Which engine, and what it is made from (`engines.base.EngineSettings` has the meaning)."""

    engine: str = "llama"
    model: str | None = None
    served_model_name: str | None = None
    max_model_len: int | None = None
    max_num_seqs: int = 16
    max_num_batched_tokens: int = 512
    kv_cache_tokens: int | None = None
    threads: int | None = None
    seed: int = 0
    options: Mapping[str, str] = {}

    def __post_init__(self) -> None:
        _require(self.max_num_seqs >= 1, "--max-num-seqs", "must be at least 1")
        _require(
            self.max_num_batched_tokens >= self.max_num_seqs,
            "--max-num-batched-tokens",
            f"must be at least --max-num-seqs, {self.max_num_seqs}: each running request takes one of a step",
        )
        _require((self.max_model_len or 1) >= 1, "--max-model-len", "must be at least 1")
        _require((self.kv_cache_tokens or 1) >= 1, "--kv-cache-tokens", "must be at least 1")
        _require((self.threads or 1) >= 1, "--threads", "must be at least 1")
        _require(0 <= self.seed < 2**32, "--seed", "must be 0 to 4294967295")


BINDINGS = ("broker", "arrival")
"""When a request gets its rank: once one can start it, or at once."""

LOG_LEVELS = ("debug", "info", "warning", "error")


class ServerConfig(Struct, frozen=True):
    """The HTTP side, and the waits of the whole deployment. Times in seconds."""

    host: str = "127.0.0.1"
    port: int = 8000
    routing: str = "least-load"
    bind: str = "broker"
    max_waiting: int | None = 1024
    max_body_bytes: int = 16 * 1024 * 1024
    startup_timeout_s: float = 300.0
    drain_timeout_s: float = 30.0
    stall_timeout_s: float = 30.0
    max_rank_restarts: int = 5
    max_rank_losses: int = 3
    rank_timeout_s: float = 10.0
    log_level: str = "info"

    def __post_init__(self) -> None:
        from paceline.engines.registry import PolicyError, find_policy

        _require(0 <= self.port < 65536, "--port", f"must be 0 to 65535, not {self.port}")
        try:
            find_policy(self.routing)
        except PolicyError as error:
            raise ConfigError(f"--routing: {error}") from None
        known = self.bind in BINDINGS
        _require(known, "--bind", f"must be {' or '.join(BINDINGS)}, not {self.bind!r}")
        _require((self.max_waiting or 1) >= 1, "--max-waiting", "must be at least 1")
        _require(self.max_body_bytes >= 1024, "--max-body-bytes", "must be at least 1024")
        _require(self.startup_timeout_s > 0, "--startup-timeout", "must be more than 0")
        _require(self.stall_timeout_s > 0, "--stall-timeout", "must be more than 0")
        _require(self.max_rank_restarts >= 0, "--max-rank-restarts", "must be 0 or more")
        _require(self.max_rank_losses >= 1, "--max-rank-losses", "must be at least 1")
        timeout_s = self.rank_timeout_s
        _require(timeout_s == 0 or 0.5 <= timeout_s <= 3600, "--rank-timeout", "must be 0 (for ever), or 0.5 to 3600")
        _require(self.drain_timeout_s >= 0, "--drain-timeout", "must be 0 or more")
        _require(
            self.log_level in LOG_LEVELS,
            "--log-level",
            f"must be debug, info, warning or error, not {self.log_level!r}",
        )


class DeploymentConfig(Struct, frozen=True):
    """All settings of `paceline serve`."""

    parallel: ParallelConfig = ParallelConfig()
    engine: EngineConfig = EngineConfig()
    server: ServerConfig = ServerConfig()


def late_binding(config: DeploymentConfig) -> bool:
    """Whether requests wait in the coordinator's queue: nobody knows where there is room in external mode, and other
    policies than least-load are there to choose the rank themselves.
    """
    server = config.server
    return server.bind == "broker" and server.routing == "least-load" and not config.parallel.data_parallel_external_lb


def threads_per_rank(config: DeploymentConfig) -> int:
    """Compute threads for each local rank: what is set, or an equal share of the cores."""
    if config.engine.threads is not None:
        return config.engine.threads
    return max(1, len(os.sched_getaffinity(0)) // max(1, config.parallel.data_parallel_size_local))
