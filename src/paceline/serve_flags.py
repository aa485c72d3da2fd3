"""The flags of `paceline serve`, as the command line shows them."""

from __future__ import annotations

from typing import Annotated, Any

import typer

_PARALLEL = "Data parallel"
_ENGINE = "Engine"
_SERVER = "Server"


def _option(group: str, text: str, *names: str) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=group, show_default=True)


ModelTagFlag = Annotated[str | None, typer.Argument(metavar="[MODEL]", help="A GGUF file; Gemma 3 270M if left out.")]
ModelFlag = Annotated[str | None, _option(_ENGINE, "The same as MODEL.", "--model")]
EngineFlag = Annotated[str, _option(_ENGINE, "llama, timed, moe, timed-lockstep, or module:Class.", "--engine")]
EngineOptionFlag = Annotated[
    list[str] | None, _option(_ENGINE, "KEY=VALUE for the engine; may be repeated.", "--engine-option")
]
ServedModelNameFlag = Annotated[str | None, _option(_ENGINE, "The model's name in the API.", "--served-model-name")]
MaxModelLenFlag = Annotated[int | None, _option(_ENGINE, "Tokens of prompt and answer together.", "--max-model-len")]
MaxNumSeqsFlag = Annotated[int, _option(_ENGINE, "Requests that run at once on a rank.", "--max-num-seqs")]
MaxNumBatchedTokensFlag = Annotated[int, _option(_ENGINE, "Tokens computed in one step.", "--max-num-batched-tokens")]
KvCacheTokensFlag = Annotated[int | None, _option(_ENGINE, "Tokens of KV memory of a rank.", "--kv-cache-tokens")]
ThreadsFlag = Annotated[int | None, _option(_ENGINE, "Compute threads of a rank.", "--threads")]
SeedFlag = Annotated[int, _option(_ENGINE, "Seed of the engine.", "--seed")]
DataParallelSizeFlag = Annotated[int, _option(_PARALLEL, "Ranks in the deployment.", "--data-parallel-size", "-dp")]
DataParallelSizeLocalFlag = Annotated[
    int | None, _option(_PARALLEL, "Ranks on this node.", "--data-parallel-size-local", "-dpl")
]
DataParallelStartRankFlag = Annotated[
    int | None, _option(_PARALLEL, "This node's first rank.", "--data-parallel-start-rank", "-dpr")
]
DataParallelRankFlag = Annotated[
    int | None, _option(_PARALLEL, "This node's one rank; external mode.", "--data-parallel-rank", "-dpn")
]
DataParallelAddressFlag = Annotated[
    str, _option(_PARALLEL, "Address of the node with rank 0.", "--data-parallel-address", "-dpa")
]
DataParallelRpcPortFlag = Annotated[
    int, _option(_PARALLEL, "Port there that joining nodes ask.", "--data-parallel-rpc-port", "-dpp")
]
DataParallelExternalLbFlag = Annotated[
    bool, _option(_PARALLEL, "Something outside balances.", "--data-parallel-external-lb", "-dpe")
]
DataParallelHybridLbFlag = Annotated[
    bool, _option(_PARALLEL, "Each node balances over its own ranks.", "--data-parallel-hybrid-lb", "-dph")
]
DpSyncIntervalFlag = Annotated[
    int, _option(_PARALLEL, "Steps between the agreements of lockstep ranks.", "--dp-sync-interval")
]
PrefillQuotaFlag = Annotated[
    str, _option(_PARALLEL, "Prompt tokens that a lockstep rank computes in a step: auto, off or N.", "--prefill-quota")
]
MinStatsUpdateIntervalMsFlag = Annotated[
    int, _option(_PARALLEL, "Least milliseconds between two load views.", "--min-stats-update-interval-ms")
]
MaxDataParallelSizeFlag = Annotated[
    int | None,
    _option(
        _PARALLEL, "Ranks that it may be scaled to; if left out 4 times as many, at least 16.",
        "--max-data-parallel-size",
    ),
]  # fmt: skip
HeadlessFlag = Annotated[bool, _option(_PARALLEL, "Ranks only, no front-end.", "--headless")]
ApiServerCountFlag = Annotated[int, _option(_SERVER, "Front-end processes on one port.", "--api-server-count", "-asc")]
HostFlag = Annotated[str, _option(_SERVER, "Address to listen on.", "--host")]
PortFlag = Annotated[int, _option(_SERVER, "Port to listen on; 0 finds one.", "--port")]
RoutingFlag = Annotated[
    str,
    _option(
        _SERVER,
        "least-load, least-requests, power-of-two, round-robin, prefix, session, lockstep, or module:Class.",
        "--routing",
    ),
]
BindFlag = Annotated[
    str,
    _option(
        _SERVER,
        "broker: requests wait once, before all ranks, until one can start them. arrival: each gets its rank when it "
        "arrives; so it is in any case in external mode, with any --routing but least-load, where a request names its "
        "rank, and while there is no coordinator.",
        "--bind",
    ),
]
MaxWaitingFlag = Annotated[
    int,
    _option(
        _SERVER,
        "Requests that may wait, in the whole deployment, before 429; 0 for no limit.",
        "--max-waiting",
    ),
]
MaxBodyBytesFlag = Annotated[int, _option(_SERVER, "Largest request body.", "--max-body-bytes")]
StartupTimeoutFlag = Annotated[float, _option(_SERVER, "Seconds until all must be ready.", "--startup-timeout")]
DrainTimeoutFlag = Annotated[
    float, _option(_SERVER, "Seconds that requests get to finish on SIGTERM.", "--drain-timeout")
]
StallTimeoutFlag = Annotated[
    float, _option(_SERVER, "Seconds after which a rank that holds lockstep ranks up is named.", "--stall-timeout")
]
MaxRankLossesFlag = Annotated[
    int,
    _option(
        _SERVER,
        "Ranks that may end one after the other while they serve a request, with no token in between, before it fails.",
        "--max-rank-losses",
    ),
]
MaxRankRestartsFlag = Annotated[
    int,
    _option(_SERVER, "Restarts in a row before a rank that dies is given up.", "--max-rank-restarts"),
]
RankTimeoutFlag = Annotated[
    float,
    _option(_SERVER, "Seconds without a sign of life from a rank's process; 0 for ever.", "--rank-timeout"),
]
LogLevelFlag = Annotated[str, _option(_SERVER, "debug, info, warning or error.", "--log-level")]
