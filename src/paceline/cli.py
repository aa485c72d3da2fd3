"""`paceline`: the command line. Flags that vLLM has are named, and mean, what they do there."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from paceline import __version__
from paceline.config import DeploymentConfig, EngineConfig, ParallelConfig, ServerConfig
from paceline.errors import ConfigError, PacelineError

app = typer.Typer(
    name="paceline",
    help="The control plane of data-parallel LLM serving.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_PARALLEL = "Data parallel"
_ENGINE = "Engine"
_SERVER = "Server"


def _option(group: str, text: str, *names: str) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=group, show_default=True)


@app.callback(invoke_without_command=True)
def main(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    """The control plane of data-parallel LLM serving."""
    if version:
        print(f"paceline {__version__}")
        raise typer.Exit


@app.command()
def serve(
    model_tag: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="A GGUF file; Gemma 3 270M if left out.")
    ] = None,
    model: Annotated[str | None, _option(_ENGINE, "The same as MODEL.", "--model")] = None,
    engine: Annotated[str, _option(_ENGINE, "llama, timed, or module:Class.", "--engine")] = "llama",
    engine_option: Annotated[
        list[str] | None, _option(_ENGINE, "KEY=VALUE for the engine; may be repeated.", "--engine-option")
    ] = None,
    served_model_name: Annotated[
        str | None, _option(_ENGINE, "The model's name in the API.", "--served-model-name")
    ] = None,
    max_model_len: Annotated[
        int | None, _option(_ENGINE, "Tokens of prompt and answer together.", "--max-model-len")
    ] = None,
    max_num_seqs: Annotated[int, _option(_ENGINE, "Requests that run at once on a rank.", "--max-num-seqs")] = 16,
    max_num_batched_tokens: Annotated[
        int, _option(_ENGINE, "Tokens computed in one step.", "--max-num-batched-tokens")
    ] = 512,
    kv_cache_tokens: Annotated[
        int | None, _option(_ENGINE, "Tokens of KV memory of a rank.", "--kv-cache-tokens")
    ] = None,
    threads: Annotated[int | None, _option(_ENGINE, "Compute threads of a rank.", "--threads")] = None,
    seed: Annotated[int, _option(_ENGINE, "Seed of the engine.", "--seed")] = 0,
    data_parallel_size: Annotated[
        int, _option(_PARALLEL, "Ranks in the deployment.", "--data-parallel-size", "-dp")
    ] = 2,
    data_parallel_size_local: Annotated[
        int | None, _option(_PARALLEL, "Ranks on this node.", "--data-parallel-size-local", "-dpl")
    ] = None,
    data_parallel_start_rank: Annotated[
        int | None, _option(_PARALLEL, "This node's first rank.", "--data-parallel-start-rank", "-dpr")
    ] = None,
    data_parallel_rank: Annotated[
        int | None, _option(_PARALLEL, "This node's one rank; external mode.", "--data-parallel-rank", "-dpn")
    ] = None,
    data_parallel_address: Annotated[
        str, _option(_PARALLEL, "Address of the node with rank 0.", "--data-parallel-address", "-dpa")
    ] = "127.0.0.1",
    data_parallel_rpc_port: Annotated[
        int, _option(_PARALLEL, "Port there that joining nodes ask.", "--data-parallel-rpc-port", "-dpp")
    ] = 29550,
    data_parallel_external_lb: Annotated[
        bool, _option(_PARALLEL, "Something outside balances.", "--data-parallel-external-lb", "-dpe")
    ] = False,
    data_parallel_hybrid_lb: Annotated[
        bool, _option(_PARALLEL, "Each node balances over its own ranks.", "--data-parallel-hybrid-lb", "-dph")
    ] = False,
    headless: Annotated[bool, _option(_PARALLEL, "Ranks only, no front-end.", "--headless")] = False,
    api_server_count: Annotated[
        int, _option(_SERVER, "Front-end processes on one port.", "--api-server-count", "-asc")
    ] = 1,
    host: Annotated[str, _option(_SERVER, "Address to listen on.", "--host")] = "127.0.0.1",
    port: Annotated[int, _option(_SERVER, "Port to listen on; 0 finds one.", "--port")] = 8000,
    routing: Annotated[str, _option(_SERVER, "least-load, least-requests or round-robin.", "--routing")] = "least-load",
    max_waiting: Annotated[
        int, _option(_SERVER, "Requests that may wait before 429; 0 for no limit.", "--max-waiting")
    ] = 1024,
    max_body_bytes: Annotated[int, _option(_SERVER, "Largest request body.", "--max-body-bytes")] = 16 * 1024 * 1024,
    startup_timeout: Annotated[
        float, _option(_SERVER, "Seconds until all must be ready.", "--startup-timeout")
    ] = 300.0,
    drain_timeout: Annotated[
        float, _option(_SERVER, "Seconds that requests get to finish on SIGTERM.", "--drain-timeout")
    ] = 30.0,
    log_level: Annotated[str, _option(_SERVER, "debug, info, warning or error.", "--log-level")] = "info",
) -> None:
    """Serve a model over N ranks with an OpenAI-compatible API."""
    given = locals()
    try:
        config = _config(given)
    except ConfigError as error:
        _fail(error, 2)
    _serve(config)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def coordinator(context: typer.Context) -> None:
    """Run a coordinator alone, for ranks and front-ends of your own."""
    from paceline.coordinator_cli import run_command

    run_command(context.args)


def _config(given: dict[str, Any]) -> DeploymentConfig:
    """The settings from the flags. Raises ConfigError naming the flag."""
    if given["model"] and given["model_tag"] and given["model"] != given["model_tag"]:
        raise ConfigError("--model: two models were named")
    server = {name: given[name] for name in ("host", "port", "routing", "max_body_bytes", "log_level")}
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
    from paceline.runtime.processes import set_up_log

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
