"""Every setting of a deployment, once: name, default, bounds and help, frozen, and checked at the edge.

A field of the classes below is a flag of `paceline serve`, its environment variable (`PACELINE_` and the flag's name,
`PACELINE_MAX_NUM_SEQS`), and what the node's processes read: `cli.py` makes the command from these classes, and
`node.py` hands them on whole. So a setting is added by a field here, and by what reads it. Names that vLLM has mean
what they mean there; those of `ParallelConfig` are its class's, too.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_origin, get_type_hints
from urllib.parse import urlsplit

from msgspec import Meta, Struct
from msgspec.structs import fields, force_setattr

from paceline.core.limits import most_ranks
from paceline.core.rank.prefill_quota import setting_of
from paceline.errors import ConfigError
from paceline.log import FORMATS

if TYPE_CHECKING:
    from paceline.engines.base import EngineSettings

LOG_LEVELS = ("debug", "info", "warning", "error")
BINDINGS = ("broker", "late", "arrival")
"""When a request gets its rank: once one can start it (`broker` is the old name of `late`), or at once."""

DEFAULT_NUM_SEQS = 16
"""What an engine of ours runs at once where nothing is set."""

PARALLEL, ENGINE, SERVER = "Data parallel", "Engine", "Server"
PANELS = {"ParallelConfig": PARALLEL, "EngineConfig": ENGINE, "ServerConfig": SERVER}


def flag(text: str, *names: str, panel: str = "", least: float | None = None, most: float | None = None) -> Meta:
    """What a field says of its flag: its text in `--help`, the inclusive bounds, and short names. The flag is named as
    the field is, without the unit, unless `names` begins with another; it stands under its class's panel.
    """
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
    hints = get_type_hints(kind, include_extras=True)
    found = []
    for field in fields(kind):
        hint = hints[field.name]
        if get_origin(hint) is Annotated:
            plain, meta = get_args(hint)
            names, panel = meta.extra["names"], meta.extra["panel"] or PANELS[kind.__name__]
            if not names or not names[0].startswith("--"):
                names = ("--" + field.name.removesuffix("_s").replace("_", "-"), *names)
            about = meta.extra | {"names": names, "panel": panel}
            found.append(Setting(field.name, plain, field.default, meta.description, **about))
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


BACKENDS = ("mp", "ray")

RANK_PORTS = 4


class ParallelConfig(Checked, frozen=True):
    """How the ranks are spread. Names and meaning as in vLLM's class of this name.

    `data_parallel_size_local`: None for all, in external mode for one; on Ray how many are aimed at on each node.
    `data_parallel_rank`: in external mode this node's one rank, else its first. `max_data_parallel_size`: None for
    `most_ranks`.
    """

    data_parallel_size: Annotated[int, flag("Ranks in the deployment.", "-dp", least=1, most=65536)] = 2
    data_parallel_size_local: Annotated[int | None, flag("Ranks on this node.", "-dpl")] = None
    data_parallel_rank: int = 0
    data_parallel_master_ip: Annotated[
        str, flag("Address of the node with rank 0.", "--data-parallel-address", "-dpa")
    ] = "127.0.0.1"
    data_parallel_rpc_port: Annotated[int, flag("Port there that joining nodes ask.", "-dpp", least=1, most=65535)] = (
        29550
    )
    data_parallel_external_lb: Annotated[bool, flag("Something outside balances.", "-dpe")] = False
    data_parallel_hybrid_lb: Annotated[bool, flag("Each node balances over its own ranks.", "-dph")] = False
    data_parallel_backend: Annotated[
        str, flag("Where ranks run: mp, processes of this node; ray, a Ray cluster that this node is in.", "-dpb")
    ] = "mp"
    ray_address: Annotated[
        str | None, flag("The Ray cluster's address, HOST:PORT; if left out RAY_ADDRESS, or the one that runs here.")
    ] = None
    ray_cpus_per_rank: Annotated[float, flag("CPUs of the Ray cluster set aside for a rank.", least=0)] = 1.0
    ray_gpus_per_rank: Annotated[
        float | None, flag("GPUs likewise; if left out what the engine computes on.", least=0)
    ] = None
    secret_file: Annotated[
        str | None, flag("The secret that the nodes share (`paceline secret new`): what leaves a node is encrypted.")
    ] = None
    insecure: Annotated[bool, flag("Let several nodes talk without a secret: whoever reaches them may do all.")] = False
    dp_sync_interval: Annotated[int, flag("Steps between the agreements of lockstep ranks.", least=1)] = 16
    prefill_quota: Annotated[str, flag("Prompt tokens that a lockstep rank computes in a step: auto, off or N.")] = (
        "auto"
    )
    min_stats_update_interval_ms: Annotated[
        int, flag("Least milliseconds between two load views.", least=5, most=3_600_000)
    ] = 100
    max_data_parallel_size: Annotated[
        int | None, flag("Ranks that it may be scaled to; if left out 4 times as many, at least 16.")
    ] = None
    min_ready_ranks: Annotated[
        int | None,
        flag("Ranks that are ready before a front-end serves; 1 if left out, all in lockstep.", least=1),
    ] = None
    headless: Annotated[bool, flag("Ranks only, no front-end.")] = False
    api_server_count: Annotated[
        int, flag("Front-end processes on one port.", "-asc", panel=SERVER, least=1, most=256)
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
        self._check_ray()

    def _check_ray(self) -> None:
        backend = self.data_parallel_backend
        require(backend in BACKENDS, "--data-parallel-backend", f"must be mp or ray, not {backend!r}")
        others = {
            "--headless": self.headless, "--data-parallel-start-rank": self.data_parallel_rank > 0,
            "--data-parallel-hybrid-lb": self.data_parallel_hybrid_lb,
            "--data-parallel-external-lb": self.data_parallel_external_lb,
        }  # fmt: skip
        for name, given in others.items():
            text = "cannot be combined with --data-parallel-backend ray, where one command has all ranks"
            require(not (self.on_ray and given), name, text)
        require(self.on_ray or not self.ray_address, "--ray-address", "needs --data-parallel-backend ray")

    def port(self, what: int) -> int:
        """Port number `what` of the deployment, counted from the one that joining nodes ask; 0, any, where there is no
        such port. The coordinator has 1 to 3 on the node with rank 0; each rank has two from RANK_PORTS on, for
        front-ends and for its peers, where it runs.
        """
        port = self.data_parallel_rpc_port + what
        return port if port < 65536 else 0

    def rank_port(self, rank: int, peers: bool) -> int:
        return self.port(RANK_PORTS + 2 * rank + peers)

    @property
    def coordinator_ports(self) -> tuple[int, int, int]:
        """For front-ends, for what ranks say, for what they hear; none where nobody connects from elsewhere."""
        return (0, 0, 0) if self.one_node else (self.port(1), self.port(2), self.port(3))

    @property
    def on_ray(self) -> bool:
        return self.data_parallel_backend == "ray"

    @property
    def local_ranks(self) -> range:
        """The ranks that this node starts and watches: its own, and all of a Ray cluster."""
        count = self.data_parallel_size if self.on_ray else self.data_parallel_size_local
        return range(self.data_parallel_rank, self.data_parallel_rank + (count or 0))

    @property
    def most_ranks(self) -> int:
        return self.max_data_parallel_size or most_ranks(self.data_parallel_size)

    @property
    def leads(self) -> bool:
        """Whether this node runs the coordinator: the one with rank 0, unless it is headless."""
        return self.data_parallel_rank == 0 and not self.headless

    @property
    def one_node(self) -> bool:
        """Whether all ranks run here, so that no socket leaves the machine."""
        return self.data_parallel_size_local == self.data_parallel_size and not self.on_ray

    @property
    def off_the_machine(self) -> bool:
        """Whether sockets of the deployment can be reached from elsewhere."""
        host = self.data_parallel_master_ip
        return not self.one_node and not (host.startswith("127.") or host in ("::1", "localhost"))

    @property
    def balanced_ranks(self) -> frozenset[int] | None:
        """The ranks that this node's front-ends balance over; None for all."""
        if self.data_parallel_external_lb or self.data_parallel_hybrid_lb:
            return frozenset(self.local_ranks)
        return None


class EngineConfig(Checked, frozen=True):
    """Which engine, and what it is made from (`engines.base.EngineSettings` has the meaning).

    `arguments`: flags that are not ours, for an engine that takes such.
    """

    engine: Annotated[str, flag("llama, vllm, timed, moe, timed-lockstep, or module:Class.")] = "llama"
    model: str | None = None
    options: Mapping[str, str] = {}
    arguments: tuple[str, ...] = ()
    served_model_name: Annotated[str | None, flag("The model's name in the API, or several, with commas.")] = None
    max_model_len: Annotated[int | None, flag("Tokens of prompt and answer together.", least=1)] = None
    max_num_seqs: Annotated[int | None, flag("Requests that run at once on a rank; 16, or vLLM's choice.", least=1)] = (
        None
    )
    max_num_batched_tokens: Annotated[int | None, flag("Tokens computed in one step; 512, or vLLM's choice.")] = None
    kv_cache_tokens: Annotated[int | None, flag("Tokens of KV memory of a rank.", least=1)] = None
    threads: Annotated[int | None, flag("Compute threads of a rank.", least=1)] = None
    task: Annotated[str, flag("generate, or embed: answer /v1/embeddings, where the engine supports it.")] = "generate"
    generation_config: Annotated[
        str,
        flag("auto: a request that names no sampling, or no max_tokens, gets what the model recommends; vllm: not."),
    ] = "auto"
    seed: Annotated[int, flag("Seed of the engine.", least=0, most=2**32 - 1)] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        seqs = self.max_num_seqs or DEFAULT_NUM_SEQS
        require(
            self.max_num_batched_tokens is None or self.max_num_batched_tokens >= seqs, "--max-num-batched-tokens",
            f"must be at least --max-num-seqs, {seqs}: each running request takes one of a step",
        )  # fmt: skip
        known = self.task in ("generate", "embed")
        require(known, "--task", f"must be generate or embed, not {self.task!r}")
        known = self.generation_config in ("auto", "vllm")
        require(known, "--generation-config", f"must be auto or vllm, not {self.generation_config!r}")
        for name in [] if self.served_model_name is None else self.served_model_name.split(","):
            right = name.strip() == name != "" and name.isprintable()
            require(right, "--served-model-name", f"must be printable text, or several with commas, not {name!a}")


QUEUED_ROUTING = ("sticky", "prefix", "least-load")
"""Those whose requests may wait in the coordinator's queue; `prefix` is what `sticky` was called first."""


class ServerConfig(Checked, frozen=True):
    """The HTTP side, and the waits of the whole deployment. Times in seconds."""

    host: Annotated[str, flag("Address to listen on.")] = "127.0.0.1"
    port: Annotated[int, flag("Port to listen on; 0 finds one.", least=0, most=65535)] = 8000
    routing: Annotated[
        str,
        flag("sticky, least-load, least-requests, power-of-two, round-robin, session, lockstep, or module:Class."),
    ] = "sticky"
    bind: Annotated[
        str,
        flag(
            "late (or broker): requests wait once, before all ranks, until one can start them. arrival: each "
            "gets its rank when it arrives; so it is in any case in external mode, with any "
            "--routing but sticky and least-load, where a request names its rank, and while there is no coordinator."
        ),
    ] = "late"
    max_waiting: Annotated[
        int, flag("Requests that may wait, in the whole deployment, before 429; 0 for no limit.", least=0)
    ] = 1024
    max_body_bytes: Annotated[int, flag("Largest request body.", least=1024)] = 16 * 1024 * 1024
    response_store_bytes: Annotated[
        int, flag("What a node keeps of responses (`store` of /v1/responses); 0: none.", least=0)
    ] = 64 * 1024 * 1024
    api_key: Annotated[
        str | None, flag("Keys that /v1 asks for, with commas; better in PACELINE_API_KEY or a file.")
    ] = None
    api_key_file: Annotated[
        str | None, flag("A file with such keys, one a line, and behind a blank the name of its tenant.")
    ] = None
    tenant_weight: Annotated[
        str | None, flag("Parts of the queue, as NAME=WEIGHT with commas; 1 for tenants that are not named.")
    ] = None
    admin_key: Annotated[
        str | None,
        flag("The key for all that shows or changes the deployment; without one it is this machine's alone."),
    ] = None
    admin_key_file: Annotated[str | None, flag("A file with such keys, one a line.")] = None
    admin_port: Annotated[
        int | None, flag("A port of its own for that; on loopback where there is no admin's key.", least=1, most=65535)
    ] = None
    open_metrics: Annotated[bool, flag("Answer /metrics to everybody, and on the clients' port too.")] = False
    allowed_origins: Annotated[str | None, flag("Origins whose web pages may ask (CORS), with commas; * for all.")] = (
        None
    )
    ssl_certfile: Annotated[str | None, flag("The certificate for TLS.")] = None
    ssl_keyfile: Annotated[str | None, flag("Its private key.")] = None
    allow_unknown_fields: Annotated[bool, flag("Take requests with fields that nobody knows.")] = False
    trust_request_chat_template: Annotated[bool, flag("Let requests bring a chat template of their own.")] = False
    tool_call_parser: Annotated[
        str, flag("How the model writes calls of tools: auto (by its chat template), one of tools.py, as hermes.")
    ] = "auto"
    reasoning_parser: Annotated[
        str, flag("How it marks its reasoning: auto (by its chat template), think, mistral, openai_gptoss, none.")
    ] = "auto"
    startup_timeout_s: Annotated[float, flag("Seconds until all that this node starts must be ready.")] = 300.0
    drain_timeout_s: Annotated[float, flag("Seconds that requests get to finish on SIGTERM.", least=0)] = 30.0
    stall_timeout_s: Annotated[float, flag("Seconds after which a rank that hangs, or holds others up, is named.")] = (
        30.0
    )
    step_timeout_s: Annotated[
        float | None,
        flag("Seconds after which a rank whose step does not return is started again; 0: never.", least=0),
    ] = None
    max_rank_restarts: Annotated[int, flag("Restarts in a row before a rank that dies is given up.", least=0)] = 5
    revive_interval_s: Annotated[float, flag("Seconds between two tries of a rank that was given up.", least=1)] = 300.0
    max_rank_losses: Annotated[
        int,
        flag(
            "Ranks that may end one after the other while they serve a request, with no token in between, "
            "before it fails.",
            least=1,
        ),
    ] = 3
    hold_timeout_s: Annotated[float, flag("Seconds that requests wait for ranks while there is none.", least=0)] = 600.0
    rank_timeout_s: Annotated[float, flag("Seconds without a sign of life from a rank's process; 0 for ever.")] = 10.0
    log_slow_s: Annotated[
        float | None, flag("Log each request that takes so many seconds, with where they went (docs/slow.md).", least=0)
    ] = None
    otlp_traces_endpoint: Annotated[
        str | None,
        flag("URL that a trace of each request is sent to, as OTLP over HTTP; needs the extra otel (docs/tracing.md)."),
    ] = None
    access_log: Annotated[bool, flag("Log each HTTP request with its status, time and id.")] = False
    log_level: Annotated[str, flag("debug, info, warning or error.")] = "info"
    log_format: Annotated[str, flag("text, or json: an object a line.")] = "text"

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
        check_traces_endpoint(self.otlp_traces_endpoint)
        require(self.log_format in FORMATS, "--log-format", f"must be text or json, not {self.log_format!r}")
        known = self.log_level in LOG_LEVELS
        require(known, "--log-level", f"must be debug, info, warning or error, not {self.log_level!r}")


def check_traces_endpoint(url: str | None) -> None:
    """Raise ConfigError where traces cannot be sent there: it is no URL, or what sends them is not installed."""
    if url is None:
        return
    name = "--otlp-traces-endpoint"
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and url.isprintable()
    except ValueError:
        good = False
    require(good and " " not in url, name, f"must be a URL as http://127.0.0.1:4318/v1/traces, not {url!a}")
    try:
        there = find_spec("opentelemetry.exporter.otlp.proto.http") and find_spec("opentelemetry.sdk.trace")
    except ImportError:
        there = None
    require(there is not None, name, "needs OpenTelemetry: pip install 'paceline[otel]'")


class DeploymentConfig(Struct, frozen=True):
    """All settings of `paceline serve`."""

    parallel: ParallelConfig = ParallelConfig()
    engine: EngineConfig = EngineConfig()
    server: ServerConfig = ServerConfig()

    @property
    def late_binding(self) -> bool:
        """Whether requests wait in the coordinator's queue: nobody knows where there is capacity in external mode, and
        other policies than sticky and least-load are there to choose the rank themselves.
        """
        external = self.parallel.data_parallel_external_lb
        return self.server.bind != "arrival" and self.server.routing in QUEUED_ROUTING and not external

    @property
    def threads_per_rank(self) -> int:
        """Compute threads for each rank: what is set, an equal share of the cores, or on Ray what is set aside."""
        if self.engine.threads is not None:
            return self.engine.threads
        if self.parallel.on_ray:
            return max(1, int(self.parallel.ray_cpus_per_rank))
        return max(1, len(os.sched_getaffinity(0)) // max(1, len(self.parallel.local_ranks)))

    def engine_settings(self, rank: int = 0) -> EngineSettings:
        """What one rank's engine is made from, and its tokenizer: the fields of `EngineConfig` by their names, where
        they are set. An engine with flags of its own is told by these what was asked for.
        """
        from paceline.engines.base import EngineSettings

        names = [name for name in EngineSettings.__struct_fields__ if getattr(self.engine, name, None) is not None]
        chosen = {name: getattr(self.engine, name) for name in names}
        sizes = [name for name in ("max_num_seqs", "max_num_batched_tokens") if name in chosen]
        flags = [f"--{name.replace('_', '-')}={chosen[name]}" for name in sizes]
        own = {
            "rank": rank, "dp_size": self.parallel.data_parallel_size, "threads": self.threads_per_rank,
            "places": len(self.parallel.local_ranks), "arguments": (*self.engine.arguments, *flags),
        }  # fmt: skip
        return EngineSettings(**chosen | own)
