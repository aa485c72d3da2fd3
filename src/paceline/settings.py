"""Every setting of a deployment, once: name, default, bounds and help, frozen, and checked at the edge.

A field of the classes below is a flag of `paceline serve`, its environment variable (`PACELINE_` and the flag's name,
`PACELINE_MAX_NUM_SEQS`), and what the node's processes read: `cli.py` makes the command from these classes, and
`node.py` hands them on whole. So a setting is added by a field here, and by what reads it. Names that vLLM has mean
what they mean there; those of `ParallelConfig` are its class's, too.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from msgspec import Meta, Struct
from msgspec.structs import fields, force_setattr

from paceline.core.limits import most_ranks
from paceline.core.rank.prefill_quota import setting_of
from paceline.errors import ConfigError

LOG_LEVELS = ("debug", "info", "warning", "error")
BINDINGS = ("broker", "late", "arrival")
"""When a request gets its rank: once one can start it (`broker` is the old name of `late`), or at once."""

PARALLEL, ENGINE, SERVER = "Data parallel", "Engine", "Server"


def flag(panel: str, text: str, *names: str, least: float | None = None, most: float | None = None) -> Meta:
    """What a field says of its flag: where `--help` shows it, its text there, its names, and the inclusive bounds."""
    return Meta(description=text, extra={"panel": panel, "names": names, "least": least, "most": most})


class Setting(Struct, frozen=True):
    """A field as a flag. `kind`: its type, without the rest of the annotation."""

    field: str
    kind: Any
    default: Any
    text: str
    panel: str
    names: tuple[str, ...]
    least: float | None
    most: float | None


def variable_of(name: str) -> str:
    """The environment variable that says what the flag of this name says where that is left out."""
    return "PACELINE_" + name.removeprefix("--").replace("-", "_").upper()


def settings_of(kind: type[Struct]) -> list[Setting]:
    """The flags of one class, in their order."""
    hints = get_type_hints(kind, include_extras=True)
    found = []
    for field in fields(kind):
        hint = hints[field.name]
        if get_origin(hint) is Annotated:
            plain, meta = get_args(hint)
            found.append(Setting(field.name, plain, field.default, meta.description, **meta.extra))
    return found


class Checked(Struct, frozen=True):
    """A class of settings, which refuses what is out of bounds with a ConfigError that names the flag."""

    def __post_init__(self) -> None:
        for one in settings_of(type(self)):
            value = getattr(self, one.field)
            if value is not None and one.least is not None:
                most = float("inf") if one.most is None else one.most
                bounds = f"at least {one.least:g}" if one.most is None else f"{one.least:g} to {one.most:.15g}"
                require(one.least <= value <= most, one.names[0], f"must be {bounds}, not {value}")


def require(condition: bool, setting: str, text: str) -> None:
    """Raise ConfigError where it does not hold."""
    if not condition:
        raise ConfigError(f"{setting}: {text}")


class ParallelConfig(Checked, frozen=True):
    """How the ranks are spread. Names and meaning as in vLLM's class of this name.

    `data_parallel_size_local`: None for all, in external mode for one. `data_parallel_rank`: in external mode this
    node's one rank, else its first. `max_data_parallel_size`: None for `most_ranks`.
    """

    data_parallel_size: Annotated[
        int, flag(PARALLEL, "Ranks in the deployment.", "--data-parallel-size", "-dp", least=1, most=65536)
    ] = 2
    data_parallel_size_local: Annotated[
        int | None, flag(PARALLEL, "Ranks on this node.", "--data-parallel-size-local", "-dpl")
    ] = None
    data_parallel_rank: int = 0
    data_parallel_master_ip: Annotated[
        str, flag(PARALLEL, "Address of the node with rank 0.", "--data-parallel-address", "-dpa")
    ] = "127.0.0.1"
    data_parallel_rpc_port: Annotated[
        int,
        flag(PARALLEL, "Port there that joining nodes ask.", "--data-parallel-rpc-port", "-dpp", least=1, most=65535),
    ] = 29550
    data_parallel_external_lb: Annotated[
        bool, flag(PARALLEL, "Something outside balances.", "--data-parallel-external-lb", "-dpe")
    ] = False
    data_parallel_hybrid_lb: Annotated[
        bool, flag(PARALLEL, "Each node balances over its own ranks.", "--data-parallel-hybrid-lb", "-dph")
    ] = False
    dp_sync_interval: Annotated[
        int, flag(PARALLEL, "Steps between the agreements of lockstep ranks.", "--dp-sync-interval", least=1)
    ] = 16
    prefill_quota: Annotated[
        str,
        flag(PARALLEL, "Prompt tokens that a lockstep rank computes in a step: auto, off or N.", "--prefill-quota"),
    ] = "auto"
    min_stats_update_interval_ms: Annotated[
        int,
        flag(
            PARALLEL,
            "Least milliseconds between two load views.",
            "--min-stats-update-interval-ms",
            least=5,
            most=3_600_000,
        ),
    ] = 100
    max_data_parallel_size: Annotated[
        int | None,
        flag(
            PARALLEL,
            "Ranks that it may be scaled to; if left out 4 times as many, at least 16.",
            "--max-data-parallel-size",
        ),
    ] = None
    headless: Annotated[bool, flag(PARALLEL, "Ranks only, no front-end.", "--headless")] = False
    api_server_count: Annotated[
        int, flag(SERVER, "Front-end processes on one port.", "--api-server-count", "-asc", least=1, most=256)
    ] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        size, external = self.data_parallel_size, self.data_parallel_external_lb
        both = external and self.data_parallel_hybrid_lb
        require(not both, "--data-parallel-external-lb", "cannot be combined with --data-parallel-hybrid-lb")
        local = self.data_parallel_size_local
        if local is None:
            local = 1 if external else size
            force_setattr(self, "data_parallel_size_local", local)
        require(0 <= local <= size, "--data-parallel-size-local", f"must be 0 to {size} (all ranks), not {local}")
        require(local == 1 or not external, "--data-parallel-size-local", "must be 1 with --data-parallel-external-lb")
        require(
            0 <= self.data_parallel_rank <= size - max(1, local),
            "--data-parallel-rank" if external else "--data-parallel-start-rank",
            f"{self.data_parallel_rank} with {local} local ranks does not fit {size} ranks",
        )
        try:
            setting_of(self.prefill_quota)
        except ValueError as error:
            raise ConfigError(f"--prefill-quota: {error}") from None
        most = self.max_data_parallel_size or size
        require(size <= most <= 65536, "--max-data-parallel-size", f"must be {size} to 65536, not {most}")
        require(not self.headless or local > 0, "--headless", "a headless node needs at least one local rank")

    @property
    def local_ranks(self) -> range:
        """The ranks that run on this node."""
        return range(self.data_parallel_rank, self.data_parallel_rank + (self.data_parallel_size_local or 0))

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


class EngineConfig(Checked, frozen=True):
    """Which engine, and what it is made from (`engines.base.EngineSettings` has the meaning)."""

    engine: Annotated[str, flag(ENGINE, "llama, timed, moe, timed-lockstep, or module:Class.", "--engine")] = "llama"
    model: str | None = None
    options: Mapping[str, str] = {}
    served_model_name: Annotated[str | None, flag(ENGINE, "The model's name in the API.", "--served-model-name")] = None
    max_model_len: Annotated[
        int | None, flag(ENGINE, "Tokens of prompt and answer together.", "--max-model-len", least=1)
    ] = None
    max_num_seqs: Annotated[int, flag(ENGINE, "Requests that run at once on a rank.", "--max-num-seqs", least=1)] = 16
    max_num_batched_tokens: Annotated[int, flag(ENGINE, "Tokens computed in one step.", "--max-num-batched-tokens")] = (
        512
    )
    kv_cache_tokens: Annotated[
        int | None, flag(ENGINE, "Tokens of KV memory of a rank.", "--kv-cache-tokens", least=1)
    ] = None
    threads: Annotated[int | None, flag(ENGINE, "Compute threads of a rank.", "--threads", least=1)] = None
    seed: Annotated[int, flag(ENGINE, "Seed of the engine.", "--seed", least=0, most=2**32 - 1)] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.max_num_batched_tokens >= self.max_num_seqs, "--max-num-batched-tokens",
            f"must be at least --max-num-seqs, {self.max_num_seqs}: each running request takes one of a step",
        )  # fmt: skip


class ServerConfig(Checked, frozen=True):
    """The HTTP side, and the waits of the whole deployment. Times in seconds."""

    host: Annotated[str, flag(SERVER, "Address to listen on.", "--host")] = "127.0.0.1"
    port: Annotated[int, flag(SERVER, "Port to listen on; 0 finds one.", "--port", least=0, most=65535)] = 8000
    routing: Annotated[
        str,
        flag(
            SERVER,
            "least-load, least-requests, power-of-two, round-robin, prefix, session, lockstep, or module:Class.",
            "--routing",
        ),
    ] = "least-load"
    bind: Annotated[
        str,
        flag(
            SERVER,
            "late (or broker): requests wait once, before all ranks, until one can start them. arrival: each "
            "gets its rank when it arrives; so it is in any case in external mode, with any --routing but least-load, "
            "where a request names its rank, and while there is no coordinator.",
            "--bind",
        ),
    ] = "late"
    max_waiting: Annotated[
        int,
        flag(
            SERVER,
            "Requests that may wait, in the whole deployment, before 429; 0 for no limit.",
            "--max-waiting",
            least=0,
        ),
    ] = 1024
    max_body_bytes: Annotated[int, flag(SERVER, "Largest request body.", "--max-body-bytes", least=1024)] = (
        16 * 1024 * 1024
    )
    startup_timeout_s: Annotated[float, flag(SERVER, "Seconds until all must be ready.", "--startup-timeout")] = 300.0
    drain_timeout_s: Annotated[
        float, flag(SERVER, "Seconds that requests get to finish on SIGTERM.", "--drain-timeout", least=0)
    ] = 30.0
    stall_timeout_s: Annotated[
        float,
        flag(SERVER, "Seconds after which a rank that holds lockstep ranks up is named.", "--stall-timeout"),
    ] = 30.0
    max_rank_restarts: Annotated[
        int,
        flag(SERVER, "Restarts in a row before a rank that dies is given up.", "--max-rank-restarts", least=0),
    ] = 5
    max_rank_losses: Annotated[
        int,
        flag(
            SERVER,
            "Ranks that may end one after the other while they serve a request, with no token in between, "
            "before it fails.",
            "--max-rank-losses",
            least=1,
        ),
    ] = 3
    rank_timeout_s: Annotated[
        float, flag(SERVER, "Seconds without a sign of life from a rank's process; 0 for ever.", "--rank-timeout")
    ] = 10.0
    log_level: Annotated[str, flag(SERVER, "debug, info, warning or error.", "--log-level")] = "info"

    def __post_init__(self) -> None:
        from paceline.engines.registry import PolicyError, find_policy

        super().__post_init__()
        try:
            find_policy(self.routing)
        except PolicyError as error:
            raise ConfigError(f"--routing: {error}") from None
        require(self.bind in BINDINGS, "--bind", f"must be late, broker or arrival, not {self.bind!r}")
        for name, value in (("startup", self.startup_timeout_s), ("stall", self.stall_timeout_s)):
            require(value > 0, f"--{name}-timeout", "must be more than 0")
        timeout_s = self.rank_timeout_s
        require(timeout_s == 0 or 0.5 <= timeout_s <= 3600, "--rank-timeout", "must be 0 (for ever), or 0.5 to 3600")
        known = self.log_level in LOG_LEVELS
        require(known, "--log-level", f"must be debug, info, warning or error, not {self.log_level!r}")


class DeploymentConfig(Struct, frozen=True):
    """All settings of `paceline serve`."""

    parallel: ParallelConfig = ParallelConfig()
    engine: EngineConfig = EngineConfig()
    server: ServerConfig = ServerConfig()

    @property
    def late_binding(self) -> bool:
        """Whether requests wait in the coordinator's queue: nobody knows where there is capacity in external mode, and
        other policies than least-load are there to choose the rank themselves.
        """
        external = self.parallel.data_parallel_external_lb
        return self.server.bind != "arrival" and self.server.routing == "least-load" and not external

    @property
    def threads_per_rank(self) -> int:
        """Compute threads for each local rank: what is set, or an equal share of the cores."""
        if self.engine.threads is not None:
            return self.engine.threads
        return max(1, len(os.sched_getaffinity(0)) // max(1, len(self.parallel.local_ranks)))
