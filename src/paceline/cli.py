"""`paceline`: the command line. Flags that vLLM has are named, and mean, what they do there."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Annotated, Any

import typer

from paceline import __version__
from paceline.config import DeploymentConfig, EngineConfig, ParallelConfig, ServerConfig
from paceline.errors import ConfigError, PacelineError
from paceline.serve_flags import (
    ApiServerCountFlag,
    BindFlag,
    DataParallelAddressFlag,
    DataParallelExternalLbFlag,
    DataParallelHybridLbFlag,
    DataParallelRankFlag,
    DataParallelRpcPortFlag,
    DataParallelSizeFlag,
    DataParallelSizeLocalFlag,
    DataParallelStartRankFlag,
    DpSyncIntervalFlag,
    DrainTimeoutFlag,
    EngineFlag,
    EngineOptionFlag,
    HeadlessFlag,
    HostFlag,
    KvCacheTokensFlag,
    LogLevelFlag,
    MaxBodyBytesFlag,
    MaxDataParallelSizeFlag,
    MaxModelLenFlag,
    MaxNumBatchedTokensFlag,
    MaxNumSeqsFlag,
    MaxRankLossesFlag,
    MaxRankRestartsFlag,
    MaxWaitingFlag,
    MinStatsUpdateIntervalMsFlag,
    ModelFlag,
    ModelTagFlag,
    PortFlag,
    PrefillQuotaFlag,
    RankTimeoutFlag,
    RoutingFlag,
    SeedFlag,
    ServedModelNameFlag,
    StallTimeoutFlag,
    StartupTimeoutFlag,
    ThreadsFlag,
)

app = typer.Typer(
    name="paceline",
    help="The control plane of data-parallel LLM serving.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def main(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    """The control plane of data-parallel LLM serving."""
    if version:
        print(f"paceline {__version__}")
        raise typer.Exit


@app.command()
def serve(
    model_tag: ModelTagFlag = None,
    model: ModelFlag = None,
    engine: EngineFlag = "llama",
    engine_option: EngineOptionFlag = None,
    served_model_name: ServedModelNameFlag = None,
    max_model_len: MaxModelLenFlag = None,
    max_num_seqs: MaxNumSeqsFlag = 16,
    max_num_batched_tokens: MaxNumBatchedTokensFlag = 512,
    kv_cache_tokens: KvCacheTokensFlag = None,
    threads: ThreadsFlag = None,
    seed: SeedFlag = 0,
    data_parallel_size: DataParallelSizeFlag = 2,
    data_parallel_size_local: DataParallelSizeLocalFlag = None,
    data_parallel_start_rank: DataParallelStartRankFlag = None,
    data_parallel_rank: DataParallelRankFlag = None,
    data_parallel_address: DataParallelAddressFlag = "127.0.0.1",
    data_parallel_rpc_port: DataParallelRpcPortFlag = 29550,
    data_parallel_external_lb: DataParallelExternalLbFlag = False,
    data_parallel_hybrid_lb: DataParallelHybridLbFlag = False,
    dp_sync_interval: DpSyncIntervalFlag = 16,
    prefill_quota: PrefillQuotaFlag = "auto",
    min_stats_update_interval_ms: MinStatsUpdateIntervalMsFlag = 100,
    max_data_parallel_size: MaxDataParallelSizeFlag = None,
    headless: HeadlessFlag = False,
    api_server_count: ApiServerCountFlag = 1,
    host: HostFlag = "127.0.0.1",
    port: PortFlag = 8000,
    routing: RoutingFlag = "least-load",
    bind: BindFlag = "broker",
    max_waiting: MaxWaitingFlag = 1024,
    max_body_bytes: MaxBodyBytesFlag = 16 * 1024 * 1024,
    startup_timeout: StartupTimeoutFlag = 300.0,
    drain_timeout: DrainTimeoutFlag = 30.0,
    stall_timeout: StallTimeoutFlag = 30.0,
    max_rank_restarts: MaxRankRestartsFlag = 5,
    max_rank_losses: MaxRankLossesFlag = 3,
    rank_timeout: RankTimeoutFlag = 10.0,
    log_level: LogLevelFlag = "info",
) -> None:
    """Serve a model over N ranks with an OpenAI-compatible API."""
    given = locals()
    try:
        config = _config(given)
    except ConfigError as error:
        _fail(error, 2)
    _serve(config)


_PASSED_ON: dict[str, Any] = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
"""For commands whose flags are read elsewhere: what they need is imported only when they run."""


@app.command(context_settings=_PASSED_ON)
def simulate(context: typer.Context) -> None:
    """Run the machines in virtual time, from a seed, with delays, losses and crashes."""
    from paceline.simulate_cli import app as simulate_app

    simulate_app(context.args, prog_name="paceline simulate")


@app.command(name="check", context_settings=_PASSED_ON)
def check(context: typer.Context) -> None:
    """Walk every interleaving of the machines in a small deployment."""
    from paceline.check.cli import app as check_app

    check_app(context.args, prog_name="paceline check")


@app.command(context_settings=_PASSED_ON)
def loads(context: typer.Context) -> None:
    """Show what every rank of a running deployment has to do."""
    from paceline.loads_cli import app as loads_app

    loads_app(context.args, prog_name="paceline loads")


@app.command(context_settings=_PASSED_ON)
def scale(context: typer.Context) -> None:
    """Let a running deployment have more ranks, or fewer."""
    from paceline.scale_cli import app as scale_app

    scale_app(context.args, prog_name="paceline scale")


@app.command(context_settings=_PASSED_ON)
def coordinator(context: typer.Context) -> None:
    """Run a coordinator alone, for ranks and front-ends of your own."""
    from paceline.coordinator_cli import run_command

    run_command(context.args)


@app.command(context_settings=_PASSED_ON)
def vllm(context: typer.Context) -> None:
    """Run the vllm command with Paceline's coordinator: `paceline vllm serve MODEL --data-parallel-size 2`."""
    from paceline.vllm.plugin import run_command

    run_command(context.args)


UrlFlag = Annotated[str, typer.Option("--url", help="A front-end of the deployment.")]
PauseTimeoutFlag = Annotated[float, typer.Option("--timeout", help="Seconds to wait until all ranks have.")]


@app.command()
def pause(
    mode: Annotated[str, typer.Option("--mode", help="keep, wait for, or abort the requests that run.")] = "keep",
    timeout: PauseTimeoutFlag = 60.0,
    url: UrlFlag = "http://127.0.0.1:8000",
) -> None:
    """Suspend a running deployment; returns once no rank computes."""
    from paceline.control import Control

    _control(lambda: Control(url).pause(mode, timeout))


@app.command()
def resume(timeout: PauseTimeoutFlag = 60.0, url: UrlFlag = "http://127.0.0.1:8000") -> None:
    """Let a suspended deployment go on."""
    from paceline.control import Control

    _control(lambda: Control(url).resume(timeout))


def _control(call: Callable[[], dict[str, object]]) -> None:
    begin = time.monotonic()
    try:
        done = call()
    except PacelineError as error:
        _fail(error, 1)
    print(f"{done['status']} after {time.monotonic() - begin:.3f} s (suspension {done['suspension']})")


def _config(given: dict[str, Any]) -> DeploymentConfig:
    """The settings from the flags. Raises ConfigError naming the flag."""
    if given["model"] and given["model_tag"] and given["model"] != given["model_tag"]:
        raise ConfigError("--model: two models were named")
    server = {name: given[name] for name in ("host", "port", "routing", "bind", "max_body_bytes", "log_level")}
    engine_names = ("engine", "served_model_name", "max_model_len", "max_num_seqs", "max_num_batched_tokens",
                    "kv_cache_tokens", "threads", "seed")  # fmt: skip
    return DeploymentConfig(
        parallel=_parallel(given),
        engine=EngineConfig(
            model=given["model"] or given["model_tag"],
            options=_engine_options(given["engine_option"] or []),
            **{name: given[name] for name in engine_names},
        ),
        server=ServerConfig(
            max_waiting=given["max_waiting"] or None,
            startup_timeout_s=given["startup_timeout"],
            drain_timeout_s=given["drain_timeout"],
            stall_timeout_s=given["stall_timeout"],
            max_rank_restarts=given["max_rank_restarts"],
            max_rank_losses=given["max_rank_losses"],
            rank_timeout_s=given["rank_timeout"],
            **server,
        ),
    )


def _parallel(given: dict[str, Any]) -> ParallelConfig:
    size, local = given["data_parallel_size"], given["data_parallel_size_local"]
    own_rank, start_rank = given["data_parallel_rank"], given["data_parallel_start_rank"]
    if own_rank is not None and start_rank is not None:
        raise ConfigError("--data-parallel-rank: cannot be combined with --data-parallel-start-rank")
    # As in vLLM, naming one rank means that something outside balances over the ranks.
    external = given["data_parallel_external_lb"] or (own_rank is not None and not given["data_parallel_hybrid_lb"])
    if external and own_rank is None and start_rank is None:
        raise ConfigError("--data-parallel-external-lb: needs --data-parallel-rank")
    return ParallelConfig(
        data_parallel_size=size,
        data_parallel_size_local=local if local is not None else (1 if external else size),
        data_parallel_rank=own_rank if own_rank is not None else (start_rank or 0),
        data_parallel_master_ip=given["data_parallel_address"],
        data_parallel_rpc_port=given["data_parallel_rpc_port"],
        data_parallel_external_lb=external,
        data_parallel_hybrid_lb=given["data_parallel_hybrid_lb"],
        headless=given["headless"],
        dp_sync_interval=given["dp_sync_interval"],
        prefill_quota=given["prefill_quota"],
        min_stats_update_interval_ms=given["min_stats_update_interval_ms"],
        max_data_parallel_size=given["max_data_parallel_size"],
        api_server_count=given["api_server_count"],
    )


def _engine_options(texts: list[str]) -> dict[str, str]:
    options: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise ConfigError(f"--engine-option: {text!r} is not KEY=VALUE")
        options[name] = value
    return options


def _serve(config: DeploymentConfig) -> None:
    from paceline.console import StartupDisplay
    from paceline.deployment import Plan, serve
    from paceline.process.log import set_up_log

    set_up_log(config.server.log_level)
    display = StartupDisplay()

    def on_ready(plan: Plan) -> None:
        display.close()
        _say_ready(config, plan.port)

    try:
        with display:
            status = serve(config, display, on_ready)
    except PacelineError as error:
        _fail(error, 1)
    sys.exit(status)


def _say_ready(config: DeploymentConfig, port: int) -> None:
    parallel = config.parallel
    ranks = ", ".join(map(str, parallel.local_ranks))
    if parallel.headless:
        print(f"ranks {ranks} of {parallel.data_parallel_size} are ready", file=sys.stderr, flush=True)
        return
    host = f"[{config.server.host}]" if ":" in config.server.host else config.server.host
    print(
        f"paceline {__version__} serves on http://{host}:{port}/v1 with rank {ranks} of {parallel.data_parallel_size}"
        f" and {parallel.api_server_count} front-end{'s' if parallel.api_server_count > 1 else ''}",
        file=sys.stderr,
        flush=True,
    )


def _fail(error: PacelineError, status: int) -> Any:
    print(f"paceline: error: {error}", file=sys.stderr)
    sys.exit(status)


def run() -> None:
    """Run the command line."""
    app()
