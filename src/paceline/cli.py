"""`paceline`: the command line. Flags that vLLM has are named, and mean, what they do there.

The flags of `serve` are the fields of `settings.py`. What the other commands need is imported only when they run.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
import os
import re
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer
from msgspec import Struct
from typer.core import TyperCommand, TyperOption

from paceline import __version__
from paceline.errors import ConfigError, PacelineError
from paceline.log import FORMAT_VARIABLE, fail, set_up_log, tell
from paceline.settings import (
    ENGINE,
    PARALLEL,
    DeploymentConfig,
    EngineConfig,
    ParallelConfig,
    ServerConfig,
    settings_of,
    variable_of,
)

app = typer.Typer(
    name="paceline", help="The control plane of data-parallel LLM serving.", no_args_is_help=True,
    add_completion=False, pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip


THEIRS = "paceline.theirs"
"""Where a context has the flags that are not ours."""
NUMBER = re.compile(r"-\d+(\.\d+)?(e-?\d+)?")


@app.callback(invoke_without_command=True)
def main(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    """The control plane of data-parallel LLM serving."""
    if version:
        print(f"paceline {__version__}")
        raise typer.Exit


# serve --------------------------------------------------------------------------------------------


def _option(field: str, kind: Any, default: Any, text: str, panel: str, *names: str) -> inspect.Parameter:
    """One flag as typer reads it, with its environment variable."""
    option = typer.Option(*names, help=text, rich_help_panel=panel, envvar=variable_of(names[0]), show_envvar=False)
    return inspect.Parameter(field, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option])


def _flags(kind: type[Struct]) -> list[inspect.Parameter]:
    return [_option(one.field, one.kind, one.default, one.text, one.panel, *one.names) for one in settings_of(kind)]


class ServeCommand(TyperCommand):
    """`paceline serve`, where flags that are not ours go to an engine that takes such.

    Which of them have a value only the engine knows. So it gets, in their order, all that is behind such a flag and
    before the next of ours; the model, too, where it stands there.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        takes_value = {
            name: not one.is_flag
            for one in self.params if isinstance(one, TyperOption) for name in (*one.opts, *one.secondary_opts)
        } | {"--help": False, "-h": False}  # fmt: skip
        ours: list[str] = []
        theirs: list[str] = ctx.meta.setdefault(THEIRS, [])
        rest, into = iter(args), ours
        for token in rest:
            name, equals, _ = token.partition("=")
            known = name if name in takes_value else name.replace("_", "-")
            if known in takes_value:
                ours.append(known + token[len(name) :])
                if takes_value[known] and not equals:
                    ours += itertools.islice(rest, 1)
                into = ours
            elif token.startswith("-") and not NUMBER.fullmatch(token):
                into = theirs
                theirs.append(token)
            else:
                into.append(token)
        return super().parse_args(ctx, ours)


def serve(context: typer.Context, engine_help: bool, **given: Any) -> None:
    """Serve a model over N ranks with an OpenAI-compatible API."""
    try:
        if engine_help or context.meta[THEIRS]:
            _ask_engine(context, given["engine"], engine_help)
        config = _config(given, tuple(context.meta[THEIRS]))
    except ConfigError as error:
        _fail(error, 2)
    _serve(config)


def _ask_engine(context: typer.Context, name: str, engine_help: bool) -> None:
    """Print the engine's help; refuse flags of nobody."""
    from paceline.engines.base import EngineError
    from paceline.engines.registry import find_engine

    try:
        engine = find_engine(name)
        if engine_help:
            print(engine.arguments_help())
            raise typer.Exit
    except EngineError as error:
        raise ConfigError(str(error)) from None
    if not engine.takes_arguments:
        context.fail(f"No such option: {context.meta[THEIRS][0].partition('=')[0]}")


def _signature() -> inspect.Signature:
    """What typer takes for the parameters of `serve`: the fields of the settings, and the flags that make several."""
    engine, parallel = _flags(EngineConfig), _flags(ParallelConfig)
    engine.insert(0, _option("model", str | None, None, "The same as MODEL.", ENGINE, "--model"))
    options = "KEY=VALUE for the engine; may be repeated."
    engine.insert(2, _option("engine_option", list[str] | None, None, options, ENGINE, "--engine-option"))
    text = "Print the flags of the engine's own (vLLM's), and exit."
    engine.insert(3, _option("engine_help", bool, False, text, ENGINE, "--engine-help"))
    first, only = "This node's first rank.", "This node's one rank; external mode."
    start = _option("start_rank", int | None, None, first, PARALLEL, "--data-parallel-start-rank", "-dpr")
    parallel[2:2] = [start, _option("own_rank", int | None, None, only, PARALLEL, "--data-parallel-rank", "-dpn")]
    tag = typer.Argument(
        metavar="[MODEL]",
        help="A GGUF file, gemma-3-270m, or a model for vLLM; if left out SmolLM2 135M Instruct, fetched once.",
    )
    model = inspect.Parameter(
        "model_tag", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[str | None, tag]
    )
    context = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
    return inspect.Signature([context, model, *engine, *parallel, *_flags(ServerConfig)])


serve.__signature__ = _signature()  # type: ignore[attr-defined]
serve.__annotations__ = {name: one.annotation for name, one in _signature().parameters.items()}
app.command(cls=ServeCommand)(serve)


def _config(given: dict[str, Any], arguments: tuple[str, ...] = ()) -> DeploymentConfig:
    """The settings from the flags. Raises ConfigError naming the flag."""
    if "" in (given["model"], given["model_tag"]):
        raise ConfigError("--model: names no model")
    if given["model"] and given["model_tag"] and given["model"] != given["model_tag"]:
        raise ConfigError("--model: two models were named")

    def of(kind: type[Struct]) -> dict[str, Any]:
        return {one.field: given[one.field] for one in settings_of(kind)}

    own_rank, start_rank = given["own_rank"], given["start_rank"]
    if own_rank is not None and start_rank is not None:
        raise ConfigError("--data-parallel-rank: cannot be combined with --data-parallel-start-rank")
    parallel = of(ParallelConfig) | {"data_parallel_rank": own_rank if own_rank is not None else (start_rank or 0)}
    # As in vLLM, naming one rank means that something outside balances over the ranks.
    parallel["data_parallel_external_lb"] |= own_rank is not None and not given["data_parallel_hybrid_lb"]
    if parallel["data_parallel_external_lb"] and own_rank is None and start_rank is None:
        raise ConfigError("--data-parallel-external-lb: needs --data-parallel-rank")
    engine = of(EngineConfig) | {"model": given["model"] or given["model_tag"]}
    engine |= {"options": _engine_options(given["engine_option"] or []), "arguments": arguments}
    return DeploymentConfig(ParallelConfig(**parallel), EngineConfig(**engine), ServerConfig(**of(ServerConfig)))


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
    from paceline.node import Plan, serve
    from paceline.server.guard import check_doors
    from paceline.server.tenants import weights_of

    try:
        check_doors(config.server)
        weights_of(config.server.tenant_weight)
    except ConfigError as error:
        _fail(error, 2)
    os.environ[FORMAT_VARIABLE] = config.server.log_format
    set_up_log(config.server.log_level)
    display = StartupDisplay()

    def on_ready(plan: Plan) -> None:
        display.close()
        _say_ready(config, plan.port)

    try:
        with display:
            status = serve(config, display, on_ready)
    except PacelineError as error:
        _fail(error, 2 if isinstance(error, ConfigError) else 1)
    sys.exit(status)


def _say_ready(config: DeploymentConfig, port: int) -> None:
    parallel = config.parallel
    ranks = ", ".join(map(str, parallel.local_ranks))
    if parallel.headless:
        tell(f"ranks {ranks} of {parallel.data_parallel_size} are ready")
        return
    scheme = "https" if config.server.ssl_certfile else "http"
    bare = config.server.host.removeprefix("[").removesuffix("]")
    host = f"[{bare}]" if ":" in bare else bare
    tell(
        f"paceline {__version__} serves on {scheme}://{host}:{port}/v1"
        f" with rank {ranks} of {parallel.data_parallel_size}"
        f" and {parallel.api_server_count} front-end{'s' if parallel.api_server_count > 1 else ''}"
    )


# The others ---------------------------------------------------------------------------------------

ELSEWHERE = {
    "simulate": ("simulate_cli", "Run the machines in virtual time, from a seed, with delays, losses and crashes."),
    "check": ("check.cli", "Walk every interleaving of the machines in a small deployment."),
    "top": ("top.cli", "Show in the terminal what a running deployment does, as its page does."),
    "loads": ("operate", "Show what every rank of a running deployment has to do."),
    "explain": ("explain", "Say where the time of a request went, by its id."),
    "scale": ("operate", "Let a running deployment have more ranks, or fewer."),
    "revive": ("operate", "Start ranks of a running deployment again that ended too often."),
    "secret": ("operate", "Make the secret that the nodes of a deployment share: `paceline secret new`."),
    "coordinator": ("coordinator_cli", "Run a coordinator alone, for ranks and front-ends of your own."),
    "vllm": (
        "vllm.plugin",
        "Run the vllm command with Paceline's coordinator: `paceline vllm serve MODEL --data-parallel-size 2`.",
    ),
    "model": ("operate", "Fetch a model that Paceline knows by name: `paceline model get`."),
    "pause": ("operate", "Suspend a running deployment; returns once no rank computes."),
    "resume": ("operate", "Let a suspended deployment go on."),
}
"""Command to the module that has it, as `run_command(arguments)` or as the typer command `NAME_app`, and its help."""


def _passed_on(name: str, module: str) -> Callable[[typer.Context], None]:
    def command(context: typer.Context) -> None:
        found = importlib.import_module(f"paceline.{module}")
        if (run_command := getattr(found, "run_command", None)) is not None:
            run_command(context.args)
        else:
            getattr(found, f"{name}_app")(context.args, prog_name=f"paceline {name}")

    return command


for _name, (_module, _help) in ELSEWHERE.items():
    app.command(
        _name, help=_help,
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    )(_passed_on(_name, _module))  # fmt: skip


def _fail(error: PacelineError, status: int) -> Any:
    fail(error)
    sys.exit(status)


def run() -> None:
    """Run the command line."""
    app()
