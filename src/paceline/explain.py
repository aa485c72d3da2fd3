"""`paceline explain REQUEST_ID`: where the time of a request went, as bars in a terminal."""

from __future__ import annotations

import json
import shutil
import statistics
import sys
from datetime import datetime
from typing import Annotated, Any

import typer

from paceline.control import Control
from paceline.errors import PacelineError
from paceline.operate import HERE, UrlFlag

Part = tuple[str, float, float]
"""What, from when to when, in seconds since the request was received."""

LEAST_BAR = 10
SPARKS = "▁▂▃▄▅▆▇█"

explain_app = typer.Typer(
    add_completion=False, pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]}
)


@explain_app.command()
def explain(
    request_id: Annotated[
        str, typer.Argument(metavar="REQUEST_ID", help="Its X-Request-Id, or the id that its answer has.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="What the server says.")] = False,
    url: UrlFlag = HERE,
) -> None:
    """Say where the time of a request went: of one that is under way, or is kept still."""
    try:
        found: Any = Control(url).requests(request_id)
    except PacelineError as error:
        print(f"paceline: error: {error}", file=sys.stderr)
        sys.exit(1)
    if as_json:
        print(json.dumps(found))
        return
    width = shutil.get_terminal_size((100, 24)).columns
    print("\n\n".join(text(one, width) for one in found))


def text(said: dict[str, Any], width: int) -> str:
    """One request's timeline in lines of at most `width`, where that has room for a bar."""
    when = datetime.fromtimestamp(said["received_at"]).astimezone().isoformat(" ", "milliseconds")
    ended = f"status {said['status']}" if said["status"] else "its client has gone"
    state = "under way" if said["under_way"] else ended
    where = f"{when}  front-end {said['front_end']}"
    lines = [f"{said['id']}  {said['path']}  {state}  {said['seconds']:.3f} s  {where}"]
    for number, choice in enumerate(said["choices"]):
        if len(said["choices"]) > 1:
            lines.append(f"choice {number}")
        lines += _rows(parts(said, choice), said["seconds"], width)
        lines += remarks(choice)
    return "\n".join(lines)


def parts(said: dict[str, Any], choice: dict[str, Any]) -> list[Part]:
    """The parts of a choice, one behind the other."""
    end = said["seconds"] if choice["ended_s"] is None else choice["ended_s"]
    found: list[Part] = [("read", 0.0, said["read_s"]), ("tokenized", said["read_s"], said["tokenized_s"])]
    placed, first = choice["placed_s"], choice["first_token_s"]
    if placed is None:
        return [*found, ("waits for a rank", choice["submitted_s"], end)]
    found.append(("queued" if choice["queued"] else "placed", choice["submitted_s"], placed))
    for stay, until in zip(choice["ranks"], [*(stay["since_s"] for stay in choice["ranks"][1:]), end], strict=True):
        since, rank = stay["since_s"], stay["rank"]
        if stay["until_engine_s"] is None:
            found.append((f"rank {rank}: no token", since, until))
            continue
        engine = min(until, since + stay["until_engine_s"])
        token = min(until, engine + stay["until_token_s"])
        if since <= (first or 0.0) <= until:
            token = first
        found.append((f"rank {rank}: before the engine", since, engine))
        found.append((f"rank {rank}: prefill", engine, token))
        found.append((f"rank {rank}: tokens", token, until))
    return found


def remarks(choice: dict[str, Any]) -> list[str]:
    """What is no part: tokens and their gaps, moves, why this rank."""
    made = f"  {choice['tokens']} tokens, {choice['finish_reason'] or 'under way'}"
    lines = [f"{made}; prompt {choice['prompt_tokens']} tokens, {choice['cached_tokens']} of them cached"]
    if choice["queued_at_coordinator_s"] is None:
        lines.append("  waits for a rank" if choice["ended_s"] is None else "  was given no rank")
    elif choice["queued"]:
        lines.append(f"  waited in the queue, by the coordinator's clock {choice['queued_at_coordinator_s']:.3f} s")
    gaps = choice["gaps"]
    if gaps["seconds"]:
        each = [gap / gaps["tokens_each"] for gap in gaps["seconds"]]
        lines.append(
            f"  gaps between tokens: half under {statistics.median(each) * 1000:.1f} ms, the longest "
            f"{gaps['longest_s'] * 1000:.1f} ms, after token {gaps['longest_after_token']}"
        )
        lines.append(f"  {sparks(each)}")
    for stay in choice["ranks"][1:]:
        lines.append(f"  moved to rank {stay['rank']} behind {stay['behind_tokens']} tokens: {stay['why']}")
    routing = choice["routing"]
    if routing is not None:
        believed, reason = routing["believed"], routing.get("reason")
        lines.append(
            f"  rank {routing['rank']} of {routing['ranks']} by {routing['policy']}{f' ({reason})' if reason else ''}: "
            f"it had {believed['requests']} requests, {believed['prefill_tokens']} prompt tokens to compute"
        )
    return lines


def sparks(values: list[float], most: int = 40) -> str:
    """Values as a line of blocks; of several that share one the largest."""
    each = -(-len(values) // most)
    shown = [max(values[at : at + each]) for at in range(0, len(values), each)]
    top = max(shown) or 1.0
    return "".join(SPARKS[min(len(SPARKS) - 1, int(value / top * len(SPARKS)))] for value in shown)


def _rows(found: list[Part], whole: float, width: int) -> list[str]:
    names = max(len(name) for name, _, _ in found)
    room = max(LEAST_BAR, width - names - 16)
    lines = []
    for name, begin, end in found:
        left = min(room - 1, int(begin / whole * room)) if whole else 0
        bar = max(1, min(room - left, round((end - begin) / whole * room))) if whole else 1
        lines.append(f"  {name:<{names}} {end - begin:9.3f} s  {' ' * left}{'█' * bar}")
    return lines
